"""What the kernels of this room share: products of tiles, and what of a device their launches depend on."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

__all__ = ["MAGIC", "TYPES", "exact_product", "interpreted", "narrowed", "processors", "unpadded", "working_type"]

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: for tests, slow."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def working_type(dtype: torch.dtype) -> tuple[tl.dtype, bool]:
    """The type that operands of a product are rounded to, and whether they are widened to float32 then: the interpreter
    multiplies bfloat16 wrongly."""
    return TYPES[dtype], dtype == torch.bfloat16 and interpreted()


def processors(device: torch.device) -> int:
    """Of a GPU; 4 in the interpreter, where it shows in how work is cut only."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


CUTS = tl.constexpr(interpreted())  # its casts to bfloat16 and float8 cut off what a GPU rounds
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and taking it away rounds to an integer, half to even


@triton.jit
def narrowed(v, TYPE: tl.constexpr):
    """float32 as TYPE, to the nearest, half to even."""
    if CUTS and v.dtype == tl.float32 and (TYPE == tl.bfloat16 or TYPE == tl.float8e4nv):
        LOST: tl.constexpr = 16 if TYPE == tl.bfloat16 else 20
        bits = v.to(tl.int32, bitcast=True)
        up = (bits + (1 << (LOST - 1)) - 1 + ((bits >> LOST) & 1)) >> LOST << LOST
        near = tl.where(tl.abs(v) < float("inf"), up.to(tl.float32, bitcast=True), v)
        if TYPE == tl.float8e4nv:  # below 2^-6 its steps are 2^-9
            near = tl.where(tl.abs(v) < 0.015625, (v * 512.0 + MAGIC - MAGIC) * 0.001953125, near)
        return near.to(TYPE)
    else:
        return v.to(TYPE)


@triton.jit
def exact_product(a, b, acc, WIDE: tl.constexpr):
    """acc + a b in float32; float32 operands are multiplied as such, not cut to tf32. WIDE: see `working_type`."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def unpadded(i, N: tl.constexpr, NP: tl.constexpr):
    """Which of NP indices are below N."""
    if N == NP:
        return tl.full([NP], True, tl.int1)
    else:
        return i < N
