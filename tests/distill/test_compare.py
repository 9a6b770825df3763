"""A student against its baseline: ratios worked out by hand, the table, the record, the command."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dfastllm.distill.compare import compare_students, main, show, verdict
from dfastllm.errors import ValidationError
from dfastllm.metrics.evaluation import Evaluation, Row

ROW = Row(
    id="", task="tools", right=True, tokens=20, forwards=10, reference_tokens=20, length=90, ttfa_tokens=None,
    ttfa_excess_tokens=None, named=None, argued=None, valid=None, complete=None, false_call=None, text="",
)  # fmt: skip


def side(name: str, rows: list[dict[str, Any]]) -> Evaluation:
    made = tuple(dataclasses.replace(ROW, id=f"s{i}", **row) for i, row in enumerate(rows))
    return Evaluation(name, "greedy", 1.0, made)


def test_ratios_by_hand() -> None:
    before = side("b", [{"tokens": 20, "ttfa_tokens": 20.0}, {"tokens": 30, "ttfa_tokens": 30.0}, {"tokens": 40}])
    after = side("a", [{"tokens": 10, "ttfa_tokens": 10.0}, {"tokens": 15, "ttfa_tokens": math.inf}, {"tokens": 40}])
    found = compare_students(before, after, least=1)
    assert found.ratios["median_tokens"].median == 15 / 30
    assert found.ratios["all_tokens"].median == pytest.approx(65 / 90)
    assert found.ratios["ttfa_tokens"].median == 10 / 20  # only where both called
    assert found.ratios["ttfa_tokens"].n == 1
    assert found.ratios["tokens_per_forward"].median == pytest.approx((65 / 30) / (90 / 30))
    assert found.ratios["tokens_per_forward"].low <= 65 / 90 <= found.ratios["tokens_per_forward"].high


def test_figures_without_samples_are_left_out() -> None:
    same = side("b", [{"tokens": 0}, {"tokens": 0}])
    found = compare_students(same, same, least=1)
    assert found.ratios == {}
    assert found.equality.difference == 0


def test_drift_by_shape() -> None:
    before = side("b", [{"length": 10}, {"length": 10}, {"length": 200}])
    after = side("a", [{"length": 10}, {"length": 10}, {"length": 200, "right": False}])
    assert compare_students(before, after, least=1, shapes=[64, 256]).drift == {64: 0.0, 256: -1.0}


def test_other_samples_are_no_comparison() -> None:
    with pytest.raises(ValidationError, match="same samples"):
        compare_students(side("b", [{}]), side("a", [{}, {}]))


def test_the_table_fits_a_terminal() -> None:
    rows = [
        {"tokens": 30 + i % 7, "ttfa_tokens": 30.0, "ttfa_excess_tokens": 2.0, "named": True, "argued": i % 9 > 0}
        for i in range(1200)
    ]
    after = [{**row, "tokens": 20, "ttfa_tokens": 20.0} for row in rows]
    found = compare_students(side("b", rows), side("a", after), shapes=[64, 128])
    screen = Console(width=80, record=True, file=io.StringIO())
    show(found, screen)
    text = screen.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "equal accuracy\n1200 pairs, 0 lost and 0 gained: +0.00 points, at least -0.2" in text
    line = next(line for line in text.splitlines() if line.startswith("TTFA, tokens"))
    assert line.split() == ["TTFA,", "tokens", "30", "20", "0.667", "(0.667", "to", "0.667)"]
    assert "shape 128: accuracy +0.0 points" in text
    json.dumps(found.record(), allow_nan=False)
    worse = compare_students(side("b", rows), side("a", [{**row, "right": False} for row in rows]))
    assert verdict(worse.equality).startswith("equal accuracy is not shown: the bound -100.00 points")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model against itself, on few samples: equal rows, and too few of them to say so."""
    out = tmp_path / "comparison.json"
    assert main(["demo-ar", "demo-ar", "--n", "12", "--json", str(out), "--shapes", "64,512"]) == 1
    shown = capsys.readouterr().out
    assert "equal accuracy is not shown: " in shown
    assert "12 pairs, 0 lost and 0 gained" in shown
    results = json.loads(out.read_text())["results"]
    assert results["ratios"]["median_tokens"] == {"median": 1.0, "low": 1.0, "high": 1.0, "n": 12}
    assert results["student"]["rows"] == results["baseline"]["rows"]
    assert len(results["student"]["rows"]) == 12


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--n", "0"], "n must be at least 1"),
        (["--decode", "[1]"], "decoder options"),
        (["--decode", '{"rulez": 1}'], "decoder options"),
        (["--shapes", "a"], "shapes is a list of lengths"),
        (["--tasks", "toolz"], "no task 'toolz'"),
        (["--tasks", "tools", "--data", "x"], "leave it out"),
        (["--data", "nowhere.jsonl"], "not there"),
        (["--n", "1", "--decode", '{"rule": "factor"}'], "demo-ar"),
    ],
)
def test_what_cannot_be_compared(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo-ar", "demo-ar", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
