"""Speed of answers whose moments are written by hand: each figure against its definition, worked out on paper."""

from __future__ import annotations

import dataclasses
import math

import pytest

from dfastllm.metrics.speed import Arrival, CallPart, Timeline, percentiles

# Eight tokens: two at 1 s, four at 2 s, and two that arrive together at 2.5 s. The answer is complete at 3 s.
EIGHT = Timeline(
    (Arrival(1.0, 2), Arrival(2.0, 4), Arrival(2.5, 1), Arrival(2.5, 1)), 3.0, began=0.25, blocks=(1.0, 2.5)
)
SPOKEN = (CallPart(0, "clock", '{"zone": 1}'),)


def test_every_figure_of_an_answer() -> None:
    assert EIGHT.n == 8
    assert EIGHT.moments == [(1.0, 2), (2.0, 4), (2.5, 2)]
    assert EIGHT.ttft == 1.0
    assert EIGHT.tps == pytest.approx(7 / 1.5)
    assert EIGHT.tpot == pytest.approx(2 / 7)
    assert EIGHT.gaps == pytest.approx([1.0, 0.5])
    assert EIGHT.itl == pytest.approx([0.25, 0.25, 0.25, 0.25, 0.25, 0.25])
    assert EIGHT.block_seconds == pytest.approx([0.75, 1.5])


@pytest.mark.parametrize(
    ("arrivals", "tokens", "ttft", "tps", "tpot"),
    [
        ((), None, math.inf, None, None),
        ((), 5, math.inf, None, None),  # tokens that never came
        ((Arrival(1.0, 0, "a"),), None, math.inf, None, None),  # text that was held back is no token
        ((Arrival(1.0, 1),), None, 1.0, math.inf, None),  # one token has no time between tokens
        ((Arrival(1.0, 2),), None, 1.0, math.inf, 2.0),
        ((Arrival(1.0, None, "a"), Arrival(1.5, None, "b")), None, 1.0, None, None),
        ((Arrival(1.0, None, "a"), Arrival(1.5, None, "b")), 5, 1.0, 8.0, 0.5),
        ((Arrival(1.0, None, "", SPOKEN), Arrival(1.5, None, "", SPOKEN)), 3, 1.0, 4.0, 1.0),
    ],
)
def test_answers_at_the_limits(
    arrivals: tuple[Arrival, ...], tokens: int | None, ttft: float, tps: float | None, tpot: float | None
) -> None:
    timeline = Timeline(arrivals, 3.0, tokens)
    assert (timeline.ttft, timeline.tps, timeline.tpot) == (ttft, tps, tpot)


@pytest.mark.parametrize("unknown", [0, 1, 2])
def test_gaps_between_tokens_need_the_tokens_of_every_arrival(unknown: int) -> None:
    """One arrival whose tokens are not known leaves the share of each gap open."""
    arrivals = [Arrival(float(at), 2, "a") for at in (1, 2, 3)]
    arrivals[unknown] = Arrival(arrivals[unknown].at, None, "a")
    assert Timeline(arrivals, 4.0).itl == []
    assert Timeline(arrivals, 4.0).gaps == [1.0, 1.0]


def test_arrivals_of_one_moment_are_one() -> None:
    """Of how many tokens is known only where each of them tells."""
    assert Timeline((Arrival(1.0, 2), Arrival(1.0, None, "a"), Arrival(2.0, 1)), 3.0).moments == [(1.0, None), (2.0, 1)]


@pytest.mark.parametrize(
    "value", [CallPart(0), Arrival(1.0), Timeline((), 1.0)], ids=lambda value: type(value).__name__
)
def test_what_came_is_a_value(value: CallPart | Arrival | Timeline) -> None:
    """Equal by its fields, and never changed once it is written down."""
    assert dataclasses.replace(value) == value
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, dataclasses.fields(value)[0].name, 2)


def test_parts_of_calls_are_equal_by_what_they_say() -> None:
    assert CallPart(0) == CallPart(0, "", "") != CallPart(1)
    assert CallPart(0, "a", "{") != CallPart(0, "a", "}")
    assert (Arrival(1.0).tokens, Arrival(1.0).text, Arrival(1.0).calls) == (1, "", ())


def test_percentiles_are_linear_over_finite_values() -> None:
    """100, 150 and 200: the 95th lies nine tenths of the way from the second to the third."""
    assert percentiles([200, math.inf, 100, 150], (50, 95)) == {"p50": 150.0, "p95": pytest.approx(195.0)}
    assert percentiles([math.inf], (5,)) == {"p05": math.inf}
    assert percentiles([], (5,)) == {"p05": 0.0}
    assert set(percentiles([1.0])) == {"p50", "p90", "p95", "p99"}
