"""Rotary positions, K,V writes and attention of packed spans over K,V in blocks. The native kernels run where they are
built, else the torch twins of attention_plain.py.

With the native kernels a row's result depends on its own query and the keys it sees, to the bit: not on other rows, on
which blocks hold the keys, or on threads. Everything is on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dfastllm.errors import ValidationError
from dfastllm.kernels import attention_plain as plain
from dfastllm.kernels.extension import native
from dfastllm.kernels.kv import KvLayer
from dfastllm.kernels.step import BLOCK, Step

__all__ = ["attention", "rope_store"]


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
    first, or [heads * dim] of all heads at once, x / sqrt(mean(x^2) + eps) * weight. K and V go to step.slot in
    `cache` and to step.own_slot in `own`, as the layer's type: bfloat16 to the nearest, int8 as codes of -127 to 127
    with scale max |x| / 127 per position and head (NaN if a value is not finite). ValidationError says what does not
    fit.
    """
    module = native()
    if module is None:
        kv_heads, dim = _check_layers(cache, own)
        _check_rows("qkv", qkv, len(step), heads, kv_heads, (heads + 2 * kv_heads) * dim)
        half = cos.shape[-1]
        for name, table in (("cos", cos), ("sin", sin)):
            _check_tensor(name, table, (len(step), half))
        if 2 * half > dim:
            raise ValidationError(f"{2 * half} rotary dims do not fit into heads of {dim}.", param="cos")
        for name, weight, count in (("q_norm", q_norm, heads), ("k_norm", k_norm, kv_heads)):
            if weight is not None:
                _check_tensor(name, weight, (count * dim if weight.shape == (count * dim,) else dim,))
        step.check(cache.blocks, 0 if own is None else own.blocks)
        plain.rope_store(qkv, cos, sin, step, cache, own, heads=heads, q_norm=q_norm, k_norm=k_norm, eps=eps)
        return
    handle = None if own is None else own.native()
    try:
        module.rope_store(qkv, heads, q_norm, k_norm, eps, cos, sin, cache.native(), handle, step.native())
    except ValueError as error:
        raise ValidationError(str(error)) from error


def attention(
    q: Tensor,
    step: Step,
    cache: KvLayer,
    own: KvLayer | None = None,
    *,
    heads: int,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """softmax(scale * q k^T) v of every span over the keys that each row sees -> float32 [rows, heads * dim].

    q float32 [rows, heads * dim or more] (qkv as rope_store leaves it); the keys are those of step.spans, each row's
    limits and the masks. heads is a multiple of the layer's kv_heads, neighbours share one. scale: dim ** -0.5 unless
    given. window: a row at position p sees only keys at positions above p - window; 0: all. softcap: a score s becomes
    softcap * tanh(s / softcap) where softcap > 0. Rows that see no key, or are in no span, give zeros.
    ValidationError says what does not fit.

    Sums are float32. The native AVX-512 kernels round q and the softmax weights to bfloat16 where K and V are that.
    """
    scale = cache.k.shape[2] ** -0.5 if scale is None else scale
    module = native()
    if module is None:
        kv_heads, dim = _check_layers(cache, own)
        _check_rows("q", q, len(step), heads, kv_heads, heads * dim)
        step.check(cache.blocks, 0 if own is None else own.blocks)
        return plain.attention(q, step, cache, own, heads=heads, scale=scale, window=window, softcap=softcap)
    out = torch.empty(len(step), heads * cache.k.shape[2])
    handle = None if own is None else own.native()
    try:
        module.attention(q, heads, scale, cache.native(), handle, step.native(), out, window, softcap)
    except ValueError as error:
        raise ValidationError(str(error)) from error
    return out


def _check_layers(cache: KvLayer, own: KvLayer | None) -> tuple[int, int]:
    """kv_heads, dim."""
    for name, layer in (("cache", cache), ("own", own)):
        if layer is None:
            continue
        if layer.k.ndim != 4 or layer.k.dtype not in (torch.float32, torch.bfloat16, torch.int8):
            raise ValidationError(
                f"K must be [blocks, kv_heads, dim, {BLOCK}] of float32, bfloat16 or int8, got "
                f"{list(layer.k.shape)} of {layer.k.dtype}.",
                param=name,
            )
        blocks, kv_heads, dim, _ = layer.k.shape
        _check_tensor("K", layer.k, (blocks, kv_heads, dim, BLOCK), layer.k.dtype)
        _check_tensor("V", layer.v, (blocks, kv_heads, BLOCK, dim), layer.k.dtype)
        for side, scales in (("K", layer.k_scales), ("V", layer.v_scales)):
            if (scales is not None) != (layer.k.dtype == torch.int8):
                raise ValidationError(
                    f"{side} of {name} is {layer.k.dtype}: only int8 K,V have scales, and they must.", param=name
                )
            if scales is not None:
                _check_tensor(f"{side} scales of {name}", scales, (blocks, kv_heads, BLOCK))
        if (layer.k.dtype, kv_heads, dim) != (cache.k.dtype, cache.k.shape[1], cache.k.shape[2]):
            raise ValidationError("cache and own must have one type, kv_heads and dim.", param="own")
    return cache.k.shape[1], cache.k.shape[2]


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValidationError(
            f"{name} must be contiguous {list(shape)} of {dtype}, got {list(tensor.shape)} of {tensor.dtype}"
            f"{'' if tensor.is_contiguous() else ', not contiguous'}."
        )


def _check_rows(name: str, x: Tensor, rows: int, heads: int, kv_heads: int, width: int) -> None:
    if heads < 1 or heads % kv_heads:
        raise ValidationError(f"heads must be a multiple of the {kv_heads} K,V heads, got {heads}.", param="heads")
    fits = x.ndim == 2 and x.shape[0] == rows and x.shape[1] >= width
    if not fits or x.dtype != torch.float32 or (x.numel() and x.stride(1) != 1):
        raise ValidationError(
            f"{name} must be float32 [{rows}, {width} or more] with columns side by side, got {list(x.shape)} of "
            f"{x.dtype} with strides {list(x.stride())}.",
            param=name,
        )
