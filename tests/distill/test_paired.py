"""Equal accuracy: the score and its bound against a published interval, the likelihood by brute force, and the exact
share of samples in which a model that is too bad would pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfastllm.distill.paired import LEAST_PAIRS, equal_accuracy, lower_bound, score
from dfastllm.errors import ValidationError

Z95 = NormalDist().inv_cdf(0.95)


@dataclass(frozen=True)
class Marked:
    id: str
    right: bool


def marked(*rights: bool) -> list[Marked]:
    return [Marked(f"s{i}", right) for i, right in enumerate(rights)]


def counted(both: int, lost: int, gained: int, neither: int) -> tuple[list[Marked], list[Marked]]:
    """Rows of two models with these counts of pairs."""
    before = [True] * both + [True] * lost + [False] * gained + [False] * neither
    after = [True] * both + [False] * lost + [True] * gained + [False] * neither
    return marked(*before), marked(*after)


@pytest.mark.parametrize(
    ("lost", "gained", "n", "bounds"),
    [
        # Airway hyper-responsiveness before and after stem cell transplantation (Bentur et al. 2009): Tango's 95 %
        # interval as Fagerland, Lydersen and Laake (2014) give it.
        (7, 1, 21, (-0.517, -0.026)),
    ],
)
def test_published_intervals(lost: int, gained: int, n: int, bounds: tuple[float, float]) -> None:
    assert lower_bound(lost, gained, n, 0.025) == pytest.approx(bounds[0], abs=5e-4)
    assert -lower_bound(gained, lost, n, 0.025) == pytest.approx(bounds[1], abs=5e-4)  # the upper one, mirrored


def likeliest(lost: int, gained: int, n: int, difference: float) -> float:
    """The probability of a lost answer that makes the counts likeliest when p_after - p_before is given: by looking at
    each of 200,001 values of it."""
    q = np.linspace(max(0.0, -difference), (1 - difference) / 2, 200_001)[1:-1]
    counts = (lost, gained, n - lost - gained)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = (np.log(q), np.log(q + difference), np.log(1 - 2 * q - difference))
    likelihood = sum(count * log for count, log in zip(counts, logs, strict=True) if count)
    return float(q[np.argmax(likelihood)])


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 400), st.data())
def test_the_score_uses_the_likeliest_probability(n: int, data: st.DataObject) -> None:
    """Against the definition: the z of the counts' difference, with the variance at the maximum of the likelihood."""
    lost = data.draw(st.integers(0, n))
    gained = data.draw(st.integers(0, n - lost))
    difference = data.draw(st.floats(-0.6, -0.001))
    q = likeliest(lost, gained, n, difference)
    variance = n * (2 * q + difference - difference**2)
    wanted = (gained - lost - n * difference) / math.sqrt(variance)
    assert score(lost, gained, n, difference) == pytest.approx(wanted, rel=2e-3, abs=2e-3)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.data())
def test_the_bound_is_where_the_score_is_the_quantile(n: int, data: st.DataObject) -> None:
    lost = data.draw(st.integers(0, n))
    gained = data.draw(st.integers(0, n - lost))
    bound = lower_bound(lost, gained, n)
    assert -1 <= bound <= (gained - lost) / n
    if bound > -1:
        assert score(lost, gained, n, bound - 1e-9) > Z95 - 1e-4 * max(1.0, Z95)
        assert score(lost, gained, n, bound + 1e-9) < Z95 + 1e-4 * max(1.0, Z95)
    if gained + 1 + lost <= n:
        assert lower_bound(lost, gained + 1, n) > bound - 1e-12  # one more gained is never worse
    if lost:
        assert lower_bound(lost - 1, gained, n) > bound - 1e-12


def passing_share(n: int, lost: float, margin: float) -> float:
    """The probability that a model which loses exactly `margin` passes as equal: the sum over all counts of pairs."""
    gained = lost - margin
    total = 0.0
    for b in range(n + 1):
        if abs(b - n * lost) > 8 * math.sqrt(n * lost) + 8:
            continue
        for c in range(n - b + 1):
            if abs(c - n * gained) > 8 * math.sqrt(n * gained) + 8:
                continue
            if score(b, c, n, -margin) > Z95:
                same = n - b - c
                log = math.lgamma(n + 1) - math.lgamma(b + 1) - math.lgamma(c + 1) - math.lgamma(same + 1)
                log += b * math.log(lost) + c * math.log(gained) + same * math.log(1 - lost - gained)
                total += math.exp(log)
    return total


@pytest.mark.parametrize("lost", [0.0101, 0.012, 0.015, 0.02, 0.04])
def test_a_model_that_loses_the_margin_passes_as_seldom_as_alpha_says(lost: float) -> None:
    """Counted exactly at 1,000 pairs and a margin of one point: at most 5.1 % of samples (0.0101 to 0.04 of the
    answers lost, the others gained back)."""
    assert 0.02 < passing_share(LEAST_PAIRS, lost, 0.01) <= 0.051


def test_coverage_by_simulation() -> None:
    """The bound lies above the truth in about 5 % of samples, whatever the accuracy: here 2 % lost, 3 % gained."""
    generator = np.random.default_rng(0)
    counts = generator.multinomial(1000, (0.02, 0.03, 0.95), 2000)
    missed = sum(lower_bound(int(b), int(c), 1000) > 0.01 for b, c, _ in counts)
    assert abs(missed - 100) <= 4 * math.sqrt(2000 * 0.05 * 0.95)


def test_equal_accuracy_of_models() -> None:
    same = equal_accuracy(*counted(950, 0, 0, 50))
    assert (same.equal, same.reason, same.n, same.before, same.after) == (True, "", 1000, 0.95, 0.95)
    assert -0.004 < same.lower < 0  # 1,000 equal pairs exclude a loss of 0.3 points and no less
    better = equal_accuracy(*counted(940, 2, 20, 38))
    assert better.equal
    assert better.difference == pytest.approx(0.018)
    worse = equal_accuracy(*counted(930, 20, 0, 50))
    assert not worse.equal
    assert "is not above -1" in worse.reason
    assert "more than" not in worse.reason  # no number of pairs will help
    unsure = equal_accuracy(*counted(930, 20, 20, 30))
    assert not unsure.equal  # no difference seen is not the same as none
    assert "with more than 1000 pairs it may be" in unsure.reason
    assert equal_accuracy(*counted(930, 20, 20, 30), margin=0.02).equal


def test_few_pairs_show_nothing() -> None:
    few = equal_accuracy(*counted(990, 0, 9, 0))
    assert not few.equal
    assert few.reason == "999 pairs, at least 1000 are wanted"
    assert equal_accuracy(*counted(990, 0, 9, 0), least=999).equal


def test_rows_are_paired_by_their_ids() -> None:
    before, after = counted(600, 100, 5, 300)
    found = equal_accuracy(before, after[::-1])
    assert (found.lost, found.gained) == (100, 5)
    with pytest.raises(ValidationError, match="1 samples have one answer, such as 's1004'"):
        equal_accuracy(before, after[:-1])
    with pytest.raises(ValidationError, match="counts once"):
        equal_accuracy(before, [*after[:-1], after[0]])
    with pytest.raises(ValidationError, match="no sample"):
        equal_accuracy([], [])


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, math.nan])
def test_bad_margins_and_levels(value: float) -> None:
    with pytest.raises(ValidationError, match="margin"):
        equal_accuracy(*counted(1, 0, 0, 0), margin=value)
    with pytest.raises(ValidationError, match="alpha"):
        equal_accuracy(*counted(1, 0, 0, 0), alpha=value)


@pytest.mark.parametrize("counts", [(-1, 0, 5), (0, -1, 5), (3, 3, 5), (0, 0, 0)])
def test_counts_that_cannot_be(counts: tuple[int, int, int]) -> None:
    with pytest.raises(ValidationError, match="cannot be"):
        lower_bound(*counts)


def test_all_lost() -> None:
    assert lower_bound(5, 0, 5) == -1.0
    assert 0.2 < lower_bound(0, 5, 5) < 1
