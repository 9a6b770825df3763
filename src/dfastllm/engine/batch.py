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
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dfastllm.core import Span, Store, value
from dfastllm.engine.pages import PageTable
from dfastllm.kernels.rows import int64s

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
    if [1 for span, _, _ in items if span.branches]:
        items = [part for item in items for part in _unfolded(item)]
    size = items[0][1].pool.page_size
    f = _flatten(items, size)
    total = len(f.tokens)
    padded = max(total, min_rows)
    table = int64s([f.facts]).reshape(-1, 9)
    spans = np.ascontiguousarray(table[:, :5])
    counts = spans[:, 1] - spans[:, 0]
    positions = np.arange(total) + table[:, 5].repeat(counts)
    for i in f.shadowed:
        shadows = items[i][0].shadows
        positions[spans[i, 1] - len(shadows) : spans[i, 1]] = [p for p, _ in shadows]
    pages = int64s([f.pages])

    limits = table[:, 6].repeat(counts)
    if f.partial:
        reach = table[:, 7].repeat(counts)
        limits = np.minimum((positions // reach + 1) * reach - table[:, 8].repeat(counts), limits)
    masks = {i: visibility(items[i][0], int(spans[i, 2])) for i in f.shadowed}

    wanted = len(f.want)
    want = int64s([f.want])
    want += spans[:, 0].repeat(f.asked)
    if 0 < wanted < min_rows:
        want = np.concatenate([want, np.full(min_rows - wanted, want[0])])
    slots = _slots(spans, counts, positions, pages, size, f.stored)
    ids = int64s([f.tokens], padded - total)
    if padded > total:
        more = padded - total
        positions, limits, slots = np.pad(positions, (0, more)), np.pad(limits, (0, more)), np.pad(slots, (0, more))
        slots[total:] = -1
    return PackedRows(ids, positions, slots, limits, want, wanted, spans, pages, size, masks)


def _slots(spans: Ints, counts: Ints, positions: Ints, pages: Ints, size: int, stored: int) -> Ints:
    """int64 [rows]: where K,V of each row go, -1: nowhere. stored: rows that are stored."""
    if not stored:
        return np.full(len(positions), -1, dtype=np.int64)
    page = positions // size
    first = spans[:, 4].repeat(counts)
    if stored == len(positions):
        slots: Ints = (pages[first + page] - page) * size + positions
        return slots
    own0 = spans[:, 0] + spans[:, 3]
    written = np.flatnonzero(np.arange(len(positions)) < own0.repeat(counts))
    slots = np.full(len(positions), -1, dtype=np.int64)
    page = page[written]
    slots[written] = (pages[first[written] + page] - page) * size + positions[written]
    return slots


def _unfolded(item: tuple[Span, PageTable, int]) -> Items:
    """A span, and each of its branches as a span that stores nothing."""
    span, table, kv_len = item
    assert span.store != "replace" or not span.branches, "a branch would see what the span replaces"
    store: Store = "none" if span.store == "none" else "scratch"
    more = [Span(b.start, b.ids, span.attend, store, b.want, block=span.block) for b in span.branches]
    return [item, *[(branch, table, kv_len) for branch in more]]


_ALL = 1 << 40  # a block that holds every position


@dataclass(slots=True)
class _Flat:
    """What spans say, as lists, end to end.

    facts   nine numbers a span: the five of `PackedRows.spans`; the position of row 0 of the step, were its rows to
            begin there; its keys; the block within which rows see what comes after them (1 when causal, all when
            full); the position of key 0.
    tokens, pages, want  of all spans; want: relative to the span. asked: rows wanted of each. stored: rows that are
    stored. shadowed: the spans with shadows. partial: some rows do not see all keys of their span.
    """

    facts: list[int]
    tokens: list[int]
    pages: list[int]
    want: list[int]
    asked: list[int]
    shadowed: list[int]
    stored: int
    partial: bool


def _flatten(items: Items, size: int) -> _Flat:
    facts: list[int] = []
    tokens: list[int] = []
    pages: list[int] = []
    want: list[int] = []
    asked: list[int] = []
    shadowed: list[int] = []
    stored, partial, row1, page0 = 0, False, 0, 0
    for span, table, kv_len in items:
        start, ids, store, attend = span.start, span.ids, span.store, span.attend
        n = rows = len(ids)
        tokens += ids
        if span.shadows:
            shadowed.append(len(asked))
            tokens += [token for _, token in span.shadows]
            rows += len(span.shadows)
        row0, row1 = row1, row1 + rows
        block = _ALL
        if attend != "full":
            block, partial = 1 if attend == "causal" else span.block, True
        cached, own0, offset = 0, 0, 0
        if store == "keep":
            cached, own0 = start + n, n
        elif store == "replace":
            cached, own0 = kv_len, n
        elif store == "scratch":
            cached = start
        else:
            offset = start
        stored += own0
        facts += (row0, row1, cached, own0, page0, start - row0, cached + rows - own0, block, offset)
        if cached:
            pages += table.pages[: -(-cached // size)]
            page0 = len(pages)
        want += span.want
        asked.append(len(span.want))
    return _Flat(facts, tokens, pages, want, asked, shadowed, stored, partial)


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
