"""What adapters add to the rows of a linear, in plain torch: y <- factor * (y + scale * B (A x)) + shift.

The native kernels do the same inside of a forward (native/low_rank.h); `Place` says to both where the outputs of a
matrix lie among the columns of a linear that holds several.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dfastllm.core import value

__all__ = ["LowRank", "Place", "add_low_rank", "low_rank"]


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


def low_rank(x: Tensor, part: LowRank, least: int = 1) -> Tensor | float:
    """scale * B (A x) of rows x [rows, in], float32 [rows, out], or 0 without A and B. At least so many rows are
    computed together: torch's products of a few rows sum in another order, so the bits of a row would depend on how
    many others there are."""
    if part.a is None or part.b is None:
        return 0.0
    rows = len(x)
    wide = x.float() if rows >= least else F.pad(x.float(), (0, 0, 0, least - rows))
    return ((wide @ part.a.float().T * part.scale) @ part.b.float())[:rows]


def add_low_rank(y: Tensor, x: Tensor, part: LowRank, least: int = 1) -> Tensor:
    """Rows y [rows, out] as the adapter has them, float32, of inputs x [rows, in]."""
    out = y.float() + low_rank(x, part, least)
    if part.factor is not None:
        out = out * part.factor
    return out if part.shift is None else out + part.shift
