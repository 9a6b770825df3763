"""Rows: the dense twin against plain arithmetic, bits that depend on nothing else, and who has been looked at."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dfastllm.decode.records import token_logprob
from dfastllm.kernels.rows import DenseRows, RowStats
from dfastllm.kernels.token_set import TokenSet

torch.set_num_threads(1)


def logits(rows: int = 7, vocab: int = 53, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def fields(stats: RowStats) -> dict[str, Any]:
    return {name: getattr(stats, name) for name in RowStats.__slots__}


@pytest.mark.parametrize("ban", [(), (4,), (0, 52)])
def test_statistics_are_right(ban: tuple[int, ...]) -> None:
    values = logits()
    left = values.double().clone()
    left[:, list(ban)] = -torch.inf
    p = torch.softmax(left, dim=-1)
    best = p.sort(dim=-1, descending=True).values
    stats = DenseRows(values.clone()).stats(ban=ban, norm=True, spread=True, top=5)
    assert stats.token.tolist() == left.argmax(dim=-1).tolist()
    assert stats.best.tolist() == left.amax(dim=-1).tolist()
    assert stats.finite.all()
    np.testing.assert_allclose(stats.norm, left.logsumexp(dim=-1), atol=1e-5)
    np.testing.assert_allclose(stats.entropy, -(p * p.clamp_min(1e-300).log()).sum(dim=-1), atol=1e-5)
    np.testing.assert_allclose(stats.margin, best[:, 0] - best[:, 1], atol=1e-6)
    assert stats.ids.tolist() == left.topk(5).indices.tolist()
    assert stats.logits.tolist() == left.topk(5).values.tolist()
    assert (stats.token.dtype, stats.best.dtype, stats.norm.dtype) == (np.int64, np.float32, np.float32)


def test_ties_go_to_the_lowest_id() -> None:
    values = torch.zeros(2, 9)
    values[0, [3, 5]] = values[1, [8]] = 1.0
    stats = DenseRows(values).stats(ban=(0,), top=4)
    assert stats.token.tolist() == [3, 8]
    assert stats.ids.tolist() == [[3, 5, 1, 2], [8, 1, 2, 3]]


def test_barred_ids_are_not_chosen_and_stay_in_the_distribution() -> None:
    values = logits(4, 53)
    best = values.argmax(dim=-1).tolist()
    sets = [TokenSet([best[0]], 53), None, TokenSet.outside([7, 9], 53), TokenSet([best[3], 4], 53)]
    rows = DenseRows(values.clone())
    stats = rows.stats(ban=(4,), barred=sets, norm=True, spread=True, top=5)
    plain = rows.stats(ban=(4,), norm=True, spread=True, top=5)
    left = values.clone()
    left[:, 4] = left[0, best[0]] = left[3, best[3]] = -torch.inf
    left[2, [i for i in range(53) if i not in (7, 9)]] = -torch.inf
    assert stats.token.tolist() == left.argmax(dim=-1).tolist()
    assert stats.best.tolist() == left.amax(dim=-1).tolist()
    for name in ("finite", "norm", "entropy", "margin", "ids", "logits"):
        assert np.array_equal(getattr(stats, name), getattr(plain, name)), name
    assert torch.equal(rows.logits(), values)


def test_a_set_is_its_ids() -> None:
    ids = TokenSet([0, 63, 64, 63, 129], 130)
    assert (len(ids), ids.size, len(ids.words)) == (4, 130, 3)
    assert [i for i in range(-70, 200) if i in ids] == [0, 63, 64, 129]
    other = TokenSet.outside([0, 5], 130)
    assert [i for i in range(130) if i not in other] == [0, 5]
    assert [i for i in range(130) if i not in (ids | other)] == [5]
    assert ids.tensor(torch.device("cpu")).tolist() == [0, 63, 64, 129]


def test_banned_ids_come_last_and_the_logits_stay() -> None:
    values = logits(2, 5)
    rows = DenseRows(values.clone())
    stats = rows.stats(ban=(1, 3), norm=True, top=9)
    assert {tuple(sorted(ids[3:])) for ids in stats.ids.tolist()} == {(1, 3)}
    assert np.isneginf(stats.logits[:, 3:]).all()
    assert torch.equal(rows.logits(), values)
    assert rows.logits() is rows.logits()


def test_a_number_depends_on_no_other_row_and_no_other_number() -> None:
    values = logits(40, 2111)
    every = fields(DenseRows(values.clone()).stats(ban=(7,), norm=True, spread=True, top=6))
    for asked in ({"norm": True}, {"spread": True}, {"norm": True, "top": 3}, {}):
        for index in (range(40), [3], [0, 17, 39]):
            part = fields(DenseRows(values.clone()).select(list(index)).stats(ban=(7,), **asked))  # type: ignore[arg-type]
            for name, value in part.items():
                if value.size:
                    expected = every[name][list(index)]
                    assert np.array_equal(value, expected[:, :3] if value.ndim == 2 else expected), name


def test_not_asked_for_is_not_there() -> None:
    stats = DenseRows(logits(3)).stats()
    assert [len(x) for x in fields(stats).values()] == [3, 3, 3, 0, 0, 0, 0, 0]


def test_finite_is_of_what_was_looked_at() -> None:
    values = logits(6)
    values[1, 2] = float("nan")
    values[3, 0] = float("inf")
    values[4, 9] = float("-inf")
    rows = DenseRows(values)
    assert rows.finite().all()
    part = rows.select([0, 1, 4])
    deeper = part.select([1])
    assert rows.finite().all()
    assert deeper.stats().token[0] in range(53)
    assert rows.finite().tolist() == [True, False, True, True, True, True]
    assert part.finite().tolist() == [True, False, True]
    part.logits()
    assert rows.finite().tolist() == [True, False, True, True, False, True]
    stats = rows.stats(norm=True, spread=True, top=3)
    assert stats.finite.tolist() == [True, False, True, False, False, True]
    assert rows.finite().tolist() == stats.finite.tolist()
    assert np.isfinite(stats.norm[[0, 2, 5]]).all()
    assert stats.ids.min() >= 0
    assert stats.ids.max() < 53


def test_no_rows_at_all() -> None:
    rows = DenseRows(torch.empty(0, 11))
    stats = rows.stats(norm=True, spread=True, top=2)
    assert (len(rows), len(stats.token), len(stats.norm), len(rows.finite())) == (0, 0, 0, 0)
    assert rows.select([]).logits().shape == (0, 11)


def test_logprobs_are_of_the_raw_distribution() -> None:
    values = logits(2, 10, seed=8)
    raw = torch.log_softmax(values, dim=-1)
    stats = DenseRows(values).stats(norm=True, top=3)
    for row, token in enumerate((3, 4)):
        none, some = (token_logprob(stats, row, token, values[row, token].item(), n) for n in (0, 3))
        assert none.token == some.token == token
        assert none.top == ()
        assert none.logprob == some.logprob == pytest.approx(raw[row, token].item(), abs=1e-6)
        assert [t for t, _ in some.top] == raw[row].topk(3).indices.tolist()
        assert [x for _, x in some.top] == sorted((x for _, x in some.top), reverse=True)
