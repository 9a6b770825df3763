"""Paged K,V: who owns which page (bookkeeping, no tensors) and the tensors themselves.

A slot is one position's K,V: slot = page * page_size + offset. `Pages` hands out lowest-numbered pages first, so a
table is usually one run of consecutive pages and its K,V can be read as a view instead of gathered.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

if TYPE_CHECKING:
    import torch

__all__ = ["KVStore", "OutOfPages", "PageTable", "Pages"]


class OutOfPages(Exception):
    """Fewer free pages than asked for. The scheduler answers it by preempting; it never reaches a caller."""


class Pages:
    """Reference-counted pages. Every page is either free or held by `refs[page] > 0` tables; never both, never lost."""

    def __init__(self, count: int, page_size: int) -> None:
        self.count = count
        self.page_size = page_size
        self.refs = [0] * count
        self._free = list(range(count))  # a heap: lowest page first keeps tables contiguous

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.count - len(self._free)

    def pages_for(self, positions: int) -> int:
        return -(-positions // self.page_size)

    def alloc(self, n: int) -> list[int]:
        """Take n free pages, all or none. Raises OutOfPages."""
        if n > len(self._free):
            raise OutOfPages(f"{n} pages wanted, {len(self._free)} of {self.count} free")
        pages = [heapq.heappop(self._free) for _ in range(n)]
        for page in pages:
            self.refs[page] = 1
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        for page in pages:
            assert self.refs[page] > 0, f"page {page} is free and cannot be shared"
            self.refs[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        for page in pages:
            assert self.refs[page] > 0, f"page {page} released twice"
            self.refs[page] -= 1
            if self.refs[page] == 0:
                heapq.heappush(self._free, page)


class PageTable:
    """The pages of one sequence, in order of position."""

    def __init__(self, pool: Pages) -> None:
        self.pool = pool
        self.pages: list[int] = []

    @property
    def capacity(self) -> int:
        return len(self.pages) * self.pool.page_size

    def missing(self, positions: int) -> int:
        """Pages that `grow(positions)` would have to allocate."""
        return max(0, self.pool.pages_for(positions) - len(self.pages))

    def grow(self, positions: int) -> None:
        """Own pages for at least `positions` positions. Raises OutOfPages and changes nothing."""
        self.pages += self.pool.alloc(self.missing(positions))

    def truncate(self, positions: int) -> None:
        """Give back pages wholly beyond `positions`."""
        keep = self.pool.pages_for(positions)
        if keep < len(self.pages):
            dropped = self.pages[keep:]
            del self.pages[keep:]
            self.pool.release(dropped)

    def free(self) -> None:
        self.truncate(0)

    def share(self, positions: int) -> PageTable:
        """A table over the same full pages of [0, positions), which must be a multiple of the page size: a shared page
        is never written again by either side."""
        assert positions % self.pool.page_size == 0, "only full pages can be shared"
        assert positions <= self.capacity, "cannot share more positions than are held"
        twin = PageTable(self.pool)
        twin.pages = self.pages[: positions // self.pool.page_size]
        self.pool.retain(twin.pages)
        return twin

    def slots(self, start: int, stop: int) -> Sequence[int]:
        """Slots of the positions [start, stop), in order."""
        size = self.pool.page_size
        first = self.run(stop)
        if first is not None:
            return range(first + start, first + stop)
        low = start // size
        table = np.asarray(self.pages[low : self.pool.pages_for(stop)])
        slots = (table[:, None] * size + np.arange(size)).ravel()
        return cast(list[int], slots[start - low * size : stop - low * size].tolist())

    def run(self, stop: int) -> int | None:
        """First slot if the pages of [0, stop) are consecutive, else None."""
        pages = self.pages[: self.pool.pages_for(stop)]
        first = pages[0] if pages else 0
        return first * self.pool.page_size if pages == list(range(first, first + len(pages))) else None


class KVStore:
    """K and V of all layers: two tensors [layers, slots, kv_heads, head_dim] of the model's dtype on its device."""

    def __init__(
        self, layers: int, slots: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        import torch

        # Zeros, not empty: untouched pages cost no memory until written, and stale NaN bits can never be read.
        self.k = torch.zeros(layers, slots, kv_heads, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros(layers, slots, kv_heads, head_dim, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return 2 * self.k.numel() * self.k.element_size()
