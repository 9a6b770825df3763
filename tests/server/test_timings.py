"""Timings of a request: from events under a clock made by hand, and over a socket in every kind of response."""

from __future__ import annotations

import time
from typing import Any

import pytest

from dfastllm.core import CanvasUpdate, Finish, FinishReason, Request, StepEvent, Usage
from dfastllm.metrics import Metrics
from dfastllm.server.timings import RequestTimings
from dfastllm.text import ChatTemplates, taught
from tests.kit.live import Live
from tests.kit.served import TEMPLATE, Parrot
from tests.server.test_chat import CALL, HELLO, WEATHER, teach


def event(tokens: int = 0, text: str = "", *, done: bool | None = None, end: bool = False) -> StepEvent:
    usage = Usage(prompt_tokens=1, completion_tokens=1, forwards=1, exactness="reference", queue_s=0.5)
    canvas = None if done is None else CanvasUpdate({}, {}, {}, done, 8, 0)
    return StepEvent(
        "r", tuple(range(tokens)), text, canvas=canvas, finish=Finish(FinishReason.STOP, usage) if end else None
    )


def followed(*events: tuple[float, StepEvent], tools: tuple[str, ...] = ()) -> RequestTimings:
    calls = taught(ChatTemplates({"default": TEMPLATE})).reading(tools) if tools else None
    found = RequestTimings(Request("r", (1,), arrival=100.0), calls)
    for at, each in events:
        found.see(each, 100.0 + at)
    return found


def series(metrics: Metrics) -> dict[str, float]:
    return {s.name.removeprefix("dfastllm_"): s.value for f in metrics.registry.collect() for s in f.samples}


def test_timings_of_known_moments() -> None:
    out = followed(
        (1.0, event(4, done=True)), (1.5, event(done=False)), (2.0, event(4, done=True)), (3.0, event(end=True))
    ).out()
    assert out.tokens_per_second == pytest.approx(7.0)
    assert out.time_per_output_token_seconds == pytest.approx(2.0 / 7)
    assert out.inter_token_seconds is not None
    assert out.inter_token_seconds.model_dump() == dict.fromkeys(("p50", "p90", "p95", "p99"), pytest.approx(0.25))
    assert out.block_seconds == [0.5, 1.0]
    assert out.first_tool_call_tokens is None


def test_one_piece_has_no_speed() -> None:
    out = followed((1.0, event(8, "x")), (1.1, event(end=True))).out()
    assert (out.tokens_per_second, out.inter_token_seconds, out.block_seconds) == (None, None, [])
    empty = followed((1.0, event(end=True))).out()
    assert empty.time_per_output_token_seconds is None


def test_first_tool_call() -> None:
    half = len(CALL) // 2
    found = followed(
        (1.0, event(3, CALL.replace("weather", "other"))),  # none of the request's tools
        (2.0, event(4, CALL[:half])),
        (3.0, event(5, CALL[half:])),
        (4.0, event(6, CALL, end=True)),
        tools=("weather",),
    )
    assert found.first_call == (12, 3.0)
    metrics = Metrics()
    found.report(metrics, "m")
    seen = series(metrics)
    assert seen["time_to_first_tool_call_seconds_sum"] == 3.0
    assert seen["tokens_to_first_tool_call_sum"] == 12
    assert followed((1.0, event(3, CALL, end=True))).first_call is None  # a request without tools
    unclosed = CALL.removesuffix("\n</tool_call>")
    assert followed((1.0, event(3, unclosed)), (2.0, event(end=True)), tools=("weather",)).first_call == (3, 2.0)
    half = CALL.partition('"Oslo')[0]
    assert followed((1.0, event(3, half)), (2.0, event(end=True)), tools=("weather",)).first_call is None


def test_blocks_reach_the_metrics_when_the_request_has_ended() -> None:
    metrics = Metrics()
    followed((1.0, event(4, done=True))).report(metrics, "m")
    assert "time_per_block_seconds_sum" not in series(metrics)
    followed((1.0, event(4, done=True)), (2.5, event(4, done=True, end=True))).report(metrics, "m")
    assert series(metrics)["time_per_block_seconds_sum"] == pytest.approx(2.0)
    assert series(metrics)["time_per_block_seconds_count"] == 2


def test_a_response_carries_timings_when_asked(live: Live, parrot: Parrot) -> None:
    teach(live, parrot, f"Let me look. {CALL}", messages=HELLO, tools=WEATHER)
    before = live.metric("tokens_to_first_tool_call_count", model_name="parrot")
    body: dict[str, Any] = {"model": "parrot", "messages": HELLO, "tools": WEATHER, "n": 2}
    assert "timings" not in live.post("/v1/chat/completions", body).json()["dfastllm"]
    answer = live.post("/v1/chat/completions", {**body, "timings": True}).json()
    timings = answer["dfastllm"]["timings"]
    assert len(timings) == 2
    for each in timings:
        assert each["first_tool_call_tokens"] == len(f"Let me look. {CALL}".encode())
        assert 0 < each["first_tool_call_seconds"] <= answer["dfastllm"]["total_seconds"] + 0.5
        assert each["tokens_per_second"] > 0
        assert 0 < each["inter_token_seconds"]["p50"] <= each["inter_token_seconds"]["p99"]
        assert each["block_seconds"] == []
    assert live.metric("tokens_to_first_tool_call_count", model_name="parrot") == before + 4


def chunks(live: Live, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    import json

    lines = live.post(path, {**body, "stream": True}).text.splitlines()
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(each) for each in data[:-1]]


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_ends_with_timings_when_asked(live: Live, usage: bool) -> None:
    body = {"model": "canvas", "prompt": "ab", "max_tokens": 32, "block_length": 8, "ignore_eos": True}
    body |= {"stream_options": {"include_usage": True}} if usage else {}
    last = chunks(live, "/v1/completions", {**body, "timings": True})[-1]
    assert last["choices"] == []
    assert (last.get("usage") is not None) == usage
    [timings] = last["dfastllm"]["timings"]
    assert len(timings["block_seconds"]) == 4
    assert all(seconds > 0 for seconds in timings["block_seconds"])
    assert sum(timings["block_seconds"]) <= last["dfastllm"]["total_seconds"] + 0.5
    assert "dfastllm" not in chunks(live, "/v1/completions", body)[-1] or usage
    chat = {"model": "causal", "messages": HELLO, "max_tokens": 4, "timings": True}
    assert chunks(live, "/v1/chat/completions", chat)[-1]["dfastllm"]["timings"][0]["block_seconds"] == []


def test_blocks_are_counted_by_the_server(live: Live) -> None:
    before = live.metric("time_per_block_seconds_count", model_name="blocks")
    body = {"model": "blocks", "prompt": "ab", "max_tokens": 16, "ignore_eos": True, "timings": True}
    answer = live.post("/v1/completions", body).json()
    counted = len(answer["dfastllm"]["timings"][0]["block_seconds"])
    assert counted > 0
    assert live.metric("time_per_block_seconds_count", model_name="blocks") == before + counted


def test_time_between_tokens_reaches_the_metrics(live: Live) -> None:
    """A gap for each token but those that come first, and all gaps within the request's own time."""
    name = "inter_token_latency_seconds"
    count, before = (live.metric(f"{name}_{part}", model_name="parrot") for part in ("count", "sum"))
    began = time.monotonic()
    body = {"model": "parrot", "prompt": "abc", "max_tokens": 12, "ignore_eos": True, "stream": True}
    assert live.post("/v1/completions", body).status_code == 200
    took = time.monotonic() - began
    assert live.metric(f"{name}_count", model_name="parrot") - count in range(1, 12)
    assert 0 < live.metric(f"{name}_sum", model_name="parrot") - before <= took
