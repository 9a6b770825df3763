"""Pages: never leaked, never aliased, whatever the order of operations."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dfastllm.engine.pages import OutOfPages, Pages, PageTable


class PageMachine(RuleBasedStateMachine):
    """Drives tables over one pool and compares with plain counting, keys and the order of eviction included."""

    @initialize(count=st.integers(1, 24), size=st.sampled_from([1, 3, 16]))
    def start(self, count: int, size: int) -> None:
        self.pool = Pages(count, size)
        self.tables: list[PageTable] = []
        self.keys: dict[int, bytes] = {}
        self.idle: list[int] = []  # free with a key, least recently used first
        self.made = 0

    def held(self) -> Counter[int]:
        return Counter(page for table in self.tables for page in table.pages)

    def next_pages(self, n: int) -> list[int]:
        """What an allocation must hand out, and what is forgotten for it."""
        held = self.held()
        blank = [p for p in range(self.pool.count) if not held[p] and p not in self.keys][:n]
        old, self.idle = self.idle[: n - len(blank)], self.idle[n - len(blank) :]
        for page in old:
            del self.keys[page]
        return sorted(blank + old)

    def dropped(self, pages: list[int]) -> None:
        """These were let go by a table."""
        held = self.held()
        self.idle += [page for page in reversed(pages) if not held[page] and page in self.keys]

    @rule(positions=st.integers(0, 60))
    def new(self, positions: int) -> None:
        table = PageTable(self.pool)
        self.tables.append(table)
        self.grow_one(table, positions)

    @rule(data=st.data(), positions=st.integers(0, 60))
    def grow(self, data: st.DataObject, positions: int) -> None:
        if self.tables:
            self.grow_one(data.draw(st.sampled_from(self.tables)), positions)

    def grow_one(self, table: PageTable, positions: int) -> None:
        before, missing, free = list(table.pages), table.missing(positions), self.pool.free
        if missing > free:
            with pytest.raises(OutOfPages):
                table.grow(positions)
            assert table.pages == before
            assert self.pool.free == free
        else:
            wanted = before + self.next_pages(missing)
            table.grow(positions)
            assert table.pages == wanted
            assert table.capacity >= positions

    @rule(data=st.data(), positions=st.integers(0, 60))
    def truncate(self, data: st.DataObject, positions: int) -> None:
        if self.tables:
            table = data.draw(st.sampled_from(self.tables))
            before = list(table.pages)
            table.truncate(positions)
            assert table.pages == before[: self.pool.pages_for(positions)]
            self.dropped(before[len(table.pages) :])

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        if self.tables:
            table = data.draw(st.sampled_from(self.tables))
            full = data.draw(st.integers(0, len(table.pages))) * self.pool.page_size
            self.tables.append(table.share(full))

    @rule(data=st.data(), again=st.booleans(), leave=st.booleans())
    def label(self, data: st.DataObject, again: bool, leave: bool) -> None:
        """A sequence finishes its pages, with keys of their own or ones that others have; it may end with that."""
        if not self.tables:
            return
        table = data.draw(st.sampled_from(self.tables))
        for page in [page for page in table.pages if page not in self.keys]:
            known = sorted(self.keys.values())
            key = known[0] if again and known else self.made.to_bytes(2)
            self.made += 1
            assert self.pool.label(page, key) == (key not in known)
            if key not in known:
                self.keys[page] = key
        if leave:
            self.leave(table)

    @rule(data=st.data())
    def adopt(self, data: st.DataObject) -> None:
        """A new sequence finds a few pages by their keys, free ones among them."""
        known = st.sampled_from(sorted(self.keys.values())) if self.keys else st.nothing()
        keys = data.draw(st.lists(known, unique=True))
        pages = [page for key in keys if (page := self.pool.find(key)) is not None]
        assert [self.keys[page] for page in pages] == keys
        table = PageTable(self.pool)
        table.adopt(pages)
        self.idle = [page for page in self.idle if page not in pages]
        self.tables.append(table)

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        if self.tables:
            self.leave(data.draw(st.sampled_from(self.tables)))

    def leave(self, table: PageTable) -> None:
        before = list(table.pages)
        table.free()
        self.tables.remove(table)
        self.dropped(before)

    @rule(sure=st.integers(0, 9))
    def forget(self, sure: int) -> None:
        if sure == 9:
            self.pool.forget()
            self.keys.clear()
            self.idle.clear()

    @invariant()
    def accounted(self) -> None:
        if not hasattr(self, "pool"):
            return
        held = self.held()
        assert [held[p] for p in range(self.pool.count)] == self.pool.refs
        assert self.pool.used == len(held)
        assert self.pool.idle == len(self.idle)
        for table in self.tables:
            assert len(set(table.pages)) == len(table.pages)
        for page in range(self.pool.count):
            assert self.pool.writable(page) == (held[page] == 1 and page not in self.keys)
        for page, key in self.keys.items():
            assert self.pool.find(key) == page


TestPageMachine = PageMachine.TestCase
TestPageMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


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


def test_the_end_of_a_sequence_is_given_up_before_its_beginning() -> None:
    pool = Pages(4, 1)
    old, young = PageTable(pool), PageTable(pool)
    old.grow(2)
    young.grow(2)
    for page, key in zip(old.pages + young.pages, (b"a", b"b", b"c", b"d"), strict=True):
        pool.label(page, key)
    old.free()
    young.free()
    gone = []
    for _ in range(4):
        pool.alloc(1)
        gone.append({key for key in (b"a", b"b", b"c", b"d") if pool.find(key) is None})
    assert gone == [{b"b"}, {b"a", b"b"}, {b"a", b"b", b"d"}, {b"a", b"b", b"c", b"d"}]
    assert pool.evicted == 4


def test_a_free_page_without_a_key_cannot_be_shared() -> None:
    pool = Pages(2, 4)
    with pytest.raises(AssertionError, match="free and cannot be shared"):
        pool.retain([0])
    with pytest.raises(AssertionError, match="cannot get a key"):
        pool.label(0, b"k")
