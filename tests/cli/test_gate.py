"""`dfastllm gate` as a user sees it: tables, the last line, exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from dfastllm.bench import counters as exact
from dfastllm.bench.gate_command import COUNTERS
from dfastllm.metrics.gates import SpeedReport, load_report, save_report
from tests.kit.source import ROOT

Cli = Callable[..., Result]
BASE = {
    "ttft_ms": {"p50": 200.0, "p95": 400.0},
    "tps": {"p50": 30.0, "p95": 25.0},
    "ttfa_tokens": {"p95": 20.0},
    "n": 3,
}


def write(path: Path, key: str = "here", **changes: Any) -> Path:
    metrics = {**BASE, **changes}
    report = SpeedReport(speed_metrics=metrics, hardware={}, hardware_profile_key=key, fingerprints={}, n=3)
    save_report(report, path)
    return path


def last(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_check_passes(cli: Cli, tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.json"), write(tmp_path / "b.json", ttft_ms={"p50": 210.0, "p95": 380.0})
    result = cli("gate", "check", b, "--baseline", a, "--json")
    assert result.exit_code == 0, result.output
    assert last(result)["verdict"] == "pass"
    assert "5.0% slower" in result.stdout
    assert "5.0% faster" in result.stdout


def test_check_fails(cli: Cli, tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.json"), write(tmp_path / "b.json", tps={"p50": 27.0, "p95": float("inf")})
    result = cli("gate", "check", b, "--baseline", a, "--json")
    assert result.exit_code == 1
    assert "FAIL" in result.stdout
    assert "TPS p50 regression: 10.0%" in result.stdout
    found = last(result)
    assert (found["verdict"], found["exit_code"], found["gates_passed"]) == ("fail", 1, False)
    assert found["tps_regression"]["p95"]["current"] == "Infinity"  # strict JSON
    assert cli("gate", "check", b, "--baseline", a, "--threshold", 0.5).exit_code == 1


def test_check_skips_other_hardware_unless_told(cli: Cli, tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.json", key="there"), write(tmp_path / "b.json")
    result = cli("gate", "check", b, "--baseline", a, "--json")
    assert result.exit_code == 0
    assert "skipped: hardware_mismatch" in result.stdout
    assert last(result)["verdict"] == "skipped"
    refused = cli("gate", "check", b, "--baseline", a, "--same-hardware")
    assert refused.exit_code == 2
    assert "measured on there" in refused.stderr
    assert last(cli("gate", "check", b, "--json"))["reason"] == "no_baseline"
    unrecorded = cli("gate", "check", b, "--baseline", tmp_path / "none.json", "--json")
    assert (unrecorded.exit_code, last(unrecorded)["reason"]) == (0, "no_baseline")
    assert "none.json: record it" in " ".join(unrecorded.stdout.split())


@pytest.mark.parametrize("text", ['{"schema_version": 1, "speed', "{}", ""])
def test_check_refuses_broken_files(cli: Cli, tmp_path: Path, text: str) -> None:
    (tmp_path / "broken.json").write_text(text)
    good = write(tmp_path / "good.json")
    for words in (
        (tmp_path / "broken.json",),
        (good, "--baseline", tmp_path / "broken.json"),
        (tmp_path / "none.json",),
    ):
        result = cli("gate", "check", *words)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
        assert len(result.stderr.splitlines()) == 1


def test_check_refuses_a_negative_threshold(cli: Cli, tmp_path: Path) -> None:
    path = write(tmp_path / "a.json")
    assert cli("gate", "check", path, "--baseline", path, "--threshold", -0.1).exit_code == 2
    assert cli("gate", "check", path, "--baseline", path, "--ttfa-limit", 10).exit_code == 1


def test_record_and_check(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "base.json"
    result = cli("gate", "record", "--out", out, "--requests", 2, "--max-tokens", 40, "--threads", 1, "--json")
    assert result.exit_code == 0, result.output
    assert last(result)["n"] == 2
    assert load_report(out).fingerprints["workload"]["model"] == "demo-ar"
    again = cli("gate", "check", out, "--baseline", out, "--json")
    assert again.exit_code == 0, again.output  # the same measurement is never slower than itself
    gate = last(again)["ttfa_gate"]
    assert (gate["threshold"], gate["counted"]) == (25, "ttfa_excess_tokens")
    assert gate["ttfa_tokens_p95"] > 25  # the call's own length, which no limit is set for
    assert "TTFA excess p95" in again.stdout


def test_check_of_another_model(cli: Cli, tmp_path: Path) -> None:
    paths = []
    for name in ("student", "teacher"):
        prints = {"workload": {"name": "task mix", "model": name}}
        kept = SpeedReport(speed_metrics=BASE, hardware={}, hardware_profile_key="here", fingerprints=prints, n=3)
        save_report(kept, tmp_path / f"{name}.json")
        paths.append(tmp_path / f"{name}.json")
    refused = cli("gate", "check", paths[0], "--baseline", paths[1])
    assert refused.exit_code == 2
    assert "not comparable" in refused.stderr
    assert cli("gate", "check", paths[0], "--baseline", paths[1], "--other-model").exit_code == 0


def sleeper(seconds: float) -> str:
    return f'"{sys.executable}" -S -c "import time; time.sleep({seconds})"'


def test_compare(cli: Cli) -> None:
    """Sides so far apart that no noise of the machine closes the gap."""
    quick, slow = sleeper(0.0), sleeper(0.5)
    result = cli("gate", "compare", quick, slow, "--pairs", 6, "--warmups", 0, "--json")
    assert result.exit_code == 1, result.output
    found = last(result)
    assert found["verdict"] == "fail"
    assert found["ratio"]["low"] > 1.05
    assert found["ratio"]["n"] == 6
    assert cli("gate", "compare", slow, quick, "--pairs", 6, "--warmups", 0).exit_code == 0


def test_compare_without_a_verdict(cli: Cli) -> None:
    result = cli("gate", "compare", sleeper(0.0), sleeper(0.0), "--pairs", 2, "--warmups", 0, "--json")
    assert result.exit_code == 3
    assert "no verdict: 2 pairs make no interval" in result.stdout
    assert last(result)["verdict"] == "no verdict"


@pytest.mark.parametrize("words", [("--margin", "-0.1"), ("--pairs", "0")])
def test_compare_refuses_bad_numbers(cli: Cli, words: tuple[str, str]) -> None:
    assert cli("gate", "compare", sleeper(0.0), sleeper(0.0), *words).exit_code == 2


def test_counters(cli: Cli, tmp_path: Path) -> None:
    key, [case] = exact.counters_key(), exact.cases_of(["diffusion factor 1.0 dual"])
    found = exact.count(case)
    path = tmp_path / "counters.json"
    exact.save_counters(path, {key: {case.name: found}})
    words = ("gate", "counters", "--baseline", path, "--case", case.name, "--json")
    result = cli(*words)
    assert result.exit_code == 0, result.output
    assert last(result)["counters"] == {case.name: found}
    exact.save_counters(path, {key: {case.name: {**found, "nfe": 1}}})
    result = cli(*words)
    assert result.exit_code == 1
    assert last(result)["changes"] == [
        {"case": case.name, "counter": "nfe", "baseline": 1, "current": found["nfe"]},
    ]
    exact.save_counters(path, {"other": {}})
    result = cli(*words)
    assert result.exit_code == 0
    assert f"has no counters for kernels of kind {key}" in " ".join(result.stdout.split())
    assert last(result)["verdict"] == "skipped"
    assert cli("gate", "counters", "--baseline", tmp_path / "none.json").exit_code == 2
    assert cli(*words[:-2], "nonsense", "--baseline", path).exit_code == 2


def test_counters_update(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = exact.counters_key()
    one: exact.Counters = {"nfe": 2, "steps": 1, "rows": 3, "completion_tokens": 4, "answers": "x"}
    monkeypatch.setattr(exact, "count_everywhere", lambda: iter([(key, {"ar": one}), ("other", {"ar": one})]))
    path = tmp_path / "counters.json"
    result = cli("gate", "counters", "--baseline", path, "--update", "--json")
    assert result.exit_code == 0, result.output
    assert last(result)["kinds"] == [key, "other"]
    assert exact.load_counters(path, "other") == {"ar": one}
    assert cli("gate", "counters", "--update", "--case", "ar").exit_code == 2


def test_the_default_baseline_is_in_the_repository() -> None:
    assert (ROOT / COUNTERS).is_file()
