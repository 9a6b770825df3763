"""The soak's short form: seconds of what scripts/soak does for minutes, on a server of its own."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from typing import Any

import pytest

from tests.soak.__main__ import WIDTH, table
from tests.soak.attacks import ATTACKS
from tests.soak.clients import WAYS, Found
from tests.soak.deck import Choice, assembled, deck
from tests.soak.server import Held
from tests.soak.soak import Plan, Result, soak

# Beside other tests on two cores a single answer of /health may wait for the machine, so its median is held to the
# bound; seconds are too few for the allocator to settle, so the growth allowed is that of the bodies in flight.
SHORT = Plan(seconds=5.0, warm=1.5, questions=12, clients=6, bomb=200_000, seed=3, threads=1, growth=96.0, strict=False)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_seconds_of_everything_at_once() -> None:
    result = soak(SHORT)
    lines = list(table(result))
    assert result.faults() == [], "\n".join(lines)
    assert result.found.compared >= 5
    assert result.attacks.keys() == ATTACKS.keys()
    assert result.log_bytes < 10_000


HELD = Held(rss=400.0, files=9, threads=7, busy=0.0, connections=0.0, series=1500)


def made(**changes: object) -> Result:
    good = Result(
        found=Found(asked=Counter(dict.fromkeys(WAYS, 1000)), compared=3000),
        attacks=Counter(dict.fromkeys(ATTACKS, 100)),
        at_fault=[],
        health=[0.01] * 100,
        unanswered=0,
        slow=[],
        before=HELD,
        after=HELD,
        preemptions=5.0,
        seconds=60.0,
        plan=Plan(seconds=60.0, warm=10.0, questions=9),
    )
    return dataclasses.replace(good, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"found": Found(compared=9, differ=["x"])}, "1 answers differ"),
        ({"found": Found(compared=9, lost=["x", "y"])}, "2 answers lost"),
        ({"found": Found(compared=9, failed=["x"])}, "1 requests failed"),
        ({"found": Found()}, "no answer was compared"),
        ({"at_fault": ["x"]}, "1 attacks not met"),
        ({"health": [0.01] * 99 + [0.21]}, "/health took 210 ms"),
        ({"health": []}, "/health took inf ms"),
        ({"unanswered": 2}, "/health was not answered 2 times"),
        ({"after": dataclasses.replace(HELD, busy=1.0)}, "gauges stand at 1"),
        ({"after": dataclasses.replace(HELD, connections=2.0)}, "2 connections are left"),
        ({"after": dataclasses.replace(HELD, rss=460.0)}, "memory grew by 60 MB"),
        ({"after": dataclasses.replace(HELD, files=12)}, "3 files are left open"),
        ({"after": dataclasses.replace(HELD, threads=10)}, "3 threads more"),
    ],
)
def test_each_fault_is_told(changes: dict[str, object], fault: str) -> None:
    assert made().faults() == []
    assert made(**changes).faults() == [fault]
    assert list(table(made(**changes)))[-1] == f"bad: {fault}"


def test_the_table_fits_80_columns() -> None:
    assert max(map(len, table(made()))) <= WIDTH


def test_a_stream_put_together_is_the_whole_answer() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    probs = {"content": [{"token": "a", "logprob": -0.5, "top_logprobs": []}]}
    whole: dict[str, Any] = {
        "index": 0,
        "message": {"content": "ab", "tool_calls": [call]},
        "finish_reason": "stop",
        "logprobs": probs,
    }
    parts: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "a"}, "logprobs": probs}]},
        {"choices": [{"index": 0, "delta": {"content": "b"}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"name": "f"}}]}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"arguments": '{"x": 1}'}}]}}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {"choices": [], "usage": {}},
    ]
    assert (
        assembled(parts)
        == assembled([{"choices": [whole]}])
        == [Choice("ab", "stop", [["f", '{"x": 1}']], ["a"], [-0.5])]
    )


def test_a_choice_is_the_same_or_not() -> None:
    """To the bit: log probabilities too, whatever happened to the request on its way."""
    one = Choice("ab", "stop", [], ["a"], [-0.5])
    assert one == dataclasses.replace(one)
    for changes in (
        {"logprobs": [-0.50000001]},
        {"text": "a"},
        {"finish": "length"},
        {"tokens": ["b"]},
        {"calls": [["", ""]]},
    ):
        assert one != dataclasses.replace(one, **changes)  # type: ignore[arg-type]


def test_decks_are_drawn_by_their_seed_and_hold_every_kind() -> None:
    assert deck(1, 30) == deck(1, 30)
    assert deck(1, 30) != deck(2, 30)
    fields = {name for question in deck(1, 90) for name in question.body}
    wanted = {"n", "stop", "seed", "temperature", "top_p", "tools", "logprobs", "prompt", "messages", "cache"}
    assert wanted <= fields
