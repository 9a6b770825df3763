"""Random adapters of small models, as directories that PEFT would write, strong enough to change what is said; and what
the same requests give on a model with the adapter merged into its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from dfastllm.convert.merge import with_adapter
from dfastllm.core import Request
from dfastllm.engine import Engine, EngineConfig
from dfastllm.lora import read_adapter
from dfastllm.models import Decoder, adapter_base
from dfastllm.train.lora import LowRanks, Recipe, export

__all__ = ["Answers", "serve", "write_strong"]


def write_strong(
    path: Path, model: Decoder, seed: int, *, rank: int = 4, strength: float = 1.0, targets: Sequence[str] = ()
) -> Path:
    """A directory with a random adapter of the model. strength: of its changes, against the weights' own size."""
    recipe = Recipe(model.info.name, rank=rank, alpha=float(rank), targets=tuple(targets), seed=seed)
    changes = LowRanks(model, recipe)
    draw = torch.Generator().manual_seed(seed + 1)
    for _, change in changes.changes():
        size = strength * change._base[0].weight.std().item() * (change.a.shape[1] / rank) ** 0.5
        change.b.data = torch.randn(change.b.shape, generator=draw) * size
    export(changes, recipe, path, torch.float32)
    changes.remove()
    return path


def serve(engine: Engine, request: Request) -> tuple[int, ...]:
    """The tokens of one request, alone."""
    engine.add(request)
    tokens: tuple[int, ...] = ()
    while engine.has_work:
        for event in engine.step():
            tokens += event.token_ids
            assert event.finish is None or event.finish.error is None
    return tokens


class Answers:
    """What requests give alone on a model with an adapter merged into its weights, each found once.

    build  an engine of a float model.
    ties   requests to which the unmerged adapter, alone too, gives another answer. Merged and unmerged sums round apart
           in the last bits, so that can be where two choices are equally good but for those. What is expected is then
           the unmerged adapter's own answer; who counts says how many there were.
    """

    def __init__(
        self, model: Decoder, build: Callable[[Decoder, EngineConfig], Engine], contents: Mapping[str, Path]
    ) -> None:
        self.model, self.build, self.contents = model, build, contents
        self._engines: dict[str, Engine] = {}
        self._plain: Engine | None = None
        self._known: dict[str, tuple[int, ...]] = {}
        self.ties = 0

    def __call__(self, request: Request, content: str) -> tuple[int, ...]:
        key = repr((request, content))
        if key not in self._known:
            found = serve(self._merged(content), request)
            if content and (unmerged := self._unmerged(request, content)) != found:
                found, self.ties = unmerged, self.ties + 1
            self._known[key] = found
        return self._known[key]

    def __len__(self) -> int:
        return len(self._known)

    def _merged(self, content: str) -> Engine:
        if content not in self._engines:
            model = self.model
            if content:
                model = with_adapter(model, read_adapter(self.contents[content], adapter_base(model)))
            self._engines[content] = self._engine(model)
        return self._engines[content]

    def _unmerged(self, request: Request, content: str) -> tuple[int, ...]:
        if self._plain is None:
            self._plain = self._engine(self.model)
            for name, path in self.contents.items():
                self._plain.adapters.load(name, path)
        return serve(self._plain, dataclasses.replace(request, lora=content))

    def _engine(self, model: Decoder) -> Engine:
        return self.build(model, EngineConfig(kv_tokens=1024, prefix_caching=False))
