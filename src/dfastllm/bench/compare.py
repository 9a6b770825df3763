"""Two sides measured in turns on a noisy machine, and a verdict that knows when the noise wins.

A pair is one measurement of each side, one right after the other and in alternating order, so that a slow moment of the
machine hits both. The ratio (new over base, in time: above 1 is slower) is the median over pairs with a 95 % bootstrap
interval, made as wide as the sign test's: with few pairs the bootstrap of a median misses more often than it says (each
end in 6 % of the samples at 7 pairs). The verdict looks at the whole interval: pass, it ends below 1 + margin;
fail, it begins above; otherwise no verdict, as with fewer than six pairs.

So a side that is slower by exactly the margin fails in at most 2.5 % of the comparisons, and one that is not slower
almost never (tests/bench/test_compare.py counts the one exactly and simulates the other).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from dfastllm.errors import ValidationError
from dfastllm.metrics.stats import Ratio, Summary, paired_ratio, sign_interval, summarise

__all__ = ["LEAST_PAIRS", "Compared", "Verdict", "compare", "guarded_ratio", "judge", "take_pairs"]

Side = Callable[[], float]  # one measurement, in seconds
Verdict = Literal["pass", "fail", "no verdict"]
LEAST_PAIRS = 6


@dataclass(frozen=True, slots=True)
class Compared:
    """base, new: seconds of each side. ratio: new over base. reason: why there is no verdict, else ""."""

    base: Summary
    new: Summary
    ratio: Ratio
    margin: float
    verdict: Verdict
    reason: str


def judge(ratio: Ratio, margin: float) -> tuple[Verdict, str]:
    """The verdict on "new is at most `margin` slower than base", and why there is none. Raises ValidationError for a
    margin that is negative or no number."""
    if not margin >= 0 or math.isinf(margin):
        raise ValidationError(f"margin must be a number >= 0, got {margin}.", param="margin")
    if ratio.n < LEAST_PAIRS:
        return "no verdict", f"{ratio.n} pairs make no interval, {LEAST_PAIRS} are needed"
    limit = 1 + margin
    if ratio.high <= limit:
        return "pass", ""
    if ratio.low > limit:
        return "fail", ""
    width = ratio.high - ratio.low
    return (
        "no verdict",
        f"the interval ({width:.1%} wide) holds the limit {limit:.3f}: take more pairs or a quieter hour",
    )


def take_pairs(
    base: Side, new: Side, pairs: int, *, warmups: int = 2, progress: Callable[[int], None] | None = None
) -> tuple[list[float], list[float]]:
    """Seconds of both sides, pair by pair, the order turned round every time, after `warmups` unmeasured turns of each.
    progress: called with the number of pairs done. Raises ValidationError below one pair."""
    if pairs < 1 or warmups < 0:
        raise ValidationError(f"pairs must be >= 1 and warmups >= 0, got {pairs} and {warmups}.", param="pairs")
    for _ in range(warmups):
        base()
        new()
    found: tuple[list[float], list[float]] = ([], [])
    for i in range(pairs):
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            found[side].append((base, new)[side]())
        if progress is not None:
            progress(i + 1)
    return found


def compare(
    base: Side,
    new: Side,
    *,
    pairs: int = 15,
    margin: float = 0.05,
    warmups: int = 2,
    progress: Callable[[int], None] | None = None,
) -> Compared:
    """Measure two sides in turns and judge. Raises what the sides raise, and ValidationError for bad numbers (before
    anything is measured)."""
    judge(Ratio(1.0, 1.0, 1.0, pairs), margin)
    before, after = take_pairs(base, new, pairs, warmups=warmups, progress=progress)
    ratio = guarded_ratio(after, before)
    verdict, reason = judge(ratio, margin)
    return Compared(summarise(before), summarise(after), ratio, margin, verdict, reason)


def guarded_ratio(over: Sequence[float], under: Sequence[float]) -> Ratio:
    """`paired_ratio`, its interval as wide as that of the sign test where this one promises anything. Raises
    ValidationError as that does."""
    ratio = paired_ratio(over, under)
    low, high = sign_interval([a / b for a, b in zip(over, under, strict=True)])
    if math.isinf(low):
        return ratio
    return Ratio(ratio.median, min(ratio.low, low), max(ratio.high, high), ratio.n)
