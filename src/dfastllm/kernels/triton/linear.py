"""Linear layers on a GPU; the twin is plain.linear.

Floats go to torch, that is cuBLAS, unless rows must not depend on each other; then, and in all other formats, tiles are
multiplied here. Long rows of inputs are cut into pieces whose sums are added in order, so that a matrix of few outputs
keeps a card busy: how follows from the matrix, never from the rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dfastllm.kernels.activations import Acts
from dfastllm.kernels.packed import Packed
from dfastllm.kernels.triton.products import FLOATS, finished, form_of, height_of, tile_product
from dfastllm.kernels.triton.tiles import interpreted, narrowed

__all__ = ["linear", "pieces_of"]

ENOUGH = 132  # tiles that keep a card busy
PIECE = 1024  # inputs of a piece, at least


def linear(x: Acts, weight: Packed, bias: Tensor | None = None, *, out: torch.dtype, invariant: bool = False) -> Tensor:
    """See the twin."""
    rows, n = x.rows, weight.n
    if weight.format in FLOATS and weight.format != "fp8" and not invariant:
        data = x.data if x.data.dtype == weight.data.dtype else x.data.to(weight.data.dtype)
        if bias is None or bias.dtype == data.dtype:  # then it is added in the product's own last step
            return F.linear(data, weight.data, bias).to(out)
        return (F.linear(data, weight.data).float() + bias).to(out)
    if weight.format == "fp8" and not invariant and not interpreted() and x.scales is not None:
        assert weight.scales is not None
        y = torch._scaled_mm(
            x.data, weight.data.t(), x.scales[:, None], weight.scales[None, :], out_dtype=torch.bfloat16
        )
        return (y if bias is None else y.float() + bias).to(out)
    y = torch.empty(rows, n, dtype=out, device=x.data.device)
    if not rows:
        return y
    pieces, piece = pieces_of(weight)
    height, width, depth, warps, stages = _tile(rows, weight)
    exact = weight.format == "w8"
    parts = torch.empty(pieces, rows, n, dtype=torch.int32 if exact else torch.float32, device=y.device)
    parts = parts if pieces > 1 else parts[:, :0]
    sides = [x.data if side is None else side for side in (x.scales, x.sums)]
    theirs = [weight.data if side is None else side for side in (weight.scales, weight.mins)]
    some = y if bias is None else bias
    how = form_of(x, weight)
    _linear[(triton.cdiv(rows, height), triton.cdiv(n, width), pieces)](
        x.data, *sides, weight.data, *theirs, some, y if pieces == 1 else parts, rows, n, weight.k,
        x.data.shape[1], piece, **how, BIAS=bias is not None, CUT=pieces > 1, BM=height, BN=width, BK=depth,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if pieces > 1:
        _added[(rows, triton.cdiv(n, 1024))](
            parts, sides[0], theirs[0], some, y, rows, n, PIECES=pieces, FORM=how["FORM"], BIAS=bias is not None, B=1024
        )
    return y


def pieces_of(weight: Packed) -> tuple[int, int]:
    """How many pieces the inputs of a matrix are cut into, and the inputs of one: a multiple of 256."""
    wanted = max(1, 2 * ENOUGH // triton.cdiv(weight.n, 64))
    piece = max(PIECE, triton.cdiv(triton.cdiv(weight.k, wanted), 256) * 256)
    pieces = triton.cdiv(weight.k, piece)
    return (1, weight.k) if pieces == 1 else (pieces, piece)


def _tile(rows: int, weight: Packed) -> tuple[int, int, int, int, int]:
    """Rows and outputs of a tile, inputs of one turn, warps and stages. Sums of floats depend on the tile, so theirs is
    one for any number of rows."""
    if weight.format in FLOATS:
        return 64, 128, 32 if weight.format == "f32" else 64, 4, 3 if weight.format == "f32" else 4
    height = height_of(rows, weight)
    if weight.format == "w8" and rows > 64:
        return 128, 128, 128, 8, 4
    return height, 64, 128, 4, 4 if weight.format == "w8" else 3


@triton.jit
def _linear(
    x, x_scales, x_sums, w, w_scales, w_mins, bias, out, M, N, K, stride, piece,
    FORM: tl.constexpr, MINS: tl.constexpr, WIDE: tl.constexpr, BIAS: tl.constexpr,
    CUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of the outputs, or (CUT) of a piece's sums."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)  # tiles of the same weights follow each other
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    some, chosen = m < M, n < N
    begin = tl.program_id(2) * piece
    acc = tile_product(x, x_scales, x_sums, w, w_scales, w_mins, m, n, some, chosen, begin,
                       tl.minimum(begin + piece, K), K, N, stride, FORM, MINS, WIDE, BM, BN, BK)  # fmt: skip
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    here = some[:, None] & chosen[None, :]
    if CUT:
        tl.store(out + tl.program_id(2).to(tl.int64) * M * N + at, acc, mask=here)
    else:
        y = finished(acc, x_scales, w_scales, m, n, some, chosen, FORM)
        if BIAS:
            y += tl.load(bias + n, mask=chosen, other=0.0)[None, :]
        tl.store(out + at, narrowed(y, out.dtype.element_ty), mask=here)


@triton.jit
def _added(
    parts, x_scales, w_scales, bias, out, M, N,
    PIECES: tl.constexpr, FORM: tl.constexpr, BIAS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Outputs of a row: its pieces in order."""
    row = tl.program_id(0)
    n = tl.program_id(1) * B + tl.arange(0, B)
    chosen = n < N
    at = row.to(tl.int64) * N + n
    acc = tl.load(parts + at, mask=chosen, other=0)
    for piece in tl.static_range(1, PIECES):
        acc += tl.load(parts + piece * tl.cast(M, tl.int64) * N + at, mask=chosen, other=0)
    y = acc.to(tl.float32)
    if FORM == 1 or FORM == 2:
        y = y * tl.load(w_scales + n, mask=chosen, other=0.0) * tl.load(x_scales + row)
    if BIAS:
        y += tl.load(bias + n, mask=chosen, other=0.0)
    tl.store(out + at, narrowed(y, out.dtype.element_ty), mask=chosen)
