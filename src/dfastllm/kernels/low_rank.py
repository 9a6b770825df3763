"""What adapters add to the rows of a linear, in plain torch: y <- factor * (y + scale * B (A x)) + shift.

The native kernels do the same inside of a forward (native/low_rank.h); `Place` says to both where the outputs of a
matrix lie among the columns of a linear that holds several.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dfastllm.core import value

__all__ = ["LowRank", "Place", "add_low_rank", "low_rank", "pack_outputs", "steady_product", "unpack_outputs"]

STEADY = 16
UNIT = 32  # outputs of B that the native kernels find side by side


@value(frozen=True, slots=True)
class Place:
    """Outputs [first, first + count) of a matrix: output first + i is column `column` + i // 32 * stride + i % 32."""

    first: int
    count: int
    column: int
    stride: int = 32

    @property
    def columns(self) -> Tensor:
        """int64 [count]."""
        i = torch.arange(self.count)
        return self.column + i // 32 * self.stride + i % 32


@value(frozen=True, slots=True)
class LowRank:
    """One matrix's part of an adapter: a [rank, in], b [rank, out] of float32, bfloat16 or float16, None: none; factor,
    shift float32 [out], None: 1 and 0."""

    a: Tensor | None
    b: Tensor | None
    scale: float
    factor: Tensor | None
    shift: Tensor | None


def pack_outputs(b: Tensor) -> Tensor:
    """B [rank, out] as the native kernels read it: [ceil(out / 32), rank, 32], zero beyond `out`."""
    rank, out = b.shape
    wide = F.pad(b, (0, -out % UNIT))
    return wide.view(rank, -1, UNIT).transpose(0, 1).contiguous()


def unpack_outputs(packed: Tensor, out: int) -> Tensor:
    """[rank, out] of `pack_outputs`."""
    return packed.transpose(0, 1).reshape(packed.shape[1], -1)[:, :out]


def low_rank(x: Tensor, part: LowRank, least: int = 1) -> Tensor | float:
    """scale * B (A x) of rows x [rows, in], float32 [rows, out], or 0 without A and B. least: see `steady_product`."""
    if part.a is None or part.b is None:
        return 0.0
    if least == 1:
        return (x.float() @ part.a.float().T * part.scale) @ part.b.float()
    return steady_product(steady_product(x, part.a, least) * part.scale, part.b.T, least)


def steady_product(x: Tensor, weight: Tensor, least: int) -> Tensor:
    """x [rows, k] times the rows of weight [n, k], float32 [rows, n], in which a row's bits do not depend on the other
    rows where torch multiplies on a CPU: its products of a few rows, or of sizes that fill no whole vector, sum in
    another order from row to row. So all sizes are multiples of 16, and the rows at least so many."""
    rows, (n, k) = len(x), weight.shape
    wide = F.pad(x.float(), (0, -k % STEADY, 0, max(least, rows + -rows % STEADY) - rows))
    return F.linear(wide, F.pad(weight.float(), (0, -k % STEADY, 0, -n % STEADY)).contiguous())[:rows, :n]


def add_low_rank(y: Tensor, x: Tensor, part: LowRank, least: int = 1) -> Tensor:
    """Rows y [rows, out] as the adapter has them, float32, of inputs x [rows, in]."""
    out = y.float() + low_rank(x, part, least)
    if part.factor is not None:
        out = out * part.factor
    return out if part.shift is None else out + part.shift
