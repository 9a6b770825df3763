"""Benchmarks: the arithmetic of spreads, the counters of a workload, records, the plot. Never a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dfastllm.bench.decoders import Point, decoder_grid, parallelism_sweep, plot_points
from dfastllm.bench.overhead import _Operations, step_overhead
from dfastllm.bench.workload import Outcome
from dfastllm.decode.registry import CACHES, RULES
from dfastllm.metrics.records import machine, spread, write_record
from dfastllm.metrics.workload import gradable


@given(st.lists(st.floats(-1e6, 1e6), min_size=1))
def test_spread_is_median_and_extremes(values: list[float]) -> None:
    import statistics

    got = spread(values)
    assert got.median == pytest.approx(statistics.median(values))
    assert (got.low, got.high, got.n) == (min(values), max(values), len(values))


def test_outcome_ratios() -> None:
    outcome = Outcome(samples=4, correct=3, tokens=60, forwards=20, seconds=2.0)
    assert (outcome.accuracy, outcome.tokens_per_forward, outcome.tokens_per_second) == (0.75, 3.0, 30.0)


def test_gradable_samples_come_from_the_test_split_evenly() -> None:
    samples = gradable(18)
    counts = [sum(s.task == task for s in samples) for task in {s.task for s in samples}]
    assert set(counts) == {18 // len(counts)}
    assert all(s.grader for s in samples)


@pytest.mark.parametrize(("kind", "rows"), [("ar", 1), ("diffusion", 32), ("block", 4)])
def test_overhead_counts_steady_steps(kind: str, rows: int) -> None:
    record = step_overhead(kind, 3, steps=4)
    assert record["sequences"] == 3
    assert record["rows_per_step"] >= 3 * rows
    assert record["step_us"].low >= record["outside_forward_us"].low > 0
    assert record["torch_step_us"].low > 0
    assert record["torch_copies"] < record["torch_operations"]
    assert record["peak_kib"] > 0


@pytest.mark.parametrize(("kind", "base", "each"), [("ar", 200, 75), ("diffusion", 314, 69), ("block", 312, 75)])
def test_a_step_calls_few_functions(kind: str, base: int, each: int) -> None:
    """Counted, not timed, so that a busy machine changes nothing: functions called by a step of 1 and of 9."""
    one, nine = (step_overhead(kind, n, steps=1)["calls"] for n in (1, 9))
    assert one <= base + each
    assert (nine - one) / 8 <= each


def test_grid_covers_every_rule_and_cache() -> None:
    grid = [(rule, params.cache) for rule, _, params in decoder_grid(list(RULES), list(CACHES), 32, 64)]
    assert grid == [(rule, cache) for rule in RULES for cache in CACHES]
    assert len({(rule, setting) for rule, setting, _ in parallelism_sweep("none", 32, 64)}) > 10


def test_a_record_says_where_it_was_made(tmp_path: Path) -> None:
    write_record(tmp_path / "a" / "x.json", "x", [{"speed": spread([1.0, 3.0])}], note="n")
    record = json.loads((tmp_path / "a" / "x.json").read_text())
    assert record["results"] == [{"speed": {"median": 2.0, "low": 1.0, "high": 3.0, "n": 2}}]
    assert record["machine"]["torch"] == machine()["torch"]
    assert {"schema", "name", "utc", "note"} <= record.keys()


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    points = [
        Point("schedule", "none", "s", 9, 0.9, 32, 20, 0.6, 100),
        Point("factor", "dual", "f", 9, 0.8, 9, 20, 2, 300),
    ]
    plot_points(points, tmp_path / "p.png", "title")
    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_counting_operations_changes_none() -> None:
    """What is counted runs as it was called, its keywords too."""
    with _Operations() as counted:
        zeros = torch.zeros(3, dtype=torch.int64)
        total = zeros.sum(dtype=torch.float64)
    assert (zeros.dtype, total.dtype) == (torch.int64, torch.float64)
    assert counted.seen["sum"] == 1
