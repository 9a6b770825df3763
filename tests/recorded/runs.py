"""The recorded runs that the suite keeps: short runs of random two-layer models, one a family, which together hold
every kind of span, cache, rule and drafter. `python -m tests.recorded.runs [FAMILY ...]` records them again, which is
right only for a new family, or when the numbers of a forward were meant to change.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dfastllm import assemble, models
from dfastllm.core import DecodeParams, ModelInfo, Request, SamplingParams, SpeculativeParams
from dfastllm.decode.registry import CACHES, RULES, policy_for
from dfastllm.engine import Engine, EngineConfig
from dfastllm.engine.runners.record import Recorder
from dfastllm.engine.speculate import DraftCanvas, DraftModel
from dfastllm.errors import UnsupportedError
from dfastllm.models import tiny

HERE = Path(__file__).parent
SHAPE = {"vocab_size": 36, "hidden_size": 32, "intermediate_size": 48, "max_len": 128}
# Two layers show both kinds of a pattern only where it is this short.
MORE: dict[str, dict[str, Any]] = {
    "exaone4": {"window": 8, "windowed": (True, False), "ropeless": (False, True)},
    "fast_dllm_v2": {"block": 8},
    "llada2_moe": {"block": 8, "edit": True},
    "sdar": {"block": 4},
    "sdar_moe": {"block": 4},
}
METHODS = ("none", "ngram", "suffix", "draft_model", "diffusion")
SEED = 11


@dataclass(frozen=True)
class Run:
    """One recorded run. native: by the packed runner, as all that the suite keeps; else by the torch one."""

    family: str
    native: bool = True

    @property
    def path(self) -> Path:
        return HERE / f"{self.family}.steps"

    def model(self) -> Any:
        """The random model it was recorded with."""
        model = tiny(self.family, seed=SEED, **{**SHAPE, **MORE.get(self.family, {})})
        return assemble.pack(model) if self.native else model


def runs() -> list[Run]:
    """One a family; a family that is registered gets a run."""
    return [Run(name) for name in sorted(models.FAMILIES)]


class Judge:
    """The small autoregressive opinion of rule apd: log-probabilities that depend on the token before."""

    vocab_size = SHAPE["vocab_size"]

    def score(self, tokens: Any, count: int) -> torch.Tensor:
        before = torch.tensor(tokens[len(tokens) - count - 1 : -1])
        table = torch.randn(self.vocab_size, self.vocab_size, generator=torch.Generator().manual_seed(3))
        return torch.log_softmax(table[before], dim=-1)


def takes(info: ModelInfo, cache: str) -> bool:
    """Whether the model may have this cache, other than none."""
    return cache != "none" and (cache == "sub_block") == (info.kind == "block")


def requests(info: ModelInfo) -> Iterator[Request]:
    """Every rule and cache that the model takes, or every drafter; some greedy, some drawn."""
    asked: list[tuple[DecodeParams | None, SpeculativeParams | None]] = []
    if info.kind == "ar":
        asked += [(None, SpeculativeParams(method, 3, adaptive=False)) for method in METHODS]  # type: ignore[arg-type]
    else:
        caches = ("none" if info.kind == "diffusion" else None, *[name for name in CACHES if takes(info, name)])
        for i, rule in enumerate(RULES):
            kept = caches[i % len(caches)]
            options = {"draft_steps": 2, "forward_rows": 1e6} if rule == "free_dave" else {}
            if options:
                kept = caches[0]
            asked.append((DecodeParams(rule=rule, cache=kept, block_length=4, options=options), None))  # type: ignore[arg-type]
    if info.causal:
        asked.append((DecodeParams(rule="ar"), SpeculativeParams("self", 3, adaptive=False)))
    for i, (decode, speculative) in enumerate(asked):
        prompt = tuple((5 * i + 3 * j) % 28 + 1 for j in range(4 + 5 * (i % 4)))
        sampling = SamplingParams(
            temperature=(0.0, 0.9)[i % 2], seed=i, max_tokens=6 + i % 3, ignore_eos=True, logprobs=(None, 1)[i % 2]
        )
        yield Request(f"r{i}", prompt, sampling, decode, speculative=speculative)


def engine_of(run: Run) -> Engine:
    """The engine of a run: small enough that prompts come in chunks and requests are preempted."""
    model = run.model()
    config = EngineConfig(max_batch_rows=48, prefill_chunk=8, kv_tokens=192, page_size=16)
    drafters: dict[str, Any] = {}
    if model.info.kind == "ar":
        drafter = tiny("llama", seed=4, **SHAPE)
        masked = tiny("llada", seed=5, **SHAPE)
        drafters = {"draft_model": DraftModel(drafter, config), "diffusion": DraftCanvas(masked, config)}
    judge = Judge()
    return Engine(
        model,
        config=config,
        dtype=torch.float32,
        drafters=drafters,
        choose=lambda request, info: policy_for(request, info, judge),
    )


def record(run: Run, path: Path) -> int:
    """Serve the run's requests, its steps recorded. Returns how many requests there were."""
    engine = engine_of(run)
    engine.runner = Recorder(engine.runner, path, seed=SEED, slots=192, kv="float32")
    served = 0
    for request in requests(engine.info):
        try:
            engine.add(request)
        except UnsupportedError:  # a rule or a cache that this model cannot have
            continue
        served += 1
    while engine.has_work:
        for event in engine.step():
            if event.finish is not None and event.finish.error is not None:
                raise event.finish.error
    return served


if __name__ == "__main__":
    for one in runs():
        if sys.argv[1:] and one.family not in sys.argv[1:]:
            continue
        print(one.path.name, record(one, one.path), "requests,", one.path.stat().st_size, "bytes")
