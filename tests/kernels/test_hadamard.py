"""The transform of a gate's products: Hadamard's matrix written out, and the same bits on the kernels and their
twin."""

from __future__ import annotations

import pytest
import torch
from tests.kit.weights import random_qtensor
from torch import Tensor

from dfastllm.errors import ValidationError
from dfastllm.kernels import linear_plain as plain
from dfastllm.kernels import native, set_threads
from dfastllm.kernels.activations import ACT_KINDS, Acts
from dfastllm.kernels.linear import linear, linear_gated, pack, prepare
from dfastllm.kernels.packed import QTensor

SIZES = [(1, 5), (2, 6), (4, 12), (8, 24), (8, 88), (16, 48), (32, 96), (64, 192), (128, 640), (256, 4864), (512, 1536)]
needs_native = pytest.mark.skipif(native() is None, reason="no native kernels")


def draw(rows: int, k: int) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(k))


def same(a: Acts, b: Acts) -> bool:
    pairs = ((a.data, b.data), (a.scales, b.scales), (a.sums, b.sums))
    return all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)  # type: ignore[arg-type]


def sylvester(order: int) -> Tensor:
    """Entry (i, j) is -1 to the number of bits that i and j share."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(order)] for i in range(order)]
    matrix: Tensor = torch.tensor(signs, dtype=torch.float64) / order**0.5
    return matrix


@pytest.mark.parametrize(("block", "k"), SIZES)
def test_it_is_hadamards_matrix_over_the_root_of_its_order(block: int, k: int) -> None:
    x = draw(3, k)
    wanted = (x.double().view(3, -1, block) @ sylvester(block)).view(3, k)
    assert (plain.hadamard(x, block) - wanted).abs().max() < 1e-5
    found = prepare(x, "f32", block=block).dequantise()
    assert (found - wanted).abs().max() < 1e-5


@needs_native
@pytest.mark.parametrize(("block", "k"), SIZES)
@pytest.mark.parametrize("kind", ACT_KINDS)
def test_rows_are_the_twins_to_the_bit(block: int, k: int, kind: str) -> None:
    wide = draw(37, k + 3)
    x = wide[:, :k]  # rows further apart than they are long
    before = wide.clone()
    wanted = plain.prepare(plain.hadamard(x, block), kind)
    for threads in (1, 3):
        set_threads(threads)
        assert same(prepare(x, kind, block=block), wanted)
    set_threads(1)
    assert torch.equal(wide, before)
    assert same(prepare(x[5:6], kind, block=block), plain.prepare(plain.hadamard(x[5:6], block), kind))


@pytest.mark.parametrize("kind", ACT_KINDS)
@pytest.mark.parametrize(("width", "block"), [(96, 32), (88, 8), (256, 256)])
def test_a_gates_products_are_turned_before_they_are_rounded(kind: str, width: int, block: int) -> None:
    """The steps one by one: gate and up, their product, the transform, the rule of `prepare`."""
    n = -(-width // 32) * 64
    weight, x = pack(random_qtensor("w8", n, 64)), draw(19, 64) * 0.1
    product = prepare(x, "row8")
    h = linear_gated(product, weight, kind="f32", width=width).dequantise()
    wanted = prepare(h.contiguous(), kind, block=block)
    assert same(linear_gated(product, weight, kind=kind, width=width, block=block), wanted)
    # A matrix that is turned the same way gives what the two give as they were.
    matrix = draw(8, width)
    turned = plain.hadamard(matrix, block)
    got = linear(prepare(h.contiguous(), "f32", block=block), pack(QTensor("f32", turned.contiguous())))
    assert (got - h @ matrix.T).abs().max() <= 1e-5 * (1 + (h @ matrix.T).abs().max())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_noticed(value: float) -> None:
    x = draw(3, 64)
    x[1, 7] = value
    found = prepare(x, "row8", block=64)
    assert found.scales is not None
    assert found.scales.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize(("block", "says"), [(3, "got 3"), (0, "got 0"), (64, "divides 96, got 64")])
def test_other_stretches_are_refused(block: int, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        prepare(torch.zeros(1, 96), "f32", block=block)
    with pytest.raises(ValidationError, match=says):
        linear_gated(torch.zeros(1, 64), pack(random_qtensor("w8", 192, 64)), kind="f32", block=block)


def test_normed_rows_are_not_turned() -> None:
    with pytest.raises(ValidationError, match="normed or turned, not both"):
        prepare(torch.zeros(1, 96), "f32", norm=torch.ones(96), block=32)
