"""Statistics of interleaved measurements: medians with their quartiles, paired ratios with a bootstrap interval, and an
interval of the median that holds for few values too."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dfastllm.errors import ValidationError

__all__ = ["Ratio", "Summary", "bootstrap_ratio", "paired_ratio", "sign_interval", "summarise", "wilson"]

Z95 = 1.959963984540054  # of the normal distribution


@dataclass(frozen=True, slots=True)
class Summary:
    """Median, quartiles (their distance is the spread, IQR) and least of `n` values."""

    median: float
    q1: float
    q3: float
    least: float
    n: int


@dataclass(frozen=True, slots=True)
class Ratio:
    """Median of paired ratios, or ratio of two statistics; its 95 % percentile-bootstrap interval over `n` pairs."""

    median: float
    low: float
    high: float
    n: int


def summarise(values: Sequence[float]) -> Summary:
    """Raises ValidationError for no values."""
    if not values:
        raise ValidationError("a summary needs at least one value, got none.", param="values")
    q1, median, q3 = np.quantile(np.asarray(values, dtype=np.float64), (0.25, 0.5, 0.75))
    return Summary(float(median), float(q1), float(q3), float(min(values)), len(values))


def paired_ratio(over: Sequence[float], under: Sequence[float], *, draws: int = 4000, seed: int = 0) -> Ratio:
    """The median of over[i] / under[i]; pair i was measured one right after the other, so a slow moment of the machine
    hits both. The interval resamples whole pairs (Efron 1979). Raises ValidationError unless there are equally many
    positive values of both."""
    if len(over) != len(under) or not over or min(*over, *under) <= 0:
        raise ValidationError(
            f"paired ratios need equally many positive values, got {len(over)} and {len(under)}.", param="over"
        )
    ratios = np.asarray(over, dtype=np.float64) / np.asarray(under, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(ratios), (draws, len(ratios)))
    low, high = np.quantile(np.median(ratios[picks], axis=1), (0.025, 0.975))
    return Ratio(float(np.median(ratios)), float(low), float(high), len(ratios))


def sign_interval(values: Sequence[float], miss: float = 0.025) -> tuple[float, float]:
    """Order statistics that enclose the median whatever the distribution: each end misses it in at most `miss` of all
    samples (the interval that inverts the sign test; e.g. Conover, Practical Nonparametric Statistics, 3.2). Infinite
    where so few values cannot promise that (fewer than six for 0.025)."""
    ordered, n = sorted(values), len(values)
    below, k = 0.0, 0
    while k < n and (below := below + math.comb(n, k) * 0.5**n) <= miss:
        k += 1
    return (ordered[k - 1], ordered[n - k]) if k else (-math.inf, math.inf)


def bootstrap_ratio(
    over: Sequence[Sequence[float]],
    under: Sequence[Sequence[float]],
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    *,
    draws: int = 2000,
    seed: int = 0,
) -> Ratio:
    """The ratio of one statistic of two paired lists, and a 95 % percentile-bootstrap interval that resamples whole
    pairs (Efron 1979), so that what the two have in common cancels.

    over, under: [pairs, values of each]. statistic: [..., pairs, values] -> [...]. The result's median is the ratio of
    the lists as they are. Raises ValidationError unless there are equally many pairs of both, and for a statistic of
    `under` that is not above 0."""
    if len(over) != len(under) or not len(over):
        raise ValidationError(f"paired lists are equally long, got {len(over)} and {len(under)}.", param="over")
    first, second = (np.asarray(rows, dtype=np.float64).reshape(len(rows), -1) for rows in (over, under))
    below = float(statistic(second))
    if not below > 0:
        raise ValidationError(f"a ratio needs a statistic above 0 to divide by, got {below}.", param="under")
    generator = np.random.default_rng(seed)
    ratios = []
    for _ in range(0, draws, 100):
        picks = generator.integers(0, len(first), (100, len(first)))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios.append(statistic(first[picks]) / statistic(second[picks]))
    found = np.concatenate(ratios)
    low, high = np.quantile(found[~np.isnan(found)], (0.025, 0.975))
    return Ratio(float(statistic(first)) / below, float(low), float(high), len(first))


def wilson(correct: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): sensible for small n and at 0 and 1."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = correct / n, Z95 * Z95
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # at the ends the exact bound, which rounding would miss by a hair
    return (max(0.0, middle - half) if correct else 0.0), (min(1.0, middle + half) if correct < n else 1.0)
