"""Paged K,V: who owns which page. Bookkeeping, no tensors: those belong to the runners.

A slot is one position's K,V: slot = page * page_size + offset. `Pages` hands out lowest-numbered pages first, so a
table is usually one run of consecutive pages and its K,V can be read as a view instead of gathered. A free page keeps
what it holds and can be found by its key (`prefix` makes the keys).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import cast

import numpy as np

__all__ = ["OutOfPages", "PageTable", "Pages"]


class OutOfPages(Exception):
    """Fewer free pages than asked for. The scheduler answers it by preempting; it never reaches a caller."""


class Pages:
    """Reference-counted pages. Every page is either free or held by `refs[page] > 0` tables; never both, never lost.

    A page may have a key, which stands for all that its K,V depend on. Such a page keeps content and key when it
    becomes free, and `find` gives it to the next table that wants the same (`retain` brings it back), until `alloc`
    needs it for something else: free pages without a key go first, lowest first; then those least recently used, of
    one table the last positions before the first ones, since nobody can use a page without those before it.
    """

    def __init__(self, count: int, page_size: int) -> None:
        self.count = count
        self.page_size = page_size
        self.refs = [0] * count
        self.evicted = 0  # pages whose content was given up, in all
        self._blank = list(range(count))  # free, without a key. A heap: lowest page first keeps tables contiguous
        self._idle: dict[int, None] = {}  # free, with a key; least recently used first
        self._keys: dict[int, bytes] = {}
        self._pages: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        return len(self._blank) + len(self._idle)

    @property
    def used(self) -> int:
        return self.count - self.free

    @property
    def idle(self) -> int:
        """Free pages whose content can still be found."""
        return len(self._idle)

    def unheld(self, pages: Iterable[int]) -> int:
        """How many of them are free."""
        return sum(self.refs[page] == 0 for page in pages)

    def pages_for(self, positions: int) -> int:
        return -(-positions // self.page_size)

    def alloc(self, n: int) -> list[int]:
        """Take n free pages, all or none, in ascending order. Raises OutOfPages."""
        if n > self.free:
            raise OutOfPages(f"{n} pages wanted, {self.free} of {self.count} free")
        pages = [heapq.heappop(self._blank) for _ in range(min(n, len(self._blank)))]
        if len(pages) < n:
            for page in list(islice(self._idle, n - len(pages))):
                del self._idle[page]
                del self._pages[self._keys.pop(page)]
                self.evicted += 1
                pages.append(page)
            pages.sort()
        for page in pages:
            self.refs[page] = 1
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """One more holder of each. A free page can be retained while it has its key."""
        for page in pages:
            if self.refs[page] == 0:
                assert page in self._idle, f"page {page} is free and cannot be shared"
                del self._idle[page]
            self.refs[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder less of each; the last of `pages` become the first to be given up."""
        for page in reversed(pages):
            assert self.refs[page] > 0, f"page {page} released twice"
            self.refs[page] -= 1
            if self.refs[page] == 0:
                if page in self._keys:
                    self._idle[page] = None
                else:
                    heapq.heappush(self._blank, page)

    def label(self, page: int, key: bytes) -> bool:
        """Give a held page its key: from now on nobody writes it. False when another page has that key already."""
        assert self.refs[page] > 0, f"page {page} is free and cannot get a key"
        assert page not in self._keys, f"page {page} has a key already"
        if key in self._pages:
            return False
        self._keys[page] = key
        self._pages[key] = page
        return True

    def find(self, key: bytes) -> int | None:
        """The page with that key, held or free."""
        return self._pages.get(key)

    def writable(self, page: int) -> bool:
        """Whether its one holder may write it."""
        return self.refs[page] == 1 and page not in self._keys

    def forget(self) -> None:
        """Drop every key: what is free holds nothing any more, what is held stays with its holders."""
        for page in self._idle:
            heapq.heappush(self._blank, page)
        self._idle.clear()
        self._keys.clear()
        self._pages.clear()


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

    def adopt(self, pages: Sequence[int]) -> None:
        """Hold these pages too, after the own ones: full ones that somebody else wrote, and nobody writes again."""
        self.pool.retain(pages)
        self.pages += pages

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
