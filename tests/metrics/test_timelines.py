"""Speed metrics of timelines made by hand, of our engine's events under a clock made by hand, and their aggregate."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfastllm.core import CanvasUpdate, Finish, FinishReason, StepEvent, Usage
from dfastllm.llm import resolve
from dfastllm.metrics.speed import Arrival, CallPart, percentiles
from dfastllm.metrics.timelines import ToolTimeline as Timeline
from dfastllm.metrics.timelines import aggregate, measure, record
from dfastllm.text import Tokenizer

CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "required": ["zone"]}}}
CALL = '<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call>'


def steady(n: int, first: float, gap: float, text: str = "x") -> Timeline:
    arrivals = tuple(Arrival(first + i * gap, 1, text) for i in range(n))
    return Timeline(arrivals, first + (n - 1) * gap + 0.5)


def test_itl_shares_the_gap_of_tokens_that_arrive_together() -> None:
    timeline = Timeline((Arrival(1.0, 2), Arrival(2.0, 4), Arrival(2.5, 1), Arrival(2.5, 1)), 3.0)
    assert timeline.itl == pytest.approx([0.25] * 4 + [0.25] * 2)
    assert timeline.gaps == pytest.approx([1.0, 0.5])
    assert timeline.tpot == pytest.approx(2.0 / 7)
    assert timeline.n == 8
    assert Timeline((Arrival(1.0, None, "a"), Arrival(2.0, None, "b")), 3.0).itl == []


def test_time_per_block() -> None:
    timeline = Timeline((Arrival(1.0, 32),), 2.5, began=0.25, blocks=(1.0, 2.5))
    assert timeline.block_seconds == [0.75, 1.5]
    assert steady(3, 0.1, 0.1).block_seconds == []


def test_ttfa_of_streamed_call_parts() -> None:
    """As vLLM and OpenAI stream them; the braces inside are not the end."""
    pieces = ['{"zone"', ': {"a": 1}', "}", " "]
    parts = [(CallPart(0, "clock"),), *((CallPart(0, "", p),) for p in pieces)]
    timeline = Timeline(tuple(Arrival(float(i + 1), 3, "", p) for i, p in enumerate(parts)), 9.0)
    assert timeline.ttfa([CLOCK]) == (12, 4.0)
    other = Timeline((Arrival(1.0, 3, "", (CallPart(0, "clock", "{}"), CallPart(1, "clock", '{"zone": 1}'))),), 9.0)
    assert other.ttfa([CLOCK]) == (3, 1.0)  # the second of two calls fits


def test_ttfa_index_is_estimated_where_tokens_are_unknown() -> None:
    arrivals = (Arrival(1.0, None, CALL), Arrival(2.0, None, "y" * len(CALL)))
    assert Timeline(arrivals, 3.0, tokens=20).ttfa([CLOCK]) == (10, 1.0)
    assert Timeline(arrivals, 3.0).ttfa([CLOCK]) == (math.inf, 1.0)


def usage(**given: Any) -> Usage:
    return Usage(prompt_tokens=1, completion_tokens=1, forwards=1, exactness="reference", **given)


def canvas(done: bool) -> CanvasUpdate:
    return CanvasUpdate({}, {}, {}, done, 8, 0)


def test_record_reads_events_token_by_token() -> None:
    tokenizer = Tokenizer.load(resolve("demo-ar"))
    ids = tokenizer.encode(CALL + " and so on", add_special=False)
    cut = len(ids) // 2
    now = iter([2.0, 3.0, 5.0])
    events = [
        StepEvent("r", tuple(ids[:cut]), "...", canvas=canvas(False)),
        StepEvent("r", tuple(ids[cut:]), "...", canvas=canvas(True)),
        StepEvent("r", finish=Finish(FinishReason.STOP, usage(queue_s=0.25)), canvas=canvas(True)),
    ]
    timeline = record(events, sent=1.0, clock=lambda: next(now), tokenizer=tokenizer)
    assert "".join(a.text for a in timeline.arrivals) == CALL + " and so on"
    assert timeline.n == len(ids)
    assert timeline.moments == [(1.0, cut), (2.0, len(ids) - cut)]
    assert (timeline.began, timeline.end) == (0.25, 4.0)
    assert timeline.block_seconds == [1.75, 2.0]
    tokens, seconds = timeline.ttfa([CLOCK])
    prefixes = [tokenizer.decode(ids[: i + 1]) for i in range(len(ids))]
    assert tokens == next(i + 1 for i, text in enumerate(prefixes) if CALL in text)
    assert cut < tokens < len(ids)
    assert seconds == 2.0


def test_record_without_a_tokenizer_takes_the_text_as_it_comes() -> None:
    now = iter([1.0, 2.0])
    events = [StepEvent("r", (1, 2), "ab"), StepEvent("r", (3,), "c", finish=Finish(FinishReason.STOP, usage()))]
    timeline = record(events, sent=0.0, clock=lambda: next(now))
    assert [(a.at, a.tokens, a.text) for a in timeline.arrivals] == [(1.0, 2, "ab"), (2.0, 1, "c")]


def test_measure_leaves_out_two_warmups() -> None:
    asked: list[str] = []

    def ask(request: str) -> tuple[Timeline, list[dict[str, Any]] | None]:
        asked.append(request)
        slow = 10.0 if len(asked) <= 2 else 0.1
        return steady(3, slow, 0.1), None

    rows = measure(ask, ["a", "b", "c"])
    assert asked == ["a", "b", "a", "b", "c"]
    assert [row["ttft_ms"] for row in rows] == pytest.approx([100.0] * 3)
    assert measure(ask, []) == []
    assert len(measure(ask, ["a"], warmups=0)) == 1


def rows(name: str, *values: float | None) -> Iterator[dict[str, float | None]]:
    for value in values:
        yield {"ttft_ms": 1.0, "tps": 1.0, "ttfa_tokens": None, "ttfa_ms": None, name: value}


def test_aggregate_without_requests_for_tools() -> None:
    got = aggregate(rows("ttft_ms", 1.0, 2.0))
    assert got["ttfa_tokens"] == {"p50": 0.0, "p95": 0.0}
    assert got["ttfa_hit_rate"] is None  # not the same as none of them called


def test_p05_is_the_slow_tail_of_a_speed() -> None:
    values = list(range(1, 101))
    got = aggregate(rows("tps", *map(float, values)))["tps"]
    assert (got["p05"], got["p95"]) == (pytest.approx(5.95), pytest.approx(95.05))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40))
def test_percentiles_are_numpys_linear_ones(values: list[float]) -> None:
    got = percentiles(values)
    assert got == {f"p{q}": pytest.approx(np.quantile(values, q / 100)) for q in (50, 90, 95, 99)}
    ordered = sorted(values)  # and the definition itself: linear between the neighbours of rank q (n - 1)
    rank = 0.9 * (len(values) - 1)
    low = ordered[int(rank)]
    high = ordered[min(int(rank) + 1, len(values) - 1)]
    assert got["p90"] == pytest.approx(low + (high - low) * (rank % 1))


def test_figures_are_plain_json_numbers() -> None:
    json.dumps(aggregate([steady(4, 0.1, 0.1).metrics()]))


def test_itl_needs_every_arrival_to_tell_its_tokens() -> None:
    """One that does not makes the gaps around it nobody's."""
    arrivals = (Arrival(1.0, 1, "a"), Arrival(2.0, None, "b"), Arrival(3.0, 1, "c"))
    assert Timeline(arrivals, 3.0).itl == []
    assert Timeline(arrivals[::2], 3.0).itl == [2.0]


def told(*pieces: str, tokens: int | None = 1, **more: Any) -> Timeline:
    """One arrival a piece."""
    return Timeline(tuple(Arrival(float(i + 1), tokens, piece) for i, piece in enumerate(pieces)), 99.0, **more)


TIGHT = CALL.replace('"zone": ', '"zone":')


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        (TIGHT, TIGHT),
        (CALL, TIGHT),
        ("Well, I look. " + CALL, TIGHT),
        (CALL.replace('{"zone": "UTC"}', '{ "zone" :\n "UTC" }'), TIGHT),
        ('<tool_call>{"name": "other", "arguments": {}}</tool_call>' + CALL, TIGHT),
        (' {"name": "clock", "arguments": {"zone": 1}}', '{"name": "clock", "arguments": {"zone":1}}'),
        ('[TOOL_CALLS]clock[ARGS]{"zone": "\\u00e9"}', '[TOOL_CALLS]clock[ARGS]{"zone":"é"}'),
    ],
)
def test_excess_is_all_but_the_shortest_writing(text: str, needed: str) -> None:
    """Counted in characters, so that a token is one."""
    found = told(*text, count=len).first_call([CLOCK])
    assert (found.tokens, found.excess) == (len(text), len(text) - len(needed))


def test_the_second_call_behind_one_opening_does_not_need_the_first() -> None:
    first, second = (
        '<tool_call>[{"name": "other", "arguments": {}}, ',
        '{"name": "clock", "arguments": {"zone":1}}]</tool_call>',
    )
    found = told(*first, *second, count=len).first_call([CLOCK])
    assert found.excess == pytest.approx(len(first), abs=1)  # the brace with which the second was seen to begin


def test_excess_is_estimated_without_a_tokenizer() -> None:
    """From the share of the characters: half of the text is the call."""
    talk = "x" * len(CALL)
    tight = 1 - 1 / (2 * len(CALL))  # a space that the arguments do not need
    assert told(talk + CALL, tokens=40).first_call([CLOCK]).excess == pytest.approx(40 - 40 * tight / 2, abs=0.5)
    parts = (CallPart(0, "clock", '{"zone":1}'),)
    bare = Timeline((Arrival(1.0, 30, "", parts),), 2.0)
    assert bare.first_call([CLOCK]) == (30, 1.0, 0.0)
    late = Timeline((Arrival(0.5, 15, "x" * 15), Arrival(1.0, 15, "", parts)), 2.0)
    assert late.first_call([CLOCK]).excess == 15
    assert told("no call").first_call([CLOCK]) == (math.inf, math.inf, math.inf)
    assert told(CALL, tokens=None).first_call([CLOCK]).excess == math.inf  # nothing tells the tokens


def test_aggregate_tells_the_excess_where_rows_have_it() -> None:
    assert "ttfa_excess_tokens" not in aggregate(rows("ttfa_tokens", 10.0))
    got = aggregate(rows("ttfa_excess_tokens", 0.0, 10.0, math.inf, None))
    assert got["ttfa_excess_tokens"] == {"p50": 5.0, "p95": pytest.approx(9.5)}
