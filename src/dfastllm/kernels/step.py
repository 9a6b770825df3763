"""A step: one forward pass over packed spans, as one contiguous array of int32 and nothing else.

No page table, span or request is in it, so a step can be captured in a graph, copied to a device in one piece, sent to
another process, recorded and replayed. The engine makes it (`engine.batch`), a runner runs it.

Layout, in words of 4 bytes, `HEADER` words first and then the arrays one after the other:

| array | shape | meaning |
|---|---|---|
| ids | [rows] | token ids |
| positions | [rows] | positions in their sequences |
| slot | [rows] | where a row's K,V are kept: block * block_size + offset; -1: nowhere |
| own_slot | [rows] | the same for K,V of this pass only (rows that see each other but are not kept) |
| cached_limit | [rows] | the row sees the first so many cached keys of its span |
| own_limit | [rows] | and the first so many own keys |
| adapter | [rows] | number of the adapter that the row's linear layers use; 0: none |
| want | [wanted] | rows whose hidden states are wanted, ascending within a span |
| spans | [spans, 8] | row0, row1; cached, own: numbers of keys; block0, own_block0: where its entries of `blocks` |
| | | and `own_blocks` begin; own_start: position of its first own key; mask_at: byte of `mask`, -1: none |
| blocks | [blocks] | block tables of the cached keys, ceil(cached / block_size) a span |
| own_blocks | [own blocks] | those of the own keys |
| mask | [mask bytes] | of the spans that have one: uint8 [rows, cached + own], nonzero: visible within the limits |

The keys of a span are its cached ones, which are the positions [0, cached) of its sequence, and after them its own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfastllm.errors import ValidationError
from dfastllm.kernels.extension import native

__all__ = ["BLOCK", "SPAN_WORDS", "Step", "put"]

BLOCK = 16  # positions of a block of the native kernels
HEADER = 16
MAGIC = 0x53544531  # "STE1": the layout above
SPAN_WORDS = 8
_ROW_ARRAYS = ("ids", "positions", "slot", "own_slot", "cached_limit", "own_limit", "adapter")

Ints = NDArray[np.int32]


class Step:
    """One forward pass; every array is a view of `words`, see the table above. Nobody writes a step once it is made.

    words       int32 [total]: the whole step.
    block_size  positions of a block, of slots and block tables.
    """

    __slots__ = (
        *_ROW_ARRAYS, "_native", "block_size", "blocks", "mask", "own_blocks", "spans", "want", "words",
    )  # fmt: skip
    ids: Ints
    positions: Ints
    slot: Ints
    own_slot: Ints
    cached_limit: Ints
    own_limit: Ints
    adapter: Ints

    def __init__(self, words: Ints) -> None:
        """Of a whole step's words, whose counts must fit (`check` looks at the contents). Raises ValidationError."""
        if words.dtype != np.int32 or words.ndim != 1 or not words.flags.c_contiguous:
            raise ValidationError(
                f"a step must be contiguous int32 [words], got {words.dtype} {list(words.shape)}.", param="step"
            )
        if len(words) < HEADER or words[0] != MAGIC:
            raise ValidationError("the step is of another version, or no step at all.", param="step")
        _, rows, spans, blocks, own_blocks, wanted, mask_words, block_size = words[:8].tolist()
        sizes = [rows] * len(_ROW_ARRAYS) + [wanted, SPAN_WORDS * spans, blocks, own_blocks, mask_words]
        if min(sizes) < 0 or len(words) != HEADER + sum(sizes):
            raise ValidationError(
                f"the step is cut or too long: {len(words)} words, wanted {HEADER + sum(sizes)}.", param="step"
            )
        self._lay(words, rows, spans, blocks, own_blocks, wanted, block_size)

    def _lay(
        self, words: Ints, rows: int, spans: int, blocks: int, own_blocks: int, wanted: int, block_size: int
    ) -> None:
        """Lay the arrays over words of these counts."""
        self.words, self.block_size = words, block_size
        self._native: Any = None
        at = [HEADER + rows * i for i in range(len(_ROW_ARRAYS) + 1)]
        self.ids, self.positions = words[at[0] : at[1]], words[at[1] : at[2]]
        self.slot, self.own_slot = words[at[2] : at[3]], words[at[3] : at[4]]
        self.cached_limit, self.own_limit = words[at[4] : at[5]], words[at[5] : at[6]]
        self.adapter = words[at[6] : at[7]]
        facts = at[7] + wanted
        tables = facts + SPAN_WORDS * spans
        own = tables + blocks
        self.want: Ints = words[at[7] : facts]
        self.spans: Ints = words[facts:tables].reshape(spans, SPAN_WORDS)
        self.blocks: Ints = words[tables:own]
        self.own_blocks: Ints = words[own : own + own_blocks]
        self.mask: NDArray[np.uint8] = words[own + own_blocks :].view(np.uint8)

    @classmethod
    def blank(
        cls,
        rows: int,
        spans: int,
        *,
        blocks: int = 0,
        own_blocks: int = 0,
        wanted: int = 0,
        mask: int = 0,
        block_size: int = BLOCK,
    ) -> Step:
        """A step of these sizes, zeros, for its maker to fill in. mask: bytes."""
        mask_words = -(-mask // 4)
        total = HEADER + rows * len(_ROW_ARRAYS) + wanted + SPAN_WORDS * spans + blocks + own_blocks + mask_words
        words = np.zeros(total, dtype=np.int32)
        struct.pack_into("8i", words.data, 0, MAGIC, rows, spans, blocks, own_blocks, wanted, mask_words, block_size)
        step = cls.__new__(cls)
        step._lay(words, rows, spans, blocks, own_blocks, wanted, block_size)
        return step

    @classmethod
    def of(cls, arrays: Mapping[str, Any], block_size: int = BLOCK) -> Step:
        """A step of arrays by name, copied; what is left out is zeros (`slot`, `own_slot`: -1) or empty."""
        given = {name: np.asarray(value) for name, value in arrays.items()}
        rows = len(given["ids"])
        spans = given.get("spans", np.zeros((0, SPAN_WORDS)))
        counts = {name: len(given.get(name, ())) for name in ("blocks", "own_blocks", "mask")}
        step = cls.blank(rows, len(spans), wanted=len(given.get("want", ())), block_size=block_size, **counts)
        step.slot[:] = step.own_slot[:] = -1
        for name, value in given.items():
            getattr(step, name)[: len(value)] = value
        return step

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Its arrays by name, views."""
        return {name: getattr(self, name) for name in (*_ROW_ARRAYS, "want", "spans", "blocks", "own_blocks", "mask")}

    def __len__(self) -> int:
        """Rows."""
        return len(self.ids)

    @property
    def own_keys(self) -> int:
        """Slots of own K,V in use: own blocks times the block size."""
        return int(len(self.own_blocks) * self.block_size)

    def span_masks(self) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """(span number, uint8 [rows, cached + own]) of the spans that have a mask."""
        for number in np.flatnonzero(self.spans[:, 7] >= 0).tolist() if self.mask.size else ():
            row0, row1, cached, own, *_, at = self.spans[number].tolist()
            yield number, self.mask[at : at + (row1 - row0) * (cached + own)].reshape(row1 - row0, cached + own)

    def native(self) -> Any:
        """The native kernels' form of it, checked. Raises ValidationError naming what does not fit."""
        if self._native is None:
            try:
                self._native = native().Step(self.words)
            except ValueError as error:
                raise ValidationError(str(error), param="step") from error
        return self._native

    def check_ids(self, rows: int) -> None:
        """Raises ValidationError for an id without one of so many embedding rows."""
        if (most := self.ids.max(initial=-1)) >= rows:
            raise ValidationError(f"the step has id {most}; this model has {rows} embedding rows.", param="step")

    def check(self, cache_blocks: int, own_blocks: int = 0) -> None:
        """Raises ValidationError unless its rows, limits and masks fit its spans and its blocks and slots lie in caches
        of so many blocks: what the native kernels check by themselves."""
        rows, size = len(self.ids), self.block_size
        for name, values, least, end in (
            ("ids", self.ids, 0, 1 << 31),
            ("positions", self.positions, 0, 1 << 31),
            ("slot", self.slot, -1, cache_blocks * size),
            ("own_slot", self.own_slot, -1, own_blocks * size),
            ("adapter", self.adapter, 0, 1 << 31),
            ("blocks", self.blocks, 0, cache_blocks),
            ("own_blocks", self.own_blocks, 0, own_blocks),
            ("want", self.want, 0, rows),
        ):
            if len(values) and (values.min() < least or values.max() >= max(end, least + 1)):
                raise ValidationError(
                    f"{name} of the step must be from {least} to {end - 1}, got {values.min()} to {values.max()}.",
                    param=name,
                )
        self._check_spans(rows, size)

    def _check_spans(self, rows: int, size: int) -> None:
        """Of all spans at once: a step may have hundreds, and is checked before it runs."""
        row0, row1, cached, own, at, own_at, _, mask_at = self.spans.astype(np.int64).T
        counts = row1 - row0
        before = np.concatenate(([0], row1[:-1]))
        if (i := _first((row0 < before) | (counts < 0) | (row1 > rows))) is not None:
            raise ValidationError(
                f"span {i} has rows {row0[i]} to {row1[i]}, wanted in order within {rows}.", param="spans"
            )
        which = np.repeat(np.arange(len(counts)), counts)
        inside = np.arange(len(which)) + (row0 - (np.cumsum(counts) - counts))[which]
        for name, keys, first, blocks, limit in (
            ("cached", cached, at, self.blocks, self.cached_limit),
            ("own", own, own_at, self.own_blocks, self.own_limit),
        ):
            if (i := _first((keys < 0) | (first < 0) | (first + -(-keys // size) > len(blocks)))) is not None:
                raise ValidationError(
                    f"span {i} has {keys[i]} {name} keys, but not the blocks for them.", param="spans"
                )
            seen = limit[inside]
            if (row := _first((seen < 0) | (seen > keys[which]))) is not None:
                i = which[row]
                raise ValidationError(
                    f"a row of span {i} sees {seen[row]} of {keys[i]} {name} keys.", param=f"{name}_limit"
                )
        if (i := _first((mask_at >= 0) & (mask_at + counts * (cached + own) > self.mask.size))) is not None:
            raise ValidationError(f"the mask of span {i} is too short.", param="mask")


def _first(wrong: NDArray[np.bool_]) -> int | None:
    """Where the first is true."""
    return int(wrong.argmax()) if wrong.any() else None


def put(values: Sequence[int], array: Ints) -> None:
    """Write Python ints into an int32 array of the same length, a view of a step. By `struct`, which reads Python ints
    four times as fast as numpy does."""
    struct.pack_into(f"{len(values)}i", array.data, 0, *values)
