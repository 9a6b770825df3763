"""K and V of past positions on a device: one pair of tensors for all layers, a slot for each position.

A slot is block * 16 + offset, as everywhere. Who owns which block is the engine's business.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dfastllm.errors import UnsupportedError

__all__ = ["KV_TYPES", "DeviceKv", "KvSide", "kv_bytes"]

KV_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8)


class KvSide(NamedTuple):
    """One layer's: k, v [slots, kv_heads, dim]; k_scales, v_scales float32 [slots, kv_heads], of int8 alone."""

    k: Tensor
    v: Tensor
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None


class DeviceKv:
    """K, V of all layers: k, v [layers, slots, kv_heads, dim], zeros at first, so that what was never written is never
    NaN. Raises UnsupportedError for a type that no kernel reads."""

    def __init__(
        self, layers: int, slots: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        if dtype not in KV_TYPES:
            names = ", ".join(str(known).removeprefix("torch.") for known in KV_TYPES)
            raise UnsupportedError(f"K,V on a device are {names}, got {dtype}.", param="kv_cache_dtype")
        shape = (layers, slots, kv_heads, dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        scaled = dtype == torch.int8
        self.k_scales = torch.zeros(shape[:3], device=device) if scaled else None
        self.v_scales = torch.zeros(shape[:3], device=device) if scaled else None
        self._sides = [self._side(layer) for layer in range(layers)]

    @property
    def slots(self) -> int:
        return self.k.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.k, self.v, self.k_scales, self.v_scales) if t is not None)

    def layer(self, index: int) -> KvSide:
        return self._sides[index]

    def _side(self, index: int) -> KvSide:
        if self.k_scales is None or self.v_scales is None:
            return KvSide(self.k[index], self.v[index])
        return KvSide(self.k[index], self.v[index], self.k_scales[index], self.v_scales[index])


def kv_bytes(layers: int, kv_heads: int, dim: int, dtype: torch.dtype) -> int:
    """Bytes of one position."""
    scale = 4 if dtype == torch.int8 else 0
    return 2 * layers * kv_heads * (dim * dtype.itemsize + scale)
