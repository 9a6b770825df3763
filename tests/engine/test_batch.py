"""Packing against the words of Span: visibility by brute force, and packed rows against each span alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfastllm.core import Branch, Span
from dfastllm.engine.batch import pack
from dfastllm.engine.pages import Pages, PageTable
from dfastllm.engine.runners.torch import TorchRunner
from dfastllm.kernels.step import Step
from tests.kit.fake import FakeModel


def brute(span: Span, cached: int) -> np.ndarray:
    """Span's docstring, one (row, key) at a time."""
    own = len(span.ids) if span.store in ("keep", "replace") else 0
    keys = [("plain", p) for p in range(cached)]
    keys += [("plain", span.start + r) for r in range(own, len(span.ids))]
    keys += [("shadow", p) for p, _ in span.shadows]
    rows = [(p, None) for p in span.places or range(span.start, span.stop)]
    rows += [(p, i) for i, (p, _) in enumerate(span.shadows)]
    out = np.zeros((len(rows), len(keys)), dtype=bool)
    for r, (position, shadow) in enumerate(rows):
        for c, (what, key) in enumerate(keys):
            if (what == "shadow" and shadow is None) or (what == "plain" and shadow is not None and key == position):
                out[r, c] = False
            elif span.attend == "causal":
                out[r, c] = key <= position
            elif span.attend == "block":
                out[r, c] = key < (position // span.block + 1) * span.block
            else:
                out[r, c] = True
    return out


@st.composite
def spans(draw: st.DrawFn) -> tuple[Span, int]:
    start, n = draw(st.integers(0, 9)), draw(st.integers(1, 6))
    store = draw(st.sampled_from(["keep", "replace", "scratch", "none"]))
    attend = draw(st.sampled_from(["causal", "full", "block"]))
    places: tuple[int, ...] = ()
    if store == "replace" and draw(st.booleans()):
        places = tuple(accumulate(draw(st.lists(st.integers(1, 3), min_size=n - 1, max_size=n - 1)), initial=start))
    last = places[-1] if places else start + n - 1
    shadows = tuple((draw(st.integers(start, last)), 3) for _ in range(draw(st.integers(0, 3))))
    want = tuple(sorted(draw(st.sets(st.integers(0, n + len(shadows) - 1)))))
    block = draw(st.integers(1, 5))
    span = Span(start, tuple(range(n)), attend, store, want, block=block, shadows=shadows, places=places)
    kv = draw(st.integers(last + 1, last + 7)) if store == "replace" else start
    cached = {"keep": span.stop, "replace": kv, "scratch": start, "none": 0}[store]
    return span, cached


def seen(step: Step, number: int) -> np.ndarray:
    """Bool [rows, keys] of a span, as the step says it."""
    row0, row1, cached, own, *_, mask_at = step.spans[number].tolist()
    parts = [np.arange(n) < limit[row0:row1, None] for n, limit in ((cached, step.cached_limit), (own, step.own_limit))]
    out = np.concatenate(parts, axis=1)
    if mask_at >= 0:
        out &= dict(step.span_masks())[number] != 0
    return out


@given(st.lists(spans(), min_size=1, max_size=4), st.sampled_from([1, 2, 4]))
@settings(max_examples=300, deadline=None)
def test_a_step_is_what_spans_say(cases: list[tuple[Span, int]], block: int) -> None:
    """Ids, positions, slots, visible keys and wanted rows of each span, by Span's docstring."""
    pool = Pages(64, 4)
    items = []
    for i, (span, cached) in enumerate(cases):
        table = PageTable(pool)
        table.grow(8)
        pool.alloc(i % 2)  # some tables are scattered
        table.grow(max(cached, span.stop))
        items.append((span, table, cached if span.store == "replace" else span.start))
    step = pack(items, block)
    step.check(pool.count * 4 // block, len(step.own_blocks))
    want: list[int] = []
    for i, ((span, table, _), (_, cached)) in enumerate(zip(items, cases, strict=True)):
        row0, row1, held, passing_keys, at, own_at, own_start, _ = step.spans[i].tolist()
        own = span.places or range(span.start, span.stop)
        places = [*own, *(p for p, _ in span.shadows)]
        assert step.ids[row0:row1].tolist() == [*span.ids, *(t for _, t in span.shadows)]
        assert step.positions[row0:row1].tolist() == places
        everywhere = list(table.slots(0, own[-1] + 1))
        stored = [everywhere[p] for p in own] if span.store in ("keep", "replace") else []
        assert step.slot[row0:row1].tolist() == stored + [-1] * (row1 - row0 - len(stored))
        assert (held, passing_keys) == (cached, row1 - row0 - len(stored))
        assert own_start == span.start + len(stored)
        blocks = step.blocks[at : at + -(-cached // block)]
        assert [int(b) * block + o for b in blocks for o in range(block)][:cached] == list(table.slots(0, cached))
        passing = step.own_blocks[own_at : own_at + -(-passing_keys // block)]
        slots = [int(b) * block + o for b in passing for o in range(block)][:passing_keys]
        assert step.own_slot[row0:row1].tolist() == [-1] * len(stored) + slots
        assert (seen(step, i) == brute(span, cached)).all()
        assert (step.spans[i, 7] >= 0) == bool(span.shadows)
        want += [row0 + r for r in span.want]
    assert step.want.tolist() == want
    assert not step.adapter.any()
    taken = step.own_slot[step.own_slot >= 0]
    assert len(set(taken.tolist())) == len(taken)


@given(st.lists(spans(), min_size=1, max_size=3), st.data())
@settings(max_examples=100, deadline=None)
def test_branches_are_packed_as_spans_that_store_nothing(cases: list[tuple[Span, int]], data: st.DataObject) -> None:
    """The same arrays as of the branches given as spans of their own, with what the span stores already held."""
    pool = Pages(64, 4)
    with_branches, flat = [], []
    for span, kv in cases:
        table = PageTable(pool)
        table.grow(max(kv, span.stop) + 8)
        branches = []
        for _ in range(data.draw(st.integers(0, 2)) if span.store != "replace" else 0):
            begin = data.draw(st.integers(span.start, span.stop))
            n = data.draw(st.integers(1, 6))
            branches.append(Branch(begin, tuple(range(n)), tuple(sorted(data.draw(st.sets(st.integers(0, n - 1)))))))
        held = kv if span.store == "replace" else span.start
        with_branches.append((replace(span, branches=tuple(branches)), table, held))
        flat.append((span, table, held))
        store = "none" if span.store == "none" else "scratch"
        flat += [(Span(b.start, b.ids, span.attend, store, b.want, span.block), table, b.start) for b in branches]
    packed, expected = pack(with_branches, 4), pack(flat, 4)
    assert len(packed.want) == sum(span.wanted for span, _, _ in with_branches)
    assert len(packed) == sum(span.rows for span, _, _ in with_branches)
    assert packed.words.tolist() == expected.words.tolist()


def test_a_branch_of_a_span_that_replaces_is_refused() -> None:
    table = PageTable(Pages(4, 4))
    table.grow(8)
    span = Span(0, (1, 2), "full", "replace", branches=(Branch(0, (3, 4), (0,)),))
    with pytest.raises(AssertionError, match="replaces"):
        pack([(span, table, 4)], 4)


def test_packed_spans_equal_each_alone() -> None:
    def run(groups: list[list[int]]) -> dict[int, torch.Tensor]:
        pool = Pages(16, 4)
        runner = TorchRunner(FakeModel(), 64, torch.float64, "cpu", 16, 4)
        tables = [PageTable(pool) for _ in range(3)]
        prompts = [(1, 2, 3, 4, 5), (6, 7), (8, 9, 10, 11, 12, 13, 14)]
        for table in tables:
            table.grow(12)
        last = [(20,), (21, 22, 23), (24, 25)]
        out = {}
        for group in groups:
            runner.run(pack([(Span(0, prompts[i], "causal", "keep"), tables[i], 0) for i in group], 4))
            n = {i: len(prompts[i]) for i in group}
            items = [
                (Span(n[i], last[i], "causal", "scratch", tuple(range(len(last[i])))), tables[i], n[i]) for i in group
            ]
            logits, at = runner.run(pack(items, 4)).logits(), 0
            for i in group:
                out[i] = logits[at : at + len(last[i])]
                at += len(last[i])
        return out

    together, alone = run([[0, 1, 2]]), run([[2], [0], [1]])
    for i in range(3):
        assert torch.equal(together[i], alone[i])


def test_padding_rows_change_nothing() -> None:
    table = PageTable(Pages(4, 4))
    table.grow(8)
    span = Span(0, (1, 2, 3), "full", "none", (1, 2))
    model = FakeModel()
    step = pack([(span, table, 0)], 4)
    rows = [TorchRunner(model, 16, torch.float64, "cpu", m, 4).run(step).logits() for m in (1, 8)]
    assert model.heights == [3, 8]
    assert torch.equal(rows[0], rows[1])


def test_scattered_pages_read_like_consecutive_ones() -> None:
    pool = Pages(8, 2)
    runner = TorchRunner(FakeModel(), 16, torch.float64, "cpu", 1, 2)
    apart, other, together = PageTable(pool), PageTable(pool), PageTable(pool)
    apart.grow(2)
    other.grow(2)
    apart.grow(6)
    together.grow(6)
    assert apart.run(5) is None
    logits = []
    for table in (apart, together):
        runner.run(pack([(Span(0, (1, 2, 3, 4), "causal", "keep"), table, 0)], 2))
        logits.append(runner.run(pack([(Span(4, (5,), "causal", "keep", (0,)), table, 4)], 2)).logits())
    assert torch.equal(logits[0], logits[1])
