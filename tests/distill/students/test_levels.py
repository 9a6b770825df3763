"""Curves at equal accuracy: interpolation against a plain loop, the interval against resampling by hand."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from dfastllm.distill.students.levels import levels_of, speeds_at
from dfastllm.errors import ValidationError
from dfastllm.metrics.evaluation import Row


def plain_speed(points: list[tuple[float, float]], level: float) -> float:
    """The same rule for one curve of (speed, accuracy), walked from its quickest point back."""
    points = sorted(points)
    for at in range(len(points) - 1, -1, -1):
        speed, accuracy = points[at]
        if accuracy >= level:
            if at == len(points) - 1:
                return speed
            beyond, worse = points[at + 1]
            return speed + (beyond - speed) * (accuracy - level) / (accuracy - worse)
    return math.nan


def row(sample: int, right: bool, forwards: int) -> Row:
    return Row(f"s/{sample}", "code", right, 12, forwards, 12, 40, None, None, None, None, None, None, None, "")


def test_between_points_a_line_decides() -> None:
    accuracy, speed = np.array([[0.96, 0.95, 0.93]]), np.array([[7.0, 8.0, 10.0]])
    assert speeds_at(accuracy, speed, 0.94) == pytest.approx([9.0])
    assert speeds_at(accuracy, speed, 0.955) == pytest.approx([7.5])
    assert speeds_at(accuracy, speed, 0.96) == pytest.approx([7.0])
    assert speeds_at(accuracy, speed, 0.90) == pytest.approx([10.0])  # nothing is known beyond the quickest point
    assert math.isnan(speeds_at(accuracy, speed, 0.97)[0])


def test_it_is_the_plain_rule_for_any_curve() -> None:
    draw = random.Random(3)
    curves = [[(draw.uniform(2, 12), draw.choice((0.9, 0.93, 0.95, 0.96))) for _ in range(5)] for _ in range(60)]
    speed, accuracy = (np.array([[point[at] for point in curve] for curve in curves]) for at in (0, 1))
    for level in (0.92, 0.95, 0.955, 0.97):
        wanted = [plain_speed(curve, level) for curve in curves]
        assert speeds_at(accuracy, speed, level) == pytest.approx(wanted, nan_ok=True)


def test_two_curves_at_levels() -> None:
    """Right answers 190 and 180 of 200, forwards 4 and 2; the second model needs half of them."""

    def curve(scale: int) -> list[list[Row]]:
        return [
            [row(i, i % 20 != 0, 4 * scale) for i in range(200)],
            [row(i, i % 10 != 0, 2 * scale) for i in range(200)],
        ]

    half, full = curve(1), curve(2)
    at, low, none = levels_of(full, half, (0.925, 0.9, 0.99), draws=200)
    # both curves have the same right answers, so what a resampling does to the accuracy cancels
    assert [at.before, at.after, at.ratio, at.low, at.high] == pytest.approx([2.25, 4.5, 2.0, 2.0, 2.0])
    assert [low.before, low.after] == pytest.approx([3.0, 6.0])
    assert (none.before, none.after, none.ratio, none.low, none.high, none.reached) == (None,) * 5 + (0.0,)
    assert 0.9 < at.reached <= 1


def test_the_interval_is_that_of_resampled_samples() -> None:
    """One setting each, so that a level below both is a plain ratio of speeds, which is resampled here by index."""
    draw = random.Random(5)
    first = [[row(i, True, draw.randint(2, 6)) for i in range(60)]]
    second = [[row(i, True, draw.randint(1, 4)) for i in range(60)]]
    (found,) = levels_of(first, second, (0.5,), draws=4000)
    slow, quick = (np.array([one.forwards for one in rows[0]]) for rows in (first, second))
    picks = np.random.default_rng(11).integers(0, 60, (4000, 60))
    low, high = np.quantile(slow[picks].sum(1) / quick[picks].sum(1), (0.025, 0.975))
    assert found.ratio == pytest.approx(slow.sum() / quick.sum())
    assert [found.low, found.high] == pytest.approx([low, high], rel=0.02)


def test_other_samples_are_refused() -> None:
    rows = [row(i, True, 2) for i in range(4)]
    with pytest.raises(ValidationError, match="the same samples"):
        levels_of([rows], [rows[:3]], (0.9,))
    with pytest.raises(ValidationError, match="one setting or more"):
        levels_of([rows], [], (0.9,))
