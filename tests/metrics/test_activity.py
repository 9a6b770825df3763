"""Rates are those of the last seconds; what is older is forgotten."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dfastllm.core import StepStats
from dfastllm.metrics.activity import WINDOW, Activity

STEP = StepStats(
    model="m", sequences=4, rows=8, wanted=4, committed=6, waiting=2, running=4, pages_used=5, pages_total=20,
    preempted=0, seconds=0.1, run_seconds=0.1,
)  # fmt: skip


def test_rates() -> None:
    now = [100.0]
    activity = Activity(lambda: now[0])
    idle = activity.rates()
    assert (idle.running, idle.tokens_per_second, idle.tokens_per_forward, idle.prefix_hits) == (0, 0.0, None, None)
    for step in range(30):  # ten a second: only those of the last five seconds count
        activity.see(replace(STEP, committed=1000) if step < 5 else STEP)
        now[0] += 0.25
    found = activity.rates()
    kept = int(WINDOW / 0.25)
    assert found.steps_per_second == pytest.approx(kept / WINDOW)
    assert found.tokens_per_second == pytest.approx(6 * kept / WINDOW)
    assert found.tokens_per_forward == pytest.approx(1.5)
    assert (found.running, found.waiting, found.pages, found.pages_total) == (4, 2, 5, 20)
    activity.see(replace(STEP, drafts=((4, 3), (4, 1)), prefix_queries=32, prefix_hits=8, running=0, waiting=0))
    found = activity.rates()
    assert (found.accepted, found.prefix_hits, found.running) == (0.5, 0.25, 0)
    now[0] += 2 * WINDOW
    assert activity.rates().tokens_per_second == 0.0
