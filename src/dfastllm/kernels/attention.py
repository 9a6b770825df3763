"""Rotary positions, K,V writes and attention of packed spans over K,V in blocks. The native kernels run where they are
built, else the torch twins of attention_plain.py.

With the native kernels a row's result depends on its own query and the keys it sees, to the bit: not on other rows, on
which blocks hold the keys, or on threads. Everything is on the CPU.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dfastllm.errors import ValidationError
from dfastllm.kernels import attention_plain as plain
from dfastllm.kernels.extension import native
from dfastllm.kernels.kv import KvLayer
from dfastllm.kernels.step import BLOCK, Step

__all__ = ["attention", "rope_store", "span_attention"]


def rope_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    step: Step,
    cache: KvLayer,
    own: KvLayer | None = None,
    *,
    heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Norm and rotate q and k in place, then write K and V to the step's slots.

    qkv float32 [rows, (heads + 2 kv_heads) * dim], rows may be further apart; cos, sin float32 [rows, rotary / 2]: the
    first `rotary` dims of a head rotate, in pairs (i, i + rotary / 2). q_norm, k_norm [dim]: RMSNorm of each head
    first, x / sqrt(mean(x^2) + eps) * weight. K and V go to step.slot in `cache` and to step.own_slot in `own`, as the
    layer's type: bfloat16 to the nearest, int8 as codes of -127 to 127 with scale max |x| / 127 per position and head
    (NaN if a value is not finite). ValidationError says what does not fit.
    """
    kv_heads, dim = _check_layers(cache, own)
    rows = _check_rows("qkv", qkv, heads, kv_heads, (heads + 2 * kv_heads) * dim, exact=True)
    half = cos.shape[-1]
    for name, table in (("cos", cos), ("sin", sin)):
        _check_floats(name, table, (rows, half))
    if 2 * half > dim:
        raise ValidationError(f"{2 * half} rotary dims do not fit into heads of {dim}.", param="cos")
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            _check_floats(name, weight, (dim,))
    for name, slot, layer in (("slot", step.slot, cache), ("own_slot", step.own_slot, own)):
        _check_ints(name, slot, rows, 0 if layer is None else layer.blocks * BLOCK, least=-1)
    module = native()
    if module is None:
        plain.rope_store(qkv, cos, sin, step, cache, own, heads=heads, q_norm=q_norm, k_norm=k_norm, eps=eps)
        return
    module.rope_store(
        qkv.data_ptr(), rows, qkv.stride(0), heads, _address(q_norm), _address(k_norm), eps, cos.data_ptr(),
        sin.data_ptr(), 2 * half, cache.shape, cache.addresses, _addresses(own), step.slot.ctypes.data,
        step.own_slot.ctypes.data,
    )  # fmt: skip


def attention(
    q: Tensor,
    step: Step,
    cache: KvLayer,
    own: KvLayer | None = None,
    *,
    heads: int,
    scale: float | None = None,
    check: bool = True,
) -> Tensor:
    """softmax(scale * q k^T) v of every span over the keys that each row sees -> float32 [rows, heads * dim].

    q float32 [rows, heads * dim or more] (qkv as rope_store leaves it); the keys are those of step.spans, each row's
    limits and the masks. heads is a multiple of the layer's kv_heads, neighbours share one. scale: dim ** -0.5 unless
    given. Rows that see no key, or are in no span, give zeros. ValidationError says what does not fit;
    check=False leaves that out where the same step was checked before (out-of-range blocks then crash the process).

    Sums are float32. The native AVX-512 kernels round q and the softmax weights to bfloat16 where K and V are that.
    """
    rows, dim = q.shape[0], cache.k.shape[2]
    if check:
        kv_heads, _ = _check_layers(cache, own)
        _check_rows("q", q, heads, kv_heads, heads * dim)
        _check_spans(step, rows, cache, own)
    scale = dim**-0.5 if scale is None else scale
    module = native()
    if module is None:
        return plain.attention(q, step, cache, own, heads=heads, scale=scale)
    out = torch.empty(rows, heads * dim)
    module.attention(
        q.data_ptr(), rows, q.stride(0), heads, scale, cache.shape, cache.addresses, _addresses(own), len(step.spans),
        step.spans.ctypes.data, step.blocks.ctypes.data, step.own_blocks.ctypes.data,
        0 if step.mask_at is None else step.mask_at.ctypes.data, 0 if step.mask is None else step.mask.ctypes.data,
        step.cached_limit.ctypes.data, step.own_limit.ctypes.data, out.data_ptr(),
    )  # fmt: skip
    return out


def span_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(dim)) v with grouped-query heads.

    q [rows, heads, dim]; k, v [keys, kv_heads, dim]; mask bool [rows, keys] (True: visible) or None. -> [rows, heads,
    dim]. The query heads that share a K,V head are folded into the rows, so K and V are never expanded.
    """
    rows, heads, dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    # [kv_heads, group * rows, dim]: row g * rows + r is query head h * group + g at row r
    folded = q.view(rows, kv_heads, group, dim).permute(1, 2, 0, 3).reshape(1, kv_heads, group * rows, dim)
    if mask is not None and group > 1:
        mask = mask.repeat(group, 1)
    out = F.scaled_dot_product_attention(
        folded, k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0), attn_mask=mask
    )
    return out.view(kv_heads, group, rows, dim).permute(2, 0, 1, 3).reshape(rows, heads, dim)


def _check_layers(cache: KvLayer, own: KvLayer | None) -> tuple[int, int]:
    """kv_heads, dim."""
    for name, layer in (("cache", cache), ("own", own)):
        if layer is None:
            continue
        if layer.k.ndim != 4 or layer.k.dtype not in (torch.float32, torch.bfloat16, torch.int8):
            raise ValidationError(
                f"K of {name} must be [blocks, kv_heads, dim, {BLOCK}] of float32, bfloat16 or int8, got "
                f"{list(layer.k.shape)} of {layer.k.dtype}.",
                param=name,
            )
        blocks, kv_heads, dim, _ = layer.k.shape
        _check_tensor(f"K of {name}", layer.k, (blocks, kv_heads, dim, BLOCK), layer.k.dtype)
        _check_tensor(f"V of {name}", layer.v, (blocks, kv_heads, BLOCK, dim), layer.k.dtype)
        for side, scales in (("K", layer.k_scales), ("V", layer.v_scales)):
            if (scales is not None) != (layer.k.dtype == torch.int8):
                raise ValidationError(
                    f"{side} of {name} is {layer.k.dtype}: only int8 has scales, and it must.", param=name
                )
            if scales is not None:
                _check_tensor(f"{side} scales of {name}", scales, (blocks, kv_heads, BLOCK), torch.float32)
        if (layer.k.dtype, kv_heads, dim) != (cache.k.dtype, cache.k.shape[1], cache.k.shape[2]):
            raise ValidationError("cache and own must have one type, kv_heads and dim.", param="own")
    return cache.k.shape[1], cache.k.shape[2]


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValidationError(
            f"{name} must be contiguous {list(shape)} of {dtype}, got {list(tensor.shape)} of {tensor.dtype}"
            f"{'' if tensor.is_contiguous() else ', not contiguous'}."
        )


def _check_floats(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    _check_tensor(name, tensor, shape, torch.float32)


def _check_rows(name: str, x: Tensor, heads: int, kv_heads: int, width: int, *, exact: bool = False) -> int:
    if heads < 1 or heads % kv_heads:
        raise ValidationError(f"heads must be a multiple of the {kv_heads} K,V heads, got {heads}.", param="heads")
    fits = x.ndim == 2 and (x.shape[1] == width or (x.shape[1] > width and not exact))
    if not fits or x.dtype != torch.float32 or (x.numel() and x.stride(1) != 1):
        raise ValidationError(
            f"{name} must be [rows, {width}{'' if exact else ' or more'}] of torch.float32 with columns side by side, "
            f"got {list(x.shape)} of {x.dtype} with strides {list(x.stride())}.",
            param=name,
        )
    return x.shape[0]


def _check_ints(name: str, values: np.ndarray, count: int, end: int, *, least: int = 0) -> None:
    """int32 [count or more], each in [least, end) or -1 where that is `least`."""
    if values.dtype != np.int32 or values.ndim != 1 or len(values) < count or not values.flags.c_contiguous:
        raise ValidationError(
            f"{name} must be contiguous int32 [{count}], got {values.dtype} {list(values.shape)}.", param=name
        )
    used = values[:count]
    if count and (used.min() < least or used.max() >= max(end, least + 1)):
        raise ValidationError(
            f"{name} must be from {least} to {end - 1}, got {used.min()} to {used.max()}.", param=name
        )


def _check_spans(step: Step, rows: int, cache: KvLayer, own: KvLayer | None) -> None:
    spans = step.spans
    if spans.dtype != np.int32 or spans.ndim != 2 or spans.shape[1] != 6 or not spans.flags.c_contiguous:
        raise ValidationError(
            f"spans must be contiguous int32 [spans, 6], got {spans.dtype} {list(spans.shape)}.", param="spans"
        )
    _check_ints("blocks", step.blocks, len(step.blocks), cache.blocks)
    _check_ints("own_blocks", step.own_blocks, len(step.own_blocks), 0 if own is None else own.blocks)
    for name, limit in (("cached_limit", step.cached_limit), ("own_limit", step.own_limit)):
        _check_ints(name, limit, rows, 1 << 31)
    before = 0
    for i, (row0, row1, cached, own_count, at, own_at) in enumerate(spans.tolist()):
        if not before <= row0 <= row1 <= rows:
            raise ValidationError(f"span {i} has rows {row0} to {row1}, wanted in order within {rows}.", param="spans")
        before = row1
        for name, count, first, blocks, limit in (
            ("cached", cached, at, step.blocks, step.cached_limit),
            ("own", own_count, own_at, step.own_blocks, step.own_limit),
        ):
            if count < 0 or first < 0 or first + -(-count // BLOCK) > len(blocks):
                raise ValidationError(f"span {i} has {count} {name} keys, but not the blocks for them.", param="spans")
            if row1 > row0 and limit[row0:row1].max() > count:
                raise ValidationError(
                    f"a row of span {i} sees more than its {count} {name} keys.", param=f"{name}_limit"
                )
        if step.mask_at is not None and step.mask_at[i] >= 0:
            end = int(step.mask_at[i]) + (row1 - row0) * (cached + own_count)
            if step.mask is None or step.mask.dtype != np.uint8 or end > step.mask.size:
                raise ValidationError(f"the mask of span {i} must be uint8 [rows, cached + own].", param="mask")


def _addresses(layer: KvLayer | None) -> tuple[int, int, int, int]:
    return (0, 0, 0, 0) if layer is None else layer.addresses


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
