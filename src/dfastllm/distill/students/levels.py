"""Two curves of accuracy against tokens per forward, compared at equal accuracy: between the points that were measured.

At a level of accuracy a curve's speed is the greatest one at which the line through its points is still as accurate.
The interval of the ratio of two such speeds resamples samples, each with all its answers by both models at all settings
(a paired bootstrap, Efron 1979): what a hard sample does to both curves cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dfastllm.errors import ValidationError
from dfastllm.metrics.evaluation import Row

__all__ = ["Level", "levels_of", "speeds_at"]

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Level:
    """Two curves at one accuracy.

    level    the accuracy.
    before   tokens per forward of the first curve there; None: no point of it is as accurate.
    after    of the second.
    ratio    after / before; None where either is None.
    low      2.5 % of the resampled ratios lie below; None without a ratio.
    high     2.5 % lie above.
    reached  share of the resamplings in which both curves have points as accurate as the level; the interval is theirs.
    """

    level: float
    before: float | None
    after: float | None
    ratio: float | None
    low: float | None
    high: float | None
    reached: float


def speeds_at(accuracy: Values, speed: Values, level: float) -> Values:
    """The greatest speed at which the line through the points is at least as accurate as the level, [draws]; NaN where
    no point is.

    accuracy, speed: [draws, points], in any order. Where the quickest point of all is as accurate its speed counts:
    nothing is known beyond it."""
    order = np.argsort(speed, axis=1, kind="stable")
    right, fast = np.take_along_axis(accuracy, order, 1), np.take_along_axis(speed, order, 1)
    points, rows = right.shape[1], np.arange(len(right))
    able = right >= level
    last = points - 1 - np.argmax(able[:, ::-1], axis=1)  # the quickest point that is as accurate
    beyond = np.minimum(last + 1, points - 1)
    drop = right[rows, last] - right[rows, beyond]
    share = np.divide(right[rows, last] - level, drop, out=np.zeros(len(right)), where=drop > 0)
    found = fast[rows, last] + share * (fast[rows, beyond] - fast[rows, last])
    return np.where(able.any(axis=1), found, np.nan)


def levels_of(
    before: Sequence[Sequence[Row]],
    after: Sequence[Sequence[Row]],
    levels: Sequence[float],
    *,
    draws: int = 2000,
    seed: int = 0,
) -> list[Level]:
    """The two curves at each level. before, after: of each setting the rows of the same samples in the same order.
    Raises ValidationError for no setting, and where the samples differ."""
    ids = {tuple(row.id for row in rows) for rows in (*before, *after)}
    if not before or not after or len(ids) != 1:
        raise ValidationError("curves are compared on the same samples, at one setting or more of each.", param="rows")
    count = len(next(iter(ids)))
    weights = np.random.default_rng(seed).multinomial(count, [1 / count] * count, draws).astype(np.float64)
    weights = np.vstack([np.ones(count), weights])  # the first draw: the samples as they are
    first, second = (_weighed(rows, weights) for rows in (before, after))
    found = []
    for level in levels:
        slow, quick = speeds_at(*first, level), speeds_at(*second, level)
        ratios = quick[1:] / slow[1:]
        known = ratios[~np.isnan(ratios)]
        ratio = _number(quick[0] / slow[0])
        low, high = np.quantile(known, (0.025, 0.975)) if ratio is not None and len(known) else (np.nan, np.nan)
        reached = len(known) / max(1, len(ratios))
        found.append(
            Level(level, _number(slow[0]), _number(quick[0]), ratio, _number(low), _number(high), reached),
        )
    return found


def _weighed(settings: Sequence[Sequence[Row]], weights: Values) -> tuple[Values, Values]:
    """(accuracy, tokens per forward) of each setting in each draw, [draws, settings]."""
    right, tokens, forwards = (
        weights @ np.array([[float(getattr(row, name)) for row in rows] for rows in settings]).T
        for name in ("right", "tokens", "forwards")
    )
    return right / weights.sum(axis=1, keepdims=True), tokens / forwards


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
