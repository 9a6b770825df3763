"""The speed gates: every case of the specification, missing values, files that are no baselines."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dfastllm.errors import ValidationError
from dfastllm.metrics.gates import (
    SpeedReport,
    check,
    evaluate_speed_gates,
    load_report,
    make_report,
    same_machine,
    save_report,
    strict_json,
)
from dfastllm.metrics.timelines import aggregate

BASE = {"ttft_ms": {"p50": 200.0, "p95": 400.0}, "tps": {"p50": 30.0, "p95": 25.0}}


def now(**changes: Any) -> dict[str, Any]:
    return {**BASE, "ttfa_tokens": {"p95": 20.0}, **changes}


@pytest.mark.parametrize("base", [3.0, 0.1, 123.456, 7e5, 1e-3])
def test_exactly_the_threshold_passes_and_a_hair_more_does_not(base: float) -> None:
    """Whatever the last bit of the division says."""
    baseline = {**BASE, "ttft_ms": {"p50": base, "p95": base}, "tps": {"p50": base, "p95": base}}
    limit = {"ttft_ms": {"p50": base * 1.05, "p95": base}, "tps": {"p50": base * 0.95, "p95": base}}
    assert evaluate_speed_gates(now(**limit), baseline)["gates_passed"] is True
    slower = {**limit, "ttft_ms": {"p50": base * 1.0501, "p95": base}}
    assert evaluate_speed_gates(now(**slower), baseline)["gates_passed"] is False


def test_the_threshold_is_the_callers() -> None:
    slower = now(ttft_ms={"p50": 220.0, "p95": 440.0})
    assert evaluate_speed_gates(slower, BASE, regression_threshold=0.1)["gates_passed"] is True
    assert evaluate_speed_gates(now(), BASE, regression_threshold=0.0)["gates_passed"] is True
    faster = now(ttft_ms={"p50": 100.0, "p95": 100.0}, tps={"p50": 60.0, "p95": 60.0})
    assert evaluate_speed_gates(faster, BASE, regression_threshold=0.0)["gates_passed"] is True


@pytest.mark.parametrize("threshold", [-0.01, -math.inf, math.inf, math.nan])
def test_bad_thresholds_are_refused(threshold: float) -> None:
    with pytest.raises(ValidationError, match="regression_threshold"):
        evaluate_speed_gates(now(), BASE, regression_threshold=threshold)


@pytest.mark.parametrize("name", ["ttft_ms", "tps", "ttfa_tokens"])
@pytest.mark.parametrize("value", [None, {}, {"p50": 1.0}, {"p50": 1.0, "p95": None}, {"p50": 1.0, "p95": math.nan}, 3])
def test_a_missing_current_value_fails(name: str, value: Any) -> None:
    got = evaluate_speed_gates(now(**{name: value}), BASE)
    assert got["gates_passed"] is False
    assert any("missing" in error for error in got["errors"])


def test_empty_metrics_fail() -> None:
    assert evaluate_speed_gates({}, BASE)["gates_passed"] is False
    nothing = evaluate_speed_gates(aggregate([]), BASE)  # zeros everywhere, which look like a TTFT to be proud of
    assert nothing["gates_passed"] is False
    assert "nothing was measured" in nothing["errors"][0]


def test_the_slow_tail_is_gated_where_the_baseline_has_it() -> None:
    baseline = {**BASE, "tps": {"p50": 30.0, "p95": 25.0, "p05": 10.0}}
    assert evaluate_speed_gates(now(tps={"p50": 30.0, "p95": 25.0, "p05": 9.0}), baseline)["gates_passed"] is False
    assert evaluate_speed_gates(now(), baseline)["gates_passed"] is False  # missing
    assert evaluate_speed_gates(now(tps={"p50": 30.0, "p95": 25.0, "p05": 9.0}), BASE)["gates_passed"] is True


def test_speeds_of_one_piece_answers() -> None:
    """Infinite in both: nothing to compare, and it says so. Only now: not measured, a failure."""
    endless = {"tps": {"p50": math.inf, "p95": math.inf}}
    got = evaluate_speed_gates(now(**endless), {**BASE, **endless})
    assert got["gates_passed"] is True
    assert got["tps_regression"]["p50"]["reason"] == "no_baseline_value"
    assert evaluate_speed_gates(now(**endless), BASE)["gates_passed"] is False


def test_a_workload_without_tools_has_no_ttfa_gate() -> None:
    metrics = aggregate([{"ttft_ms": 200.0, "tps": 30.0, "ttfa_tokens": None, "ttfa_ms": None}])
    got = evaluate_speed_gates(metrics, metrics)
    assert got["gates_passed"] is True
    assert got["ttfa_gate"]["reason"] == "no_tool_requests"


def report(key: str = "here", **changes: Any) -> SpeedReport:
    form: dict[str, Any] = {
        "speed_metrics": now(n=3),
        "hardware": {"cpu": "x"},
        "hardware_profile_key": key,
        "fingerprints": {"workload": "w", "threads": 2},
        "n": 3,
    }
    return SpeedReport(**{**form, **changes})


def test_reports_survive_the_file(tmp_path: Path) -> None:
    kept = report(speed_metrics=now(ttfa_tokens={"p50": 1.5, "p95": math.inf}))
    save_report(kept, tmp_path / "new" / "base.json")
    assert load_report(tmp_path / "new" / "base.json") == kept
    text = (tmp_path / "new" / "base.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert set(json.loads(text)) == {
        "schema_version", "speed_metrics", "hardware", "hardware_profile_key", "fingerprints", "n",
    }  # fmt: skip
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "base.json"]


def test_make_report_is_of_this_machine() -> None:
    from dfastllm.metrics.hardware import hardware_profile_key

    made = make_report({**now(), "n": 7}, model="m")
    assert made.hardware_profile_key == hardware_profile_key()
    assert (made.n, made.fingerprints["model"]) == (7, "m")
    with pytest.raises(ValidationError, match="nothing was measured"):
        make_report(aggregate([]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"schema_version": 1, "speed_metrics": {"ttft_ms"', "cut short"),
        ("", "cut short"),
        ("[1]", "wanted a JSON object"),
        ("{}", "schema version None"),
        ('{"schema_version": 2}', "schema version 2"),
        ('{"schema_version": 1}', "no speed report"),
        ("\xff", "no complete JSON"),
    ],
)
def test_files_that_are_no_baseline(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "base.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValidationError, match=said):
        load_report(path)


def test_missing_undecodable_and_empty_baselines(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="cannot be read"):
        load_report(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValidationError, match="cannot be read"):
        load_report(tmp_path / "binary.json")
    save_report(report(n=0), tmp_path / "zero.json")
    with pytest.raises(ValidationError, match="no measured request"):
        load_report(tmp_path / "zero.json")


def test_a_baseline_of_another_machine(tmp_path: Path) -> None:
    save_report(report("there"), tmp_path / "base.json")
    with pytest.raises(ValidationError, match="baseline was measured on there, the current report on here"):
        same_machine(report("here"), load_report(tmp_path / "base.json"))
    same_machine(report("there"), load_report(tmp_path / "base.json"))
    got = check(report("here"), load_report(tmp_path / "base.json"))
    assert (got["gates_passed"], got["skipped"], got["reason"]) == (True, True, "hardware_mismatch")


def test_check_compares_reports() -> None:
    slower = report(speed_metrics=now(ttft_ms={"p50": 300.0, "p95": 400.0}))
    assert check(slower, report())["gates_passed"] is False
    assert check(slower, report(), regression_threshold=0.6)["gates_passed"] is True
    assert check(slower, None)["reason"] == "no_baseline"
    for other in ({"workload": "v", "threads": 2}, {"workload": "w", "threads": 1}):
        with pytest.raises(ValidationError, match="not comparable"):
            check(report(), report(fingerprints=other))
    assert check(report(), report(fingerprints={}))["gates_passed"] is True


def test_a_student_is_held_against_another_model() -> None:
    """The same questions to two models: comparable where that is meant, and only then."""
    asked = {"name": "task mix", "requests": 3}
    mine = report(fingerprints={"workload": {**asked, "model": "student"}})
    theirs = report(fingerprints={"workload": {**asked, "model": "teacher"}})
    with pytest.raises(ValidationError, match="not comparable"):
        check(mine, theirs)
    assert check(mine, theirs, other_model=True)["gates_passed"] is True
    longer = report(fingerprints={"workload": {**asked, "requests": 4, "model": "teacher"}})
    with pytest.raises(ValidationError, match="not comparable"):
        check(mine, longer, other_model=True)


def test_a_verdict_is_strict_json() -> None:
    found = evaluate_speed_gates(now(ttfa_tokens={"p95": math.inf}), BASE)
    text = json.dumps(strict_json(found), allow_nan=False)
    assert json.loads(text)["ttfa_gate"]["p95"] == "Infinity"
    assert strict_json({"a": [1, (-math.inf, None)]}) == {"a": [1, ["-Infinity", None]]}
