"""What tests of the GPU's kernels share. Where there is a card they run on it; else under Triton's interpreter, which
must be switched on before the kernels are imported; and they skip with a word where there is no Triton."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from dfastllm.kernels.packed import FORMS, QTensor
from dfastllm.kernels.step import BLOCK, Step
from dfastllm.kernels.triton.weight import Weight, pack

__all__ = ["DEVICE", "device_weight", "lent", "needs_interpreter", "random_weight", "step_of"]

HAVE = importlib.util.find_spec("triton") is not None
if HAVE and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
needs_interpreter = pytest.mark.skipif(not HAVE, reason="triton is not installed")


class lent:
    """A module of kernels for tests that have all tensors on the CPU: on a card a function gets copies there, and what
    it gives or changes comes back."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if DEVICE.type == "cpu" or not callable(found):
            return found

        @functools.wraps(found)
        def call(*args: Any, **options: Any) -> Any:
            moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
            args, options = _moved((args, options), lambda tensor: _there(tensor, moved))
            out = found(*args, **options)
            for here, there in moved.values():
                here.copy_(there)
            return _moved(out, lambda tensor: tensor.cpu())

        return call


def _there(tensor: torch.Tensor, moved: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    return moved.setdefault(id(tensor), (tensor, tensor.to(DEVICE)))[1]


def _moved(value: Any, move: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same with its tensors moved."""
    if isinstance(value, torch.Tensor):
        return move(value)
    if isinstance(value, dict):
        return {name: _moved(part, move) for name, part in value.items()}
    if isinstance(value, tuple):
        parts = [_moved(part, move) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _moved(getattr(value, field.name), move) for field in dataclasses.fields(value)}
        return type(value)(**fields)
    return value


def step_of(spans: Sequence[tuple[int, int, bool]], *, seed: int = 0, gap: int = 0) -> Step:
    """A step of causal spans (rows, keys before them, kept), their blocks scattered over a cache; `gap` rows of no span
    before each. Rows that are kept are cached keys, the others own ones."""
    draw = np.random.default_rng(seed)
    counts = [(-(-(before + (n if kept else 0)) // BLOCK), 0 if kept else -(-n // BLOCK)) for n, before, kept in spans]
    blocks = draw.permutation(sum(c for c, _ in counts)).astype(np.int32)
    own_blocks = draw.permutation(sum(c for _, c in counts)).astype(np.int32)
    rows = sum(n + gap for n, _, _ in spans)
    found = {name: np.zeros(rows, dtype=np.int32) for name in ("ids", "positions", "cached_limit", "own_limit")}
    slot, own_slot = np.full((2, rows), -1, dtype=np.int32)
    facts, row, at, own_at = [], 0, 0, 0
    for (n, before, kept), (held, own) in zip(spans, counts, strict=True):
        row += gap
        here, place = slice(row, row + n), before + np.arange(n)
        found["positions"][here] = place
        found["cached_limit"][here] = place + 1 if kept else before
        if kept:
            slot[here] = blocks[at + place // BLOCK] * BLOCK + place % BLOCK
        else:
            found["own_limit"][here] = np.arange(n) + 1
            own_slot[here] = own_blocks[own_at + np.arange(n) // BLOCK] * BLOCK + np.arange(n) % BLOCK
        cached = before + n if kept else before
        facts.append([row, row + n, cached, 0 if kept else n, at, own_at, before, -1])
        row, at, own_at = row + n, at + held, own_at + own
    return Step.of(
        {**found, "slot": slot, "own_slot": own_slot, "spans": facts, "blocks": blocks, "own_blocks": own_blocks}
    )


def random_weight(format: str, n: int, k: int, seed: int = 0) -> QTensor:
    """A matrix of a format; w4m and w6m: w4g and w6g with minima, f16 and fp8: float32."""
    draw = torch.Generator().manual_seed(seed)
    name = {"w4m": "w4g", "w6m": "w6g", "f16": "f32", "fp8": "f32"}.get(format, format)
    form = FORMS[name]
    if not form.quantised:
        return QTensor(name, torch.randn(n, k, generator=draw).to(form.codes))
    low, high = (-127, 128) if form.codes == torch.int8 else (0, 1 << form.bits)
    codes = torch.randint(low, high, (n, k), generator=draw).to(form.codes)
    if not form.group:
        return QTensor(name, codes, torch.rand(n, generator=draw) * 0.01)
    scales, mins = (torch.rand(2, n, k // form.group, generator=draw) * 0.01).half()
    return QTensor(name, codes, scales, 7 * mins if format.endswith("m") else None)


def device_weight(format: str, matrix: QTensor) -> Weight:
    """`random_weight` as the kernels read it."""
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}.get(format, torch.float32)
    return pack(matrix, torch.device("cpu"), dtype, fp8=format == "fp8")
