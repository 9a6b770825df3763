"""Pictures of a run: which are made, what they show and how their axes are named. (How they look is for eyes.)"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dfastllm.distill.plots import comparison_figure, main, plot_run, training_figure, validation_figure
from dfastllm.errors import DataError

STEPS = [
    {"step": 10 * i, "loss": 2.0 / (i + 1), "loss.kl_div": 1.5 / (i + 1), "loss.length": 0.1 / (i + 1), "lr": 1e-3}
    for i in range(1, 9)
]
CHECKS: list[dict[str, Any]] = [
    {
        "step": step,
        "loss": 0.5,
        "lr": 1e-3,
        "validation_loss": 0.6,
        "task.exact_match": 0.8,
        "task.median_tokens": 20.0,
        "task.teacher_median_tokens": 25.0,
        "task.ttfa_tokens": 22.0,
        "speed.ttft_ms.p50": 3.0,
        "speed.ttft_ms.p95": 5.0,
    }
    for step in (90, 100)
]
CHECKS[1]["lr_factor"] = 0.1
LINES: list[dict[str, Any]] = [*STEPS, *CHECKS, {"step": 64, "event": "qat.on", "status": "on"}]
SIDE = {"exact_match": 0.95, "false_call_rate": 0.0, "median_tokens": 20.0, "ttfa_tokens": 30.0, "forwards": 20.0}
RECORD = {
    "results": {
        "equality": {"equal": True, "difference": 0.001, "lower": -0.004, "n": 1000},
        "baseline": {"summary": SIDE},
        "student": {"summary": {**SIDE, "median_tokens": 15.0}},
    }
}


def labels(axes: Any) -> list[str]:
    return list(axes.get_legend_handles_labels()[1])


def test_the_training_picture() -> None:
    upper, lower = training_figure(LINES).axes
    assert labels(upper) == ["loss, weighted sum", "kl_div", "length", "validation loss"]
    assert list(upper.get_lines()[1].get_ydata()) == [line["loss.kl_div"] for line in STEPS]
    assert (upper.get_ylabel(), upper.get_yscale()) == ("nats per token, each term times its weight", "log")
    assert (lower.get_ylabel(), lower.get_xlabel()) == ("rate / its peak", "optimizer step")
    rates = dict(zip(lower.get_lines()[0].get_xdata(), lower.get_lines()[0].get_ydata(), strict=True))
    assert (rates[10], rates[100]) == (1e-3, 1e-4)  # the factor of what is trained rounded is in it
    for axes in (upper, lower):
        assert [text.get_text().strip() for text in axes.texts] == ["QAT on"]
        assert 64 in [line.get_xdata()[0] for line in axes.get_lines()]


def test_the_validation_picture() -> None:
    figure = validation_figure(LINES)
    assert figure is not None
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_ylabel() for axes in shown] == ["share", "tokens, median", "tokens, median", "ms"]
    assert labels(shown[1]) == ["student", "teacher"]
    assert list(shown[0].get_lines()[0].get_xdata()) == [90, 100]
    assert all(axes.get_xlabel() == "optimizer step" and axes.get_title() for axes in shown)
    assert validation_figure(STEPS) is None


def test_the_comparison_picture() -> None:
    figure = comparison_figure(RECORD)
    assert figure is not None
    left, right = figure.axes
    assert left.get_title() == "Accuracy equal: +0.10 points, at least -0.40, 1000 pairs"
    assert [bar.get_height() for bar in left.patches] == [95.0, 0.0] * 2
    assert [bar.get_height() for bar in right.patches] == [20.0, 30.0, 20.0, 15.0, 30.0, 20.0]
    assert labels(left) == ["baseline", "student"]
    assert comparison_figure({"results": {"student": {}}}) is None


def test_a_run_becomes_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in STEPS))
    assert [path.name for path in plot_run(tmp_path, tmp_path / "out")] == ["training.png"]
    log.write_text("".join(json.dumps(line) + "\n" for line in LINES) + '{"step": 110, "lo')  # killed while it wrote
    (tmp_path / "comparison.json").write_text(json.dumps(RECORD))
    assert main([str(tmp_path)]) == 0
    made = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in made] == ["training.png", "validation.png", "comparison.png"]
    assert {path.read_bytes()[:8] for path in made} == {b"\x89PNG\r\n\x1a\n"}


def test_values_that_are_no_numbers_are_left_out() -> None:
    lines = [{"step": 1, "loss": "NaN", "lr": 1e-3}, {"step": 2, "loss": 0.0, "lr": 1e-3}]
    upper, _ = training_figure(lines).axes
    assert list(upper.get_lines()[0].get_ydata()) == [0.0]
    assert upper.get_yscale() == "linear"  # nothing above 0 to show on a logarithmic axis


def test_what_has_no_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"holds no log\.jsonl"):
        plot_run(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert main([]) == 2
    (tmp_path / "log.jsonl").write_text(json.dumps(STEPS[0]) + "\n")
    (tmp_path / "comparison.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        plot_run(tmp_path)
