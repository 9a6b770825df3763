"""The record of lossless diffusion: equal answers, fewer forwards; what a branch costs and gains."""

from __future__ import annotations

import math

import pytest
import torch

from dfastllm import assemble
from dfastllm.bench import lossless
from dfastllm.llm import LLM
from dfastllm.metrics.records import spread
from dfastllm.models import tiny

torch.set_num_threads(1)


def test_drafts_save_forwards_of_equal_answers() -> None:
    with LLM("demo-block") as llm:
        rows = list(lossless.measure_drafts(llm, "demo-block", 3, 32, 1))
    assert [(r.temperature, r.draft_steps) for r in rows[:7]] == [(0.0, d) for d in (0, 1, 2, 4, 8, 4, 4)]
    assert {r.temperature for r in rows} == {0.0, 0.7}
    for part in (rows[:7], rows[7:]):
        plain, most = part[0], part[3]
        assert {r.tokens for r in part} == {plain.tokens}
        assert plain.held == 0.0
        assert most.forwards < 0.7 * plain.forwards
        assert 0.3 < most.held <= 1
        assert all(r.seconds.n == 1 and r.seconds.median > 0 for r in part)


def test_branches_are_timed() -> None:
    model = assemble.pack(tiny("qwen2", hidden_size=64, intermediate_size=96, heads=4, kv_heads=2), None)
    cost = lossless.measure_branches(model, "tiny", 4, 20, 3, 3)
    assert len(cost.seconds) == 4
    assert all(s.n == 3 for s in cost.seconds)
    assert cost.gain(0.0, 8.0) == 1.0


def test_the_fit_finds_what_the_times_were_made_of() -> None:
    def cost(block: int) -> lossless.StepCost:
        times = [0.002 * math.hypot(9.0, block * (k + 1)) for k in range(5)]
        return lossless.StepCost("made", block, 0, tuple(spread([t]) for t in times))

    costs = [cost(4), cost(32)]
    free, error = lossless.fit(costs)
    assert free == pytest.approx(9.0, rel=0.03)
    assert error < 0.01
    assert costs[0].gain(0.9, free) == pytest.approx(3.439 * math.hypot(9, 4) / math.hypot(9, 16))
    assert costs[1].gain(0.9, free) == 1.0
