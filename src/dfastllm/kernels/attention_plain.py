"""Attention in plain torch: the twins of kernels/attention.py (same arguments, already checked), and the product of one
group of sequences that training and scoring use."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dfastllm.kernels.kv import KvLayer
from dfastllm.kernels.step import BLOCK, Step

__all__ = ["attention", "masked_attention", "read_keys", "rope_store"]


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None = None,
    *,
    causal: bool,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """softmax(score) v, score = scale * q k, or softcap * tanh(scale * q k / softcap) where softcap > 0.

    q [batch, heads, rows, dim], k, v [batch, kv_heads, rows, dim]: every row is a query and a key; -> as q. What a row
    sees: `seen` (bool, broadcastable to [batch, heads, rows, rows]; None: all), if causal only keys up to itself, if
    window > 0 only keys less than so many before it. Differentiable. A row that sees nothing gives NaN.
    """
    row = torch.arange(q.shape[-2], device=q.device)
    ahead = row[:, None] - row[None, :]
    if causal and (window or softcap or seen is not None):
        seen, causal = (ahead >= 0 if seen is None else seen & (ahead >= 0)), False
    if window:
        seen = ahead < window if seen is None else seen & (ahead < window)
    if not softcap:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1], scale=scale
        )
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = softcap * torch.tanh((q @ k.transpose(-1, -2)).float() * (scale / softcap))
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v


def rope_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    step: Step,
    cache: KvLayer,
    own: KvLayer | None,
    *,
    heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> None:
    kv_heads, dim = cache.k.shape[1], cache.k.shape[2]
    by_head = qkv.view(len(qkv), heads + 2 * kv_heads, dim)  # [rows, heads + 2 kv_heads, dim], a view
    q, k, v = by_head[:, :heads], by_head[:, heads : heads + kv_heads], by_head[:, heads + kv_heads :]
    for x, weight in ((q, q_norm), (k, k_norm)):
        if weight is not None:
            sizes = x.square().mean(-1, keepdim=True)  # of each head
            sizes = sizes if len(weight) == dim else sizes.mean(1, keepdim=True)
            x.mul_(torch.rsqrt(sizes + eps)).mul_(weight.view(-1, dim))
        half = cos.shape[1]
        c, s = cos[:, None, :], sin[:, None, :]
        a, b = x[..., :half].clone(), x[..., half : 2 * half].clone()
        x[..., :half] = a * c - b * s
        x[..., half : 2 * half] = b * c + a * s
    for slot, layer in ((step.slot, cache), (step.own_slot, own)):
        kept = np.flatnonzero(slot[: len(qkv)] >= 0)
        if layer is not None and len(kept):
            _write(layer, torch.from_numpy(slot[kept]).long(), k[kept], v[kept])


def _write(layer: KvLayer, slot: Tensor, k: Tensor, v: Tensor) -> None:
    """k, v float32 [n, kv_heads, dim] into the slots [n]."""
    block, offset = slot // BLOCK, slot % BLOCK
    if layer.k_scales is None or layer.v_scales is None:
        layer.k[block, :, :, offset] = k.to(layer.k.dtype)
        layer.v[block, :, offset] = v.to(layer.v.dtype)
        return
    codes, scales = _quantise(k)
    layer.k[block, :, :, offset] = codes
    layer.k_scales[block, :, offset] = scales
    codes, scales = _quantise(v)
    layer.v[block, :, offset] = codes
    layer.v_scales[block, :, offset] = scales


def _quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes -127 to 127 and one scale per head, max |x| / 127; values that are not finite make the scale NaN."""
    scales = x.abs().amax(-1) / 127
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    finite = torch.isfinite(x).all(-1)
    codes = torch.nan_to_num((x * inverse[..., None]).clamp(-127, 127)) * finite[..., None]
    return codes.round().to(torch.int8), torch.where(finite, scales, torch.nan)


def read_keys(layer: KvLayer, blocks: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` positions of `blocks` as float32 [count, kv_heads, dim]: K and V."""
    k, v = layer.k[blocks].float(), layer.v[blocks].float()
    if layer.k_scales is not None and layer.v_scales is not None:
        k = k * layer.k_scales[blocks][:, :, None, :]
        v = v * layer.v_scales[blocks][..., None]
    return k.permute(0, 3, 1, 2).flatten(0, 1)[:count], v.transpose(1, 2).flatten(0, 1)[:count]


def attention(
    q: Tensor,
    step: Step,
    cache: KvLayer,
    own: KvLayer | None,
    *,
    heads: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    kv_heads, dim = cache.k.shape[1], cache.k.shape[2]
    group = heads // kv_heads
    out = q.new_zeros(q.shape[0], heads * dim)
    for i, (row0, row1, cached, own_count, at, own_at, *_) in enumerate(step.spans.tolist()):
        parts = [_keys(cache, step.blocks, at, cached)]
        if own is not None:
            parts.append(_keys(own, step.own_blocks, own_at, own_count))
        k, v = (torch.cat(side) for side in zip(*parts, strict=True))
        seen = torch.from_numpy(_seen(step, i, window))  # [rows, keys]
        # [kv_heads, rows, group, dim] against [kv_heads, 1, keys, dim]
        part = q[row0:row1, : heads * dim].view(row1 - row0, kv_heads, group, dim).transpose(0, 1)
        scores = (part @ k.permute(1, 2, 0)[:, None]) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        weights = torch.softmax(scores.masked_fill(~seen[None, :, None, :], -torch.inf), dim=-1)
        mixed = weights.masked_fill(~seen[None, :, None, :], 0.0) @ v.transpose(0, 1)[:, None]
        out[row0:row1] = mixed.transpose(0, 1).reshape(row1 - row0, heads * dim)
    return out


def _keys(layer: KvLayer, blocks: np.ndarray, at: int, count: int) -> tuple[Tensor, Tensor]:
    return read_keys(layer, torch.from_numpy(blocks[at : at + -(-count // BLOCK)]).long(), count)


def _seen(step: Step, span: int, window: int) -> np.ndarray:
    """bool [rows, cached + own]: which keys the rows of a span see."""
    row0, row1, cached, own = (int(x) for x in step.spans[span, :4])
    limits = np.arange(cached) < step.cached_limit[row0:row1, None], np.arange(own) < step.own_limit[row0:row1, None]
    seen: np.ndarray = np.concatenate(limits, axis=1)
    if window:
        places = np.concatenate([np.arange(cached), int(step.spans[span, 6]) + np.arange(own)])
        seen &= places > step.positions[row0:row1, None] - window
    at = int(step.spans[span, 7])
    if at >= 0:
        seen &= step.mask[at : at + seen.size].reshape(seen.shape) != 0
    return seen
