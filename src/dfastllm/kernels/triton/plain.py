"""The twins of the device's kernels in plain torch: what each op computes, on any device. They may look at values, so
no graph can hold them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dfastllm.kernels import linear_plain
from dfastllm.kernels.activations import Acts
from dfastllm.kernels.packed import Packed
from dfastllm.kernels.step import BLOCK
from dfastllm.kernels.triton.kv import KvSide
from dfastllm.kernels.triton.laid import Laid
from dfastllm.kernels.triton.weight import FLOATS, MOST_FP8, Weight, fp8_codes, natural, one_of

__all__ = ["add_low_rank", "add_norm", "attention", "experts", "gate", "head_stats", "linear", "prepare", "rope_write"]

WORDS = 8  # of a row of statistics, before its best tokens
_DTYPES = {name: dtype for dtype, name in FLOATS.items()}


def prepare(x: Tensor, kind: str, *, block: int = 1) -> Acts:
    """Rows x [rows, k] as inputs of a kind; block above 1: turned first in stretches of so many."""
    rows, k = x.shape
    wide = linear_plain.hadamard(x.float(), block)
    if kind in _DTYPES:
        return Acts(kind, rows, k, wide.to(_DTYPES[kind]))
    if kind == "fp8":
        return Acts(kind, rows, k, *fp8_codes(wide))
    return linear_plain.prepare(wide, kind)


def floats_of(acts: Acts) -> Tensor:
    """float32 [rows, k]."""
    if acts.kind == "fp8":
        assert acts.scales is not None
        return acts.data.float() * acts.scales[:, None]
    return acts.dequantise()


def add_norm(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    eps: float,
    *,
    factor: float = 1.0,
    kind: str,
    post: tuple[Tensor, float] | None = None,
) -> Acts:
    """x [rows, k] float32, in place += factor * y (None: x may be of any float dtype and stays); then its RMSNorm times
    weight float32 [k] (None: no norm), prepared as `kind`. post: weight and eps of a norm of y before it is added."""
    if y is not None:
        x.add_(y.float() if post is None else _normed(y.float(), *post), alpha=factor)
    return prepare(x.float() if weight is None else _normed(x.float(), weight, eps), kind)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (1.0 / torch.sqrt((x * x).mean(dim=1, keepdim=True) + eps)) * weight


def gate(y: Tensor, activation: str, kind: str, *, block: int = 1) -> Acts:
    """activation(gate) * up of y [rows, 2 * width], gate first; then as `prepare`."""
    first, up = y.float().chunk(2, dim=1)
    inner = first if activation == "silu" else 1.59576912 * (first + 0.044715 * first * first * first)
    return prepare(first / (1.0 + torch.exp(-inner)) * up, kind, block=block)


def rope_write(
    qkv: Tensor,
    laid: Laid,
    cos: Tensor | None,
    sin: Tensor | None,
    kv: KvSide,
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Norm and rotate q and k of qkv [rows, (heads + 2 kv_heads) * dim] in place; write K and V of rows with a slot.

    cos, sin float32 [rows, half]: the first 2 * half dims of a head rotate, in pairs (i, i + half); None: no rotation.
    q_norm, k_norm float32 [dim]: RMSNorm of each head first, or [heads * dim] of all at once. int8: codes with scale
    max |x| / 127 per position and head, NaN where a value is not finite; fp8: rounded, within what it can hold.
    """
    rows, width = len(qkv), heads * dim
    for first, last, norm in ((0, width, q_norm), (width, width + kv_heads * dim, k_norm)):
        part = qkv[:, first:last].float()
        if norm is not None:
            grouped = part.view(rows, -1, len(norm))
            root = torch.sqrt((grouped * grouped).mean(dim=-1, keepdim=True) + eps)
            part = (grouped * (1.0 / root) * norm).view(rows, -1)
        if cos is not None and sin is not None:
            half = cos.shape[1]
            by_head = part.reshape(rows, -1, dim)
            a, b = by_head[..., :half], by_head[..., half : 2 * half]
            c, s = cos[:, None], sin[:, None]
            part = torch.cat((a * c - b * s, b * c + a * s, by_head[..., 2 * half :]), dim=-1).view(rows, -1)
        qkv[:, first:last] = part
    kept = (laid.slot >= 0).nonzero()[:, 0]
    slots = laid.slot[kept].long()
    k, v = qkv[kept, width:].float().view(len(kept), 2, kv_heads, dim).unbind(dim=1)
    for values, into, scales in ((k, kv.k, kv.k_scales), (v, kv.v, kv.v_scales)):
        if scales is not None:
            amax = values.abs().amax(dim=-1)
            scale = amax / 127.0
            inverse = torch.where(amax.isfinite() & (amax >= linear_plain.LEAST_AMAX), 127.0 / amax, 0.0)
            codes = torch.round(torch.nan_to_num(values, 0.0, 0.0, 0.0) * inverse[..., None])
            into[slots] = codes.to(torch.int8)
            scales[slots] = torch.where(amax.isfinite(), scale, torch.nan)
        elif into.dtype == torch.float8_e4m3fn:
            into.view(torch.uint8)[slots] = values.clamp(-MOST_FP8, MOST_FP8).to(into.dtype).view(torch.uint8)
        else:
            into[slots] = values.to(into.dtype)


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
    invariant: bool = True,
) -> Tensor:
    """softmax(scale * q k^T) v over the keys that each row sees -> [rows, heads * dim] in qkv's dtype. qkv: as
    `rope_write` leaves it. A score s becomes softcap * tanh(s / softcap) where softcap > 0; window: a row at position p
    sees only keys at positions above p - window, 0: all. Rows that see no key give zeros. invariant: the bits of a row
    do not depend on the other rows; here they never do."""
    out = torch.zeros(len(qkv), heads * dim, dtype=qkv.dtype, device=qkv.device)
    masks = laid.words.view(torch.uint8)
    for row0, row1, cached, own, block0, own0, own_start, mask_at in laid.spans.tolist():
        if row1 == row0 or not cached + own:
            continue
        at = torch.arange(cached, device=qkv.device)
        slots = laid.words[block0 + at // BLOCK].long() * BLOCK + at % BLOCK
        fresh = laid.words[own0 : own0 + own].long()
        mine = qkv[fresh, heads * dim :].float().view(own, 2, kv_heads, dim)
        k, v = (
            torch.cat((_widened(held, scales, slots), mine[:, i]))
            for i, (held, scales) in enumerate(((kv.k, kv.k_scales), (kv.v, kv.v_scales)))
        )
        o = torch.arange(own, device=qkv.device)
        limits, own_limits = laid.cached_limit[row0:row1, None], laid.own_limit[row0:row1, None]
        seen = torch.cat((at < limits, o < own_limits), dim=1)
        if window:
            places = torch.cat((at, own_start + o))
            seen &= places > laid.positions[row0:row1, None] - window
        if mask_at >= 0:
            shown = masks[mask_at : mask_at + (row1 - row0) * (cached + own)]
            seen &= shown.view(row1 - row0, cached + own) != 0
        q = qkv[row0:row1, : heads * dim].float().view(row1 - row0, kv_heads, heads // kv_heads, dim)
        scores = torch.einsum("rkgd,jkd->kgrj", q, k) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
        weights = torch.where(seen.any(dim=1)[:, None], weights, 0.0)
        v = torch.where(seen.any(dim=0)[:, None, None], v, 0.0)  # what no row sees may be anything
        mixed = torch.einsum("kgrj,jkd->rkgd", weights, v)
        out[row0:row1] = mixed.reshape(row1 - row0, heads * dim).to(out.dtype)
    return out


def _widened(held: Tensor, scales: Tensor | None, slots: Tensor) -> Tensor:
    if held.dtype == torch.float8_e4m3fn:
        return held.view(torch.uint8)[slots].view(held.dtype).float()
    wide = held[slots].float()
    return wide if scales is None else wide * scales[slots][..., None]


def linear(x: Acts, weight: Packed, bias: Tensor | None = None, *, out: torch.dtype, invariant: bool = False) -> Tensor:
    """x W^T + bias [n] -> [rows, n] of dtype `out`. w8: the sum of codes is exact, then
    (float(sum) * scale[n]) * act_scale[m]. invariant: a row's bits do not depend on the other rows."""
    if weight.format == "w8":
        assert weight.scales is not None
        assert x.scales is not None
        sums = x.data[:, : x.k].double() @ weight.data.double().T
        y = (sums.float() * weight.scales) * x.scales[:, None]
        return (y if bias is None else y + bias).to(out)
    if weight.format in _DTYPES and not invariant:
        data = x.data if x.data.dtype == weight.data.dtype else x.data.to(weight.data.dtype)
        if bias is None or bias.dtype == data.dtype:
            return F.linear(data, weight.data, bias).to(out)
        return (F.linear(data, weight.data).float() + bias).to(out)
    wide = F.pad(floats_of(x), (0, 0, 0, -x.rows % max(16, 8 * torch.get_num_threads())))
    y = F.linear(wide, natural(weight).dequantise(), None if bias is None else bias.float())[: x.rows]
    return y.to(out)


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
    invariant: bool = True,
) -> Tensor:
    """The sum of the chosen experts' outputs times their weights, float32 [rows, hidden]. chosen int32, weights float32
    [rows, top_k]; gated, down: of all experts; kind: how `down` wants its rows. A row's sum runs over its experts in
    ascending order. invariant: a
    row's bits do not depend on the other rows; here they never do."""
    out = torch.zeros(x.rows, down.n, device=x.data.device)
    for number in sorted(set(chosen.flatten().tolist())):
        row, slot = (chosen == number).nonzero(as_tuple=True)
        both = linear(_taken(x, row), one_of(gated, number), out=torch.float32, invariant=True)
        part = linear(
            gate(both, activation, kind, block=block), one_of(down, number), out=torch.float32, invariant=True
        )
        out = out.index_add(0, row, part * weights[row, slot, None])
    return out


def _taken(acts: Acts, rows: Tensor) -> Acts:
    scales, sums = (None if side is None else side[rows] for side in (acts.scales, acts.sums))
    return Acts(acts.kind, len(rows), acts.k, acts.data[rows], scales, sums)


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
    """Statistics of the rows' logits, capped where cap > 0: int32 [rows, 8 + 2 * top], floats as their bits.

    Columns: the token that the row may choose, its logit, finite (0 or 1), logsumexp, entropy in nats, margin p1 - p2,
    the best token of all, 0; then the best `top` ids, the lowest of a tie first, and their logits. The banned ids count
    for nothing; of the best tokens they come last, with -inf.

    ban      int64 [some]: banned ids; -1: none.
    barred   uint8 [sets, ceil(n / 8)]: id i is bit i % 8 of byte i // 8; which int32 [rows]: a row's set, -1: none.
    """
    values = linear(x, weight, out=torch.float32, invariant=invariant)
    if cap:
        values = cap * torch.tanh(values / cap) + values * 0.0
    finite = values.isfinite().all(dim=1)
    ids = torch.arange(values.shape[1], device=values.device)
    values[:, torch.isin(ids, ban)] = -torch.inf
    wide, index = values.sort(dim=1, descending=True, stable=True)
    norm = (values - wide[:, :1]).double().exp().sum(dim=1).log() + wide[:, 0]
    log_p = values.double() - norm[:, None]
    entropy = -torch.where(values > -torch.inf, log_p.exp() * log_p, 0.0).sum(dim=1)
    second = wide[:, 1] if wide.shape[1] > 1 else torch.full_like(wide[:, 0], -torch.inf)
    margin = (wide[:, 0] - norm).exp() - (second - norm).exp()
    choice, best = index[:, 0], wide[:, 0]
    if barred is not None and which is not None:
        shut = (barred[:, ids // 8] >> (ids % 8).to(torch.uint8) & 1).bool()[which.clamp(min=0).long()]
        left = values.masked_fill(shut & (which >= 0)[:, None], -torch.inf)
        best, choice = left.max(dim=1)
        choice = torch.where(best > -torch.inf, choice, index[:, 0])
    choice = torch.where(finite, choice, 0)

    def bits(value: Tensor) -> Tensor:
        return value.float().contiguous().view(torch.int32)

    zero = torch.zeros_like(choice)
    columns = [choice, bits(best), finite, bits(norm), bits(entropy), bits(margin), index[:, 0], zero]
    head = torch.stack([column.to(torch.int32) for column in columns], dim=1)
    return torch.cat((head, index[:, :top].int(), bits(wide[:, :top])), dim=1)


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
    """Rows y [rows, n] of inputs x [rows, k], in place as their adapters have them: factor * (y + scale * B (A x)) +
    shift. adapter int32 [rows], 0: none. a [adapters, rank, k], b [adapters, rank, n] and scale [adapters]; factor,
    shift [adapters, n]."""
    for number in sorted(set(adapter.tolist()) - {0}):
        rows = (adapter == number).nonzero()[:, 0]
        wide = y[rows].float() + (x[rows].float() @ a[number].float().T * scale[number]) @ b[number].float()
        if factor is not None:
            wide = wide * factor[number]
        if shift is not None:
            wide = wide + shift[number]
        y[rows] = wide.to(y.dtype)
