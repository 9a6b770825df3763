"""Free draft-and-verify against the plain schedule: forwards and time on the shipped models, and what a branch costs at
a real model's shape.

Every answer with guesses is compared with the plain one, token for token; a difference is an error, not a row. The
demo models are so small that a forward is mostly Python. So the second part measures one step of a block with 0, 1, 2,
... branches on random weights of a real shape: from those times follow the rows that are nearly free (the option
`forward_rows`) and, with the share of guesses that held on the demo models, what the decoder would gain there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dfastllm.bench.workload import run
from dfastllm.core import Branch, DecodeParams, SamplingParams, Span
from dfastllm.decode.canvas.lookahead import branches_worth
from dfastllm.decode.canvas.rules import RULES
from dfastllm.engine.batch import pack
from dfastllm.engine.pages import Pages, PageTable
from dfastllm.engine.runners.native import NativeRunner
from dfastllm.llm import LLM
from dfastllm.metrics.records import Spread, spread
from dfastllm.metrics.workload import gradable
from dfastllm.models import PackedDecoder

__all__ = ["Drafted", "StepCost", "fit", "measure_branches", "measure_drafts"]

FREE = 1e6  # forward_rows: every branch is worth running


@dataclass(frozen=True)
class Drafted:
    """The schedule of one token a step, with at most draft_steps branches. forwards, seconds: one sample after the
    other; crowd_*: all in flight at once, where fewer guesses run. held: share of the drafted tokens that stood."""

    model: str
    draft_steps: int
    forward_rows: float
    temperature: float
    forwards: int
    tokens: int
    held: float
    seconds: Spread
    crowd_forwards: int
    crowd_seconds: Spread


def measure_drafts(llm: LLM, name: str, samples: int, canvas: int, repeats: int) -> Iterator[Drafted]:
    """In turns, so that a change of the machine's mood meets all alike. Raises AssertionError when tokens differ."""
    work = gradable(samples)
    settings: list[dict[str, Any]] = [
        {"draft_steps": 0},
        *({"draft_steps": d, "forward_rows": FREE} for d in (1, 2, 4, 8)),
        {"draft_steps": 4, "forward_rows": 64.0},
        {"draft_steps": 4},
    ]
    for temperature in (0.0, 0.7):
        sampling = SamplingParams(temperature=temperature, seed=1, max_tokens=canvas)
        times: list[tuple[list[float], list[float]]] = [([], []) for _ in settings]
        told: dict[int, tuple[Any, Any, Any]] = {}
        for turn in range(repeats + 1):  # the first is not counted
            for i, options in enumerate(settings):
                decode = DecodeParams(rule="free_dave", steps=canvas, options=options)
                one, done = run(llm, work, sampling, decode, together=False)
                crowd, same = run(llm, work, sampling, decode)
                assert [c.text for c in done] == [c.text for c in same], f"{name}: answers change in company"
                told[i] = (one, crowd, done)
                if turn:
                    times[i][0].append(one.seconds)
                    times[i][1].append(crowd.seconds)
        plain = [c.text for c in told[0][2]]
        for i, options in enumerate(settings):
            one, crowd, done = told[i]
            assert [c.text for c in done] == plain, f"{name}: {options} changed the answers"
            drafted = sum(c.usage.draft_tokens for c in done)
            held = sum(c.usage.accepted_tokens for c in done) / drafted if drafted else 0.0
            rows = float(options.get("forward_rows", RULES["free_dave"].options["forward_rows"].default))
            yield Drafted(
                model=name,
                draft_steps=options["draft_steps"],
                forward_rows=rows,
                temperature=temperature,
                forwards=one.forwards,
                tokens=one.tokens,
                held=held,
                seconds=spread(times[i][0]),
                crowd_forwards=crowd.forwards,
                crowd_seconds=spread(times[i][1]),
            )


@dataclass(frozen=True)
class StepCost:
    """Seconds of one step of a block of `block` tokens behind `cached` ones, by the number of branches."""

    shape: str
    block: int
    cached: int
    seconds: tuple[Spread, ...]

    def gain(self, rate: float, forward_rows: float) -> float:
        """Steps per time with as many branches as the decoder would run, over those of the plain step, when this share
        of guesses holds."""
        k = branches_worth(rate, len(self.seconds) - 1, self.block, forward_rows)
        return float(sum(rate**j for j in range(k + 1)) * self.seconds[0].median / self.seconds[k].median)


def fit(costs: Sequence[StepCost]) -> tuple[float, float]:
    """(forward_rows for which the times go as hypot(forward_rows, rows), the largest relative error of that)."""
    points = [(c.block * (k + 1), t.median) for c in costs for k, t in enumerate(c.seconds)]
    rows, seconds = (np.array(x, dtype=np.float64) for x in zip(*points, strict=True))
    best = (0.0, np.inf, np.inf)
    for free in np.geomspace(0.5, 2000, 400):
        off = np.log(seconds / np.hypot(free, rows))
        off -= off.mean()
        if (off**2).sum() < best[1]:
            best = (float(free), float((off**2).sum()), float(np.expm1(np.abs(off).max())))
    return best[0], best[2]


def measure_branches(model: PackedDecoder, name: str, block: int, cached: int, most: int, repeats: int) -> StepCost:
    """Forward and head of every masked row of every branch, as the decoder asks for them."""
    pool = Pages(-(-(cached + block) // 16) + 1, 16)
    runner = NativeRunner(model, pool.count * 16, model.dtype, 16)
    table = PageTable(pool)
    table.grow(cached + block)
    rng = np.random.default_rng(0)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(int(i) for i in rng.integers(1, model.info.vocab_size, n))

    if cached:
        runner.run(pack([(Span(0, ids(cached), "block", "keep", block=block), table, 0)]))
    want = tuple(range(block))
    spans = [
        Span(
            cached, ids(block), "block", "scratch", want, block,
            branches=tuple(Branch(cached, ids(block), want[j + 1 :]) for j in range(k)),
        )
        for k in range(most + 1)
    ]  # fmt: skip
    times: list[list[float]] = [[] for _ in spans]
    for turn in range(repeats + 1):
        for k, span in enumerate(spans):
            began = time.perf_counter()
            runner.run(pack([(span, table, cached)])).stats(norm=True)
            if turn:
                times[k].append(time.perf_counter() - began)
    return StepCost(name, block, cached, tuple(spread(t) for t in times))
