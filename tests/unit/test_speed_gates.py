"""The speed gates on numbers of a report: the document's cases, by their names, through the names it imports."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dfastllm.distill import evaluate_speed_gates
from dfastllm.errors import ValidationError

BASE = {"ttft_ms": {"p50": 200.0, "p95": 400.0}, "tps": {"p50": 30.0, "p95": 25.0}}


def now(**changes: Any) -> dict[str, Any]:
    return {**BASE, "ttfa_tokens": {"p95": 20.0}, **changes}


def test_no_baseline_skips_gates() -> None:
    got = evaluate_speed_gates(now(ttfa_tokens={"p95": 30.0}))
    assert got["gates_passed"] is True
    assert got["skipped"] is True
    assert got["reason"] == "no_baseline"
    for gate in ("ttft_regression", "tps_regression", "ttfa_gate"):
        assert got[gate] == {"skipped": True, "reason": "no_baseline"}


def test_hardware_mismatch_skips_gates() -> None:
    got = evaluate_speed_gates(now(ttft_ms={"p50": 300.0, "p95": 500.0}), BASE, hardware_match=False)
    assert got["gates_passed"] is True
    assert (got["skipped"], got["reason"]) == (True, "hardware_mismatch")
    assert got["ttft_regression"]["skipped"] is True


def test_ttft_regression_pass() -> None:
    got = evaluate_speed_gates(now(ttft_ms={"p50": 210.0, "p95": 420.0}), BASE)
    assert got["gates_passed"] is True
    assert got["ttft_regression"]["p50"]["passed"] is True
    assert got["ttft_regression"]["p95"]["regression"] == pytest.approx(0.05)


def test_ttft_regression_fail() -> None:
    got = evaluate_speed_gates(now(ttft_ms={"p50": 220.0, "p95": 450.0}), BASE)
    assert got["gates_passed"] is False
    assert got["ttft_regression"]["p50"]["passed"] is False
    assert got["ttft_regression"]["p95"]["passed"] is False
    assert len(got["errors"]) == 2
    assert "TTFT p50 regression: 10.0%" in got["errors"][0]


def test_tps_regression_pass() -> None:
    got = evaluate_speed_gates(now(tps={"p50": 28.5, "p95": 23.75}), BASE)
    assert got["gates_passed"] is True
    assert got["tps_regression"]["p50"]["regression"] == pytest.approx(0.05)


def test_tps_regression_fail() -> None:
    got = evaluate_speed_gates(now(tps={"p50": 27.0, "p95": 22.0}), BASE)
    assert got["gates_passed"] is False
    assert got["tps_regression"]["p50"]["passed"] is False
    assert got["tps_regression"]["p95"]["passed"] is False


def test_ttfa_gate_pass() -> None:
    got = evaluate_speed_gates(now(), BASE)
    assert got["gates_passed"] is True
    assert got["ttfa_gate"]["passed"] is True
    assert evaluate_speed_gates(now(ttfa_tokens={"p95": 25.0}), BASE)["gates_passed"] is True
    assert got["errors"] == []


def test_ttfa_gate_fail() -> None:
    got = evaluate_speed_gates(now(ttfa_tokens={"p95": 30.0}), BASE)
    assert got["gates_passed"] is False
    assert got["ttfa_gate"]["passed"] is False
    assert "TTFA gate failed" in got["errors"][0]
    assert evaluate_speed_gates(now(ttfa_tokens={"p95": math.inf}), BASE)["gates_passed"] is False
    assert evaluate_speed_gates(now(ttfa_tokens={"p95": 30.0}), BASE, ttfa_limit=30.0)["gates_passed"] is True
    for bad in (-1.0, math.nan):
        with pytest.raises(ValidationError, match="ttfa_limit"):
            evaluate_speed_gates(now(), BASE, ttfa_limit=bad)


def test_calls_longer_than_the_limit_are_not_late() -> None:
    """What counts is the excess, where it is known: 20 passes and 30 fails as before, however long the calls are."""
    long = {"ttfa_tokens": {"p95": 60.0}}
    got = evaluate_speed_gates(now(**long, ttfa_excess_tokens={"p95": 20.0}), BASE)
    assert got["gates_passed"] is True
    assert (got["ttfa_gate"]["counted"], got["ttfa_gate"]["p95"]) == ("ttfa_excess_tokens", 20.0)
    assert got["ttfa_gate"]["ttfa_tokens_p95"] == 60.0
    late = evaluate_speed_gates(now(**long, ttfa_excess_tokens={"p95": 30.0}), BASE)
    assert late["ttfa_gate"]["passed"] is False
    assert late["errors"] == ["TTFA gate failed: p95 tokens beyond what the call needs is 30, at most 25"]
    missing = evaluate_speed_gates(now(**long, ttfa_excess_tokens={"p50": 1.0}), BASE)
    assert "missing" in missing["errors"][0]


def test_calls_that_no_longer_come_fail_the_gate() -> None:
    """Percentiles leave out what never came, so the share that came is held against the baseline's."""
    before = {**BASE, "ttfa_hit_rate": 1.0}
    assert evaluate_speed_gates(now(ttfa_hit_rate=0.95), before)["gates_passed"] is True
    got = evaluate_speed_gates(now(ttfa_hit_rate=0.9), before)
    assert got["ttfa_gate"]["passed"] is False
    assert got["errors"] == ["TTFA gate failed: the call came in 90.0% of the requests, in the baseline 100.0%"]
    assert evaluate_speed_gates(now(ttfa_hit_rate=0.9), BASE)["gates_passed"] is True  # nothing to hold it against
    assert evaluate_speed_gates(now(ttfa_hit_rate=0.9), {**BASE, "ttfa_hit_rate": 0.0})["gates_passed"] is True
