"""Packing: many spans end to end, no padding, as the arrays one forward pass needs.

Everything that depends only on the spans (positions, slots, what is visible) is worked out once per step here and
reused by all layers. `pack_rows` gives it as numpy arrays, which is what a native forward takes; `pack` as the index
tensors and boolean masks of the torch runner.

The keys of a span are numbered: first the cached positions [0, cached), then its own rows from `own0` on (own rows
before it are among the cached ones, written before attention reads). Without shadows every row sees a prefix of them,
so one number a row, `limits`, says it all; a span with shadows has a mask. A branch of a span is packed as a span of
its own after it: what it sees of the cache may have been written in this very pass.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dfastllm.core import Span, Store, value
from dfastllm.decode.rows import int64s
from dfastllm.engine.kv import PageTable

__all__ = ["Packed", "PackedRows", "SpanKeys", "pack", "pack_rows", "visibility"]

Ints = NDArray[np.int64]
Items = Sequence[tuple[Span, PageTable, int]]  # a span, its sequence's pages, its kv_len


@value(frozen=True, slots=True)
class PackedRows:
    """One forward pass. All arrays int64, contiguous; rows of a span are consecutive, shadows after the ordinary ones.
    Spans here are those asked for and, after each, its branches.

    ids, positions  [rows], padding at the end: token 0 at position 0, read by nobody, attending to nothing.
    slots           [rows]: where the row's K,V are written, page * page_size + offset; -1: nowhere.
    limits          [rows]: the row sees the keys [0, limit) of its span; 0 for padding.
    want            [wanted + padding]: the rows whose logits are wanted, the first `wanted` of them.
    spans           [spans, 5]: row0, row1, cached, own0 (relative to row0), page0 (where its pages begin in `pages`).
    pages           [sum over spans]: pages of the cached positions, ceil(cached / page_size) a span.
    masks           span number -> bool [rows, keys], of the spans that have shadows: it replaces `limits` there.
    """

    ids: Ints
    positions: Ints
    slots: Ints
    limits: Ints
    want: Ints
    wanted: int
    spans: Ints
    pages: Ints
    page_size: int
    masks: dict[int, NDArray[np.bool_]]

    def mask(self, number: int) -> NDArray[np.bool_]:
        """Bool [rows, keys] of a span, True where visible."""
        if number in self.masks:
            return self.masks[number]
        row0, row1, cached, own0, _ = self.spans[number].tolist()
        keys = np.arange(cached + row1 - row0 - own0)
        return keys < self.limits[row0:row1, None]


def pack_rows(items: Items, min_rows: int = 1) -> PackedRows:
    """Pack spans, at least one. The tables must already hold the pages that `span.stored` needs. The pass is padded to
    `min_rows` rows, and so are the wanted rows if there are any (with the first one)."""
    if any(span.branches for span, _, _ in items):
        items = [part for item in items for part in _unfolded(item)]
    size = items[0][1].pool.page_size
    start, counts, cached, own0, offset, block = _facts(items)
    row1 = np.cumsum(counts)
    row0, total = row1 - counts, int(row1[-1])
    owner = np.repeat(np.arange(len(items)), counts)
    within = np.arange(total) - row0[owner]
    padded = max(total, min_rows)
    positions, limits = np.zeros((2, padded), dtype=np.int64)
    positions[:total] = start[owner] + within
    shadowed = [i for i, (span, _, _) in enumerate(items) if span.shadows]
    tokens = [span.ids for span, _, _ in items]
    for i in shadowed:
        span = items[i][0]
        places, extra = zip(*span.shadows, strict=True)
        tokens[i] = span.ids + extra
        positions[row1[i] - len(places) : row1[i]] = places
    ids = int64s(tokens, padded - total)

    held = -(-cached // size)
    page0 = np.cumsum(held) - held
    pages = int64s([table.pages[:n] for (_, table, _), n in zip(items, held.tolist(), strict=True)])
    slots = np.full(padded, -1, dtype=np.int64)
    written = np.flatnonzero(within < own0[owner])
    at = positions[written]
    page = at // size
    slots[written] = (pages[page0[owner[written]] + page] - page) * size + at

    keys = cached + counts - own0
    limits[:total] = keys[owner]
    if (block != _ALL).any():
        reach = block[owner]
        seen = (positions[:total] // reach + 1) * reach - offset[owner]
        limits[:total] = np.minimum(seen, limits[:total])
    masks = {i: visibility(items[i][0], int(cached[i])) for i in shadowed}

    asked = [len(span.want) for span, _, _ in items]
    wanted = sum(asked)
    want = int64s([span.want for span, _, _ in items])
    want += np.repeat(row0, asked)
    if 0 < wanted < min_rows:
        want = np.concatenate([want, np.full(min_rows - wanted, want[0])])
    spans = np.empty((len(items), 5), dtype=np.int64)
    for column, values in enumerate((row0, row1, cached, own0, page0)):
        spans[:, column] = values
    return PackedRows(ids, positions, slots, limits, want, wanted, spans, pages, size, masks)


def _unfolded(item: tuple[Span, PageTable, int]) -> Items:
    """A span, and each of its branches as a span that stores nothing."""
    span, table, kv_len = item
    assert span.store != "replace" or not span.branches, "a branch would see what the span replaces"
    store: Store = "none" if span.store == "none" else "scratch"
    more = [Span(b.start, b.ids, span.attend, store, b.want, block=span.block) for b in span.branches]
    return [item, *[(branch, table, kv_len) for branch in more]]


_ALL = 1 << 40  # a block that holds every position


def _facts(items: Items) -> Ints:
    """int64 [6, spans]: start, rows, cached, own0, the position of key 0, and the block within which rows see what
    comes after them: 1 when causal, everything when full."""
    flat: list[int] = []
    for span, _, kv_len in items:
        start, n, store, attend = span.start, len(span.ids), span.store, span.attend
        block = 1 if attend == "causal" else _ALL if attend == "full" else span.block
        rows = n + len(span.shadows)
        if store == "keep":
            flat += (start, rows, start + n, n, 0, block)
        elif store == "replace":
            flat += (start, rows, kv_len, n, 0, block)
        elif store == "scratch":
            flat += (start, rows, start, 0, 0, block)
        else:
            flat += (start, rows, 0, 0, start, block)
    return np.array(flat, dtype=np.int64).reshape(-1, 6).T


def visibility(span: Span, cached: int) -> NDArray[np.bool_]:
    """Bool [rows, keys] of Span's rules: which of the keys, `cached` positions and then the own rows that are not among
    those, each row sees. Only spans with shadows need it; for the others `limits` says the same."""
    n, shadows = len(span.ids), len(span.shadows)
    own0 = n if span.store in ("keep", "replace") else 0
    places = np.array([*range(span.start, span.stop), *(p for p, _ in span.shadows)])
    keys = np.concatenate([np.arange(cached), places[own0:]])
    block = {"causal": 1, "full": _ALL, "block": span.block}[span.attend]
    seen: NDArray[np.bool_] = keys < (places[:, None] // block + 1) * block
    first = len(keys) - shadows
    seen[:, first:] = False
    seen[n:, :first] &= keys[:first] != places[n:, None]
    seen[np.arange(n, n + shadows), np.arange(first, first + shadows)] = True
    return seen


@value(frozen=True, slots=True)
class SpanKeys:
    """Where the rows [row0, row1) of one span find their keys: cached slots first, then the span's own rows from `own0`
    (relative to row0) on.

    cached  a slice of slots when the pages are consecutive (a view), an int64 index tensor when not, None for no cache.
    mask    bool [rows, keys], True where visible; None when every row sees every key.
    """

    row0: int
    row1: int
    cached: slice | torch.Tensor | None
    own0: int
    mask: torch.Tensor | None


@value(frozen=True, slots=True)
class Packed:
    """The torch form: ids, positions [rows]; write_rows, write_slots [stored]; want [wanted]; all int64.

    rows and wanted count padding rows at the end; `wanted` says how many of `want` are real.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    spans: tuple[SpanKeys, ...]
    write_rows: torch.Tensor
    write_slots: torch.Tensor
    want: torch.Tensor
    wanted: int


def pack(items: Items, device: torch.device | str, min_rows: int = 1) -> Packed:
    """`pack_rows` as tensors on a device."""
    rows = pack_rows(items, min_rows)

    home = torch.device(device).type == "cpu"

    def tensor(values: NDArray[np.generic]) -> torch.Tensor:
        made = torch.from_numpy(values)
        return made if home else made.to(device)

    breaks = np.flatnonzero(rows.pages[1:] != rows.pages[:-1] + 1).tolist()  # pages that the next one does not follow
    row0, row1, cached, own0, _ = rows.spans.T
    least = np.minimum.reduceat(rows.limits[: row1[-1]], row0)
    partial = (least < cached + row1 - row0 - own0).tolist()
    spans = []
    for number, (start, stop, keys, own, page) in enumerate(rows.spans.tolist()):
        slots: slice | torch.Tensor | None = None
        end = page - (-keys // rows.page_size)
        if keys and bisect_left(breaks, page) == bisect_left(breaks, end - 1):
            first = int(rows.pages[page]) * rows.page_size
            slots = slice(first, first + keys)
        elif keys:
            pages = rows.pages[page:end, None]
            slots = tensor((pages * rows.page_size + np.arange(rows.page_size)).ravel()[:keys])
        mask = tensor(rows.mask(number)) if partial[number] or number in rows.masks else None
        spans.append(SpanKeys(start, stop, slots, own, mask))
    written = np.flatnonzero(rows.slots >= 0)
    return Packed(
        tensor(rows.ids),
        tensor(rows.positions),
        tuple(spans),
        tensor(written),
        tensor(rows.slots[written]),
        tensor(rows.want),
        rows.wanted,
    )
