"""What tests of the GPU's kernels share: they run under Triton's interpreter, which must be switched on before the
kernels are imported, and skip with a word where there is no Triton."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import numpy as np
import pytest

from dfastllm.kernels.step import BLOCK, Step

__all__ = ["needs_interpreter", "step_of"]

HAVE = importlib.util.find_spec("triton") is not None
if HAVE:
    os.environ.setdefault("TRITON_INTERPRET", "1")
needs_interpreter = pytest.mark.skipif(not HAVE, reason="triton is not installed")


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
