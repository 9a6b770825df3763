"""Speed metrics: the document's cases, by their names, of a model under a clock of its own and through the names it
imports."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from dfastllm.distill import aggregate_speed_metrics, is_valid_tool_json
from dfastllm.metrics.model_speed import measure_speed
from dfastllm.metrics.speed import Arrival
from dfastllm.metrics.timelines import ToolTimeline as Timeline
from dfastllm.metrics.workload import speed_samples
from tests.kit.clocked import Clocked

CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "required": ["zone"]}}}
CALL = '<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call>'
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TOOLS = [WEATHER, {"type": "function", "function": {"name": "clock"}}]


def measured(first: float, gap: float, n: int = 4) -> tuple[list[dict[str, float | None]], Sequence[Any], Clocked]:
    """The figures of a model that answers n samples rightly, after two slow warm-ups."""
    model, samples = Clocked(first, gap, warm_up=60.0), speed_samples(n)
    model.answer(samples)
    return measure_speed(model, samples, clock=lambda: model.now), samples, model  # type: ignore[arg-type]


def steady(n: int, first: float, gap: float, text: str = "x") -> Timeline:
    arrivals = tuple(Arrival(first + i * gap, 1, text) for i in range(n))
    return Timeline(arrivals, first + (n - 1) * gap + 0.5)


def test_ttft_measurement() -> None:
    assert [row["ttft_ms"] for row in measured(0.2, 0.1)[0]] == pytest.approx([200.0] * 4)
    assert steady(5, 0.2, 0.1).ttft == 0.2
    # A role chunk, or text of tokens that are yet to be told, is no token.
    assert Timeline((Arrival(0.1, 0), Arrival(0.2, None), Arrival(0.3, None, "a")), 1.0).ttft == 0.3
    assert Timeline((), 1.0).ttft == math.inf


def test_tps_measurement() -> None:
    assert [row["tps"] for row in measured(0.2, 0.1)[0]] == pytest.approx([10.0] * 4)
    assert steady(5, 0.2, 0.1).tps == pytest.approx(10)
    assert steady(1, 0.2, 0.1).tps == math.inf
    block = Timeline((Arrival(0.5, 32), Arrival(1.5, 32)), 1.6)
    assert block.tps == pytest.approx(63)  # (n - 1) / (t_last - t_first), as the definition says
    by_usage = Timeline((Arrival(0.5, None, "abc"), Arrival(2.5, None, "def")), 3.0, tokens=9)
    assert by_usage.tps == pytest.approx(4)
    assert Timeline((Arrival(0.5, None, "abc"), Arrival(2.5, None, "def")), 3.0).tps is None  # never chunks as tokens
    assert Timeline((), 1.0).tps is None


def test_ttfa_measurement() -> None:
    text = "Well. " + CALL + " That was it."
    arrivals = tuple(Arrival(0.1 * (i + 1), 1, c) for i, c in enumerate(text))
    timeline = Timeline(arrivals, 99.0)
    index = text.index("</tool_call>") + len("</tool_call>")
    assert timeline.ttfa([CLOCK]) == (index, pytest.approx(0.1 * index))
    assert timeline.ttfa() == timeline.ttfa([CLOCK])
    assert timeline.ttfa([]) == (math.inf, math.inf)  # no tool: no call is valid
    assert timeline.metrics([CLOCK])["ttfa_ms"] == pytest.approx(100 * index)
    assert timeline.metrics()["ttfa_tokens"] is None
    wrong = Timeline((Arrival(0.1, 5, CALL.replace("zone", "city")),), 1.0)
    assert wrong.ttfa([CLOCK]) == (math.inf, math.inf)
    rows, samples, model = measured(0.2, 0.1)
    for row, sample in zip(rows, samples, strict=True):
        length = len(model.tokenizer.encode(sample.response)) if sample.grader == "tool_call" else None
        assert row["ttfa_tokens"] == length  # the whole answer is the call; none was wanted


def rows(name: str, *values: float | None) -> Iterator[dict[str, float | None]]:
    for value in values:
        yield {"ttft_ms": 1.0, "tps": 1.0, "ttfa_tokens": None, "ttfa_ms": None, name: value}


def test_aggregate_single_metric() -> None:
    got = aggregate_speed_metrics([{"ttft_ms": 100.0, "tps": 50.0, "ttfa_tokens": 10.0, "ttfa_ms": 200.0}])
    assert got == {
        "ttft_ms": {"p50": 100.0, "p90": 100.0, "p95": 100.0},
        "tps": {"p50": 50.0, "p90": 50.0, "p95": 50.0, "p05": 50.0},
        "ttfa_tokens": {"p50": 10.0, "p95": 10.0},
        "ttfa_ms": {"p50": 200.0, "p95": 200.0},
        "ttfa_hit_rate": 1.0,
        "n": 1,
    }


def test_aggregate_multiple_metrics() -> None:
    got = aggregate_speed_metrics(rows("ttft_ms", 100.0, 150.0, 200.0))
    assert got["ttft_ms"]["p50"] == 150
    assert got["ttft_ms"]["p95"] == pytest.approx(195)
    assert got["n"] == 3


def test_aggregate_filters_what_is_not_finite() -> None:
    got = aggregate_speed_metrics(rows("ttfa_tokens", 10.0, math.inf, 20.0))
    assert got["ttfa_tokens"] == {"p50": 15.0, "p95": pytest.approx(19.5)}
    assert got["ttfa_hit_rate"] == pytest.approx(2 / 3)
    assert aggregate_speed_metrics(rows("tps", math.nan, 5.0))["tps"]["p50"] == 5


def test_aggregate_all_infinite() -> None:
    got = aggregate_speed_metrics(rows("ttfa_tokens", math.inf, math.inf))
    assert got["ttfa_tokens"] == {"p50": math.inf, "p95": math.inf}
    assert got["ttfa_hit_rate"] == 0.0


def test_aggregate_empty() -> None:
    got = aggregate_speed_metrics([])
    assert got["ttft_ms"] == {"p50": 0.0, "p90": 0.0, "p95": 0.0}
    assert got["tps"] == {"p50": 0.0, "p90": 0.0, "p95": 0.0, "p05": 0.0}
    assert (got["ttfa_hit_rate"], got["n"]) == (0.0, 0)


def tagged(name: str, **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_is_valid_tool_json() -> None:
    assert is_valid_tool_json(tagged("anything", x=1))  # no tools given: any well-formed call
    assert not is_valid_tool_json(tagged("anything", x=1), TOOLS)  # not one of the tools
    assert is_valid_tool_json(tagged("clock", zone="UTC"), TOOLS)  # no parameters declared: any object
    assert is_valid_tool_json("I look it up. " + tagged("clock"), TOOLS)
    assert is_valid_tool_json('[{"name": "clock", "arguments": {}}]', TOOLS)
    for text in (
        "",
        "   ",
        "{",
        "{}",
        "[]",
        "42",
        '{"name": "clock"}',
        '{"name": 3, "arguments": {}}',
        '{"name": "", "arguments": {}}',
        '{"name": "clock", "arguments": []}',
        'Look: {"name": "clock", "arguments": {}}',  # prose with JSON in it is no call
        tagged("clock")[:-1],
        '{"key": "name", "other": ":"}',  # what the published heuristic took for a call
    ):
        assert not is_valid_tool_json(text, TOOLS), text
