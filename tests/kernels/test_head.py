"""The head's statistics against those of the logits that `linear` gives, and against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kit.weights import CASES, random_qtensor
from torch import Tensor

from dfastllm.errors import ValidationError
from dfastllm.kernels.activations import HeadStats
from dfastllm.kernels.extension import native, set_threads, threads
from dfastllm.kernels.linear import head_stats, linear, pack, softcap
from dfastllm.kernels.linear_plain import stats_of
from dfastllm.kernels.packed import Packed, QTensor
from dfastllm.kernels.token_set import TokenSet

needs_native = pytest.mark.skipif(native() is None, reason="no native kernels")


def agree(got: HeadStats, wanted: HeadStats) -> None:
    """What is picked, exactly; what is summed, to rounding."""
    for name in ("token", "finite", "top", "second", "top_values", "top_ids"):
        np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name), name)
    np.testing.assert_allclose(got.norm, wanted.norm, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got.entropy, wanted.entropy, rtol=2e-5, atol=2e-6)


def dense(logits: Tensor) -> tuple[Tensor, Packed]:
    """Inputs and a weight whose product is exactly these logits [rows, n]: the identity times their columns."""
    return torch.eye(logits.shape[0]), pack(QTensor("f32", logits.T.contiguous()))


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(CASES),
    st.integers(1, 90),
    st.sampled_from([1, 2, 63, 64, 65, 300, 1023, 1024, 1025, 2500]),
    st.integers(0, 2**31),
    st.sampled_from([0.01, 1.0, 10.0]),
    st.integers(0, 3),
    st.sampled_from([0, 1, 5, 40]),
    st.sampled_from([0.0, 0.0, 3.0, 30.0]),
)
def test_as_of_the_logits(
    case: tuple[str, bool], rows: int, n: int, seed: int, size: float, bans: int, topk: int, cap: float
) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight = pack(random_qtensor(case[0], n, 64, mins=case[1], seed=seed))
    x, bias = torch.randn(rows, 64, generator=draw) * size, torch.randn(n, generator=draw)
    ban = tuple(torch.randint(0, n, (bans,), generator=draw).tolist())
    got = head_stats(x, weight, bias, ban=ban, entropy=True, topk=topk, cap=cap)
    logits = linear(x, weight, bias)
    capped = softcap(logits.clone(), cap)
    agree(got, stats_of(capped, ban, True, topk))
    if cap:
        exact = cap * torch.tanh(logits.double() / cap)
        torch.testing.assert_close(capped.double(), exact, rtol=0, atol=3e-7 * cap)
    plain = head_stats(x, weight, bias, ban=ban, cap=cap)  # the same bits whatever else is asked for
    for name in ("token", "top", "second", "norm"):
        assert np.array_equal(getattr(plain, name), getattr(got, name)), name
    assert not plain.entropy.any()


@needs_native
def test_rows_and_threads_change_no_bit() -> None:
    before, weight = threads(), pack(random_qtensor("w4g", 5000, 96))  # the last of its chunks has 15 panels
    x = torch.randn(150, 96)
    whole = head_stats(x, weight, ban=(7, 4999), entropy=True, topk=9)
    try:
        for count in (1, 2, 3, 8):
            set_threads(count)
            for first, rows in ((0, 150), (149, 1), (63, 2), (70, 3), (30, 70)):
                part = head_stats(x[first : first + rows], weight, ban=(4999, 7, 7), entropy=True, topk=9)
                for name in HeadStats.__slots__:
                    assert np.array_equal(getattr(part, name), getattr(whole, name)[first : first + rows]), name
    finally:
        set_threads(before)


def test_ties_give_the_lowest_id() -> None:
    logits = torch.zeros(3, 3000)
    logits[0, [2999, 70, 1500]] = 5.0
    logits[1, [64, 63]] = 5.0
    stats = head_stats(*dense(logits), topk=4)
    assert stats.token.tolist() == [70, 63, 0]
    assert stats.top.tolist() == stats.top_values[:, 0].tolist() == [5.0, 5.0, 0.0]
    assert stats.second.tolist() == [5.0, 5.0, 0.0]
    assert stats.top_ids.tolist() == [[70, 1500, 2999, 0], [63, 64, 0, 1], [0, 1, 2, 3]]
    assert head_stats(*dense(logits), ban=(70, 63, 0)).token.tolist() == [1500, 64, 1]


def test_more_candidates_than_there_are() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    stats = head_stats(*dense(logits), ban=(0,), topk=5)
    assert stats.top_ids.tolist() == [[1, 2, -1, -1, -1]]
    assert stats.top_values[0].tolist() == [3.0, 2.0, -np.inf, -np.inf, -np.inf]
    alone = head_stats(*dense(logits), ban=(0, 2), entropy=True, topk=1)
    assert (alone.token[0], alone.second[0], alone.norm[0]) == (1, -np.inf, 3.0)
    assert 0 <= alone.entropy[0] < 1e-30
    none = head_stats(*dense(logits), ban=(0, 1, 2), entropy=True, topk=1)
    assert (none.token[0], none.finite[0], none.top[0], none.norm[0]) == (-1, True, -np.inf, -np.inf)
    assert none.top_ids.tolist() == [[-1]]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("ban", [(), (2, 1500)])
def test_a_row_that_is_not_finite_is_told(value: float, ban: tuple[int, ...]) -> None:
    logits = torch.randn(70, 2000)
    logits[1, 1500] = value  # banned or not
    logits[69, 1999] = value
    x, weight = torch.eye(70), pack(QTensor("f32", logits.T.contiguous()))
    stats = head_stats(x, weight, ban=ban, entropy=True, topk=3)
    # An infinite weight makes NaN of every row of the product with it (0 * inf): all rows, as in `linear`.
    agree(stats, stats_of(linear(x, weight), ban, True, 3))
    one = head_stats(
        torch.full((1, 1), value), pack(QTensor("f32", torch.ones(2000, 1))), ban=ban, entropy=True, topk=2
    )
    assert (one.token[0], one.finite[0]) == (-1, False)
    assert np.isnan([one.top[0], one.second[0], one.norm[0], one.entropy[0]]).all()
    assert one.top_ids.tolist() == [[-1, -1]]


def test_one_bad_row_leaves_the_others_alone() -> None:
    weight, x = pack(random_qtensor("w8g", 1200, 64)), torch.randn(5, 64)
    clean = head_stats(x, weight, entropy=True, topk=3)
    x[2, 5] = torch.nan
    stats = head_stats(x, weight, entropy=True, topk=3)
    assert stats.finite.tolist() == [True, True, False, True, True]
    others = [0, 1, 3, 4]
    for name in HeadStats.__slots__:
        np.testing.assert_allclose(getattr(stats, name)[others], getattr(clean, name)[others], rtol=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e-30, 80.0, 1e4, 1e30, 1e38])
def test_logits_of_every_size(size: float) -> None:
    values = torch.randn(4, 1500, generator=torch.Generator().manual_seed(3)).clamp(-3, 3) / 3 * size
    values[3] = torch.linspace(-size, size, 1500)
    stats = head_stats(*dense(values), entropy=True, topk=2)
    agree(stats, stats_of(values, (), True, 2))
    assert np.isfinite(stats.norm).all()
    assert (stats.entropy >= 0).all()
    if size == 0:
        np.testing.assert_allclose(stats.entropy, np.log(1500), rtol=1e-6)


@pytest.mark.parametrize("format", ["bf16", "w8g", "w4g"])
def test_against_float64(format: str) -> None:
    """A vocabulary of many chunks, of logits as a trained model gives them."""
    tensor, x = random_qtensor(format, 20_011, 64, seed=1), torch.randn(3, 64) * 0.3
    stats = head_stats(x, pack(tensor), entropy=True, topk=10)
    logits = linear(x, pack(tensor)).double().numpy()
    norm = np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)) + logits.max(axis=1)
    p = np.exp(logits - norm[:, None])
    np.testing.assert_allclose(stats.norm, norm, rtol=1e-6)
    np.testing.assert_allclose(stats.entropy, -(p * (logits - norm[:, None])).sum(axis=1), rtol=1e-5)
    assert np.array_equal(stats.top_ids, np.argsort(-logits, axis=1, kind="stable")[:, :10])


def test_bad_input_is_named() -> None:
    weight, x = pack(random_qtensor("w8g", 70, 64)), torch.randn(1, 64)
    with pytest.raises(ValidationError, match="banned ids must be 0 to 69, got \\[70, -1\\]"):
        head_stats(x, weight, ban=(3, 70, -1))
    with pytest.raises(ValidationError, match="topk must not be negative"):
        head_stats(x, weight, topk=-1)
    with pytest.raises(ValidationError, match="must have 64 columns"):
        head_stats(torch.randn(1, 32), weight)
    assert head_stats(torch.randn(0, 64), weight, topk=2).top_ids.shape == (0, 2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_cap_hides_nothing_that_is_not_finite(value: float) -> None:
    x, weight = torch.randn(3, 64), pack(random_qtensor("f32", 130, 64))
    x[1, 5] = value
    stats, logits = head_stats(x, weight, cap=30.0), linear(x, weight)
    assert stats.finite.tolist() == [True, False, True]
    assert torch.isfinite(softcap(logits, 30.0).sum(1)).tolist() == [True, False, True]


def random_set(kind: str, n: int, best: int, draw: torch.Generator) -> TokenSet | None:
    """A set of ids of a row whose best logit is `best`."""
    some = torch.randint(0, n, (min(n, 5),), generator=draw).tolist()
    match kind:
        case "none":
            return None
        case "empty":
            return TokenSet((), n)
        case "best":
            return TokenSet([best], n)
        case "some":
            return TokenSet([*some, *some, best], n)  # duplicates count once
        case "allowed":
            return TokenSet.outside(some, n)
        case "all but one":
            return TokenSet.outside([some[0]], n)
        case _:
            return TokenSet(range(n), n)


KINDS = ("none", "empty", "best", "some", "allowed", "all but one", "all")


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(CASES),
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=70),
    st.sampled_from([1, 2, 63, 64, 65, 1023, 1025, 2500]),
    st.integers(0, 2**31),
    st.sampled_from([0.0, 1.0]),
    st.integers(0, 3),
    st.sampled_from([0, 4]),
    st.integers(1, 4),
)
def test_barred_ids_change_the_choice_alone(
    case: tuple[str, bool], kinds: list[str], n: int, seed: int, size: float, bans: int, topk: int, count: int
) -> None:
    """Against the logits that `linear` gives, and the same call without barred ids. size 0: all logits are ties."""
    draw, rows = torch.Generator().manual_seed(seed), len(kinds)
    weight, x = pack(random_qtensor(case[0], n, 64, mins=case[1], seed=seed)), torch.randn(rows, 64, generator=draw)
    x *= size
    ban = tuple(torch.randint(0, n, (bans,), generator=draw).tolist())
    left = linear(x, weight).numpy()
    left[:, list(ban)] = -np.inf
    sets = [random_set(kind, n, int(left[r].argmax()), draw) for r, kind in enumerate(kinds)]
    for r, ids in enumerate(sets):
        left[r, [i for i in range(n) if ids is not None and i in ids]] = -np.inf
    before = threads()
    try:
        set_threads(count)
        got = head_stats(x, weight, ban=ban, barred=sets, entropy=True, topk=topk)
    finally:
        set_threads(before)
    best = left.max(axis=1)
    np.testing.assert_array_equal(got.choice, np.where(best > -np.inf, left.argmax(axis=1), -1))
    np.testing.assert_array_equal(got.choice_logit, best)
    without = head_stats(x, weight, ban=ban, entropy=True, topk=topk)
    for name in HeadStats.__slots__:
        if not name.startswith("choice"):
            assert np.array_equal(getattr(got, name), getattr(without, name)), name
    assert np.array_equal(without.choice, without.token)
    assert np.array_equal(without.choice_logit, without.top)


def test_a_choice_from_a_row_that_is_not_finite() -> None:
    weight, x = pack(random_qtensor("f32", 130, 64)), torch.randn(3, 64)
    x[1, 5] = torch.nan
    stats = head_stats(x, weight, barred=[TokenSet([3], 130)] * 3)
    assert stats.finite.tolist() == [True, False, True]
    assert stats.choice[1] == -1
    assert np.isnan(stats.choice_logit).tolist() == [False, True, False]


def test_a_bad_set_is_named() -> None:
    weight, x = pack(random_qtensor("w8g", 70, 64)), torch.randn(2, 64)
    with pytest.raises(ValidationError, match=r"ids of a set must be 0 to 69, got \[70, -1\]"):
        TokenSet([3, 70, -1], 70)
    with pytest.raises(ValidationError, match="a set for each of 2 rows, got 1"):
        head_stats(x, weight, barred=[TokenSet([3], 70)])
    with pytest.raises(ValidationError, match="sets must be of 70 ids, got one of 71"):
        head_stats(x, weight, barred=[None, TokenSet([3], 71)])


def test_many_rows_of_a_large_vocabulary() -> None:
    """600 rows of 8,000 ids: the chunks' parts are merged by the pool, every row of them."""
    draw, weight = torch.Generator().manual_seed(4), pack(random_qtensor("w8", 8000, 32))
    x = torch.randn(600, 32, generator=draw)
    before, wanted = threads(), stats_of(linear(x, weight), (), True, 3)
    try:
        for count in (1, 3):
            set_threads(count)
            agree(head_stats(x, weight, entropy=True, topk=3), wanted)
    finally:
        set_threads(before)


@needs_native
def test_ties_give_the_lowest_ids_whichever_thread_comes_first() -> None:
    """Every logit is the same: what is kept of the first chunk must not depend on whether it came first."""
    before, weight = threads(), pack(QTensor("f32", torch.zeros(60_000, 4)))
    try:
        set_threads(8)
        for _ in range(20):
            assert head_stats(torch.ones(2, 4), weight, topk=6).top_ids.tolist() == [[*range(6)]] * 2
    finally:
        set_threads(before)
