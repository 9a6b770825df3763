"""Prefix sharing on and off: time to first token and rows computed where requests begin alike, and where none do.

Both engines run the same requests on the same model in one process, in turns, and the first to run changes with each
repeat. Prompts are random ids: what is measured is work, not text. Every answer is compared between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dfastllm.core import Request, SamplingParams, StepStats
from dfastllm.engine import Engine, EngineConfig
from dfastllm.engine.runners.torch import Runnable
from dfastllm.metrics.records import Spread, spread
from dfastllm.models import DeviceDecoder, PackedDecoder

__all__ = ["Chat", "Crowd", "Served", "measure_prefix", "play", "workloads"]


@dataclass
class Served:
    """What one engine did. first_token: seconds per request, in order of the requests; rows: of all forwards."""

    first_token: list[float] = field(default_factory=list)
    seconds: float = 0.0
    rows: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answers: list[tuple[int, ...]] = field(default_factory=list)
    one_run: list[bool] = field(default_factory=list)  # whether the pages of a sequence lay side by side when it ended


@dataclass(frozen=True)
class Crowd:
    """Requests with `common` tokens at their beginning, which an earlier request has left, and `own` of their own; one
    after the other, or all at once."""

    name: str
    requests: int
    common: int
    own: int
    answer: int
    together: bool = False

    def play(self, engine: Engine, stats: list[StepStats], seed: int) -> Served:
        rng = np.random.default_rng(seed)
        stem = _ids(rng, engine, self.common)
        prompts = [stem + _ids(rng, engine, self.own) for _ in range(self.requests)]
        if self.common:
            play(engine, stats, [prompts[0][: self.common + 1]], 1)
        if self.together:
            return play(engine, stats, prompts, self.answer)
        return _joined(play(engine, stats, [prompt], self.answer) for prompt in prompts)


@dataclass(frozen=True)
class Chat:
    """One conversation: a system prompt, then turns of `own` new tokens and an answer; each prompt holds all before."""

    name: str
    turns: int
    system: int
    own: int
    answer: int

    def play(self, engine: Engine, stats: list[StepStats], seed: int) -> Served:
        rng = np.random.default_rng(seed)
        known = _ids(rng, engine, self.system)

        def turns() -> Iterator[Served]:
            nonlocal known
            for _ in range(self.turns):
                known += _ids(rng, engine, self.own)
                served = play(engine, stats, [known], self.answer)
                known += served.answers[0]
                yield served

        return _joined(turns())


def play(engine: Engine, stats: list[StepStats], prompts: Sequence[tuple[int, ...]], answer: int) -> Served:
    """Greedy answers of exactly `answer` tokens to prompts that arrive together. stats: filled by the engine."""
    served, before = Served(), len(stats)
    sampling = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
    tokens: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        engine.add(Request(f"{engine.steps}-{i}", prompt, sampling))
        tokens[f"{engine.steps}-{i}"] = []
    lives = list(engine.scheduler.waiting)
    runs: dict[str, int | None] = {}
    while engine.has_work:
        runs |= {live.request.request_id: live.table.run(live.table.capacity) for live in lives if live.held}
        for event in engine.step():
            tokens[event.request_id] += event.token_ids
            if event.finish is not None:
                usage = event.finish.usage
                served.first_token.append(usage.first_token_s or usage.total_s)
                served.prompt_tokens += usage.prompt_tokens
                served.cached_tokens += usage.cached_tokens
    served.answers = [tuple(ids) for ids in tokens.values()]
    served.rows = sum(step.rows for step in stats[before:])
    served.seconds = sum(step.seconds for step in stats[before:])
    served.one_run = [run is not None for run in runs.values()]
    return served


def _ids(rng: np.random.Generator, engine: Engine, count: int) -> tuple[int, ...]:
    reserved = {*engine.info.eos_ids, engine.info.mask_id, engine.info.bos_id, engine.info.pad_id}
    known = [i for i in range(min(engine.info.vocab_size, 4096)) if i not in reserved]
    return tuple(rng.choice(known, count).tolist())


def _joined(parts: Iterator[Served]) -> Served:
    total = Served()
    for part in parts:
        total.first_token += part.first_token
        total.answers += part.answers
        total.one_run += part.one_run
        total.seconds += part.seconds
        total.rows += part.rows
        total.prompt_tokens += part.prompt_tokens
        total.cached_tokens += part.cached_tokens
    return total


def measure_prefix(
    model: Runnable | PackedDecoder | DeviceDecoder,
    work: Crowd | Chat,
    repeats: int = 3,
    dtype: torch.dtype | None = None,
    **config: Any,
) -> dict[str, Any]:
    """One row of the record: `repeats` paired runs, each on two fresh engines. Ratios are off / on: above 1 sharing is
    faster. first_token_ms: mean over the requests of a run."""
    pairs: list[tuple[Served, Served]] = []
    for repeat in range(repeats):
        done: dict[bool, Served] = {}
        for on in (True, False) if repeat % 2 else (False, True):
            engine = Engine(model, config=EngineConfig(prefix_caching=on, **config), dtype=dtype)
            stats: list[StepStats] = []
            engine.subscribe(stats.append)
            done[on] = work.play(engine, stats, repeat)
        pairs.append((done[False], done[True]))

    def mean(served: Served) -> float:
        return sum(served.first_token) / len(served.first_token)

    def over(pick: Callable[[Served], float], arm: int) -> Spread:
        return spread([pick(pair[arm]) for pair in pairs])

    off, on_ = pairs[0]
    return {
        "model": model.info.name,
        "workload": work.name,
        "requests": len(on_.first_token),
        "prompt_tokens": on_.prompt_tokens,
        "cached_tokens": on_.cached_tokens,
        "rows_off": off.rows,
        "rows_on": on_.rows,
        "first_token_ms_off": over(lambda s: 1e3 * mean(s), 0),
        "first_token_ms_on": over(lambda s: 1e3 * mean(s), 1),
        "first_token_ratio": spread([mean(a) / mean(b) for a, b in pairs]),
        "seconds_ratio": spread([a.seconds / b.seconds for a, b in pairs]),
        "one_run_off": sum(off.one_run) / len(off.one_run),
        "one_run_on": sum(on_.one_run) / len(on_.one_run),
        "same_tokens": all(a.answers == b.answers for a, b in pairs),
    }


def workloads(context: int) -> list[tuple[Crowd | Chat, dict[str, Any]]]:
    """What the record measures on a model of that context, each with its engine's limits: two sizes, the larger from
    1024 positions on. The last finds nothing to share in K,V that are too small for it, so that pages are given up all
    the time: what looking and remembering cost."""
    common, own, answer = (512, 32, 16) if context >= 1024 else (320, 32, 16)
    return [
        (Crowd("system prompt, one by one", 6, common, own, answer), {}),
        (Crowd("system prompt, at once", 6, common, own, answer, together=True), {}),
        (Chat("chat", 4, common // 2, own, answer), {}),
        (Crowd("nothing in common", 8, 0, common, answer), {"kv_tokens": 4 * common}),
    ]
