"""Linear layers under Triton's interpreter: the twin's numbers, the CPU kernels' bits, and rows of their own."""

from __future__ import annotations

import pytest
import torch
from tests.kit import weights
from tests.kit.interpreter import device_weight, lent, needs_interpreter, random_weight
from torch import Tensor

from dfastllm.kernels import extension
from dfastllm.kernels import linear as cpu
from dfastllm.kernels.activations import Acts
from dfastllm.kernels.packed import FORMS, QTensor
from dfastllm.kernels.triton import plain, weight

pytestmark = [needs_interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
module = lent(pytest.importorskip("dfastllm.kernels.triton.linear"))
FORMATS = ["f32", "f16", "bf16", "fp8", "w8", "w8g", "w4g", "w4m", "w6g", "w6m"]


@pytest.mark.parametrize("format", ["w8", "w8g", "w4g", "w4m", "w6g", "w6m", "f32", "bf16"])
@pytest.mark.parametrize(("n", "k"), [(3, 64), (70, 96)])
def test_what_is_packed_can_be_read_again(format: str, n: int, k: int) -> None:
    matrix = random_weight(format, n, k)
    packed = device_weight(format, matrix)
    assert torch.equal(weight.natural(packed).dequantise(), matrix.dequantise())
    ids = torch.tensor([2, 0, 2])
    assert torch.equal(weight.rows_of(packed, ids), matrix.dequantise()[ids])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 5, 32), (19, 70, 96), (3, 24, 1120)])
def test_agrees_with_the_twin(format: str, rows: int, n: int, k: int) -> None:
    """Outputs that fill no tile, a last chunk of half the inputs, and inputs cut into pieces."""
    matrix = random_weight(format, n, k)
    packed = device_weight(format, matrix)
    assert (module.pieces_of(packed)[0] > 1) == (k > 1024)
    x = plain.prepare(torch.randn(rows, k), weight.kind_of(packed.format))
    bias = torch.randn(n) if rows > 1 else None
    got = module.linear(x, packed, bias, out=torch.float32, invariant=True)
    wanted = plain.linear(x, packed, bias, out=torch.float32, invariant=True)
    size = wanted.abs().max().item()
    torch.testing.assert_close(got, wanted, rtol=0, atol=0 if format == "w8" else 2e-6 * size)
    half = module.linear(x, packed, bias, out=torch.float16, invariant=True)
    assert torch.equal(half, got.half())


def test_floats_go_to_torch_where_rows_may_depend_on_each_other() -> None:
    matrix = random_weight("f32", 12, 32)
    x, bias = plain.prepare(torch.randn(3, 32), "f32"), torch.randn(12)
    got = module.linear(x, device_weight("f32", matrix), bias, out=torch.float32)
    assert torch.equal(got, torch.nn.functional.linear(x.data, matrix.codes) + bias)


@pytest.mark.parametrize("format", ["w8", "w8g", "w4g", "w4m", "w6g", "w6m"])
def test_has_the_bits_of_the_cpu_kernels(format: str) -> None:
    if extension.native() is None:
        pytest.skip(extension.describe())
    matrix = random_weight(format, 40, 96)
    kind = weight.kind_of(matrix.format)
    rows = torch.randn(4, 96)
    rows[2] = 0
    got = module.linear(plain.prepare(rows, kind), device_weight(format, matrix), out=torch.float32)
    wanted = cpu.linear(cpu.prepare(rows, kind), cpu.pack(matrix))
    assert torch.equal(got, wanted)


def law(x: Acts, matrix: QTensor) -> Tensor:
    """What linear_plain says of group formats: each group's sum exact, each step rounded to float32 once."""
    assert x.scales is not None
    assert matrix.scales is not None
    size = matrix.codes.shape[1] // matrix.scales.shape[1]
    zero = 0 if matrix.mins is not None else FORMS[matrix.format].zero or 0
    codes, weights = x.data[:, : x.k].double(), matrix.codes.double() - zero
    y = torch.zeros(x.rows, len(weights))
    for begin in range(0, x.k, 32):
        scale = x.scales[:, begin // 32, None].double()
        parts = [slice(at, at + size) for at in range(begin, begin + 32, size)]
        for part in parts:
            sums = codes[:, part] @ weights[:, part].T
            y = (y + sums * scale * matrix.scales[:, part.start // size].double()).float()
        for part in parts if matrix.mins is not None else ():
            taken = (scale * codes[:, part].sum(dim=1, keepdim=True)).float()
            y = (y - taken * matrix.mins[:, part.start // size].double()).float()
    return y


@pytest.mark.parametrize("format", ["w8g", "w4g", "w4m", "w6g", "w6m"])
def test_group_formats_have_the_bits_of_their_law(format: str) -> None:
    matrix = random_weight(format, 30, 160)
    x = plain.prepare(torch.randn(3, 160), "group8")
    got = module.linear(x, device_weight(format, matrix), out=torch.float32)
    assert torch.equal(got, law(x, matrix))


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_alone_has_the_same_bits(format: str) -> None:
    packed = device_weight(format, random_weight(format, 20, 96))
    x = torch.randn(33, 96)
    kind = weight.kind_of(packed.format)
    together = module.linear(plain.prepare(x, kind), packed, out=torch.float32, invariant=True)
    for row in (0, 32):
        alone = module.linear(plain.prepare(x[row : row + 1], kind), packed, out=torch.float32, invariant=True)
        assert torch.equal(alone[0], together[row])


def test_what_is_not_finite_is_not_lost() -> None:
    x = torch.randn(3, 64)
    x[1, 5] = torch.nan
    for format in FORMATS:
        packed = device_weight(format, random_weight(format, 8, 64))
        kind = weight.kind_of(packed.format)
        y = module.linear(plain.prepare(x, kind), packed, out=torch.float32, invariant=True)
        assert y[1].isnan().all(), format
        assert y[[0, 2]].isfinite().all(), format


def test_no_rows() -> None:
    x = plain.prepare(torch.zeros(0, 64), "row8")
    packed = device_weight("w8", random_weight("w8", 8, 64))
    assert module.linear(x, packed, out=torch.float32).shape == (0, 8)


def test_steps_are_products_of_eight_bits() -> None:
    matrix = weights.random_qtensor("w4s", 40, 96)
    packed = device_weight("w4s", matrix)
    assert packed.format == "w8"
    assert torch.equal(weight.natural(packed).dequantise(), matrix.dequantise())
