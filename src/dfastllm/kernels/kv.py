"""K and V of past positions, in the layout of each runner. That of the native kernels: blocks of 16 positions.

| tensor | of one layer |
|---|---|
| k | [blocks, kv_heads, dim, 16]: 16 keys of one dim lie together |
| v | [blocks, kv_heads, 16, dim] |
| k_scales, v_scales | int8 only: float32 [blocks, kv_heads, 16], value = code * scale |

A slot is one position's place: block * 16 + offset. Who owns which block is the engine's business.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dfastllm.errors import ValidationError
from dfastllm.kernels.extension import native
from dfastllm.kernels.step import BLOCK

__all__ = ["KV_TYPES", "KvCache", "KvLayer", "SlotCache"]

KV_TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


class KvLayer(NamedTuple):
    """One layer's tensors, see the table above; scales are None except for int8."""

    k: Tensor
    v: Tensor
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None

    @property
    def blocks(self) -> int:
        return self.k.shape[0]

    def native(self) -> Any:
        """The native kernels' form of it, its arrays checked. Raises ValidationError."""
        k_scales, v_scales = (None if t is None else t.unsqueeze(0) for t in (self.k_scales, self.v_scales))
        return _native(self.k.unsqueeze(0), self.v.unsqueeze(0), k_scales, v_scales)


class KvCache:
    """K,V of all layers (or of one that all take turns with): k [layers, blocks, kv_heads, dim, 16] and so on, on the
    CPU, 64-byte aligned.

    Zeroed, but by the operating system as memory is first written: blocks that were never used cost none. Raises
    ValidationError for an unknown type and for sizes below 1 (`blocks` may be 0).
    """

    def __init__(self, layers: int, blocks: int, kv_heads: int, dim: int, type: str = "f32") -> None:
        if type not in KV_TYPES:
            raise ValidationError(f"K,V type must be one of {', '.join(KV_TYPES)}, got {type!r}.", param="kv_dtype")
        for name, value, least in (
            ("layers", layers, 1),
            ("blocks", blocks, 0),
            ("kv_heads", kv_heads, 1),
            ("dim", dim, 1),
        ):
            if value < least:
                raise ValidationError(f"{name} of a K,V cache must be at least {least}, got {value}.", param=name)
        self.type = type
        self.k = _zeros((layers, blocks, kv_heads, dim, BLOCK), KV_TYPES[type])
        self.v = _zeros((layers, blocks, kv_heads, BLOCK, dim), KV_TYPES[type])
        scales = (layers, blocks, kv_heads, BLOCK)
        self.k_scales = _zeros(scales, torch.float32) if type == "int8" else None
        self.v_scales = _zeros(scales, torch.float32) if type == "int8" else None
        self._handle: Any = None

    @property
    def layers(self) -> int:
        return self.k.shape[0]

    @property
    def blocks(self) -> int:
        return self.k.shape[1]

    @property
    def nbytes(self) -> int:
        """Memory once every block has been written."""
        return sum(t.nbytes for t in (self.k, self.v, self.k_scales, self.v_scales) if t is not None)

    def native(self) -> Any:
        """The native kernels' form of all layers, made once."""
        if self._handle is None:
            self._handle = _native(self.k, self.v, self.k_scales, self.v_scales)
        return self._handle

    def layer(self, index: int) -> KvLayer:
        """A view of one layer."""
        if self.k_scales is None or self.v_scales is None:
            return KvLayer(self.k[index], self.v[index])
        return KvLayer(self.k[index], self.v[index], self.k_scales[index], self.v_scales[index])


class SlotCache:
    """K and V of all layers as the torch runner reads them: k, v [layers, slots, kv_heads, dim] on any device."""

    def __init__(
        self, layers: int, slots: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        # Zeros, not empty: untouched pages cost no memory until written, and stale NaN bits can never be read.
        self.k = torch.zeros(layers, slots, kv_heads, dim, dtype=dtype, device=device)
        self.v = torch.zeros(layers, slots, kv_heads, dim, dtype=dtype, device=device)

    @property
    def slots(self) -> int:
        return self.k.shape[1]

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    # numpy's zeros come from calloc, torch's are written at once
    size = math.prod(shape) * dtype.itemsize
    raw = torch.from_numpy(np.zeros(size + 64, dtype=np.uint8))
    skip = -raw.data_ptr() % 64
    return raw[skip : skip + size].view(dtype).view(shape)


def _native(k: Tensor, v: Tensor, k_scales: Tensor | None, v_scales: Tensor | None) -> Any:
    try:
        return native().KvCache(k, v, k_scales, v_scales)
    except ValueError as error:
        raise ValidationError(str(error), param="kv") from error
