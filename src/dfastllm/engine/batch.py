"""Packing: many spans end to end, no padding, as one step.

Everything that depends only on the spans (positions, slots, what is visible) is worked out here, once for all layers.

The keys of a span are numbered: first the cached positions [0, cached), then its own rows that are not among those
(those a span stores are, written before attention reads). Without shadows every row sees a prefix of its keys, so two
numbers a row say it all; a span with shadows has a mask. A branch of a span is packed as a span of its own after it:
what it sees of the cache may have been written in this very pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dfastllm.core import Span, Store
from dfastllm.engine.pages import PageTable
from dfastllm.kernels.rows import int64s
from dfastllm.kernels.step import BLOCK, Step, put

__all__ = ["Items", "pack", "visibility"]

Ints = NDArray[np.int64]
Items = Sequence[tuple[Span, PageTable, int]]  # a span, its sequence's pages, its kv_len


def pack(items: Items, block_size: int = BLOCK, adapters: Sequence[int] = ()) -> Step:
    """The step of these spans, at least one, each followed by its branches. The tables must already hold the pages that
    `span.stored` needs. block_size: of the runner; divides the page size. adapters: the number of each span's adapter,
    which all its rows and those of its branches carry; none: they have none."""
    numbers: list[int] = []
    if any(adapters):
        numbers = [n for n, (span, *_) in zip(adapters, items, strict=True) for _ in range(1 + len(span.branches))]
    if [1 for span, _, _ in items if span.branches]:
        items = [part for item in items for part in _unfolded(item)]
    page_size = items[0][1].pool.page_size
    f = _flatten(items, page_size)
    facts = int64s([f.facts]).reshape(-1, _FACTS)
    row0, row1, cached, own0, page0, shift, block, offset, own_start = facts.T
    counts = row1 - row0
    own = counts - own0
    # Keys of this pass alone lie in blocks of their own, span after span.
    own_blocks = -(-own // block_size)
    own_first = np.cumsum(own_blocks) - own_blocks
    total_own = int(own_blocks.sum())
    masks = {i: visibility(items[i][0], int(cached[i])) for i in f.shadowed}
    step = Step.blank(
        len(f.tokens),
        len(facts),
        blocks=len(f.pages) * (page_size // block_size),
        own_blocks=total_own,
        wanted=len(f.want),
        mask=sum(mask.size for mask in masks.values()),
        block_size=block_size,
    )
    put(f.tokens, step.ids)
    if numbers:
        step.adapter[:] = np.repeat(numbers, counts)
    rows = np.arange(len(f.tokens))
    positions = rows + shift.repeat(counts)
    for i in f.shadowed:
        shadows = items[i][0].shadows
        positions[row1[i] - len(shadows) : row1[i]] = [p for p, _ in shadows]
    for i in f.scattered:
        places = items[i][0].places
        positions[row0[i] : row0[i] + len(places)] = places
    step.positions[:] = positions
    _fill_slots(step, facts, counts, positions, f, page_size)

    limits = (cached + own).repeat(counts)
    if f.partial:
        reach = block.repeat(counts)
        limits = np.minimum((positions // reach + 1) * reach - offset.repeat(counts), limits)
    if total_own:
        held = cached.repeat(counts)
        own_slot = rows - (row0 + own0 - own_first * block_size).repeat(counts)
        own_slot[rows < (row0 + own0).repeat(counts)] = -1
        step.own_slot[:] = own_slot
        np.minimum(limits, held, out=step.cached_limit, casting="unsafe")
        np.subtract(limits, step.cached_limit, out=step.own_limit, casting="unsafe")
        step.own_blocks[:] = np.arange(total_own)
    else:  # every key is a cached one
        step.own_slot[:] = -1
        step.cached_limit[:] = limits

    spans = step.spans
    spans[:, :3], spans[:, 3] = facts[:, :3], own
    spans[:, 4], spans[:, 5] = page0 * (page_size // block_size), own_first
    spans[:, 6], spans[:, 7] = own_start, -1
    _fill_masks(step, masks)
    if f.want:
        put(f.want, step.want)
        np.add(step.want, row0.repeat(f.asked), out=step.want, casting="unsafe")
    return step


def _fill_slots(step: Step, facts: Ints, counts: Ints, positions: Ints, f: _Flat, page_size: int) -> None:
    """Blocks of the cached keys, and where K,V of the stored rows go; -1: nowhere."""
    pages = int64s([f.pages])
    per_page = page_size // step.block_size
    if per_page == 1:
        step.blocks[:] = pages
    elif len(pages):
        step.blocks[:] = (pages[:, None] * per_page + np.arange(per_page)).ravel()
    if not f.stored:
        step.slot[:] = -1
        return
    page = positions // page_size
    first = facts[:, 4].repeat(counts)
    if f.stored == len(positions):
        step.slot[:] = (pages[first + page] - page) * page_size + positions
        return
    own0 = facts[:, 0] + facts[:, 3]
    written = np.flatnonzero(np.arange(len(positions)) < own0.repeat(counts))
    page = page[written]
    step.slot[:] = -1
    step.slot[written] = (pages[first[written] + page] - page) * page_size + positions[written]


def _fill_masks(step: Step, masks: dict[int, NDArray[np.bool_]]) -> None:
    """The masks, end to end; limits of their rows give way to them."""
    end = 0
    for number, seen in masks.items():
        row0, row1, cached, own = step.spans[number, :4].tolist()
        step.spans[number, 7] = end
        step.mask[end : end + seen.size] = seen.ravel()
        end += seen.size
        step.cached_limit[row0:row1], step.own_limit[row0:row1] = cached, own


def _unfolded(item: tuple[Span, PageTable, int]) -> Items:
    """A span, and each of its branches as a span that stores nothing."""
    span, table, kv_len = item
    assert span.store != "replace" or not span.branches, "a branch would see what the span replaces"
    store: Store = "none" if span.store == "none" else "scratch"
    more = [Span(b.start, b.ids, span.attend, store, b.want, block=span.block) for b in span.branches]
    return [item, *[(branch, table, kv_len) for branch in more]]


_ALL = 1 << 40  # a block that holds every position
_FACTS = 9


@dataclass(slots=True)
class _Flat:
    """What spans say, as lists, end to end.

    facts   nine numbers a span: row0, row1; its cached keys; its rows that are among those; where its pages begin in
            `pages`; the position of row 0 of the step, were its rows to begin there; the block within which rows see
            what comes after them (1 when causal, all when full); the position of key 0; the position of its first own
            key.
    tokens, pages, want  of all spans; want: relative to the span. asked: rows wanted of each. stored: rows that are
    stored. shadowed: the spans with shadows; scattered: those with places. partial: some rows do not see all keys of
    their span.
    """

    facts: list[int]
    tokens: list[int]
    pages: list[int]
    want: list[int]
    asked: list[int]
    shadowed: list[int]
    scattered: list[int]
    stored: int
    partial: bool


def _flatten(items: Items, size: int) -> _Flat:
    facts: list[int] = []
    tokens: list[int] = []
    pages: list[int] = []
    want: list[int] = []
    asked: list[int] = []
    shadowed: list[int] = []
    scattered: list[int] = []
    stored, partial, row1, page0 = 0, False, 0, 0
    for span, table, kv_len in items:
        start, ids, store, attend = span.start, span.ids, span.store, span.attend
        n = rows = len(ids)
        tokens += ids
        if span.shadows:
            shadowed.append(len(asked))
            tokens += [token for _, token in span.shadows]
            rows += len(span.shadows)
        if span.places:
            assert store == "replace", "only a span that replaces may have places"
            scattered.append(len(asked))
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
        facts += (row0, row1, cached, own0, page0, start - row0, block, offset, start + own0)
        if cached:
            pages += table.pages[: -(-cached // size)]
            page0 = len(pages)
        want += span.want
        asked.append(len(span.want))
    return _Flat(facts, tokens, pages, want, asked, shadowed, scattered, stored, partial)


def visibility(span: Span, cached: int) -> NDArray[np.bool_]:
    """Bool [rows, keys] of Span's rules: which of the keys, `cached` positions and then the own rows that are not among
    those, each row sees. Only spans with shadows need it; for the others the limits say the same."""
    n, shadows = len(span.ids), len(span.shadows)
    own0 = n if span.store in ("keep", "replace") else 0
    places = np.array([*span.positions, *(p for p, _ in span.shadows)])
    keys = np.concatenate([np.arange(cached), places[own0:]])
    block = {"causal": 1, "full": _ALL, "block": span.block}[span.attend]
    seen: NDArray[np.bool_] = keys < (places[:, None] // block + 1) * block
    first = len(keys) - shadows
    seen[:n, first:] = False
    seen[n:, :first] &= keys[:first] != places[n:, None]
    return seen
