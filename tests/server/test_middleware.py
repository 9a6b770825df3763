"""Layers around the routes, each called as a server calls it: what fails inside, bodies too long, streams cut off."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from dfastllm.server.middleware import BodyLimit, Trace
from dfastllm.server.sse import EventStream


def http(method: str = "POST", **headers: str) -> dict[str, Any]:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "method": method, "path": "/v1/x", "headers": raw}


def call(layer: Any, scope: dict[str, Any], *messages: dict[str, Any]) -> tuple[int, dict[str, str], bytes, int]:
    """Status, headers and body of the answer, and how many messages of the client were read."""
    waiting, sent = list(messages), []

    async def receive() -> dict[str, Any]:
        return waiting.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(layer(scope, receive, send))
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], headers, body, len(messages) - len(waiting)


def test_what_fails_inside_is_an_answer_with_its_name(caplog: pytest.LogCaptureFixture) -> None:
    """Not a closed connection: status 500 in the API's form, the request's id in it, in its header and in the log."""
    observed: list[tuple[Any, ...]] = []

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise ZeroDivisionError("a fault of ours")

    with caplog.at_level(logging.ERROR):
        status, headers, body, _ = call(Trace(broken, lambda *seen: observed.append(seen)), http(x_request_id="abc-1"))
    error = json.loads(body)["error"]
    assert (status, headers["x-request-id"]) == (500, "abc-1")
    assert error["code"] == "generation_failed"
    assert "abc-1" in error["message"]
    assert "ZeroDivisionError" not in body.decode()
    assert "request abc-1 failed" in caplog.text
    assert [seen[:3] for seen in observed] == [("POST", "unmatched", 500)]


def test_what_fails_after_the_answer_began_is_not_answered_twice() -> None:
    observed: list[int] = []

    async def half(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ZeroDivisionError("a fault of ours")

    with pytest.raises(ZeroDivisionError):
        call(Trace(half, lambda method, template, status, seconds: observed.append(status)), http())
    assert observed == [200]


async def echo(scope: Any, receive: Any, send: Any) -> None:
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def chunk(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


@pytest.mark.parametrize(("length", "status", "read"), [("8", 200, 2), ("9", 413, 0), ("999999", 413, 0)])
def test_a_body_that_says_it_is_too_long_is_not_read(length: str, status: int, read: int) -> None:
    got = call(BodyLimit(echo, 8), http(content_length=length), chunk(b"1234", True), chunk(b"5678"))
    assert (got[0], got[3]) == (status, read)
    if status == 200:
        assert got[2] == b"12345678"
    else:
        assert got[1]["connection"] == "close"
        assert json.loads(got[2])["error"]["code"] == "payload_too_large"


def test_a_body_that_grows_too_long_is_read_no_further() -> None:
    got = call(BodyLimit(echo, 8), http(), chunk(b"12345", True), chunk(b"6789", True), chunk(b"0"))
    assert (got[0], got[3]) == (413, 2)


async def two() -> AsyncGenerator[str]:
    yield "1"
    yield "2"


def test_a_stream_whose_client_is_gone_at_once_is_cancelled() -> None:
    """Before its first event was asked for: nothing but `cancel` ends the request then."""
    cancelled: list[bool] = []
    stream = EventStream(two(), lambda: cancelled.append(True))

    async def gone(message: Any) -> None:
        raise OSError("the client went away")

    async def silent() -> Any:
        await asyncio.sleep(60)

    with pytest.raises(OSError, match="went away"):
        asyncio.run(stream(http(), silent, gone))
    assert cancelled == [True]


def test_a_stream_that_ends_is_cancelled_once_and_whole() -> None:
    cancelled, sent = [], []
    stream = EventStream(two(), lambda: cancelled.append(True))

    async def send(message: Any) -> None:
        sent.append(message)

    async def silent() -> Any:
        await asyncio.sleep(60)

    asyncio.run(stream(http(), silent, send))
    assert cancelled == [True]
    assert b"".join(m.get("body", b"") for m in sent) == b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"
    assert "content-length" not in {name.decode() for name, _ in sent[0]["headers"]}
