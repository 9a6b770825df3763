"""The head's statistics under Triton's interpreter: the twin's numbers, ties, bans, bars, and rows of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.kit.interpreter import device_weight, lent, needs_interpreter, random_weight
from torch import Tensor

from dfastllm.kernels.packed import QTensor
from dfastllm.kernels.triton import plain, weight
from dfastllm.kernels.triton.plain import WORDS

pytestmark = [needs_interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
module = lent(pytest.importorskip("dfastllm.kernels.triton.head"))
NO_BAN = torch.tensor([-1])


def check(got: Tensor, wanted: Tensor, top: int, atol: float = 2e-5) -> None:
    """Ids and flags equal, floats close; of rows that are not finite only the choice and the flag."""
    whole = wanted[:, 2] == 1
    ints = [0, 2]
    assert torch.equal(got[:, ints], wanted[:, ints])
    exact = [6, 7, *range(WORDS, WORDS + top)]
    assert torch.equal(got[whole][:, exact], wanted[whole][:, exact])
    close = [1, 3, 4, 5, *range(WORDS + top, WORDS + 2 * top)]
    mine, theirs = (x[whole][:, close].contiguous().view(torch.float32) for x in (got, wanted))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=atol)


def both(format: str, rows: Tensor, matrix: QTensor, **asked: Any) -> tuple[Tensor, Tensor]:
    packed = device_weight(format, matrix)
    x = plain.prepare(rows, weight.kind_of(packed.format))
    asked = {"ban": NO_BAN, "invariant": True, **asked}
    return module.head_stats(x, packed, **asked), plain.head_stats(x, packed, **asked)


@pytest.mark.parametrize("format", ["f32", "f16", "bf16", "fp8", "w8", "w8g", "w4m", "w6g"])
def test_formats(format: str) -> None:
    matrix = random_weight(format, 150, 64)
    check(*both(format, torch.randn(3, 64) / 8, matrix, top=3), 3)


@pytest.mark.parametrize(("n", "rows", "cap", "top"), [(1, 1, 0.0, 1), (128, 17, 5.0, 0), (700, 5, 0.0, 12)])
def test_sizes(n: int, rows: int, cap: float, top: int) -> None:
    check(*both("f32", torch.randn(rows, 32), random_weight("f32", n, 32), cap=cap, top=top), top)


def test_more_of_the_best_than_a_tile_has() -> None:
    check(*both("f32", torch.randn(2, 32), random_weight("f32", 160, 32), top=131), 131)


def test_the_lowest_of_equal_ids() -> None:
    """Within a tile and over several, for the best, the choice and all of the best tokens."""
    codes = torch.zeros(400, 32)
    codes[[5, 9, 130, 390], 0] = 1.0
    rows = torch.zeros(2, 32)
    rows[0, 0] = 1.0
    got, wanted = both("f32", rows, QTensor("f32", codes), top=6)
    check(got, wanted, 6)
    assert got[0, WORDS : WORDS + 6].tolist() == [5, 9, 130, 390, 0, 1]
    assert got[1, WORDS : WORDS + 6].tolist() == [0, 1, 2, 3, 4, 5]


def test_banned_and_barred() -> None:
    matrix, rows = random_weight("f32", 140, 32), torch.randn(4, 32)
    logits = rows @ matrix.codes.T
    best = logits.argmax(1)
    ban = torch.tensor([int(best[0]), 139, 0])
    shut = torch.zeros(2, 144, dtype=torch.uint8)
    shut[0, best] = 1
    shut[1, :140] = 1  # nothing is left
    barred = (shut.view(2, 18, 8) << torch.arange(8)).sum(dim=2).to(torch.uint8)
    which = torch.tensor([0, 0, -1, 1], dtype=torch.int32)
    got, wanted = both("f32", rows, matrix, ban=ban, barred=barred, which=which, top=138)
    check(got, wanted, 138)
    assert not set(got[:, 0].tolist()) & set(ban.tolist())
    assert got[1, 0] != best[1]
    assert got[1, 6] == best[1]
    assert got[3, 1:2].view(torch.float32).item() == -torch.inf
    assert got[0, WORDS + 137] in ban


def test_what_is_not_finite_is_told() -> None:
    matrix, rows = random_weight("f32", 200, 32), torch.randn(5, 32)
    rows[1, 3], rows[3, 0] = torch.nan, torch.inf
    for cap in (0.0, 3.0):
        got, wanted = both("f32", rows, matrix, cap=cap, top=2)
        check(got, wanted, 2)
        assert got[:, 2].tolist() == [1, 0, 1, 0, 1]


@pytest.mark.parametrize("format", ["f32", "w8", "w4g"])
def test_a_row_alone_has_the_same_bits(format: str) -> None:
    """Beside others, and whatever else is asked."""
    packed = device_weight(format, random_weight(format, 200, 64))
    rows, kind = torch.randn(40, 64), weight.kind_of(packed.format)
    together = module.head_stats(plain.prepare(rows, kind), packed, ban=NO_BAN, invariant=True)
    for row in (0, 39):
        x = plain.prepare(rows[row : row + 1], kind)
        alone = module.head_stats(x, packed, ban=NO_BAN, top=2, invariant=True)
        assert torch.equal(alone[0, :WORDS], together[row])


def test_no_rows() -> None:
    x = plain.prepare(torch.zeros(0, 32), "f32")
    packed = device_weight("f32", random_weight("f32", 8, 32))
    assert module.head_stats(x, packed, ban=NO_BAN, top=2).shape == (0, WORDS + 4)
