"""Random weights of every format, and what a product with them may differ by."""

from __future__ import annotations

import torch
from torch import Tensor

from dfastllm.kernels.packed import FORMATS, GROUP, QTensor

CASES = [(f, m) for f in FORMATS for m in (False, True) if not m or f in ("w4g", "w6g")]
INT_KINDS = ("row8", "group8")


def random_qtensor(format: str, n: int, k: int, *, mins: bool = False, seed: int = 0) -> QTensor:
    draw = torch.Generator().manual_seed(seed)
    if format in ("f32", "bf16"):
        return QTensor(
            format, torch.randn(n, k, generator=draw).to(torch.float32 if format == "f32" else torch.bfloat16)
        )
    low, high = {"w8": (-127, 128), "w8g": (-127, 128), "w4g": (0, 16), "w6g": (0, 64), "w4s": (0, 16)}[format]
    dtype = torch.int8 if format in ("w8", "w8g") else torch.uint8
    codes = torch.randint(low, high, (n, k), generator=draw).to(dtype)
    if format in ("w8", "w4s"):
        scale = torch.rand(n, generator=draw) * 0.01 + 1e-3
        codes, steps = random_steps(codes, draw) if format == "w4s" else (codes, None)
        return QTensor(format, codes, scale, steps=steps)
    shape = (n, k // GROUP[format])
    scales = (torch.rand(shape, generator=draw) * 0.01 + 1e-3).half()
    return QTensor(format, codes, scales, (torch.rand(shape, generator=draw) * 0.1).half() if mins else None)


def random_steps(codes: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """(codes, steps) of w4s: any steps and zeros, codes moved to where a step from zero is still a signed byte."""
    n, k = codes.shape
    steps = torch.randint(0, 256, (n, k // 32), generator=draw).to(torch.uint8)
    step, zero = ((steps & 15) + 1).int()[..., None], (steps >> 4).int()[..., None]
    moved = codes.view(n, -1, 32).int().clamp(zero - 128 // step, zero + 127 // step)
    return moved.to(torch.uint8).view(n, k), steps


def exact(x: Tensor, weight: QTensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """float64 [rows, n]: x (what the codes stand for) times the weight plus bias, and the size of the terms that were
    added up: rounding errors are in proportion to it."""
    wide = weight.dequantise().double()
    size = wide.abs()
    if weight.mins is not None:
        size = size + 2 * weight.mins.double().repeat_interleave(GROUP[weight.format], dim=1)
    y, terms = x.double() @ wide.T, x.double().abs() @ size.T
    return (y, terms) if bias is None else (y + bias.double(), terms + bias.double().abs())
