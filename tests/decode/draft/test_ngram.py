"""Prompt lookup against its rule, written as a search."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from dfastllm.decode.draft.ngram import lookup


def search(tokens: Sequence[int], least: int, most: int, count: int) -> list[int]:
    total = len(tokens)
    for n in range(min(most, total - 1), least - 1, -1):
        ends = [e for e in range(n, total) if list(tokens[e - n : e]) == list(tokens[total - n :])]
        if ends:
            full = [e for e in ends if e + count <= total]
            at = full[-1] if full else ends[0]
            return list(tokens[at : at + count])
    return []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 4), st.integers(0, 4), st.integers(1, 6))
@settings(max_examples=400, deadline=None)
def test_it_is_what_a_search_finds(tokens: list[int], least: int, more: int, count: int) -> None:
    assert lookup(tokens, least, least + more, count) == search(tokens, least, least + more, count)


def test_known_cases() -> None:
    assert lookup([1, 2, 3, 9, 1, 2], 2, 5, 3) == [3, 9, 1]
    assert lookup([1, 2, 3, 9, 1, 2], 3, 5, 3) == []
    assert lookup([7], 1, 1, 3) == []
    assert lookup([7, 7, 7], 1, 2, 2) == [7]  # every match ends too near: the earliest one gives the most
