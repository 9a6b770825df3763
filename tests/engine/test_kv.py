"""Pages: never leaked, never aliased, whatever the order of operations."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dfastllm.engine.kv import OutOfPages, Pages, PageTable


class PageMachine(RuleBasedStateMachine):
    """Drives tables over one pool and compares with plain counting."""

    @initialize(count=st.integers(1, 24), size=st.integers(1, 5))
    def start(self, count: int, size: int) -> None:
        self.pool = Pages(count, size)
        self.tables: list[PageTable] = []

    @rule(positions=st.integers(0, 60))
    def new(self, positions: int) -> None:
        table = PageTable(self.pool)
        self.tables.append(table)
        free = self.pool.free
        try:
            table.grow(positions)
        except OutOfPages:
            assert self.pool.pages_for(positions) > free
            assert table.pages == []
            assert self.pool.free == free

    @rule(data=st.data(), positions=st.integers(0, 60))
    def grow(self, data: st.DataObject, positions: int) -> None:
        if not self.tables:
            return
        table = data.draw(st.sampled_from(self.tables))
        before, missing = list(table.pages), table.missing(positions)
        try:
            table.grow(positions)
            assert len(table.pages) == len(before) + missing
            assert table.capacity >= positions
        except OutOfPages:
            assert table.pages == before
        assert table.pages[: len(before)] == before

    @rule(data=st.data(), positions=st.integers(0, 60))
    def truncate(self, data: st.DataObject, positions: int) -> None:
        if self.tables:
            table = data.draw(st.sampled_from(self.tables))
            before = list(table.pages)
            table.truncate(positions)
            assert table.pages == before[: self.pool.pages_for(positions)]

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        if self.tables:
            table = data.draw(st.sampled_from(self.tables))
            full = data.draw(st.integers(0, len(table.pages))) * self.pool.page_size
            self.tables.append(table.share(full))

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        if self.tables:
            table = data.draw(st.sampled_from(self.tables))
            table.free()
            self.tables.remove(table)

    @invariant()
    def accounted(self) -> None:
        if not hasattr(self, "pool"):
            return
        held = Counter(page for table in self.tables for page in table.pages)
        assert [held[p] for p in range(self.pool.count)] == self.pool.refs
        assert self.pool.used == len(held)
        for table in self.tables:
            assert len(set(table.pages)) == len(table.pages)


TestPageMachine = PageMachine.TestCase
TestPageMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_slots_and_run_agree() -> None:
    pool = Pages(8, 4)
    a, b = PageTable(pool), PageTable(pool)
    a.grow(6)
    b.grow(3)
    a.grow(11)
    assert b.run(3) == b.slots(0, 3)[0]
    assert a.run(8) == 0
    assert a.run(11) is None  # b took the page between
    assert a.slots(6, 10) == [6, 7, 12, 13]
    assert list(a.slots(2, 5)) == [2, 3, 4]


def test_release_twice_is_caught() -> None:
    pool = Pages(2, 4)
    pages = pool.alloc(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(pages)
