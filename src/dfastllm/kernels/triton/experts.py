"""Mixtures of experts: all chosen experts in one launch a product; the twin is plain.experts.

The pairs of a row and one of its experts are sorted by expert, and cut into tiles of one expert's pairs, by two small
kernels on the device: how many rows an expert has, only the device knows. Launches are as large as any choice needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfastllm.kernels.activations import Acts
from dfastllm.kernels.packed import Packed
from dfastllm.kernels.triton.products import FLOATS, finished, form_of, tile_product
from dfastllm.kernels.triton.rows import gate
from dfastllm.kernels.triton.weight import Weight

__all__ = ["Sorted", "experts", "sort_pairs"]


@dataclass(frozen=True, eq=False)
class Sorted:
    """Pairs (row, place among its experts), numbered row * top_k + place, in the order of their experts.

    pair    int32 [pairs]: the pair at each place of the order.
    place   int32 [pairs]: where a pair lies in it.
    tiles   int32 [tiles, 3]: expert, first place and number of pairs of each tile, 0 beyond the last.
    height  most pairs of a tile.
    """

    pair: Tensor
    place: Tensor
    tiles: Tensor
    height: int


def experts(
    x: Acts,
    chosen: Tensor,
    weights: Tensor,
    gated: Weight,
    down: Weight,
    *,
    activation: str = "silu",
    block: int = 1,
    kind: str,
    invariant: bool = False,
) -> Tensor:
    """See the twin."""
    rows, top_k = chosen.shape
    out = torch.empty(rows, down.n, device=x.data.device)
    if not rows:
        return out
    count = len(gated.data)
    # Few pairs an expert want low tiles; sums of integers are the same in any.
    low = rows * top_k <= 8 * count or gated.mins is not None or (invariant and gated.format in FLOATS)
    height = 16 if low else 64
    order = sort_pairs(chosen, count, height)
    both = _product(x, gated, order, order.pair, top_k)
    middle = gate(both, activation, kind, block=block)
    parts = _product(middle, down, order, order.pair, 0)
    _combine[(rows, triton.cdiv(down.n, 1024))](
        parts, order.place, weights, out, down.n, TOP=top_k, TP=triton.next_power_of_2(top_k), B=1024,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out


def sort_pairs(chosen: Tensor, count: int, height: int) -> Sorted:
    """chosen int32 [rows, top_k], of `count` experts, in tiles of at most `height` pairs."""
    pairs, device = chosen.numel(), chosen.device
    pair, place = torch.empty(2, pairs, dtype=torch.int32, device=device)
    sizes = torch.empty(2, count, dtype=torch.int32, device=device)
    tiles = torch.empty(pairs // height + min(count, pairs), 3, dtype=torch.int32, device=device)
    _sort[(count,)](chosen, pair, place, sizes, pairs, count, B=min(1024, triton.next_power_of_2(pairs)), num_warps=4)
    _cut[(triton.cdiv(len(tiles), 64),)](
        sizes, tiles, len(tiles), count, EP=triton.next_power_of_2(count), HEIGHT=height, B=64, num_warps=4
    )
    return Sorted(pair, place, tiles, height)


def _product(x: Acts, weight: Packed, order: Sorted, pair: Tensor, top_k: int) -> Tensor:
    """Rows of x times the experts' matrices, float32 [pairs, n] in the order of experts. top_k: x has a row for each so
    many pairs; 0: one for each place of the order."""
    out = torch.empty(len(pair), weight.n, device=x.data.device)
    sides = [x.data if side is None else side for side in (x.scales, x.sums)]
    theirs = [weight.data if side is None else side for side in (weight.scales, weight.mins)]
    floats = weight.format in FLOATS
    _grouped[(len(order.tiles), triton.cdiv(weight.n, 64))](
        x.data, *sides, weight.data, *theirs, pair, order.tiles, out, weight.n, weight.k, x.data.shape[1],
        weight.data[0].numel(), 0 if weight.scales is None else weight.scales[0].numel(),
        **form_of(x, weight), TOP=top_k, BM=order.height, BN=64,
        BK=32 if weight.format == "f32" else 64 if floats else 128, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


@triton.jit
def _sort(chosen, pair, place, sizes, pairs, count, B: tl.constexpr):
    """An expert's pairs, behind those of the experts before it; and how many it has."""
    expert = tl.program_id(0)
    before, mine = tl.zeros([B], tl.int32), tl.zeros([B], tl.int32)
    for at in range(0, pairs, B):
        i = at + tl.arange(0, B)
        its = tl.load(chosen + i, mask=i < pairs, other=count)
        before += (its < expert).to(tl.int32)
        mine += (its == expert).to(tl.int32)
    start = tl.sum(before, 0)
    tl.store(sizes + expert, start)
    tl.store(sizes + count + expert, tl.sum(mine, 0))
    for at in range(0, pairs, B):
        i = at + tl.arange(0, B)
        hit = (tl.load(chosen + i, mask=i < pairs, other=count) == expert).to(tl.int32)
        where = start + tl.cumsum(hit, 0) - 1
        tl.store(pair + where, i, mask=hit != 0)
        tl.store(place + i, where, mask=hit != 0)
        start += tl.sum(hit, 0)


@triton.jit
def _cut(sizes, tiles, room, count, EP: tl.constexpr, HEIGHT: tl.constexpr, B: tl.constexpr):
    """B tiles: whose they are, where they begin and how many pairs they have."""
    e, t = tl.arange(0, EP), tl.program_id(0) * B + tl.arange(0, B)
    starts = tl.load(sizes + e, mask=e < count, other=0)
    counts = tl.load(sizes + count + e, mask=e < count, other=0)
    needed = (counts + HEIGHT - 1) // HEIGHT
    ends = tl.cumsum(needed, 0)
    first = ends - needed
    owner = (t[:, None] >= first[None, :]) & (t[:, None] < ends[None, :])
    expert = tl.sum(tl.where(owner, e[None, :], 0), 1)
    number = t - tl.sum(tl.where(owner, first[None, :], 0), 1)
    begin = tl.sum(tl.where(owner, starts[None, :], 0), 1) + number * HEIGHT
    left = tl.sum(tl.where(owner, counts[None, :], 0), 1) - number * HEIGHT
    some = tl.sum(owner.to(tl.int32), 1)
    tl.store(tiles + 3 * t, expert, mask=t < room)
    tl.store(tiles + 3 * t + 1, begin, mask=t < room)
    tl.store(tiles + 3 * t + 2, tl.where(some > 0, tl.minimum(left, HEIGHT), 0), mask=t < room)


@triton.jit
def _grouped(
    x, x_scales, x_sums, w, w_scales, w_mins, pair, tiles, out, N, K, stride, w_size, side_size,
    FORM: tl.constexpr, MINS: tl.constexpr, WIDE: tl.constexpr, TOP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of an expert's pairs and a tile of its outputs."""
    tile = tiles + 3 * tl.program_id(0)
    count = tl.load(tile + 2)
    if count > 0:
        expert = tl.load(tile).to(tl.int64)
        i = tl.arange(0, BM)
        some = i < count
        at = tl.load(tile + 1) + i
        m = at
        if TOP > 0:
            m = tl.load(pair + at, mask=some, other=0) // TOP
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        chosen = n < N
        scales, mins = w_scales + expert * side_size, w_mins + expert * side_size
        acc = tile_product(x, x_scales, x_sums, w + expert * w_size, scales, mins, m, n, some, chosen, 0, K, K, N,
                           stride, FORM, MINS, WIDE, BM, BN, BK)  # fmt: skip
        y = finished(acc, x_scales, scales, m, n, some, chosen, FORM)
        tl.store(out + at.to(tl.int64)[:, None] * N + n[None, :], y, mask=some[:, None] & chosen[None, :])


@triton.jit
def _combine(parts, place, weights, out, N, TOP: tl.constexpr, TP: tl.constexpr, B: tl.constexpr):
    """A row: the outputs of its experts times their weights, added in the order of experts."""
    row = tl.program_id(0).to(tl.int64)
    j, n = tl.arange(0, TP), tl.program_id(1) * B + tl.arange(0, B)
    places = tl.load(place + row * TOP + j, mask=j < TOP, other=2147483647)
    factors = tl.load(weights + row * TOP + j, mask=j < TOP, other=0.0)
    acc = tl.zeros([B], tl.float32)
    for _ in tl.static_range(TOP):
        here = tl.min(places, 0)
        factor = tl.sum(tl.where(places == here, factors, 0.0), 0)
        acc += tl.load(parts + here.to(tl.int64) * N + n, mask=n < N, other=0.0) * factor
        places = tl.where(places == here, 2147483647, places)
    tl.store(out + row * N + n, acc, mask=n < N)
