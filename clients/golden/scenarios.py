"""The scenarios of the golden transcripts, and how the Python client plays one."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from clients.golden.transcripts import LIMITED, PIPELINE, Scenario

from dfastllm_client import AsyncClient, AsyncStream, AsyncWebSocketClient, Backoff, ClientError
from dfastllm_client.results import (
    GenerationResult,
    HealthStatus,
    PipelineEvent,
    PipelineResult,
    RuntimeMetadata,
    TokenData,
)

__all__ = ["SCENARIOS", "played"]

_AR: Mapping[str, Any] = {
    "model": "demo-ar",
    "prompt": "What is 12 + 30?",
    "max_tokens": 16,
    "seed": 1,
    "temperature": 0,
}
_CANVAS: Mapping[str, Any] = {
    "model": "demo-diffusion",
    "messages": [{"role": "user", "content": "What is 12 + 30?"}],
    "max_tokens": 16,
    "seed": 1,
}
_LONG: Mapping[str, Any] = {**_AR, "prompt": "Count:", "max_tokens": 400, "ignore_eos": True}


def _call(method: str, *args: Any, **more: Any) -> Mapping[str, Any]:
    return {"method": method, "args": list(args), **more}


def _both(name: str, *calls: Mapping[str, Any], **more: Any) -> list[Scenario]:
    return [Scenario(f"{transport}-{name}", transport, list(calls), **more) for transport in ("http", "ws")]


SCENARIOS: Sequence[Scenario] = (
    *_both("generate", _call("generate", _AR)),
    *_both("chat", _call("generate", _CANVAS)),
    *_both("stream", _call("generate_stream", {**_AR, "logprobs": 1})),
    *_both("canvas", _call("generate_stream", {**_CANVAS, "canvas_events": True})),
    *_both("health", _call("health")),
    *_both(
        "refused",
        _call("generate", {**_AR, "max_tokns": 3}),
        _call("generate", {**_AR, "model": "nope"}),
        _call("generate", {**_AR, "temperature": -1}),
        _call("generate_stream", {**_AR, "seed": "x"}),
    ),
    *_both("wrong-key", _call("generate", _AR), api_key="not-a-key"),
    Scenario("http-limited", "http", [_call("generate", _AR), _call("generate", _AR)], api_key=LIMITED["http"]),
    Scenario("ws-limited", "ws", [_call("generate", _AR), _call("generate", _AR)], api_key=LIMITED["ws"]),
    Scenario(
        "http-pipeline",
        "http",
        [_call("register_pipeline", PIPELINE), _call("stream_pipeline", "golden", "What is 12 + 30?")],
    ),
    Scenario("ws-pipeline", "ws", [_call("stream_pipeline", "golden", "What is 12 + 30?")]),
    Scenario("http-models", "http", [_call("models")]),
    Scenario("ws-metadata", "ws", [_call("metadata")]),
    Scenario("ws-cancel", "ws", [_call("generate_stream", _LONG, cancel=True), _call("cancel", "c-none")]),
    Scenario("ws-at-once", "ws", [_call("generate", _AR), _call("generate_stream", _CANVAS)], at_once=True),
)


async def played(scenario: Scenario, url: str, key: str | None, transport: Any = None) -> list[Any]:
    """What each call of the scenario came to against the server at `url`. transport: of httpx, where it is tapped."""
    once = Backoff(attempts=0)
    if scenario.transport == "http":
        async with AsyncClient(url, key, transport=transport, backoff=once) as client:
            return await _calls(scenario, client)
    socket = AsyncWebSocketClient(url, key, backoff=once)
    try:
        return await _calls(scenario, socket)
    finally:
        await socket.disconnect()


async def _calls(scenario: Scenario, client: Any) -> list[Any]:
    if scenario.at_once:
        return list(await asyncio.gather(*(_outcome(client, call) for call in scenario.calls)))
    return [await _outcome(client, call) for call in scenario.calls]


async def _outcome(client: Any, call: Mapping[str, Any]) -> Any:
    """A call's result or error as JSON, in names that every client can make."""
    try:
        made = getattr(client, call["method"])(*call["args"])
        return await _streamed(client, made, call) if isinstance(made, AsyncStream) else _shown(await made)
    except ClientError as error:
        shown = {name: getattr(error, name) for name in ("code", "status", "param", "retry_after")}
        return {"error": type(error).__name__, **{name: value for name, value in shown.items() if value is not None}}


async def _streamed(client: Any, stream: Any, call: Mapping[str, Any]) -> Any:
    pieces = []
    async for piece in stream:
        pieces.append(_piece(piece))
        if call.get("cancel") and len(pieces) == 1:
            assert await client.cancel(stream.request_id)
    return {"pieces": pieces, **_shown(stream.result)}


def _piece(piece: TokenData | PipelineEvent) -> Any:
    if isinstance(piece, PipelineEvent):
        return [piece.type, piece.step, piece.text]
    shown = [piece.text, piece.index, piece.tokens, piece.is_final]
    return [*shown, [event["type"] for event in piece.canvas]] if piece.canvas else shown


def _shown(result: Any) -> Any:
    if isinstance(result, GenerationResult):
        names = ("text", "tokens_generated", "prompt_tokens", "finish_reason", "model")
        return {name: result[name] for name in names}
    if isinstance(result, PipelineResult):
        return {"output": result.output, "tokens_generated": result.tokens_generated}
    if isinstance(result, HealthStatus):
        return {"status": result.status, "models": list(result.models)}
    if isinstance(result, RuntimeMetadata):
        return {"names": [[one.name, one.streaming] for one in result.functions]}
    if isinstance(result, Sequence):
        return {"ids": [one["id"] for one in result]}
    return result
