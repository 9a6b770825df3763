"""Weights of a linear layer on a device.

| format | data | scales | mins |
|---|---|---|---|
| f32, bf16, f16 | the float tensor [n, k] | none | none |
| fp8 | float8_e4m3fn [n, k] | float32 [n]: max |row| / 448 | none |
| w8, w8g, w4g, w6g | as in `kernels.packed.QTensor` | as there | as there |
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dfastllm.kernels.packed import FORMS, Packed, QTensor

__all__ = ["FLOATS", "MOST_FP8", "Weight", "fp8_codes", "kind_of", "natural", "one_of", "pack", "rows_of", "stack"]

FLOATS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
MOST_FP8 = 448.0  # the largest float8_e4m3fn


class Weight(Packed):
    """A weight matrix [n, k] as the device's kernels read it, see the table of this file; or several of one shape and
    format, its tensors with one more dim before."""


def kind_of(format: str) -> str:
    """How a format wants its input rows."""
    return FORMS[format].inputs if format in FORMS else format


def fp8_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn of x [rows, k] and its scales float32 [rows]: x is about code * scale. Rows of zeros: scale 1."""
    amax = x.float().abs().amax(dim=1)
    scales = torch.where(amax == 0, 1.0, amax / MOST_FP8)
    return (x.float() / scales[:, None]).clamp(-MOST_FP8, MOST_FP8).to(torch.float8_e4m3fn), scales


def pack(matrix: QTensor, device: torch.device, dtype: torch.dtype, *, fp8: bool = False) -> Weight:
    """A matrix on the device; floats as `dtype`, or, where asked, as fp8."""
    n, k = matrix.shape
    codes = matrix.codes.to(device)
    if not FORMS[matrix.format].quantised:
        if fp8:
            return Weight("fp8", n, k, *fp8_codes(codes))
        return Weight(FLOATS[dtype], n, k, codes.to(dtype).contiguous())
    sides = (None if side is None else side.to(device).contiguous() for side in (matrix.scales, matrix.mins))
    return Weight(matrix.format, n, k, codes.contiguous(), *sides)


def stack(weights: Sequence[Weight]) -> Weight:
    """Matrices of one shape and format as one, with one more dim before."""
    first = weights[0]

    def side(values: Sequence[Tensor | None]) -> Tensor | None:
        there = [value for value in values if value is not None]
        return torch.stack(there) if there else None

    data = torch.stack([weight.data for weight in weights])
    scales, mins = side([weight.scales for weight in weights]), side([weight.mins for weight in weights])
    return Weight(first.format, first.n, first.k, data, scales, mins)


def one_of(weights: Weight, index: int) -> Weight:
    """A view of one of several."""
    sides = (None if side is None else side[index] for side in (weights.scales, weights.mins))
    return Weight(weights.format, weights.n, weights.k, weights.data[index], *sides)


def natural(weight: Packed) -> QTensor:
    """The matrix in natural order; floats of fp8 and f16 as float32."""
    if weight.format == "fp8":
        assert weight.scales is not None
        return QTensor("f32", weight.data.float() * weight.scales[:, None])
    if weight.format == "f16":
        return QTensor("f32", weight.data.float())
    return QTensor(weight.format, weight.data, weight.scales, weight.mins)


def rows_of(weight: Packed, ids: Tensor) -> Tensor:
    """float32 [count, k]: these rows of the matrix."""
    data = weight.data[ids]
    if weight.format in ("f32", "bf16", "f16"):
        return data.float()
    scales, mins = (None if side is None else side[ids] for side in (weight.scales, weight.mins))
    return natural(Weight(weight.format, len(ids), weight.k, data, scales, mins)).dequantise()
