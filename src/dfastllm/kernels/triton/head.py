"""What decoders ask about rows of logits, without the logits; the twin is plain.head_stats.

A first kernel multiplies a tile of rows with a tile of the vocabulary and keeps a few numbers of each row; a second one
puts those of a row together. How the vocabulary is cut follows from the head alone, so a row's numbers do not depend on
what else is asked, nor, where rows must not depend on each other and in the integer formats, on the other rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfastllm.kernels.activations import Acts
from dfastllm.kernels.packed import Packed
from dfastllm.kernels.triton.plain import WORDS
from dfastllm.kernels.triton.products import FLOATS, finished, form_of, height_of, tile_product

__all__ = ["head_stats"]

FACTS = 8  # numbers that the first kernel keeps of a row and a tile, see `_tiles`
WIDTH = 128  # tokens of a tile


def head_stats(
    x: Acts,
    weight: Packed,
    *,
    cap: float = 0.0,
    ban: Tensor,
    barred: Tensor | None = None,
    which: Tensor | None = None,
    top: int = 0,
    invariant: bool = False,
) -> Tensor:
    """See the twin."""
    rows, n, device = x.rows, weight.n, x.data.device
    tiles, kept = triton.cdiv(n, WIDTH), min(top, WIDTH)
    out = torch.empty(rows, WORDS + 2 * top, dtype=torch.int32, device=device)
    if not rows:
        return out
    facts = torch.empty(rows, FACTS, tiles, device=device)
    found = torch.empty(2, rows, max(1, kept), tiles, device=device)
    floats = weight.format in FLOATS
    height = 64 if floats and invariant else height_of(rows, weight)
    sides = [x.data if side is None else side for side in (x.scales, x.sums)]
    theirs = [weight.data if side is None else side for side in (weight.scales, weight.mins)]
    shut = barred is not None and which is not None
    sets = (out, out) if barred is None or which is None else (barred, which)
    _tiles[(triton.cdiv(rows, height), tiles)](
        x.data, *sides, weight.data, *theirs, ban, len(ban), *sets, facts, found, rows, n, weight.k, x.data.shape[1],
        tiles, cap, kept, **form_of(x, weight), CAP=cap > 0, BARRED=shut, FACTS=FACTS, BM=height, BN=WIDTH,
        BK=32 if weight.format == "f32" else 128 if not floats else 64,
        num_warps=8 if height == 64 else 4, num_stages=3,
    )  # fmt: skip
    _rows[(rows,)](
        facts, found, out, rows, tiles, kept, top, FACTS=FACTS, WORDS=WORDS, BN=WIDTH,
        TP=triton.next_power_of_2(tiles), num_warps=4 if tiles > 256 else 1,
    )  # fmt: skip
    return out


NONE = tl.constexpr(2147483647)  # no id


@triton.jit
def _tiles(
    x, x_scales, x_sums, w, w_scales, w_mins, ban, bans, barred, which, facts, found, M, N, K, stride, tiles, cap, kept,
    FORM: tl.constexpr, MINS: tl.constexpr, WIDE: tl.constexpr, CAP: tl.constexpr, BARRED: tl.constexpr,
    FACTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Of the logits of BM rows and BN tokens: the best, its id, the second best, the sums of e = exp(logit - best) and
    of e * (logit - best), whether one is not finite, the best that is not barred and its id; and the `kept` best."""
    tile = tl.program_id(1)
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tile * BN + tl.arange(0, BN)
    some, chosen = m < M, n < N
    acc = tile_product(x, x_scales, x_sums, w, w_scales, w_mins, m, n, some, chosen, 0, K, K, N, stride,
                       FORM, MINS, WIDE, BM, BN, BK)  # fmt: skip
    y = finished(acc, x_scales, w_scales, m, n, some, chosen, FORM)
    if CAP:  # tanh(x) = 1 - 2 / (exp(2 x) + 1); the product with 0 keeps what is not finite so
        y = cap * (1.0 - 2.0 / (tl.exp(y * (2.0 / cap)) + 1.0)) + y * 0.0
    bad = tl.max(tl.where(tl.abs(y) < float("inf"), 0.0, 1.0), 1)
    open_ = chosen
    for number in range(bans):
        open_ = open_ & (n.to(tl.int64) != tl.load(ban + number))
    y = tl.where(open_[None, :] & (y == y), y, float("-inf"))
    ids = tl.broadcast_to(n[None, :], y.shape)
    best = tl.max(y, 1)
    best_id = tl.min(tl.where((y == best[:, None]) & chosen[None, :], ids, NONE), 1)
    second = tl.max(tl.where(ids == best_id[:, None], float("-inf"), y), 1)
    below = tl.where(y > float("-inf"), y - best[:, None], 0.0)
    e = tl.where(y > float("-inf"), tl.exp(below), 0.0)
    at = facts + m.to(tl.int64) * FACTS * tiles + tile
    tl.store(at, best, mask=some)
    tl.store(at + tiles, best_id.to(tl.float32, bitcast=True), mask=some)
    tl.store(at + 2 * tiles, second, mask=some)
    tl.store(at + 3 * tiles, tl.sum(e, 1), mask=some)
    tl.store(at + 4 * tiles, tl.sum(e * below, 1), mask=some)
    tl.store(at + 5 * tiles, bad, mask=some)
    choice, choice_id = best, best_id
    if BARRED:
        row_set = tl.load(which + m, mask=some, other=-1)
        at_bits = barred + row_set.to(tl.int64)[:, None] * ((N + 7) // 8) + (n // 8)[None, :]
        bits = tl.load(at_bits, mask=(row_set >= 0)[:, None] & chosen[None, :], other=0).to(tl.int32)
        left = tl.where((bits >> (n % 8)[None, :]) & 1 != 0, float("-inf"), y)
        choice = tl.max(left, 1)
        choice_id = tl.min(tl.where((left == choice[:, None]) & chosen[None, :], ids, NONE), 1)
    tl.store(at + 6 * tiles, choice, mask=some)
    tl.store(at + 7 * tiles, choice_id.to(tl.float32, bitcast=True), mask=some)
    left_over = tl.broadcast_to(chosen[None, :].to(tl.int32), y.shape)
    for place in range(kept):
        most = tl.max(tl.where(left_over != 0, y, float("-inf")), 1)
        most_id = tl.min(tl.where((left_over != 0) & (y == most[:, None]), ids, NONE), 1)
        at_found = found + (m.to(tl.int64) * kept + place) * tiles + tile
        tl.store(at_found, most, mask=some)
        tl.store(at_found + tl.cast(M, tl.int64) * kept * tiles, most_id.to(tl.float32, bitcast=True), mask=some)
        left_over = tl.where(ids == most_id[:, None], 0, left_over)


@triton.jit
def _rows(
    facts, found, out, M, tiles, kept, top,
    FACTS: tl.constexpr, WORDS: tl.constexpr, BN: tl.constexpr, TP: tl.constexpr,
):  # fmt: skip
    """The numbers of a row, of those of its tiles."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, TP)
    there = t < tiles
    at = facts + row * FACTS * tiles + t
    bests = tl.load(at, mask=there, other=float("-inf"))
    ids = tl.load(at + tiles, mask=there, other=0.0).to(tl.int32, bitcast=True)
    best = tl.max(bests, 0)
    token = tl.min(tl.where(there & (bests == best), ids, NONE), 0)
    rivals = tl.where(t == token // BN, tl.load(at + 2 * tiles, mask=there, other=float("-inf")), bests)
    second = tl.max(rivals, 0)
    seen = bests > float("-inf")
    below = tl.where(seen, bests - best, 0.0)
    factor = tl.where(seen, tl.exp(below), 0.0)
    totals = tl.load(at + 3 * tiles, mask=there, other=0.0)
    total = tl.sum(factor * totals, 0)
    weighted = tl.sum(factor * (tl.load(at + 4 * tiles, mask=there, other=0.0) + below * totals), 0)
    bad = tl.max(tl.load(at + 5 * tiles, mask=there, other=0.0), 0)
    choices = tl.load(at + 6 * tiles, mask=there, other=float("-inf"))
    choice = tl.max(choices, 0)
    choice_ids = tl.load(at + 7 * tiles, mask=there, other=0.0).to(tl.int32, bitcast=True)
    choice_id = tl.min(tl.where(there & (choices == choice), choice_ids, NONE), 0)
    choice_id = tl.where(choice > float("-inf"), choice_id, token)
    spread = tl.log(total)
    to = out + row * (WORDS + 2 * top)
    tl.store(to, tl.where(bad > 0.0, 0, choice_id))
    tl.store(to + 1, choice.to(tl.int32, bitcast=True))
    tl.store(to + 2, tl.where(bad > 0.0, 0, 1))
    tl.store(to + 3, (best + spread).to(tl.int32, bitcast=True))
    tl.store(to + 4, (spread - weighted / total).to(tl.int32, bitcast=True))
    margin = (1.0 - tl.exp(second - best)) / total
    tl.store(to + 5, margin.to(tl.int32, bitcast=True))
    tl.store(to + 6, token)
    tl.store(to + 7, 0)
    turn = tl.zeros([TP], tl.int32)
    mine = found + row * kept * tiles + t
    its = mine + tl.cast(M, tl.int64) * kept * tiles
    values = tl.load(mine, mask=there & (turn < kept), other=float("-inf"))
    names = tl.load(its, mask=there & (turn < kept), other=0.0).to(tl.int32, bitcast=True)
    names = tl.where(there, names, NONE)
    for place in range(top):
        most = tl.max(tl.where(names != NONE, values, float("-inf")), 0)
        name = tl.min(tl.where(values == most, names, NONE), 0)
        tl.store(to + WORDS + place, name)
        tl.store(to + WORDS + top + place, most.to(tl.int32, bitcast=True))
        here = there & (t == name // BN)
        turn += here.to(tl.int32)
        more = here & (turn < kept)
        new = tl.load(mine + turn * tiles, mask=more, other=float("-inf"))
        new_name = tl.load(its + turn * tiles, mask=more, other=0.0).to(tl.int32, bitcast=True)
        values = tl.where(here, new, values)
        names = tl.where(here, tl.where(more, new_name, NONE), names)
