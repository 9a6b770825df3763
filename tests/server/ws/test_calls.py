"""Calls over /ws: each gives what the HTTP API gives, and each ends with one frame."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx2 as httpx
import pytest

from dfastllm.server.schemas import ChatRequest, CompletionRequest
from dfastllm.server.ws.functions import FUNCTIONS
from dfastllm.server.ws.protocol import CancelParams
from tests.kit.live import Live, serving
from tests.kit.served import Parrot, random_engine, slow
from tests.kit.sockets import Frame, Socket, socket
from tests.server.test_lifecycle import idle, until

PROMPT = {"prompt": "abc", "max_tokens": 24, "seed": 3, "temperature": 0.7, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "seed": 3, "temperature": 0.7}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
LONG: dict[str, Any] = {"model": "slow", "prompt": "x", "max_tokens": 400, "ignore_eos": True}


@pytest.fixture
def ws(live: Live) -> Iterator[Socket]:
    with socket(live) as made:
        yield made


def tokens(frames: list[Frame], choice: int = 0) -> list[Frame]:
    data = [frame["data"] for frame in frames if frame["status"] == "streaming"]
    return [part for part in data if part["type"] == "token" and part["choice"] == choice]


def chunks(answer: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# Against the HTTP API.


@pytest.mark.parametrize("model", ["canvas", "causal", "blocks"])
@pytest.mark.parametrize("body", [PROMPT, CHAT, {**PROMPT, "n": 2, "logprobs": 2, "return_token_ids": True}])
def test_an_answer_is_the_one_of_http(live: Live, ws: Socket, model: str, body: dict[str, Any]) -> None:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    wanted = live.post(path, {**body, "model": model}).json()
    got = ws.result("generate", **body, model=model)
    first = wanted["choices"][0]
    assert got["choices"] == wanted["choices"]
    assert got["text"] == (first["text"] if "text" in first else first["message"]["content"])
    assert got["finish_reason"] == first["finish_reason"]
    assert got["tokens_generated"] == wanted["usage"]["completion_tokens"]
    assert got["prompt_tokens"] == wanted["usage"]["prompt_tokens"]
    assert got["dfastllm"]["nfe"] == wanted["dfastllm"]["nfe"]
    assert got["model"] == model
    assert got["time_ms"] >= got["dfastllm"]["total_seconds"] * 1000


@pytest.mark.parametrize("model", ["canvas", "causal", "blocks"])
@pytest.mark.parametrize("body", [{**PROMPT, "n": 2}, CHAT])
def test_a_streams_parts_make_the_whole(live: Live, ws: Socket, model: str, body: dict[str, Any]) -> None:
    whole = ws.result("generate", **body, model=model)
    frames = ws.call("generate", **body, model=model, stream=True, return_token_ids=True)
    end = frames[-1]["data"]
    varies = {"choices", "dfastllm", "id", "time_ms", "usage"}
    assert {k: v for k, v in end.items() if k not in varies} == {k: v for k, v in whole.items() if k not in varies}
    for choice in whole["choices"]:
        parts = tokens(frames, choice["index"])
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        assert "".join(part["text"] for part in parts) == text
        assert all(part["token"] == part["text"] for part in parts)
        ids = [token for part in parts for token in part.get("token_ids", [])]
        assert len(ids) == sum(part["tokens"] for part in parts)
        assert [part["index"] for part in parts] == [sum(p["tokens"] for p in parts[:at]) for at in range(len(parts))]
        assert [part["is_final"] for part in parts] == [False] * (len(parts) - 1) + [True]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
    total = sum(sum(part["tokens"] for part in tokens(frames, c["index"])) for c in whole["choices"])
    assert total == end["tokens_generated"]


def test_canvas_events_are_the_ones_of_http(live: Live, ws: Socket) -> None:
    body = {**PROMPT, "model": "canvas", "stream": True, "block_length": 8, "stream_options": {"canvas_events": True}}
    wanted = [chunk["canvas"] for chunk in chunks(live.post("/v1/completions", body)) if "canvas" in chunk]
    data = [frame["data"] for frame in ws.call("generate", **body) if frame["status"] == "streaming"]
    got = [{"index": part["choice"], "events": part["events"]} for part in data if part["type"] == "canvas"]
    assert got == wanted
    assert {event["type"] for canvas in got for event in canvas["events"]} >= {"commit", "block_done", "stats"}


def test_log_probabilities_of_a_stream(ws: Socket) -> None:
    whole = ws.result("generate", **PROMPT, model="causal", logprobs=1)["choices"][0]["logprobs"]
    parts = tokens(ws.call("generate", **PROMPT, model="causal", logprobs=1, stream=True))
    told = [part for part in parts if part["tokens"]]
    assert [x for part in told for x in part["logprobs"]["token_logprobs"]] == whole["token_logprobs"]
    assert [part.get("logprob") for part in told] == whole["token_logprobs"]


def test_tool_calls(ws: Socket, parrot: Parrot) -> None:
    said = 'I look.<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "?"}], "tools": TOOLS, "model": "parrot"}
    parrot.teach(ws.result("generate", **body, max_tokens=1)["prompt_tokens"], said)
    whole = ws.result("generate", **body, max_tokens=200)
    assert (whole["text"], whole["finish_reason"]) == ("I look.", "tool_calls")
    wanted = whole["choices"][0]["message"]["tool_calls"][0]["function"]
    assert wanted == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    frames = ws.call("generate", **body, max_tokens=200, stream=True)
    calls = [call["function"] for part in tokens(frames) for call in part.get("tool_calls", [])]
    assert calls[0]["name"] == "weather"
    assert "".join(call["arguments"] for call in calls) == wanted["arguments"]
    assert frames[-1]["data"]["text"] == "I look."
    assert frames[-1]["data"]["finish_reason"] == "tool_calls"


def test_frames_can_be_filled_up(ws: Socket) -> None:
    body = {**PROMPT, "model": "causal", "stream": True, "stream_options": {"include_obfuscation": True}}
    ws.send({"id": "1", "function": "generate", "params": body})
    sizes = set()
    while True:
        text = ws.ws.recv(timeout=20)
        if json.loads(text)["status"] != "streaming":
            break
        sizes.add(len(str(text).encode()) % 64)
    assert sizes == {0}


# What is refused, as HTTP refuses it.

BAD: dict[str, tuple[dict[str, Any], str, int, str | None]] = {
    "neither prompt nor messages": ({}, "INVALID_PARAMS", 400, "prompt"),
    "prompt and messages": ({"prompt": "x", **CHAT}, "INVALID_PARAMS", 400, "messages"),
    "a misspelt field": ({"prompt": "x", "max_token": 1}, "INVALID_PARAMS", 400, "max_token"),
    "a field of the other kind": ({"prompt": "x", "tools": TOOLS}, "INVALID_PARAMS", 400, "tools"),
    "a wrong type": ({"prompt": "x", "max_tokens": "1"}, "INVALID_PARAMS", 400, "max_tokens"),
    "out of range": ({"prompt": "x", "temperature": -1}, "INVALID_PARAMS", 400, "temperature"),
    "an empty prompt": ({"prompt": ""}, "INVALID_PARAMS", 400, "prompt"),
    "an unknown model": ({"prompt": "x", "model": "nobody"}, "INVALID_PARAMS", 404, "model"),
    "a prompt beyond the context": ({"prompt": "x" * 600}, "INVALID_PARAMS", 400, "prompt"),
    "a chat beyond the context": (
        {"messages": [{"role": "user", "content": "x" * 600}]},
        "INVALID_PARAMS",
        400,
        "messages",
    ),
    "too many sequences": ({"prompt": ["x"] * 20, "n": 3}, "INVALID_PARAMS", 400, "n"),
    "a suffix for a causal model": ({"prompt": "x", "suffix": "y"}, "INVALID_PARAMS", 400, "suffix"),
    "stream options without a stream": (
        {"prompt": "x", "stream_options": {"canvas_events": True}},
        "INVALID_PARAMS",
        400,
        "stream_options",
    ),
    "by another name of an option": (
        {**CHAT, "max_tokens": None, "max_completion_tokens": 100_000},
        "INVALID_PARAMS",
        400,
        "max_completion_tokens",
    ),
    "no time": ({"prompt": "x", "timeout": 1e-6, "max_tokens": 100}, "INTERNAL_ERROR", 504, None),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_params_are_refused_as_over_http(live: Live, ws: Socket, name: str) -> None:
    params, code, status, param = BAD[name]
    params = {"model": "causal", **params}
    error = ws.refusal("generate", **params)
    assert (error["code"], error["details"]["status"], error["details"]["param"]) == (code, status, param)
    if not {"prompt", "messages"} <= set(params) and len(params) > 1:
        path = "/v1/chat/completions" if "messages" in params else "/v1/completions"
        wanted = live.post(path, params).json()["error"]
        assert error["message"] == wanted["message"]
        assert error["details"] == {"status": status, **{k: wanted[k] for k in ("type", "param", "code")}}
    assert ws.result("health")["status"] == "ready"


def test_a_function_that_there_is_not(ws: Socket) -> None:
    error = ws.refusal("generat")
    assert error["code"] == "DISPATCH_ERROR"
    assert "Did you mean 'generate'?" in error["message"]
    error = ws.refusal("embed", text="x")
    assert error["code"] == "DISPATCH_ERROR"
    assert "embed is not done" in error["message"]
    assert ws.refusal("health", verbose=True)["details"]["param"] == "verbose"


def test_an_engine_that_fails(ws: Socket, parrot: Parrot) -> None:
    parrot.fail = True
    error = ws.refusal("generate", model="parrot", prompt="x")
    assert (error["code"], error["details"]["code"]) == ("INTERNAL_ERROR", "generation_failed")


def test_a_fault_of_ours_is_an_error_of_its_call_alone(ws: Socket, monkeypatch: pytest.MonkeyPatch, live: Live) -> None:
    from dfastllm.server.ws import functions

    monkeypatch.setattr(functions, "chat_call", None)
    error = ws.refusal("generate", **CHAT, model="causal")
    assert (error["code"], error["details"]["status"]) == ("INTERNAL_ERROR", 500)
    assert "NoneType" not in error["message"]
    assert ws.result("generate", **PROMPT, model="causal")["tokens_generated"] == 24


# Health and metadata.


def test_health(live: Live, ws: Socket) -> None:
    first = ws.result("health")
    assert first["models"] == ["canvas", "causal", "blocks", "parrot"]
    assert first["version"] == live.get("/version").json()["version"]
    assert 0 < first["uptime_seconds"] <= ws.result("health")["uptime_seconds"]


def test_metadata_is_what_dispatch_takes(ws: Socket) -> None:
    told = {row["name"]: row for row in ws.result("metadata")["functions"]}
    assert list(told) == list(FUNCTIONS)
    fields = {name: {param["name"] for param in row["params"]} for name, row in told.items()}
    assert fields["generate"] == set(CompletionRequest.model_fields) | set(ChatRequest.model_fields)
    assert fields["cancel"] == set(CancelParams.model_fields)
    assert fields["health"] == fields["metadata"] == set()
    for name, params in fields.items():  # each is known to dispatch: null is absence, and a name that is not is refused
        assert "Unknown field" not in json.dumps(ws.call(name, "9", **dict.fromkeys(params)))
        needed = {"prompt": "x"} if name == "generate" else {}
        assert ws.refusal(name, **needed, **{"no-such": 1})["details"]["param"] == "no-such"
    typed = {param["name"]: param for param in told["generate"]["params"]}
    assert typed["max_tokens"]["type"] == "integer"
    assert typed["prompt"]["required"] is False
    assert typed["seed"]["description"]
    assert [param["required"] for param in told["cancel"]["params"]] == [True]
    assert {name for name, row in told.items() if row["streaming"]} <= {"generate", "pipeline"}


# Many at once, and ends.


@pytest.fixture(scope="module")
def slow_live() -> Iterator[Live]:
    with serving({"slow": slow(random_engine("llama"), 0.01)}) as running:
        yield running


def test_calls_run_at_once_and_each_ends_once(slow_live: Live) -> None:
    with socket(slow_live) as ws:
        for at in range(8):
            params = {"model": "slow", "prompt": f"p{at}", "max_tokens": 10, "ignore_eos": True, "stream": at % 2 == 0}
            ws.send({"id": str(at), "function": "generate", "params": params})
        ends: dict[str, Frame] = {}
        order: list[str] = []
        while len(ends) < 8:
            frame = ws.receive()
            order.append(frame["id"])
            if frame["status"] != "streaming":
                assert frame["id"] not in ends
                ends[frame["id"]] = frame
        assert all(end["status"] == "complete" for end in ends.values())
        assert sum(a != b for a, b in pairwise(order)) > 16  # they mixed
        assert ws.result("health")["status"] == "ready"  # nothing more came of them


def test_cancel_ends_the_call_and_frees_its_work(slow_live: Live) -> None:
    with socket(slow_live) as ws:
        ws.send({"id": "long", "function": "generate", "params": {**LONG, "stream": True}})
        assert ws.receive()["status"] == "streaming"
        began = time.monotonic()
        ws.send({"id": "stop", "function": "cancel", "params": {"id": "long"}})
        frames = [ws.receive()]
        while frames[-1]["id"] != "stop":
            frames.append(ws.receive())
        assert frames[-2] == {"id": "long", "status": "cancelled"}
        assert frames[-1] == {"id": "stop", "status": "complete", "data": {"id": "long", "cancelled": True}}
        assert until(lambda: idle(slow_live), 2)
        assert time.monotonic() - began < 2  # to its end it takes four seconds
        error = ws.refusal("cancel", id="long")
        assert (error["code"], error["details"]["code"]) == ("INVALID_PARAMS", "request_not_found")
        assert ws.call("generate", "long", **{**LONG, "max_tokens": 2})[-1]["status"] == "complete"  # an id again


def test_cancel_over_http_ends_a_call_too(slow_live: Live) -> None:
    with socket(slow_live) as ws:
        ws.send({"id": "1", "function": "generate", "params": LONG})
        assert until(lambda: bool(slow_live.serving.jobs))
        (id,) = slow_live.serving.jobs
        assert httpx.delete(f"{slow_live.url}/v1/requests/{id}").status_code == 200
        assert ws.until_end("1") == [{"id": "1", "status": "cancelled"}]
    assert until(lambda: idle(slow_live))


def test_the_metrics_of_requests_are_those_of_http(slow_live: Live) -> None:
    names = {"model_name": "slow", "finished_reason": "length"}
    before = slow_live.metric("request_success_total", **names)
    calls = slow_live.metric("websocket_calls_total", function="generate", status="complete")
    sent = slow_live.metric("websocket_frames_total", direction="sent")
    with socket(slow_live) as ws:
        assert slow_live.metric("websocket_connections") == 1
        frames = ws.call("generate", **{**LONG, "max_tokens": 3, "stream": True})
    assert slow_live.metric("request_success_total", **names) == before + 1
    assert slow_live.metric("websocket_calls_total", function="generate", status="complete") == calls + 1
    assert slow_live.metric("websocket_frames_total", direction="sent") == sent + 1 + len(frames)
    assert slow_live.metric("websocket_call_duration_seconds_count", function="generate") > 0
    assert slow_live.metric("http_requests_total", handler="/ws", method="GET", status="101") > 0
    assert until(lambda: slow_live.metric("websocket_connections") == 0)
