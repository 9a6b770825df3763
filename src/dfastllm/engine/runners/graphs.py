"""Buckets of steps, and the CUDA graph of each: captured once, replayed for every step that the bucket holds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch

from dfastllm.kernels.step import BLOCK, Step
from dfastllm.kernels.triton.laid import PIECE, Bucket, pieces_of, tail_words
from dfastllm.kernels.triton.memory import out_of_memory

__all__ = ["Buckets", "Graphs", "row_counts"]

log = logging.getLogger("dfastllm.engine")

SHORT = 16  # query rows of a tile, all heads of a group counted: what one product of a tensor core takes
TALL = 64  # and of buckets of many rows
MANY = 256
FINE = 64  # from so many rows on, buckets are half as far apart: their time grows with their rows
WARM = 2  # runs before one is recorded: kernels compile in the first
MOST_TAIL = 1 << 20  # words of block tables and masks that a bucket holds


class Buckets:
    """The buckets of a runner.

    max_rows   the largest step; max_spans: the most spans.
    max_len    the longest sequence.
    group      query heads that share a K,V head.
    invariant  all buckets have tiles of one height, for that shows in a row's bits.
    """

    def __init__(self, max_rows: int, max_spans: int, max_len: int, group: int, *, invariant: bool = False) -> None:
        self.sizes = row_counts(max_rows)
        self.most_rows = self.sizes[-1]
        self._group, self._invariant = group, invariant
        self._max_spans = max_spans
        self._pieces = max(1, -(-max_len // PIECE))
        tail = min(MOST_TAIL, max_spans * (-(-max_len // BLOCK) + 1) + BLOCK * self.most_rows)
        self.words = max(bucket.head for bucket in self) + tail

    def _bucket(self, rows: int, pieces: int, masked: bool) -> Bucket:
        return Bucket(rows, rows, min(rows, self._max_spans), self.tile_rows(rows), pieces, masked=masked)

    def tile_rows(self, rows: int) -> int:
        """Rows of a tile in a step of so many."""
        height = SHORT if self._invariant or rows < MANY else TALL
        return max(1, height // self._group)

    def __iter__(self) -> Iterator[Bucket]:
        """All of them, the largest first: of each size one for masks, which hold any context, and for steps without a
        mask one for short contexts and one for all."""
        for rows in reversed(self.sizes):
            yield self._bucket(rows, self._pieces, True)
            for pieces in sorted({1, self._pieces}, reverse=True):
                yield self._bucket(rows, pieces, False)

    def of(self, step: Step) -> Bucket | None:
        """The smallest that holds a step, None: none does."""
        rows, spans = len(step), step.spans
        if not rows or not len(spans) or rows > self.most_rows or len(spans) > min(rows, self._max_spans):
            return None
        pieces = pieces_of(step)
        if pieces > self._pieces:
            return None
        size = next(size for size in self.sizes if size >= rows)
        masked = bool(step.mask.size) and bool((spans[:, 7] >= 0).any())
        bucket = self._bucket(size, self._pieces if masked or pieces > 1 else 1, masked)
        if bucket.head + tail_words(step) > self.words:
            return None
        together = spans[0, 0] == 0 and spans[-1, 1] == rows and bool((spans[1:, 0] == spans[:-1, 1]).all())
        return bucket if together and bool((spans[:, 1] > spans[:, 0]).all()) else None


def row_counts(most: int) -> list[int]:
    """1, 2, 4 ... and from 64 on those between, up to the first that holds `most`."""
    sizes = [1]
    while sizes[-1] < most:
        last = sizes[-1]
        power = 1 << (last.bit_length() - 1)
        sizes.append(2 * last if last < FINE else power * 3 // 2 if last == power else 2 * power)
    return sizes


class Graphs:
    """Work of fixed sizes, captured once for each and replayed.

    device  that it runs on.
    failed  what could not be captured, and why: it runs op by op.
    """

    def __init__(self, device: torch.device) -> None:
        self.failed: dict[Hashable, str] = {}
        self._device = device
        self._captured: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None  # of memory, which all share: one runs at a time

    def __len__(self) -> int:
        return len(self._captured)

    def capture(self, name: Hashable, work: Callable[[], None]) -> None:
        """Run `work` until its kernels are compiled, then record what it launches. It must read and write the same
        memory every time, and look at no value. Raises ModelLoadError where memory runs out."""
        try:
            with out_of_memory("capturing graphs"):
                self._captured[name] = self._recorded(work)
        except RuntimeError as error:
            self.failed[name] = str(error).splitlines()[0]
            log.warning("no graph for %s, which will run op by op: %s", name, self.failed[name])

    def _recorded(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(WARM):
                work()
        torch.cuda.current_stream(self._device).wait_stream(side)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        return graph

    def run(self, name: Hashable) -> bool:
        """Replay what was captured under a name. False: nothing was."""
        graph = self._captured.get(name)
        if graph is None:
            return False
        graph.replay()
        return True
