"""Packing: many spans end to end, no padding, as the index tensors one forward pass needs.

Everything that depends only on the spans (positions, slots, masks) is built once per step here and reused by all
layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dfastllm.core import Span
from dfastllm.engine.kv import PageTable

__all__ = ["Packed", "SpanKeys", "pack", "visibility"]


@dataclass(frozen=True, slots=True)
class SpanKeys:
    """Where the rows [row0, row1) of one span find their keys: cached slots first, then the span's own rows from `own0`
    (relative to row0) on.

    cached  a slice of slots when the pages are consecutive (a view), an int64 index tensor when not, None for no cache.
    own0    own rows before it are already among the cached keys (they were written before attention reads).
    mask    bool [rows, keys], True where visible; None when every row sees every key.
    """

    row0: int
    row1: int
    cached: slice | torch.Tensor | None
    own0: int
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Packed:
    """One forward pass: ids, positions [rows]; write_rows, write_slots [stored]; want [wanted]; all int64.

    rows and wanted count padding rows at the end (token 0 at position 0, read by nobody, attending to nothing);
    `wanted` says how many of `want` are real.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    spans: tuple[SpanKeys, ...]
    write_rows: torch.Tensor
    write_slots: torch.Tensor
    want: torch.Tensor
    wanted: int


def visibility(span: Span, cached: int) -> np.ndarray | None:
    """Bool [rows, keys] of Span's rules for keys = positions [0, cached) then the own rows that are not cached; None
    when all are visible."""
    own0 = _own0(span)
    last = span.attend == "causal" and len(span.ids) == 1 and cached <= span.stop  # the usual decode step
    if (span.attend == "full" or last) and not span.shadows:
        return None
    row_pos = np.array([*range(span.start, span.stop), *(p for p, _ in span.shadows)])
    key_pos = np.concatenate([np.arange(cached), row_pos[own0:]])
    if span.attend == "full":
        seen = np.ones((len(row_pos), len(key_pos)), dtype=bool)
    elif span.attend == "causal":
        seen = key_pos[None, :] <= row_pos[:, None]
    else:
        seen = key_pos[None, :] < ((row_pos // span.block + 1) * span.block)[:, None]
    if span.shadows:
        n = len(span.ids)
        first = len(key_pos) - len(span.shadows)  # key columns of the shadows
        seen[:, first:] = False
        for i, (position, _) in enumerate(span.shadows):
            seen[n + i, :first] &= key_pos[:first] != position
            seen[n + i, first + i] = True
    return None if seen.all() else seen


def _own0(span: Span) -> int:
    return len(span.ids) if span.store in ("keep", "replace") else 0


def _cached(span: Span, kv_len: int) -> int:
    """How many cached positions [0, n) the rows may look at, the span's own writes included."""
    return {"keep": span.stop, "replace": kv_len, "scratch": span.start, "none": 0}[span.store]


def pack(items: Sequence[tuple[Span, PageTable, int]], device: torch.device | str, min_rows: int = 1) -> Packed:
    """Pack (span, its sequence's pages, its kv_len). The tables must already hold the pages that `span.stored`
    needs. The pass is padded to `min_rows` rows, and so are the wanted rows if there are any."""
    ids: list[int] = []
    positions: list[int] = []
    write_rows: list[int] = []
    write_slots: list[int] = []
    want: list[int] = []
    spans = []
    for span, table, kv_len in items:
        row0 = len(ids)
        ids += span.ids
        ids += (token for _, token in span.shadows)
        positions += range(span.start, span.stop)
        positions += (p for p, _ in span.shadows)
        want += (row0 + r for r in span.want)
        if span.store in ("keep", "replace"):
            write_rows += range(row0, row0 + len(span.ids))
            write_slots += table.slots(span.start, span.stop)
        n = _cached(span, kv_len)
        cached: slice | torch.Tensor | None = None
        if n:
            first = table.run(n)
            if first is not None:
                cached = slice(first, first + n)
            else:
                cached = torch.tensor(table.slots(0, n), dtype=torch.int64, device=device)
        seen = visibility(span, n)
        mask = None if seen is None else torch.from_numpy(seen).to(device)
        spans.append(SpanKeys(row0, len(ids), cached, _own0(span), mask))

    wanted = len(want)
    if wanted:
        want += [want[0]] * (min_rows - wanted)
    pad = max(0, min_rows - len(ids))
    ids += [0] * pad
    positions += [0] * pad

    def index(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return Packed(
        index(ids), index(positions), tuple(spans), index(write_rows), index(write_slots), index(want), wanted
    )
