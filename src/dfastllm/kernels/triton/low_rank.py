"""What adapters add to the rows of a linear, each row its own; the twin is plain.add_low_rank.

A first kernel makes a row's few numbers A x, a second one adds B of them. Rows without an adapter are left at once, and
a row's bits depend on nothing but itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["add_low_rank"]


def add_low_rank(
    y: Tensor,
    x: Tensor,
    adapter: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    factor: Tensor | None = None,
    shift: Tensor | None = None,
) -> None:
    """See the twin."""
    rows, n = y.shape
    rank, k = a.shape[1:]
    if not rows:
        return
    few = torch.empty(rows, rank, device=y.device)
    width = min(16, triton.next_power_of_2(rank))
    _shrink[(rows, triton.cdiv(rank, width))](
        x, adapter, a, scale, few, x.stride(0), rank, k, RB=width, B=min(512, triton.next_power_of_2(k)), num_warps=4
    )
    _expand[(rows, triton.cdiv(n, 256))](
        y, adapter, b, few, y if factor is None else factor, y if shift is None else shift, y.stride(0), rank, n,
        FACTOR=factor is not None, SHIFT=shift is not None, RB=min(16, triton.next_power_of_2(rank)), B=256,
        num_warps=4,
    )  # fmt: skip


@triton.jit
def _shrink(x, adapter, a, scale, few, stride, rank, k, RB: tl.constexpr, B: tl.constexpr):
    """scale * A x of a row, RB of its numbers."""
    row = tl.program_id(0).to(tl.int64)
    number = tl.load(adapter + row).to(tl.int64)
    if number > 0:
        r = tl.program_id(1) * RB + tl.arange(0, RB)
        acc = tl.zeros([RB, B], tl.float32)
        for at in range(0, k, B):
            j = at + tl.arange(0, B)
            here = (r < rank)[:, None] & (j < k)[None, :]
            weights = tl.load(a + (number * rank + r[:, None]) * k + j[None, :], mask=here, other=0.0).to(tl.float32)
            acc += weights * tl.load(x + row * stride + j, mask=j < k, other=0.0).to(tl.float32)[None, :]
        made = tl.sum(acc, 1) * tl.load(scale + number)
        tl.store(few + row * rank + r, made, mask=r < rank)


@triton.jit
def _expand(
    y, adapter, b, few, factor, shift, stride, rank, n,
    FACTOR: tl.constexpr, SHIFT: tl.constexpr, RB: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """B outputs of a row: factor * (y + B few) + shift."""
    row = tl.program_id(0).to(tl.int64)
    number = tl.load(adapter + row).to(tl.int64)
    if number > 0:
        i = tl.program_id(1) * B + tl.arange(0, B)
        more = tl.zeros([B], tl.float32)
        for at in range(0, rank, RB):
            r = at + tl.arange(0, RB)
            here = (r < rank)[:, None] & (i < n)[None, :]
            weights = tl.load(b + (number * rank + r[:, None]) * n + i[None, :], mask=here, other=0.0).to(tl.float32)
            more += tl.sum(weights * tl.load(few + row * rank + r, mask=r < rank, other=0.0)[:, None], 0)
        wide = tl.load(y + row * stride + i, mask=i < n, other=0.0).to(tl.float32) + more
        if FACTOR:
            wide *= tl.load(factor + number * n + i, mask=i < n, other=0.0)
        if SHIFT:
            wide += tl.load(shift + number * n + i, mask=i < n, other=0.0)
        tl.store(y + row * stride + i, wide.to(y.dtype.element_ty), mask=i < n)
