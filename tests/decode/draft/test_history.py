"""Draft lengths under rejection: a function of what stood."""

from __future__ import annotations

from dfastllm.decode.draft.history import History, after, allowed


def test_length_follows_what_stood() -> None:
    h = after(None, 5, drafted=5, accepted=2, tokens=10)
    assert h == History(3)
    h = after(h, 5, 3, 3, 14)
    assert h.length == 4
    h = after(after(h, 5, 4, 4, 19), 5, 5, 5, 25)
    assert h.length == 5  # never beyond what was asked for
    assert allowed(h, 5, 25) == 5
    assert allowed(h, 2, 25) == 2
    assert allowed(None, 5, 3) == 5


def test_misses_in_a_row_pause_ever_longer_and_one_hit_ends_that() -> None:
    h, at, pauses = History(5), 100, []
    for _ in range(6):
        for _ in range(4):
            h = after(h, 5, 1, 0, at)
        assert allowed(h, 5, at) == 0
        pauses.append(h.resume - at)
        assert allowed(h, 5, h.resume - 1) == 0
        at = h.resume
        assert allowed(h, 5, at) == 1
    assert pauses == [16, 32, 64, 128, 256, 256]
    h = after(h, 5, 1, 1, at + 2)
    assert allowed(h, 5, at + 2) == 2
    for _ in range(4):
        h = after(h, 5, 1, 0, at)
    assert h.resume - at == 16


def test_a_short_lookup_counts_as_far_as_it_went() -> None:
    assert after(History(4), 5, drafted=2, accepted=2, tokens=9).length == 5
    assert after(History(1), 5, drafted=1, accepted=1, tokens=9).length == 2
