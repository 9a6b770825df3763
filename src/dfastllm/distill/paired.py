"""Two models asked the same samples: is the second as accurate as the first, and by how much is it faster.

Accuracy is paired: only the samples on which the two differ say anything, so a small loss can be excluded with fewer
samples than two separate shares would need. "Equal" is non-inferiority: the loss of accuracy is below the margin with
a confidence of 1 - alpha, on at least LEAST_PAIRS samples. It is never concluded from a difference that is merely not
significant.

The bound is Tango's (1998): it inverts the score test of H0: p_after - p_before = d, with the probability of a lost
answer estimated under H0. Unlike Wald's it holds where few or no answers differ, and where they all differ one way.
tests/distill/test_paired.py counts its coverage exactly.

  T. Tango, Equivalence test and confidence interval for the difference in proportions for the paired-sample design,
  Statistics in Medicine 17 (1998) 891-908. For its size and power among its rivals: M. W. Fagerland, S. Lydersen,
  P. Laake, Recommended tests and confidence intervals for paired binomial proportions, Statistics in Medicine 33 (2014)
  2850-2875.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Protocol, TypeVar

from dfastllm.errors import ValidationError

__all__ = ["LEAST_PAIRS", "Equality", "equal_accuracy", "lower_bound", "pair", "score"]

LEAST_PAIRS = 1000


class Graded(Protocol):
    """What is compared of a row: which sample it answers, and whether rightly."""

    @property
    def id(self) -> str: ...

    @property
    def right(self) -> bool: ...


G = TypeVar("G", bound=Graded)


@dataclass(frozen=True, slots=True)
class Equality:
    """Whether accuracy stayed equal.

    n           pairs.
    before      accuracy of the first model.
    after       accuracy of the second.
    lost        samples that only the first answered rightly.
    gained      samples that only the second answered rightly.
    difference  after - before.
    lower       one-sided lower bound of the true difference.
    margin      the loss that counts as none.
    alpha       of samples like these, the share in which a model that loses exactly the margin passes as equal.
    equal       lower > -margin, on at least `least` pairs.
    reason      why it is not shown to be equal, else "".
    """

    n: int
    before: float
    after: float
    lost: int
    gained: int
    difference: float
    lower: float
    margin: float
    alpha: float
    equal: bool
    reason: str


def equal_accuracy(
    before: Sequence[Graded],
    after: Sequence[Graded],
    *,
    margin: float = 0.01,
    alpha: float = 0.05,
    least: int = LEAST_PAIRS,
) -> Equality:
    """Whether the second model is at most `margin` less accurate than the first, on the same samples (by id).

    Raises ValidationError where the two did not answer the same samples, each once, and for a margin or alpha outside
    (0, 1)."""
    for name, value in (("margin", margin), ("alpha", alpha)):
        if not 0 < value < 1:
            raise ValidationError(f"{name} must be above 0 and below 1, got {value}.", param=name)
    pairs = pair(before, after)
    n = len(pairs)
    lost = sum(a.right and not b.right for a, b in pairs)
    gained = sum(b.right and not a.right for a, b in pairs)
    lower = lower_bound(lost, gained, n, alpha)
    difference = (gained - lost) / n
    reason = ""
    if lower <= -margin:
        reason = f"the bound {100 * lower:+.2f} points is not above {-100 * margin:+g}"
        if difference > -margin:
            reason += f"; with more than {n} pairs it may be"
    elif n < least:
        reason = f"{n} pairs, at least {least} are wanted"
    shares = [sum(rows[side].right for rows in pairs) / n for side in (0, 1)]
    return Equality(n, shares[0], shares[1], lost, gained, difference, lower, margin, alpha, not reason, reason)


def pair(before: Sequence[G], after: Sequence[G]) -> list[tuple[G, G]]:
    """The rows of two models by their samples, in the order of the first. Raises ValidationError unless both answered
    the same samples, at least one, each once."""
    first, second = _by_id(before, "before"), _by_id(after, "after")
    if first.keys() != second.keys() or not first:
        odd = sorted(first.keys() ^ second.keys())
        what = f"{len(odd)} samples have one answer, such as {odd[0]!r}" if odd else "there is no sample"
        raise ValidationError(
            f"the two did not answer the same samples: {what}.",
            param="after",
            hint="Ask both the same samples, with the same seed and number.",
        )
    return [(row, second[name]) for name, row in first.items()]


def _by_id(rows: Sequence[G], param: str) -> Mapping[str, G]:
    found = {row.id: row for row in rows}
    if len(found) < len(rows):
        raise ValidationError(f"{len(rows)} rows have {len(found)} different ids; a sample counts once.", param=param)
    return found


def lower_bound(lost: int, gained: int, n: int, alpha: float = 0.05) -> float:
    """The one-sided lower (1 - alpha) bound of p_after - p_before from n pairs, of which `lost` were right before only
    and `gained` after only: the difference at which Tango's score is the normal quantile. -1 <= bound <= difference.

    Raises ValidationError for counts that cannot be."""
    if n < 1 or min(lost, gained) < 0 or lost + gained > n:
        raise ValidationError(f"{lost} lost and {gained} gained of {n} pairs cannot be.", param="lost")
    if lost == n:
        return -1.0
    quantile = NormalDist().inv_cdf(1 - alpha)
    low, high = -1.0, (gained - lost) / n  # the score falls from here to there, and is 0 at the difference
    for _ in range(60):
        middle = (low + high) / 2
        if score(lost, gained, n, middle) > quantile:
            low = middle
        else:
            high = middle
    return low


def score(lost: int, gained: int, n: int, difference: float) -> float:
    """Tango's statistic of H0: p_after - p_before = difference, about N(0, 1) under it.

    With c gained, b lost and d the difference it is (c - b - n d) / sqrt(n (2 q + d (1 - d))). q is the likeliest
    probability of a lost answer under H0: the larger root of 2 n q^2 - (b + c - d (2 n - c + b)) q - b d (1 - d) = 0,
    where the derivative of the trinomial likelihood is 0."""
    linear = lost + gained - difference * (2 * n - gained + lost)
    constant = lost * difference * (1 - difference)
    q = (linear + math.sqrt(max(0.0, linear * linear + 8 * n * constant))) / (4 * n)
    variance = n * (2 * q + difference * (1 - difference))
    excess = gained - lost - n * difference
    if variance <= 0:
        return math.copysign(math.inf, excess) if excess else 0.0
    return excess / math.sqrt(variance)
