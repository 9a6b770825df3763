"""Weights of a linear layer on a device.

| format | data | scales | mins |
|---|---|---|---|
| f32, bf16, f16 | the float tensor [n, k] | none | none |
| fp8 | float8_e4m3fn [n, k] | float32 [n]: max |row| / 448 | none |
| w8 | as in `kernels.packed.QTensor` | as there | none |
| w8g | as there | float16 [k / 32, n] | none |
| w4g | uint8 [n, k4 / 2] | float16 [k / 32, n] | the same, or none |
| w6g | uint8 [n, k4 / 2 + k4 / 4] | float16 [k / 16, n] | the same, or none |

k4 is k rounded up to 64. Of each 64 inputs, byte j of 32 holds input j in its low and input 32 + j in its high four
bits; a w6g's 16 bytes of high bits, behind the bytes of the whole row, hold inputs j, 16 + j, 32 + j and 48 + j, from
the lowest two bits up. So a kernel makes the inputs of a group of 32 with one shift, all in their order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dfastllm.kernels.packed import FORMS, GROUP, Packed, QTensor

__all__ = [
    "CHUNK",
    "FLOATS",
    "MOST_FP8",
    "Weight",
    "fp8_codes",
    "kind_of",
    "natural",
    "one_of",
    "pack",
    "rows_of",
    "stack",
]

CHUNK = 64  # inputs whose packed codes lie together
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
    """A matrix on the device; floats as `dtype`, or, where asked, as fp8. w4s becomes w8: the same products."""
    if matrix.steps is not None:
        matrix = QTensor("w8", matrix.whole_codes(), matrix.scales)
    n, k = matrix.shape
    codes = matrix.codes.to(device)
    if not FORMS[matrix.format].quantised:
        if fp8:
            return Weight("fp8", n, k, *fp8_codes(codes))
        return Weight(FLOATS[dtype], n, k, codes.to(dtype).contiguous())
    sides = [None if side is None else side.to(device) for side in (matrix.scales, matrix.mins)]
    if matrix.format in GROUP:
        sides = [None if side is None else side.T.contiguous() for side in sides]
    data = codes.contiguous() if matrix.format in ("w8", "w8g") else _nibbles(codes, matrix.format)
    return Weight(matrix.format, n, k, data, *sides)


def _nibbles(codes: Tensor, format: str) -> Tensor:
    """uint8 codes [n, k] of w4g or w6g as the table of this file has them."""
    n = len(codes)
    by_chunk = F.pad(codes, (0, -codes.shape[1] % CHUNK)).view(n, -1, 2, CHUNK // 2)
    low = (by_chunk[:, :, 0] & 15 | by_chunk[:, :, 1] << 4).reshape(n, -1)
    if format == "w4g":
        return low
    high = (by_chunk >> 4).view(n, -1, 4, CHUNK // 4)
    high = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    return torch.cat((low, high.reshape(n, -1)), dim=1)


def _codes(data: Tensor, format: str, k: int) -> Tensor:
    """uint8 [n, k]: the inverse of `_nibbles`."""
    n, size = len(data), -(-k // CHUNK) * CHUNK
    low = data[:, : size // 2].reshape(n, -1, 1, CHUNK // 2)
    codes = torch.cat((low & 15, low >> 4), dim=2).view(n, size)
    if format == "w6g":
        high = data[:, size // 2 :].reshape(n, -1, 1, CHUNK // 4)
        bits = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], dim=2).view(n, size)
        codes = codes | bits << 4
    return codes[:, :k].contiguous()


def stack(weights: Sequence[Packed]) -> Weight:
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
    if weight.format not in GROUP:
        return QTensor(weight.format, weight.data, weight.scales)
    codes = weight.data if weight.format == "w8g" else _codes(weight.data, weight.format, weight.k)
    sides = (None if side is None else side.T.contiguous() for side in (weight.scales, weight.mins))
    return QTensor(weight.format, codes, *sides)


def rows_of(weight: Packed, ids: Tensor) -> Tensor:
    """float32 [count, k]: these rows of the matrix."""
    data = weight.data[ids]
    if weight.format in ("f32", "bf16", "f16"):
        return data.float()
    sides = (weight.scales, weight.mins)
    if weight.format in GROUP:
        scales, mins = (None if side is None else side[:, ids] for side in sides)
    else:
        scales, mins = (None if side is None else side[ids] for side in sides)
    return natural(Weight(weight.format, len(ids), weight.k, data, scales, mins)).dequantise()
