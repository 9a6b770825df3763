"""The fake model with adapters: what a row sees depends on the content of the adapter that its row carries too.

A directory holds one file, `weights`, whose bytes are all that an adapter of it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dfastllm.core import ModelInfo
from dfastllm.engine import Engine, EngineConfig
from dfastllm.engine.runners.torch import TorchRunner
from dfastllm.errors import AdapterError
from dfastllm.kernels.rows import Rows
from dfastllm.kernels.step import Step
from dfastllm.lora import Adapter
from tests.kit.fake import FakeModel

__all__ = ["AdaptedRunner", "adapted_engine", "read_fake", "write_fake"]


def write_fake(path: Path, content: bytes) -> Path:
    path.mkdir(exist_ok=True)
    (path / "weights").write_bytes(content)
    return path


def read_fake(path: Path) -> Adapter:
    try:
        content = (path / "weights").read_bytes()
    except FileNotFoundError:
        raise AdapterError(f"{path} holds no adapter.") from None
    return Adapter(hashlib.blake2b(content, digest_size=16).digest(), {}, 8, len(content))


class AdaptedRunner(TorchRunner):
    """Hands each row's adapter to a FakeModel. Refuses a row whose number the table does not have.

    mixed: the most different adapters, none counting as one, that a step had.
    """

    model: FakeModel  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.table: list[Adapter | None] = [None]
        self.mixed = 0

    def adapters(self, table: Sequence[Adapter | None]) -> None:
        self.table = list(table)

    def run(self, step: Step) -> Rows:
        found = [self.table[number] if number else None for number in step.adapter.tolist()]
        assert all((number == 0) == (one is None) for number, one in zip(step.adapter, found, strict=True))
        self.mixed = max(self.mixed, len({None if one is None else one.hash for one in found}))
        salts = [0 if one is None else int.from_bytes(one.hash[:5]) for one in found]
        self.model.salts = torch.tensor(salts)
        bare = Step(step.words.copy())
        bare.adapter[:] = 0
        return super().run(bare)


def adapted_engine(kind: str, *, choose: Any = None, cut_free: bool = False, **config: Any) -> Engine:
    """An engine over the fake model with adapters. cut_free: its rows do not depend on how spans are cut, which is true
    of the fake, so that every full page can be shared."""
    model = FakeModel(kind)
    settings = EngineConfig(**{"kv_tokens": 512, "page_size": 4, **config})
    engine = Engine(model, config=settings, **({} if choose is None else {"choose": choose}))
    slots = engine.pages.count * settings.page_size
    runner = AdaptedRunner(model, slots, model.dtype, "cpu", 16, settings.page_size)
    runner.cut_free = cut_free
    engine.runner = runner
    engine.prefix = engine.scheduler.prefix = engine._prefix_cache()
    engine.adapters.read = read_fake
    return engine


def info(kind: str) -> ModelInfo:
    return FakeModel(kind).info
