"""The panel layout: packing is invertible, and single weights lie where the table says."""

from __future__ import annotations

import pytest
import torch
from tests.kit.weights import CASES, random_qtensor

from dfastllm.errors import ValidationError
from dfastllm.kernels.packed import FORMS, GROUP, Packed, QTensor, pack_panels, unpack_panels


@pytest.mark.parametrize(("format", "mins"), CASES)
@pytest.mark.parametrize("n", [1, 63, 64, 130])
@pytest.mark.parametrize("k", [32, 96, 37])
def test_round_trip(format: str, mins: bool, n: int, k: int) -> None:
    if k % FORMS[format].together:
        pytest.skip("groups do not divide")
    tensor = random_qtensor(format, n, k, mins=mins)
    packed = pack_panels(tensor)
    assert packed.data.data_ptr() % 64 == 0
    back = unpack_panels(packed)
    assert torch.equal(back.codes, tensor.codes)
    for a, b in ((back.scales, tensor.scales), (back.mins, tensor.mins), (back.steps, tensor.steps)):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)  # type: ignore[arg-type]


def code_at(packed: Packed, channel: int, i: int) -> int:
    """The code of one weight, read from the bytes as the layout table says."""
    panel, c = divmod(channel, 64)
    data = packed.data
    per = data.numel() // packed.panels
    base = panel * per
    if packed.format in ("w8", "w8g"):
        return int(data[base + (i // 4) * 256 + c * 4 + i % 4]) - 128
    if packed.format == "w4s":
        base, i = base + i // 32 * (1024 + 64), i % 32
    if packed.format in ("w4g", "w4s"):
        return int(data[base + (i // 8) * 256 + c * 4 + i % 4]) >> (4 * (i % 8 // 4)) & 15
    group = base + (i // 16) * 768
    low = int(data[group + (i % 16 // 8) * 256 + c * 4 + i % 4]) >> (4 * (i % 8 // 4)) & 15
    return low | (int(data[group + 512 + c * 4 + i % 4]) >> (2 * (i % 16 // 4)) & 3) << 4


@pytest.mark.parametrize("format", ["w8", "w8g", "w4g", "w6g", "w4s"])
def test_layout_byte_by_byte(format: str) -> None:
    tensor = random_qtensor(format, 70, 64, seed=3)
    packed = pack_panels(tensor)
    for channel in (0, 1, 17, 63, 64, 69):
        for i in range(64):
            assert code_at(packed, channel, i) == int(tensor.codes[channel, i])
    scales = packed.scales
    assert scales is not None
    if tensor.steps is not None:  # of channel 69, group 1: behind its nibbles
        assert int(packed.data[packed.data.numel() - 64 + 5]) == int(tensor.steps[69, 1])
    groups = 1 if format in ("w8", "w4s") else 64 // GROUP[format]
    natural = tensor.scales.view(70, -1)  # type: ignore[union-attr]
    assert float(scales[(1 * groups + groups - 1) * 64 + 5]) == float(natural[69, -1])
    assert float(scales[(1 * groups) * 64 + 6]) == 0.0  # beyond n


def test_padding_weighs_nothing() -> None:
    for format, mins in CASES:
        packed = pack_panels(random_qtensor(format, 65, 32, mins=mins))
        wide = unpack_panels(Packed(format, 128, 32, packed.data, packed.scales, packed.mins)).dequantise()
        assert wide[65:].abs().max() == 0


def test_steps_are_codes_of_eight_bits() -> None:
    """Against Python's integers."""
    tensor = random_qtensor("w4s", 3, 64, seed=5)
    assert tensor.steps is not None
    whole = tensor.whole_codes()
    for channel in range(3):
        for i in range(64):
            side = int(tensor.steps[channel, i // 32])
            value = (int(tensor.codes[channel, i]) - side // 16) * (side % 16 + 1)
            assert int(whole[channel, i]) == value
    stepped = tensor.steps
    assert tensor.steps_fit
    assert int(whole.min()) < -120
    for code, side in ((15, 0x0F), (0, 0x9F)):  # 15 steps of 16 above zero, 9 below
        tensor.codes[2, 40], stepped[2, 1] = code, side
        tensor.codes[2, 32:40], tensor.codes[2, 41:] = side // 16, side // 16
        assert not tensor.steps_fit
    for wrong in (None, stepped[:, :1], stepped.int()):
        with pytest.raises(ValidationError, match=r"steps of w4s: they must be \[3, 2\] torch.uint8"):
            QTensor("w4s", tensor.codes, tensor.scales, steps=wrong)
    with pytest.raises(ValidationError, match="steps of w8: there are none"):
        QTensor("w8", whole, tensor.scales, steps=stepped)
    with pytest.raises(ValidationError, match="groups of 32 inputs, which do not divide 48"):
        QTensor("w4s", tensor.codes[:, :48], tensor.scales, steps=stepped)


def test_rows_and_stack() -> None:
    tensor = random_qtensor("w4g", 10, 64, mins=True)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    assert torch.equal(tensor.rows(order).dequantise(), tensor.dequantise()[order])
    assert torch.equal(
        QTensor.stack([tensor.rows(slice(0, 4)), tensor.rows(slice(4, 10))]).dequantise(), tensor.dequantise()
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QTensor("w5", torch.zeros(2, 32)), "format must be one of"),
        (lambda: QTensor("f32", torch.zeros(32)), "two dims"),
        (lambda: QTensor("w8", torch.zeros(2, 32), torch.ones(2)), "must be torch.int8"),
        (lambda: QTensor("w8", torch.zeros(1, 2**17 + 1, dtype=torch.int8), torch.ones(1)), "at most 131072 inputs"),
        (lambda: QTensor("w8g", torch.zeros(2, 33, dtype=torch.int8), torch.ones(2, 1).half()), "do not divide 33"),
        (lambda: QTensor("w8g", torch.zeros(2, 32, dtype=torch.int8)), "scales of w8g must be"),
        (lambda: QTensor("w8g", torch.zeros(2, 32, dtype=torch.int8), torch.ones(2, 1)), "scales of w8g must be"),
        (lambda: QTensor("f32", torch.zeros(2, 32), torch.ones(2)), "has no scales"),
        (
            lambda: QTensor(
                "w8g", torch.zeros(2, 32, dtype=torch.int8), torch.ones(2, 1).half(), torch.ones(2, 1).half()
            ),
            "has no minima",
        ),
    ],
)
def test_bad_parts_are_named(make: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make()  # type: ignore[operator]
