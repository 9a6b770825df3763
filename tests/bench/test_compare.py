"""Paired comparison: the bootstrap against its closed form, the false alarms counted exactly and by simulation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from dfastllm.bench.compare import LEAST_PAIRS, compare, guarded_ratio, judge, take_pairs
from dfastllm.errors import ValidationError
from dfastllm.metrics.stats import Ratio, paired_ratio, sign_interval


def tail(n: int, p: float, least: int) -> float:
    """P(Binomial(n, p) >= least)."""
    return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(least, n + 1))


def bootstrap_cdf(n: int) -> list[float]:
    """Odd n: P(median of a resample <= k-th smallest value), k = 1..n: more than half the draws are among the k
    smallest. The bootstrap distribution of a median has this closed form (Efron 1979, section 3)."""
    assert n % 2
    return [tail(n, k / n, (n + 1) // 2) for k in range(1, n + 1)]


@pytest.mark.parametrize("n", [5, 7, 15, 31])
def test_the_bootstrap_interval_is_the_closed_form_one(n: int) -> None:
    values = np.random.default_rng(n).lognormal(0, 0.2, n)
    got = paired_ratio(list(values), [1.0] * n, draws=40000)
    ordered, cdf = sorted(values), bootstrap_cdf(n)
    # The drawn frequencies stray from the probabilities by a standard error of 0.0008; both neighbours are right when a
    # probability is that close to the level.
    for level, end in ((0.025, got.low), (0.975, got.high)):
        near = {ordered[next(i for i, p in enumerate(cdf) if p >= level + slack)] for slack in (-0.003, 0, 0.003)}
        assert min(near) - 1e-12 <= end <= max(near) + 1e-12


def order_of_low_end(n: int) -> int:
    """Which of n sorted ratios the interval begins at; n of both kinds, the values are their own order."""
    low = guarded_ratio([float(k) for k in range(1, n + 1)], [1.0] * n).low
    return math.floor(low)  # the median of an even number may lie between two


@pytest.mark.parametrize("n", [*range(LEAST_PAIRS, 26), 40, 61, 100])
def test_false_alarms_stay_below_the_stated_rate(n: int) -> None:
    """The low end lies above the true median when fewer values lie below the median than its order: exact for every
    continuous distribution. 2.5 % are stated."""
    assert 1 - tail(n, 0.5, order_of_low_end(n)) <= 0.025


def test_the_bootstrap_alone_would_not_keep_the_rate() -> None:
    cdf = bootstrap_cdf(7)
    order = next(k for k, p in enumerate(cdf, start=1) if p >= 0.025)
    assert 1 - tail(7, 0.5, order) > 0.05


@pytest.mark.parametrize(("n", "order"), [(6, 1), (8, 1), (9, 2), (12, 3), (15, 4), (20, 6), (25, 8), (50, 18)])
def test_sign_interval_has_the_orders_of_the_published_table(n: int, order: int) -> None:
    """Orders of the 95 % interval of a median, as in tables of the sign test."""
    values = [float(k) for k in range(1, n + 1)]
    assert sign_interval(values) == (order, n + 1 - order)
    assert sign_interval(values[::-1]) == (order, n + 1 - order)
    assert tail(n, 0.5, n - order + 1) <= 0.025 < tail(n, 0.5, n - order)


def test_few_values_promise_nothing() -> None:
    assert sign_interval([1.0] * 5) == (-math.inf, math.inf)


def noisy(true: float, noise: float, seed: int) -> tuple[Callable[[], float], Callable[[], float]]:
    """Two sides of one machine: drift common to both, noise of each, now and then a hiccup."""
    random = np.random.default_rng(seed)
    turn = 0

    def side(mean: float) -> Callable[[], float]:
        def measure() -> float:
            nonlocal turn
            turn += 1
            drift = 1 + 0.3 * math.sin(turn / 15)
            hiccup = 1.5 if random.random() < 0.05 else 1.0
            return mean * drift * hiccup * math.exp(random.normal(0, noise))

        return measure

    return side(0.1), side(0.1 * true)


def verdicts(true: float, noise: float, runs: int, pairs: int = 15) -> Counter[str]:
    return Counter(compare(*noisy(true, noise, seed), pairs=pairs).verdict for seed in range(runs))


def test_no_false_alarms_beyond_the_stated_rate() -> None:
    """At exactly the margin, the worst case, the stated 2.5 % (and four standard errors of the simulation)."""
    runs = 200
    assert verdicts(1.05, 0.03, runs)["fail"] <= runs * 0.025 + 4 * math.sqrt(runs * 0.025 * 0.975)
    same = verdicts(1.0, 0.03, 100)
    assert same["fail"] == 0
    assert same["pass"] > 75


def test_a_regression_of_ten_per_cent_is_caught() -> None:
    got = verdicts(1.10, 0.02, 100)
    assert got["fail"] >= 90
    assert got["pass"] == 0


def test_no_verdict_when_the_noise_wins() -> None:
    got = verdicts(1.0, 0.5, 100)
    assert got["no verdict"] >= 85
    assert got["fail"] <= 5
    found = compare(*noisy(1.0, 0.5, 1), pairs=15)
    assert found.verdict == "no verdict"
    assert "holds the limit 1.050" in found.reason


@pytest.mark.parametrize(
    ("low", "high", "n", "verdict"),
    [
        (0.9, 1.05, 15, "pass"),
        (0.9, 1.0501, 15, "no verdict"),
        (1.05, 1.2, 15, "no verdict"),
        (1.0501, 1.2, 15, "fail"),
        (0.5, 0.6, LEAST_PAIRS - 1, "no verdict"),
        (2.0, 3.0, LEAST_PAIRS - 1, "no verdict"),
        (2.0, 3.0, LEAST_PAIRS, "fail"),
    ],
)
def test_judge(low: float, high: float, n: int, verdict: str) -> None:
    got, reason = judge(Ratio((low + high) / 2, low, high, n), 0.05)
    assert got == verdict
    assert bool(reason) == (verdict == "no verdict")


def test_pairs_alternate_after_the_warm_up() -> None:
    order = ""

    def side(name: str) -> Callable[[], float]:
        def measure() -> float:
            nonlocal order
            order += name
            return float(len(order))

        return measure

    done: list[int] = []
    before, after = take_pairs(side("a"), side("b"), 3, warmups=2, progress=done.append)
    assert order == "abab" + "ab" + "ba" + "ab"
    assert before == [5.0, 8.0, 9.0]
    assert after == [6.0, 7.0, 10.0]
    assert done == [1, 2, 3]


@pytest.mark.parametrize("margin", [-0.1, math.nan, math.inf])
def test_a_bad_margin_is_refused_before_measuring(margin: float) -> None:
    with pytest.raises(ValidationError, match="margin"):
        compare(lambda: pytest.fail("measured"), lambda: pytest.fail("measured"), margin=margin)


@pytest.mark.parametrize(("pairs", "warmups"), [(0, 2), (-1, 2), (5, -1)])
def test_bad_numbers_of_pairs_are_refused(pairs: int, warmups: int) -> None:
    with pytest.raises(ValidationError, match="pairs"):
        take_pairs(lambda: 1.0, lambda: 1.0, pairs, warmups=warmups)


def test_the_sides_are_reported() -> None:
    found = compare(lambda: 2.0, lambda: 3.0, pairs=6)
    assert (found.base.median, found.new.median, found.ratio.median) == (2.0, 3.0, 1.5)
    assert found.verdict == "fail"
