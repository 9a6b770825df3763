"""A step laid out for kernels whose grids are fixed: arrays of a bucket's sizes at a bucket's places in one buffer of
int32, so that a step goes to the device in one copy and a captured graph finds it where the last one lay.

A bucket holds so many rows. A step of fewer leaves rows over, which are given to a span without keys; every row is in
a tile, which is what one program of attention works on: neighbouring rows of one span. What has no bound that a bucket
could know, block tables and masks, lies in the tail, and spans name places of the whole buffer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfastllm.kernels.step import BLOCK, SPAN_WORDS, Step

__all__ = ["PIECE", "TILE_WORDS", "Bucket", "Laid", "lay", "on", "pieces_of", "tail_words"]

PIECE = 512  # cached keys that are summed together; the sums of the pieces are added in their order
TILE_WORDS = 4
_ROW_ARRAYS = ("ids", "positions", "slot", "cached_limit", "own_limit", "adapter")

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Bucket:
    """The sizes of a layout.

    rows       that it holds; wanted: of them, at most; spans: at most, beside the one of rows that are left over.
    tile_rows  most rows of a tile.
    pieces     most pieces of a span's cached keys.
    masked     whether its spans may have masks: kernels of one that has none do not look.
    """

    rows: int
    wanted: int
    spans: int
    tile_rows: int
    pieces: int
    masked: bool = True

    @property
    def tiles(self) -> int:
        """No step needs more: each span has at most one tile that is not full."""
        return min(self.rows, self.rows // self.tile_rows + self.spans) + 1

    @property
    def head(self) -> int:
        """Words before the tail."""
        rows = len(_ROW_ARRAYS) * self.rows + self.wanted
        return rows + SPAN_WORDS * (self.spans + 1) + TILE_WORDS * self.tiles


@dataclass(frozen=True, slots=True)
class Laid:
    """A step on a device: views of one buffer of int32.

    words   [capacity]: the whole buffer.
    ids, positions, slot, cached_limit, own_limit, adapter  [rows], as of a Step. Rows that are left over have slot -1
            and limits of 0.
    want    [wanted]: beyond those of the step, row 0.
    spans   [spans + 1, 8]: row0, row1; cached, own: numbers of keys; block0, own0: words of the whole buffer;
            own_start: position of its first own key; mask_at: byte of the whole buffer, -1: no mask.
            Cached key j, at position j, lies at slot words[block0 + j // 16] * 16 + j % 16. Own key o, at position
            own_start + o, is that of row words[own0 + o] of this pass. The mask is uint8 [rows, cached + own].
    tiles   [tiles, 4]: first row, number of rows (0: no tile), span, 0. Every row is in one.
    tile_rows, pieces, masked  of the bucket.
    """

    words: Tensor
    ids: Tensor
    positions: Tensor
    slot: Tensor
    cached_limit: Tensor
    own_limit: Tensor
    adapter: Tensor
    want: Tensor
    spans: Tensor
    tiles: Tensor
    tile_rows: int
    pieces: int
    masked: bool

    @classmethod
    def over(cls, words: Tensor, bucket: Bucket) -> Laid:
        """Views of a buffer int32 [capacity] where `lay` puts a bucket's arrays."""
        rows = words[: len(_ROW_ARRAYS) * bucket.rows].view(-1, bucket.rows).unbind(0)
        at = len(_ROW_ARRAYS) * bucket.rows
        want = words[at : at + bucket.wanted]
        at += bucket.wanted
        spans = words[at : at + SPAN_WORDS * (bucket.spans + 1)].view(-1, SPAN_WORDS)
        at += SPAN_WORDS * (bucket.spans + 1)
        tiles = words[at : at + TILE_WORDS * bucket.tiles].view(-1, TILE_WORDS)
        ids, positions, slot, cached_limit, own_limit, adapter = rows
        return cls(
            words,
            ids,
            positions,
            slot,
            cached_limit,
            own_limit,
            adapter,
            want,
            spans,
            tiles,
            bucket.tile_rows,
            bucket.pieces,
            bucket.masked,
        )

    @property
    def rows(self) -> int:
        return len(self.ids)


def tail_words(step: Step) -> int:
    """Words of a step's tail."""
    return len(step.blocks) + BLOCK * len(step.own_blocks) + len(step.mask) // 4


def lay(step: Step, bucket: Bucket, out: Ints) -> int:
    """Lay a step into a buffer of at least `bucket.head + tail_words(step)` words. Returns how many words are in use.
    The step fits the bucket: rows, wanted rows, spans and pieces."""
    rows, size, wanted = len(step), bucket.rows, len(step.want)
    at = 0
    for name in _ROW_ARRAYS:
        out[at : at + rows] = getattr(step, name)
        out[at + rows : at + size] = -1 if name == "slot" else 0
        at += size
    out[at : at + wanted] = step.want
    out[at + wanted : at + bucket.wanted] = 0
    at += bucket.wanted
    spans = out[at : at + SPAN_WORDS * (bucket.spans + 1)].reshape(-1, SPAN_WORDS)
    at += SPAN_WORDS * (bucket.spans + 1)
    count = len(step.spans)
    spans[:count] = step.spans
    spans[count:] = (0, 0, 0, 0, 0, 0, 0, -1)
    tiles = out[at : at + TILE_WORDS * bucket.tiles].reshape(-1, TILE_WORDS)
    _lay_tiles(step, bucket, tiles)
    at += TILE_WORDS * bucket.tiles

    blocks, own = len(step.blocks), BLOCK * len(step.own_blocks)
    spans[:count, 4] += at
    out[at : at + blocks] = step.blocks
    at += blocks
    if own:
        spans[:count, 5] *= BLOCK
        spans[:count, 5] += at
        passing = np.flatnonzero(step.own_slot >= 0)
        row_of = np.zeros((max(len(step.own_blocks), int(step.own_blocks.max()) + 1), BLOCK), dtype=np.int32)
        row_of.reshape(-1)[step.own_slot[passing]] = passing
        out[at : at + own] = row_of[step.own_blocks].reshape(-1)
        at += own
    if len(step.mask):
        masked = spans[:count, 7]
        masked[masked >= 0] += 4 * at
        out[at : at + len(step.mask) // 4] = step.mask.view(np.int32)
        at += len(step.mask) // 4
    return at


def _lay_tiles(step: Step, bucket: Bucket, out: Ints) -> None:
    """Rows of every span in tiles; rows of no span, and those that are left over, in tiles of the span behind all."""
    count, height = len(step.spans), bucket.tile_rows
    first, last = step.spans[:, 0], step.spans[:, 1]
    numbers = np.arange(count)
    gaps = np.append(first, bucket.rows) > np.concatenate(([0], last))  # before each span, and behind the last
    if gaps.any():
        first = np.concatenate((first, np.concatenate(([0], last))[gaps]))
        last = np.concatenate((last, np.append(step.spans[:, 0], bucket.rows)[gaps]))
        numbers = np.concatenate((numbers, np.full(int(gaps.sum()), bucket.spans)))
    counts = -(-(last - first) // height)
    total = int(counts.sum())
    which = np.repeat(np.arange(len(counts)), counts)
    row = first[which] + (np.arange(total) - (np.cumsum(counts) - counts)[which]) * height
    out[:total, 0] = row
    np.minimum(last[which] - row, height, out=out[:total, 1], casting="unsafe")
    out[:total, 2] = numbers[which]
    out[:total, 3] = 0
    out[total:] = 0


def pieces_of(step: Step) -> int:
    """Pieces of the span with the most cached keys, at least 1."""
    return max(1, -(-int(step.spans[:, 2].max(initial=0)) // PIECE))


def on(device: torch.device, step: Step, tile_rows: int) -> Laid:
    """A step by itself on a device, in a bucket of just its sizes: what runs without a graph."""
    gaps = 1 + len(step.spans)
    bucket = Bucket(
        max(1, len(step)), len(step.want), len(step.spans) + gaps, tile_rows, pieces_of(step), len(step.mask) > 0
    )
    words = np.empty(bucket.head + tail_words(step), dtype=np.int32)
    lay(step, bucket, words)
    return Laid.over(torch.from_numpy(words).to(device), bucket)
