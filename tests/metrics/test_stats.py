"""The ratio of two statistics with its interval, against formulas and by its coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from dfastllm.errors import ValidationError
from dfastllm.metrics.stats import bootstrap_ratio


def total(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(values[..., 0].sum(axis=-1))


def quotient(values: NDArray[np.float64]) -> NDArray[np.float64]:
    sums = values.sum(axis=-2)
    return np.asarray(sums[..., 0] / sums[..., 1])


def test_the_ratio_is_that_of_the_lists() -> None:
    got = bootstrap_ratio([[2.0], [4.0]], [[1.0], [2.0]], total)
    assert (got.median, got.low, got.high, got.n) == (2.0, 2.0, 2.0, 2)  # every pair has it: nothing is left to chance
    rates = bootstrap_ratio([[6, 2], [6, 1]], [[4, 4], [4, 4]], quotient)
    assert rates.median == pytest.approx(4.0)
    assert rates.low == pytest.approx(3.0)  # the first pair twice
    assert rates.high == pytest.approx(6.0)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Of 300 lists whose true ratio is 0.8, the 95 % interval misses about 15 (binomial; 4 standard deviations apart
    at most), and it is about as wide as the delta method says."""
    generator = np.random.default_rng(3)
    missed, widths = 0, []
    for seed in range(300):
        common = generator.gamma(4.0, 1.0, 200)
        before, after = (common + generator.gamma(1.0, 1.0, 200) for _ in (0, 1))
        found = bootstrap_ratio(0.8 * after[:, None], before[:, None], total, draws=400, seed=seed)
        missed += not found.low <= 0.8 <= found.high
        widths.append(found.high - found.low)
    assert abs(missed - 15) <= 4 * math.sqrt(300 * 0.05 * 0.95)
    deviation = 0.8 * math.sqrt(2 * 1.0 / 200) / 5.0  # of sum(a - b) / sum(b): what is common cancels
    assert np.median(widths) == pytest.approx(2 * 1.96 * deviation, rel=0.15)


@pytest.mark.parametrize(("over", "under"), [([[1.0]], []), ([], []), ([[1.0]], [[0.0]])])
def test_what_has_no_ratio(over: list[list[float]], under: list[list[float]]) -> None:
    with pytest.raises(ValidationError):
        bootstrap_ratio(over, under, total)
