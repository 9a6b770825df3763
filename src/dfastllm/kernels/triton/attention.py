"""Paged attention over packed spans of any kind. The twin is plain.attention.

A span's keys are its cached ones, read through its block table, and its own, which are rows of this very pass. What a
row sees are two limits, within a window where the layer has one and a mask where the span has one, so causal, full and
block spans need no mode. The query heads that share a K,V head are folded into the rows of a tile.

Where a bucket has few tiles, several programs sum pieces of PIECE cached keys, another the own ones, and a second
kernel adds them in order; else a program sums all keys of its tile. Invariant, it adds the pieces in the same order in
its registers, so that both do the same sums; a key that a row does not see changes no bit of it. A row's bits then
depend neither on its neighbours nor on where its keys lie; only tiles of another height may show, in whose products a
card may sum otherwise.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfastllm.kernels.step import BLOCK, SPAN_WORDS
from dfastllm.kernels.triton.kv import KvSide
from dfastllm.kernels.triton.laid import PIECE, TILE_WORDS, Laid
from dfastllm.kernels.triton.tiles import exact_product, narrowed, processors, unpadded, working_type

__all__ = ["attention"]

MOST_PARTS = 1 << 28  # bytes of the sums of pieces that a bucket may hold


def attention(
    qkv: Tensor,
    kv: KvSide,
    laid: Laid,
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    invariant: bool = False,
    split: bool | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v over the keys that each row sees -> [rows, heads * dim] in qkv's dtype; see the twin.

    Products are of K's dtype, q and the weights rounded to it; of qkv's where K has a byte a number. invariant: see the
    head of this file. split: several programs a tile; None: where the tiles alone would leave a card idle.
    """
    rows, group, deep = len(qkv), heads // kv_heads, max(16, triton.next_power_of_2(dim))
    height = max(16, triton.next_power_of_2(laid.tile_rows * group))
    work, wide = working_type(qkv.dtype if kv.k.dtype.itemsize == 1 else kv.k.dtype)
    out = torch.empty(rows, heads * dim, dtype=qkv.dtype, device=qkv.device)
    tiles, parts = len(laid.tiles), laid.pieces + 1
    memory = 4 * tiles * height * kv_heads * parts * dim
    few = tiles * kv_heads < 2 * processors(qkv.device) and laid.pieces > 1
    cut = (few if split is None else split) and rows <= PIECE and memory <= MOST_PARTS
    walkers = max(1, min(laid.pieces, triton.cdiv(2 * processors(qkv.device), tiles * kv_heads)))
    sums = torch.empty(tiles * parts * kv_heads * height * dim if cut else 1, device=qkv.device)
    ends = torch.empty(2 * tiles * parts * kv_heads * height if cut else 1, device=qkv.device)
    warps = 8 if height >= 64 and (height > 64 or invariant or deep > 128) else 4  # as many as hold the sums
    scales = (sums, sums) if kv.k_scales is None or kv.v_scales is None else (kv.k_scales, kv.v_scales)
    sizes = {"D": dim, "DP": deep, "HEADS": heads, "KV_HEADS": kv_heads, "BM": height}
    _attend[(tiles, kv_heads, walkers + 1 if cut else 1)](
        qkv, kv.k, kv.v, *scales, out, sums, ends, laid.words, laid.words.view(torch.uint8),
        laid.positions, laid.cached_limit, laid.own_limit, laid.spans, laid.tiles,
        qkv.stride(0), scale, softcap, window, laid.pieces, walkers,
        **sizes, BN=64 if deep <= 128 else 32, PIECE=PIECE, BLOCK=BLOCK, SPAN=SPAN_WORDS, TILE=TILE_WORDS,
        TYPE=work, WIDE=wide,
        CODES=kv.k_scales is not None, CAP=softcap > 0, WINDOW=window > 0,
        MASK=laid.masked, STEADY=invariant, CUT=cut,
        num_warps=warps, num_stages=3 if kv.k.dtype.itemsize < 4 and deep <= 128 else 2,
    )  # fmt: skip
    if cut:
        _merge[(tiles, kv_heads)](sums, ends, out, laid.spans, laid.tiles, laid.pieces, **sizes,
                                  PIECE=PIECE, SPAN=SPAN_WORDS, TILE=TILE_WORDS, num_warps=warps)  # fmt: skip
    return out


LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def _added(top, total, acc, top2, total2, acc2):
    """The sums of one piece added to those before it; scores are times log2(e)."""
    now = tl.maximum(top, top2)
    base = tl.where(now == float("-inf"), 0.0, now)
    keep, take = tl.exp2(top - base), tl.exp2(top2 - base)
    total = tl.fma(total, keep, total2 * take)
    acc = tl.fma(acc, tl.broadcast_to(keep[:, None], acc.shape), acc2 * take[:, None])
    return now, total, acc


@triton.jit
def _walk(
    top, total, acc, qv, sees, lowest, begin, end, k, v, k_scales, v_scales, stride, table, head, first_place, bytes,
    mask, masked, scale, softcap,
    D: tl.constexpr, DP: tl.constexpr, KV_HEADS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BLOCK: tl.constexpr, TYPE: tl.constexpr, WIDE: tl.constexpr, CODES: tl.constexpr, CAP: tl.constexpr,
    WINDOW: tl.constexpr, MASK: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """The highest score, the sum of weights and that of weights times v, with keys [begin, end) added, of the cached or
    the own ones.

    k, v: of this head; rows `stride` apart. table: where the block numbers lie, or the rows. mask: bytes of key 0.
    """
    d = tl.arange(0, DP)
    deep = unpadded(d, D, DP)
    for at in range(begin, end, BN):
        key = at + tl.arange(0, BN)
        inside = key < end
        if OWN:
            slot = tl.load(table + key, mask=inside, other=0).to(tl.int64)
        else:
            slot = tl.load(table + key // BLOCK, mask=inside, other=0).to(tl.int64) * BLOCK + key % BLOCK
        there = slot * stride
        kk = tl.load(k + there[None, :] + d[:, None], mask=inside[None, :] & deep[:, None], other=0.0)
        s = exact_product(qv, narrowed(kk, TYPE), tl.zeros([BM, BN], tl.float32), WIDE) * scale
        if CODES and not OWN:
            s = s * tl.load(k_scales + slot * KV_HEADS + head, mask=inside, other=0.0)[None, :]
        if CAP:  # tanh(x) = 1 - 2 / (exp(2 x) + 1)
            s = softcap * (1.0 - 2.0 / (tl.exp(s * (2.0 / softcap)) + 1.0))
        seen = inside[None, :] & (key[None, :] < sees[:, None])
        if WINDOW:
            seen = seen & ((first_place + key)[None, :] > lowest[:, None])
        if MASK:
            seen = seen & (tl.load(bytes + mask[:, None] + key[None, :], mask=seen & masked[:, None], other=1) != 0)
        s = tl.where(seen, s * LOG2E, float("-inf"))
        now = tl.maximum(top, tl.max(s, 1))
        base = tl.where(now == float("-inf"), 0.0, now)
        p = tl.exp2(s - base[:, None])
        keep = tl.exp2(top - base)
        total = tl.fma(total, keep, tl.sum(p, 1))
        vv = tl.load(v + there[:, None] + d[None, :], mask=inside[:, None] & deep[None, :], other=0.0)
        if CODES and not OWN:
            p = p * tl.load(v_scales + slot * KV_HEADS + head, mask=inside, other=0.0)[None, :]
        acc = exact_product(narrowed(p, TYPE), narrowed(vv, TYPE), acc * keep[:, None], WIDE)
        top = now
    return top, total, acc


@triton.jit
def _keep(sums, ends, at, top, total, acc, live, D: tl.constexpr, DP: tl.constexpr):
    """What `_merge` adds: the sums of a piece."""
    d = tl.arange(0, DP)
    tl.store(sums + at[:, None] * D + d[None, :], acc, mask=live[:, None] & unpadded(d, D, DP)[None, :])
    tl.store(ends + 2 * at, top, mask=live)
    tl.store(ends + 2 * at + 1, total, mask=live)


@triton.jit
def _attend(
    qkv, k, v, k_scales, v_scales, out, sums, ends, words, bytes, positions, cached_limit, own_limit, spans, tiles,
    q_stride, scale, softcap, window, pieces, walkers,
    D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr, TILE: tl.constexpr,
    TYPE: tl.constexpr, WIDE: tl.constexpr, CODES: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr,
    MASK: tl.constexpr, STEADY: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """A tile of one span and a K,V head: all its pieces, or (CUT) every so many-th of them, the last program having the
    own keys."""
    tile, head, walker = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tl.load(tiles + tile * TILE + 1)
    span = spans + tl.load(tiles + tile * TILE + 2) * SPAN
    cached, own = tl.load(span + 2), tl.load(span + 3)
    needed = n
    if CUT:
        needed = tl.minimum(n, tl.where(walker < walkers, cached - walker * PIECE, own))
    if needed > 0:
        G: tl.constexpr = HEADS // KV_HEADS
        m, d = tl.arange(0, BM), tl.arange(0, DP)
        deep = unpadded(d, D, DP)
        live = m // G < n
        rows = tl.load(tiles + tile * TILE) + m // G
        sees = tl.load(cached_limit + rows, mask=live, other=0)
        sees_own = tl.load(own_limit + rows, mask=live, other=0)
        end, end_own = tl.max(sees, 0), tl.max(sees_own, 0)
        mask_at = tl.load(span + 7)
        mask = mask_at + (rows - tl.load(span)) * (cached + own)
        masked = live & (tl.full([BM], 0, tl.int32) + mask_at >= 0)
        own_start = tl.load(span + 6)
        table, table_own = words + tl.load(span + 4), words + tl.load(span + 5)
        lowest = tl.full([BM], -2147483648, tl.int32)
        low, low_own = 0, 0
        if WINDOW:  # a row sees positions above `lowest`; keys below what all rows see are not read
            lowest = tl.load(positions + rows, mask=live, other=2147483647) - window
            low = tl.maximum(tl.min(lowest, 0) + 1, 0) // BN * BN
            low_own = tl.maximum(tl.min(lowest, 0) + 1 - own_start, 0) // BN * BN
        heads = head * G + m % G
        here = live[:, None] & deep[None, :]
        at_q = rows.to(tl.int64)[:, None] * q_stride + (heads * D)[:, None] + d[None, :]
        qv = tl.load(qkv + at_q, mask=here, other=0.0)
        qv = narrowed(qv, TYPE)
        k_own = qkv + (HEADS + head) * D
        v_own = k_own + KV_HEADS * D
        k_head, v_head = k + head * D, v + head * D
        none, zero = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
        zeros = tl.zeros([BM, DP], tl.float32)
        top, total, acc = none, zero, zeros
        if CUT:
            at = ((tile * KV_HEADS + head).to(tl.int64) * (pieces + 1)) * BM + m
            if walker < walkers:
                for piece in range(walker, tl.cdiv(cached, PIECE), walkers):
                    top2, total2, acc2 = _walk(
                        none, zero, zeros, qv, sees, lowest, tl.maximum(piece * PIECE, low),
                        tl.minimum(end, (piece + 1) * PIECE), k_head, v_head, k_scales, v_scales, KV_HEADS * D, table,
                        head, 0, bytes, mask, masked, scale, softcap,
                        D, DP, KV_HEADS, BM, BN, BLOCK, TYPE, WIDE, CODES, CAP, WINDOW, MASK, False,
                    )  # fmt: skip
                    _keep(sums, ends, at + piece * BM, top2, total2, acc2, live, D, DP)
            else:
                top2, total2, acc2 = _walk(
                    none, zero, zeros, qv, sees_own, lowest, low_own, end_own, k_own, v_own, k_scales, v_scales,
                    q_stride, table_own, head, own_start, bytes, mask + cached, masked, scale, softcap,
                    D, DP, KV_HEADS, BM, BN, BLOCK, TYPE, WIDE, CODES, CAP, WINDOW, MASK, True,
                )  # fmt: skip
                _keep(sums, ends, at + pieces * BM, top2, total2, acc2, live, D, DP)
        elif STEADY:
            for piece in range(tl.cdiv(end, PIECE)):
                top2, total2, acc2 = _walk(
                    none, zero, zeros, qv, sees, lowest, tl.maximum(piece * PIECE, low),
                    tl.minimum(end, (piece + 1) * PIECE), k_head, v_head, k_scales, v_scales, KV_HEADS * D, table,
                    head, 0, bytes, mask, masked, scale, softcap,
                    D, DP, KV_HEADS, BM, BN, BLOCK, TYPE, WIDE, CODES, CAP, WINDOW, MASK, False,
                )  # fmt: skip
                top, total, acc = _added(top, total, acc, top2, total2, acc2)
            top2, total2, acc2 = _walk(
                none, zero, zeros, qv, sees_own, lowest, low_own, end_own, k_own, v_own, k_scales, v_scales, q_stride,
                table_own, head, own_start, bytes, mask + cached, masked, scale, softcap,
                D, DP, KV_HEADS, BM, BN, BLOCK, TYPE, WIDE, CODES, CAP, WINDOW, MASK, True,
            )  # fmt: skip
            top, total, acc = _added(top, total, acc, top2, total2, acc2)
        else:
            top, total, acc = _walk(
                top, total, acc, qv, sees, lowest, low, end, k_head, v_head, k_scales, v_scales, KV_HEADS * D, table,
                head, 0, bytes, mask, masked, scale, softcap,
                D, DP, KV_HEADS, BM, BN, BLOCK, TYPE, WIDE, CODES, CAP, WINDOW, MASK, False,
            )  # fmt: skip
            top, total, acc = _walk(
                top, total, acc, qv, sees_own, lowest, low_own, end_own, k_own, v_own, k_scales, v_scales, q_stride,
                table_own, head, own_start, bytes, mask + cached, masked, scale, softcap,
                D, DP, KV_HEADS, BM, BN, BLOCK, TYPE, WIDE, CODES, CAP, WINDOW, MASK, True,
            )  # fmt: skip
        if not CUT:
            mean = acc / tl.where(total == 0.0, 1.0, total)[:, None]
            at_out = rows.to(tl.int64)[:, None] * (HEADS * D) + (heads * D)[:, None] + d[None, :]
            tl.store(out + at_out, narrowed(mean, out.dtype.element_ty), mask=here)


@triton.jit
def _merge(
    sums, ends, out, spans, tiles, pieces,
    D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, BM: tl.constexpr,
    PIECE: tl.constexpr, SPAN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The pieces of a tile and a K,V head, added in order: those of the cached keys, then the own ones'."""
    tile, head = tl.program_id(0), tl.program_id(1)
    n = tl.load(tiles + tile * TILE + 1)
    if n > 0:
        G: tl.constexpr = HEADS // KV_HEADS
        m, d = tl.arange(0, BM), tl.arange(0, DP)
        live = m // G < n
        here = live[:, None] & unpadded(d, D, DP)[None, :]
        rows = tl.load(tiles + tile * TILE) + m // G
        span = spans + tl.load(tiles + tile * TILE + 2) * SPAN
        held = tl.cdiv(tl.load(span + 2), PIECE)
        top = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, DP], tl.float32)
        for number in range(held + (tl.load(span + 3) > 0).to(tl.int32)):
            part = tl.where(number < held, number, pieces)
            at = ((tile * KV_HEADS + head).to(tl.int64) * (pieces + 1) + part) * BM + m
            top2 = tl.load(ends + 2 * at, mask=live, other=float("-inf"))
            total2 = tl.load(ends + 2 * at + 1, mask=live, other=0.0)
            acc2 = tl.load(sums + at[:, None] * D + d[None, :], mask=here, other=0.0)
            top, total, acc = _added(top, total, acc, top2, total2, acc2)
        mean = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        at_out = rows.to(tl.int64)[:, None] * (HEADS * D) + ((head * G + m % G) * D)[:, None] + d[None, :]
        tl.store(out + at_out, narrowed(mean, out.dtype.element_ty), mask=here)
