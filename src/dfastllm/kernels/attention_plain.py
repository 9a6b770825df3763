"""The plain torch twins of kernels/attention.py: same arguments, already checked."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dfastllm.kernels.kv import KvLayer
from dfastllm.kernels.step import BLOCK, Step

__all__ = ["attention", "read_keys", "rope_store"]


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
            x.mul_(torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).mul_(weight)
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


def attention(q: Tensor, step: Step, cache: KvLayer, own: KvLayer | None, *, heads: int, scale: float) -> Tensor:
    kv_heads, dim = cache.k.shape[1], cache.k.shape[2]
    group = heads // kv_heads
    out = q.new_zeros(q.shape[0], heads * dim)
    for i, (row0, row1, cached, own_count, at, own_at) in enumerate(step.spans.tolist()):
        parts = [_keys(cache, step.blocks, at, cached)]
        if own is not None:
            parts.append(_keys(own, step.own_blocks, own_at, own_count))
        k, v = (torch.cat(side) for side in zip(*parts, strict=True))
        seen = torch.from_numpy(_seen(step, i))  # [rows, keys]
        # [kv_heads, rows, group, dim] against [kv_heads, 1, keys, dim]
        part = q[row0:row1, : heads * dim].view(row1 - row0, kv_heads, group, dim).transpose(0, 1)
        scores = (part @ k.permute(1, 2, 0)[:, None]) * scale
        weights = torch.softmax(scores.masked_fill(~seen[None, :, None, :], -torch.inf), dim=-1)
        mixed = weights.masked_fill(~seen[None, :, None, :], 0.0) @ v.transpose(0, 1)[:, None]
        out[row0:row1] = mixed.transpose(0, 1).reshape(row1 - row0, heads * dim)
    return out


def _keys(layer: KvLayer, blocks: np.ndarray, at: int, count: int) -> tuple[Tensor, Tensor]:
    return read_keys(layer, torch.from_numpy(blocks[at : at + -(-count // BLOCK)]).long(), count)


def _seen(step: Step, span: int) -> np.ndarray:
    """bool [rows, cached + own]: which keys the rows of a span see."""
    row0, row1, cached, own = (int(x) for x in step.spans[span, :4])
    limits = np.arange(cached) < step.cached_limit[row0:row1, None], np.arange(own) < step.own_limit[row0:row1, None]
    seen: np.ndarray = np.concatenate(limits, axis=1)
    at = -1 if step.mask_at is None else int(step.mask_at[span])
    if at >= 0 and step.mask is not None:
        seen &= step.mask[at : at + seen.size].reshape(seen.shape) != 0
    return seen
