"""Draft lengths by what pays: the optimum against every combination, and behaviour under known costs."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfastllm.engine.speculate.length import PLAIN_EVERY, TRIAL, Candidate, Chances, CostTable, Pace, best_lengths

RATES = st.floats(0.0, 1.0, allow_nan=False)


@given(
    rates=st.lists(st.tuples(RATES, st.integers(1, 3), st.booleans()), min_size=1, max_size=4),
    others=st.integers(0, 3),
    steps=st.lists(st.floats(0.0, 2.0), min_size=13, max_size=13),
    each=st.floats(0.0, 1.0),
    parallel=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_it_is_the_best_of_all_combinations(
    rates: list[tuple[float, int, bool]], others: int, steps: list[float], each: float, parallel: bool
) -> None:
    """Lookups beside one method whose drafts cost by the longest of them (or once, of a model that drafts a block)."""
    candidates = [Candidate("model" if m else "lookup", n, rate ** np.arange(1.0, n + 1)) for rate, n, m in rates]
    total = sum(c.most for c in candidates)
    seconds = 1.0 + np.cumsum([0.0, *steps])[: total + 1]
    drafting = each * np.array([0.0, 1, 1, 1] if parallel else [0.0, 1, 2, 3])
    tokens = len(candidates) + others

    def rate_of(lengths: tuple[int, ...]) -> float:
        longest = max((n for c, n in zip(candidates, lengths, strict=True) if c.method == "model"), default=0)
        gain = sum(float(c.worth[:n].sum()) for c, n in zip(candidates, lengths, strict=True))
        return float((tokens + gain) / (seconds[sum(lengths)] + drafting[longest]))

    got = best_lengths(candidates, tokens, seconds, {"model": drafting})
    every = itertools.product(*(range(c.most + 1) for c in candidates))
    assert rate_of(tuple(got)) == pytest.approx(max(map(rate_of, every)), rel=1e-9)


def test_costs_between_measured_numbers_of_rows() -> None:
    table = CostTable()
    assert table.seconds(np.array([1, 50])).tolist() == [0, 0]
    table.add(4, 1.0)
    assert table.seconds(np.array([1, 4, 9])).tolist() == [0.25, 1.0, 1.0]
    table.add(8, 3.0)
    assert table.seconds(np.array([4, 6, 8, 100])).tolist() == [1.0, 2.0, 3.0, 3.0]
    table.add(6, 0.5)  # never falling
    assert table.seconds(np.array([4, 6, 7])).tolist() == [1.0, 1.0, 2.0]


def test_noise_counts_little_and_a_change_is_followed() -> None:
    table = CostTable()
    rng = np.random.default_rng(0)
    for _ in range(200):
        table.add(4, 1.0 + (50.0 if rng.random() < 0.02 else abs(0.05 * rng.standard_normal())))
    assert 0.95 < table.seconds(np.array([4]))[0] < 1.4
    for _ in range(40):
        table.add(4, 3.0)
    assert table.seconds(np.array([4]))[0] == pytest.approx(3.0, rel=0.02)


def test_chances_are_by_position_and_given_what_came_before() -> None:
    chances = Chances(4)
    for _ in range(400):
        chances.add(3, 1, keep=1.0)  # the first stands, the second does not, nobody looked at the third
    assert chances.given(0.5, 2.0) == pytest.approx([401 / 402, 1 / 402, 0.5, 0.5])


def simulate(
    steps: int,
    sequences: int,
    rate: Callable[[int], float],
    cost: Callable[[int], float],
    each: float,
    seed: int = 0,
    noise: float = 0.02,
) -> tuple[float, float, list[int]]:
    """A world with known costs: (tokens per second with the pace, plain, draft tokens per step). each: seconds of one
    forward of the drafter; 0: a lookup."""
    pace, rng = Pace(8), np.random.default_rng(seed)
    tokens = seconds = 0.0
    used = []
    passes = {"m": list(range(6))} if each else {}
    for step in range(steps):
        asks = [(f"r{i}", "m", 5) for i in range(sequences)]
        lengths = [0] * sequences if pace.resting() else pace.lengths(asks, sequences, sequences, passes)
        drafting = each * max(lengths)
        if drafting:
            pace.drafted("m", sum(n > 0 for n in lengths), max(lengths), drafting)
        took = cost(sequences + sum(lengths)) * (1 + noise * abs(rng.standard_normal()))
        made = 0
        for (request, method, _), n in zip(asks, lengths, strict=True):
            stood = 0
            while stood < n and rng.random() < rate(step):
                stood += 1
            made += 1 + stood
            if n:
                pace.judged(request, method, n, stood)
        pace.took(sequences, sequences + sum(lengths), made, took, drafting)
        tokens, seconds = tokens + made, seconds + took + drafting
        used.append(sum(lengths))
    return tokens / seconds, sequences / cost(sequences), used


def memory_bound(rows: int) -> float:
    return 1.0 + 0.02 * rows


def compute_bound(rows: int) -> float:
    return 0.1 + 1.0 * rows


def test_it_drafts_where_rows_are_cheap_and_drafts_are_good() -> None:
    got, plain, used = simulate(300, 1, lambda _: 0.9, memory_bound, each=0.05)
    assert got > 2.5 * plain
    assert np.mean(used[50:]) > 4


@pytest.mark.parametrize("sequences", [1, 4, 16])
@pytest.mark.parametrize(
    ("rate", "cost", "each"),
    [(0.02, memory_bound, 0.05), (0.0, memory_bound, 0.0), (0.5, compute_bound, 0.05), (0.9, memory_bound, 3.0)],
)
def test_it_never_costs_much(sequences: int, rate: float, cost: Callable[[int], float], each: float) -> None:
    """Bad drafts, dear rows or a dear drafter: within 3% of plain decoding, the first tries included."""
    got, plain, used = simulate(1500, sequences, lambda _: rate, cost, each, noise=0.0)
    assert got > 0.97 * plain
    assert np.mean([n == 0 for n in used[100:]]) > 0.9


def test_it_finds_the_best_fixed_length() -> None:
    """A known optimum: geometric acceptance 0.7, rows at 10% of a step each."""

    def cost(rows: int) -> float:
        return 1.0 + 0.1 * rows

    def of(k: int) -> float:
        return sum(0.7**j for j in range(k + 1)) / (cost(1 + k) + 0.02 * k)

    best = max(range(6), key=of)
    got, _, used = simulate(1200, 1, lambda _: 0.7, cost, each=0.02, noise=0.0)
    assert 0 < best < 5
    assert abs(np.mean(used[100:]) - best) < 1.5  # the optimum is flat
    assert got > 0.93 * of(best)


def test_it_recovers_when_drafts_become_good() -> None:
    _, _, used = simulate(3000, 4, lambda step: 0.0 if step < 1000 else 0.9, memory_bound, each=0.05)
    assert np.mean(used[500:1000]) < 0.5
    assert np.mean(used[2000:]) > 10


def test_plain_steps_are_measured_again() -> None:
    _, _, used = simulate(3 * PLAIN_EVERY, 1, lambda _: 0.95, memory_bound, each=0.0)
    assert 2 <= sum(n == 0 for n in used) <= 12


def test_what_loses_as_a_whole_is_left_for_a_while() -> None:
    """Chances and costs that promise a gain which is not there: time that nobody measured goes into every draft."""
    pace, steps, drafted = Pace(8), 0, 0
    for _ in range(4000):
        lengths = [0] if pace.resting() else pace.lengths([("r", "m", 3)], 1, 1, {})
        n = lengths[0]
        pace.took(1, 1 + n, 1 + n, 1.0, 5.0 if n else 0.0)  # drafting is measured by the whole only
        if n:
            pace.judged("r", "m", n, n)
        steps, drafted = steps + 1, drafted + (n > 0)
    assert TRIAL <= drafted < 0.03 * steps


def test_prompts_that_a_drafter_reads_count_against_it() -> None:
    """Drafts are always right, but every step reads prompts, and so does the drafter."""
    for drafting, leaves in ((5.0, True), (1.0, False)):
        pace, drafted = Pace(8), 0
        pace.took(1, 1, 1, 1.0, 0.0)
        for _ in range(1000):
            lengths = [0] if pace.resting() else pace.lengths([("r", "m", 3)], 1, 1, {})
            if lengths[0]:
                pace.mixed(1, lengths[0], drafting)
                pace.judged("r", "m", lengths[0], lengths[0])
                drafted += 1
        assert (drafted < 100) == leaves


def test_a_whole_that_gains_is_never_left() -> None:
    pace, drafted = Pace(8), 0
    for _ in range(1000):
        lengths = [0] if pace.resting() else pace.lengths([("r", "m", 3)], 1, 1, {})
        n = lengths[0]
        pace.took(1, 1 + n, 1 + n, 1.0, 0.5 if n else 0.0)
        if n:
            pace.judged("r", "m", n, n)
        drafted += n == 3
    assert drafted > 950
