"""The product of a tile of input rows and a tile of weight rows, in every format: what the linear layers, the mixtures
and the head are made of.

    w8           int32, exact, whatever the order: float(sum) * scale[n] * act_scale[m] is the CPU kernels' number
    w8g w4g w6g  y = fma(float(sum) * act_scale[m, g], scale[g, n], y) group after group, whose factors are exact, and
                 y = fma(-min[g, n], act_scale[m, g] * float(sum of codes), y): the CPU kernels' numbers too, whatever
                 the tiles
    others       float32 sums, in an order that follows from the tile's shape
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from dfastllm.kernels.activations import Acts
from dfastllm.kernels.packed import Packed
from dfastllm.kernels.triton.tiles import exact_product, interpreted

__all__ = ["FLOATS", "FORMS", "finished", "form_of", "height_of", "tile_product"]

FLOATS = ("f32", "bf16", "f16", "fp8")
FORMS = {"f32": 0, "bf16": 0, "f16": 0, "fp8": 1, "w8": 2, "w8g": 3, "w4g": 4, "w6g": 5}


def form_of(x: Acts, weight: Packed) -> dict[str, Any]:
    """The constants of `tile_product` for these operands."""
    form = FORMS[weight.format]
    wide = interpreted() and x.data.dtype in (torch.bfloat16, torch.float8_e4m3fn)
    return {"FORM": form, "MINS": weight.mins is not None, "WIDE": wide}


def height_of(rows: int, weight: Packed) -> int:
    """Rows of a tile of so many: as many as there are, and no more than registers hold."""
    return min(64 if weight.mins is None else 32, max(16, 1 << (rows - 1).bit_length()))


@triton.jit
def _scaled(acc, a, b, a_scale, at_scale, live):
    """acc with the codes a times b added, times their scales."""
    scale = tl.load(at_scale, mask=live, other=0.0).to(tl.float32)
    y = tl.dot(a, b, out_dtype=tl.int32).to(tl.float32) * a_scale[:, None]
    return tl.fma(y, tl.broadcast_to(scale[None, :], acc.shape), acc)


@triton.jit
def _lowered(acc, a_scale, sums, at_min, live):
    """acc less the minima times the sums of the inputs."""
    low = tl.load(at_min, mask=live, other=0.0).to(tl.float32)
    codes = a_scale * sums.to(tl.float32)
    return tl.fma(tl.broadcast_to(-low[None, :], acc.shape), tl.broadcast_to(codes[:, None], acc.shape), acc)


@triton.jit
def _half(
    acc, codes, x, x_scales, x_sums, w_scales, w_mins, at_m, m, n, some, chosen, at, g, end, N, stride,
    FORM: tl.constexpr, MINS: tl.constexpr,
):  # fmt: skip
    """acc with inputs [at, at + 32) added, group g. codes: their weights [32, BN] as stored."""
    j = tl.arange(0, 32)
    here, live = some & (tl.zeros_like(m) + at < end), chosen & (tl.zeros_like(n) + at < end)
    a = tl.load(x + at_m[:, None] + at + j[None, :], mask=here[:, None], other=0)
    a_scale = tl.load(x_scales + m * (stride // 32) + g, mask=here, other=0.0)
    at_sums = x_sums + m * (stride // 16) + 2 * g
    if FORM == 5:  # two scales a group
        at_side = 2 * g * N + n
        first = (j < 16)[None, :]
        acc = _scaled(acc, tl.where(first, a, 0).to(tl.int8), codes, a_scale, w_scales + at_side, live)
        acc = _scaled(acc, tl.where(first, 0, a).to(tl.int8), codes, a_scale, w_scales + at_side + N, live)
        if MINS:
            acc = _lowered(acc, a_scale, tl.load(at_sums, mask=here, other=0), w_mins + at_side, live)
            acc = _lowered(acc, a_scale, tl.load(at_sums + 1, mask=here, other=0), w_mins + at_side + N, live)
    else:
        acc = _scaled(acc, a, codes, a_scale, w_scales + g * N + n, live)
        if MINS:
            sums = tl.load(at_sums, mask=here, other=0) + tl.load(at_sums + 1, mask=here, other=0)
            acc = _lowered(acc, a_scale, sums, w_mins + g * N + n, live)
    return acc


@triton.jit
def _chunk(
    acc, x, x_scales, x_sums, w, w_scales, w_mins, at_m, m, n, some, chosen, at, K, end, N, stride,
    FORM: tl.constexpr, MINS: tl.constexpr,
):  # fmt: skip
    """acc with inputs [at, at + 64) of a group format added."""
    j = tl.arange(0, 32)
    live, live2 = chosen & (tl.zeros_like(n) + at < end), chosen & (tl.zeros_like(n) + at + 32 < end)
    n64 = n.to(tl.int64)[None, :]
    if FORM == 3:
        at_w = w + n64 * K + at + j[:, None]
        low = tl.load(at_w, mask=live[None, :], other=0)
        high = tl.load(at_w + 32, mask=live2[None, :], other=0)
    else:
        padded = (K + 63) // 64 * 64
        row = padded // 2 if FORM == 4 else padded // 4 * 3
        both = tl.load(w + n64 * row + at // 2 + j[:, None], mask=live[None, :], other=0)
        low, high = both & 15, both >> 4
        zero = 8
        if FORM == 5:
            at_bits = w + n64 * row + padded // 2 + at // 4 + (j % 16)[:, None]
            bits = tl.load(at_bits, mask=live[None, :], other=0)
            shift = (j // 16 * 2)[:, None].to(tl.uint8)
            low = low | ((bits >> shift) & 3) << 4
            high = high | ((bits >> (shift + 4)) & 3) << 4
            zero = 32
        low, high = low.to(tl.int8), high.to(tl.int8)
        if not MINS:
            low, high = (low - zero).to(tl.int8), (high - zero).to(tl.int8)
    g = at // 32
    acc = _half(acc, low, x, x_scales, x_sums, w_scales, w_mins, at_m, m, n, some, chosen, at, g, end, N, stride,
                FORM, MINS)  # fmt: skip
    return _half(acc, high, x, x_scales, x_sums, w_scales, w_mins, at_m, m, n, some, chosen, at + 32, g + 1, end, N,
                 stride, FORM, MINS)  # fmt: skip


@triton.jit
def tile_product(
    x, x_scales, x_sums, w, w_scales, w_mins, m, n, some, chosen, begin, end, K, N, stride,
    FORM: tl.constexpr, MINS: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows m of x [rows, stride] times rows n of the weight [N, K], over inputs [begin, end) -> [BM, BN], int32 (w8) or
    float32, without the scales of whole rows. some, chosen: which of m and n there are. begin is a multiple of 64."""
    at_m = m.to(tl.int64) * stride
    if FORM >= 3:
        acc = tl.zeros([BM, BN], tl.float32)
        for at in range(begin, end, BK):
            for turn in tl.static_range(BK // 64):
                acc = _chunk(acc, x, x_scales, x_sums, w, w_scales, w_mins, at_m, m, n, some, chosen,
                             at + 64 * turn, K, end, N, stride, FORM, MINS)  # fmt: skip
        return acc
    else:
        acc = tl.zeros([BM, BN], tl.int32 if FORM == 2 else tl.float32)
        at_n = n.to(tl.int64) * K
        for at in range(begin, end, BK):
            k = at + tl.arange(0, BK)
            inside = k < end
            here_a, here_b = some[:, None] & inside[None, :], chosen[None, :] & inside[:, None]
            if FORM == 2:
                a = tl.load(x + at_m[:, None] + k[None, :], mask=here_a, other=0)
                acc += tl.dot(a, tl.load(w + at_n[None, :] + k[:, None], mask=here_b, other=0), out_dtype=tl.int32)
            else:
                a = tl.load(x + at_m[:, None] + k[None, :], mask=here_a, other=0.0)
                b = tl.load(w + at_n[None, :] + k[:, None], mask=here_b, other=0.0)
                acc = exact_product(a, b.to(a.dtype), acc, WIDE)
        return acc


@triton.jit
def finished(acc, x_scales, w_scales, m, n, some, chosen, FORM: tl.constexpr):
    """The sums of `tile_product` over all inputs, times the scales of whole rows, float32."""
    y = acc.to(tl.float32)
    if FORM == 1 or FORM == 2:
        y = y * tl.load(w_scales + n, mask=chosen, other=0.0)[None, :]
        y = y * tl.load(x_scales + m, mask=some, other=0.0)[:, None]
    return y
