"""The Python client over HTTP: what is sent again and what never is, time limits, typed errors, streams cut."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import httpx
import pytest
from websockets.asyncio.server import ServerConnection, serve

from dfastllm_client import (
    AsyncClient,
    AsyncWebSocketClient,
    AuthenticationError,
    Backoff,
    CancelledError,
    Client,
    ClientError,
    ConnectionFailedError,
    ConnectionLostError,
    GenerationOptions,
    InvalidRequestError,
    NotFoundError,
    NotReadyError,
    PermissionDeniedError,
    ProtocolError,
    RateLimitError,
    ServerError,
    TimeoutError,
)
from dfastllm_client.errors import of_frame, of_response
from dfastllm_client.sse import EventReader

T = TypeVar("T")
Answer = Callable[[httpx.Request], httpx.Response | Awaitable[httpx.Response]]

WHOLE = {
    "id": "cmpl-1",
    "model": "m",
    "choices": [{"index": 0, "text": "42", "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    "dfastllm": {"total_seconds": 0.25},
}
QUICK = Backoff(attempts=2, first=0.0)


def ok(_: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json=WHOLE)


def refuses(status: int, retry_after: str | None, code: str) -> Answer:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    error = {"error": {"message": "Not now.", "type": "t", "param": None, "code": code}}
    return lambda _: httpx.Response(status, json=error, headers=headers)


def breaks(error: type[httpx.TransportError]) -> Answer:
    def answer(_: httpx.Request) -> httpx.Response:
        raise error("broken")

    return answer


def against(answers: list[Answer], work: Callable[[AsyncClient], Awaitable[T]], **options: Any) -> T:
    """What `work` gives with a client whose requests get these answers, one each."""

    def handler(request: httpx.Request) -> Any:
        return answers.pop(0)(request)

    async def run() -> T:
        transport = httpx.MockTransport(handler)
        async with AsyncClient("http://server", transport=transport, **{"backoff": QUICK, **options}) as client:
            return await work(client)

    return asyncio.run(run())


def asks(client: AsyncClient) -> Awaitable[Any]:
    return client.generate("x")


@pytest.mark.parametrize(
    "first",
    [
        refuses(429, "0", "rate_limit_exceeded"),
        refuses(503, "0", "not_ready"),
        breaks(httpx.ConnectError),
        breaks(httpx.ConnectTimeout),
    ],
)
def test_what_was_not_run_is_sent_again(first: Answer) -> None:
    answers = [first, ok]
    assert against(answers, asks).text == "42"
    assert answers == []


@pytest.mark.parametrize(
    ("first", "error"),
    [
        (breaks(httpx.ReadError), ConnectionLostError),
        (breaks(httpx.WriteError), ConnectionLostError),
        (breaks(httpx.RemoteProtocolError), ConnectionLostError),
        (refuses(500, None, "generation_failed"), ServerError),
        (refuses(504, None, "timeout"), TimeoutError),
        (refuses(503, None, "proxy"), NotReadyError),  # says no time to come back: it may have run
        (refuses(429, "3600", "rate_limit_exceeded"), RateLimitError),  # longer than anybody waits
        (refuses(400, None, "invalid_request"), InvalidRequestError),
    ],
)
def test_what_may_have_run_is_never_sent_again(first: Answer, error: type[ClientError]) -> None:
    answers = [first, ok]
    with pytest.raises(error):
        against(answers, asks)
    assert answers == [ok]


def test_attempts_end_with_the_refusal() -> None:
    answers = [refuses(429, "0", "queue_full")] * 4
    with pytest.raises(RateLimitError) as caught:
        against(answers, asks)
    assert len(answers) == 1, "one try and two more"
    assert caught.value.retry_after == 0
    assert caught.value.code == "queue_full"


def test_no_wait_goes_beyond_the_time_limit() -> None:
    with pytest.raises(RateLimitError):
        against([refuses(429, "30", "rate_limit_exceeded"), ok], asks, timeout=1.0)


def test_reading_calls_are_asked_again() -> None:
    models = httpx.Response(200, json={"data": [{"id": "m"}]})
    answers: list[Answer] = [breaks(httpx.ReadError), lambda _: models]
    assert against(answers, lambda client: client.models()) == ({"id": "m"},)
    with pytest.raises(ConnectionLostError):
        against([breaks(httpx.ReadError), lambda _: models], lambda c: c.load_adapter("a", "/a"))


def test_a_slow_answer_is_given_up() -> None:
    async def slow(_: httpx.Request) -> httpx.Response:
        await asyncio.sleep(30)
        raise AssertionError("not cancelled")

    with pytest.raises(TimeoutError, match=r"longer than 0\.05 s"):
        against([slow], asks, timeout=0.05)


class Body(httpx.AsyncByteStream):
    """A stream of bytes that ends with an error, or never."""

    def __init__(self, parts: list[bytes], end: type[httpx.TransportError] | float | None) -> None:
        self.parts, self.end = parts, end
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self.parts:
            yield part
        if isinstance(self.end, float):
            await asyncio.sleep(self.end)
        elif self.end is not None:
            raise self.end("broken")

    async def aclose(self) -> None:
        self.closed = True


def event(text: str = "", ids: tuple[int, ...] = (), finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "text": text, "token_ids": list(ids), "finish_reason": finish}
    return b"data: " + json.dumps({"model": "m", "choices": [choice], **more}).encode() + b"\n\n"


END = b"data: " + json.dumps({**WHOLE, "choices": []}).encode() + b"\n\ndata: [DONE]\n\n"


def streams(body: Body) -> Answer:
    return lambda _: httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=body)


async def all_of(client: AsyncClient) -> Any:
    stream = client.generate_stream("x")
    return [str(piece) async for piece in stream], stream.result


def test_a_stream_cut_at_every_byte_is_the_same() -> None:
    whole = b": a comment\n\n" + event("4é", (1, 2)) + event("", (3,)) + event("2", (4,), "stop") + END
    for size in (1, 7, len(whole)):
        parts = [whole[start : start + size] for start in range(0, len(whole), size)]
        body = Body(parts, None)
        pieces, result = against([streams(body)], all_of)
        assert pieces == ["4é", "", "2"]
        assert (result.text, result.tokens_generated, result.time_ms, result.finish_reason) == ("4é2", 2, 250.0, "stop")
        assert body.closed


@pytest.mark.parametrize("end", [httpx.ReadError, None])
def test_a_broken_stream_says_what_came_and_is_not_sent_again(end: type[httpx.TransportError] | None) -> None:
    answers = [streams(Body([event("4", (7, 8))], end)), ok]
    with pytest.raises(ConnectionLostError) as caught:
        against(answers, all_of)
    assert (caught.value.received.text, caught.value.received.tokens) == ("4", 2)
    assert caught.value.received.request_id
    assert answers == [ok]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"code": "cancelled", "type": "server_error"}, CancelledError),
        ({"code": "timeout", "type": "server_error"}, TimeoutError),
        ({"code": "generation_failed", "type": "server_error"}, ServerError),
        ({"code": "x", "type": "invalid_request_error"}, InvalidRequestError),
        ({"code": "queue_full", "type": "rate_limit_error"}, RateLimitError),
    ],
)
def test_an_error_in_a_stream_is_typed_and_says_what_came(error: dict[str, str], kind: type[ClientError]) -> None:
    failed = b"data: " + json.dumps({"error": {"message": "So.", "param": None, **error}}).encode() + b"\n\n"
    answers = [streams(Body([event("4", (7,)), failed, b"data: [DONE]\n\n"], None)), ok]
    with pytest.raises(kind, match=r"So\.") as caught:
        against(answers, all_of)
    assert caught.value.received.text == "4"
    assert answers == [ok], "what began is not sent again, whatever its error"


def test_a_stream_without_its_end_is_an_error() -> None:
    with pytest.raises(ServerError, match="before its answer did"):
        against([streams(Body([event("4", (1,)), b"data: [DONE]\n\n"], None))], all_of)


def test_a_slow_stream_is_given_up_and_closed() -> None:
    body = Body([event("4", (1,))], 30.0)
    with pytest.raises(TimeoutError) as caught:
        against([streams(body)], all_of, timeout=0.1)
    assert caught.value.received.text == "4"
    assert body.closed


def test_leaving_a_stream_closes_it() -> None:
    body = Body([event("4", (1,))], 30.0)

    async def leave(client: AsyncClient) -> None:
        async with client.generate_stream("x") as stream:
            async for _ in stream:
                break

    against([streams(body)], leave)
    assert body.closed


def test_the_key_the_id_and_the_options_are_sent() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json=WHOLE)

    options = GenerationOptions(prompt="x", max_tokens=3, more={"threshold": 0.5})
    work = lambda client: client.generate(options, max_tokens=4, block_length=8)  # noqa: E731
    against([answer], work, api_key="k", model="m")
    assert seen[0].headers["authorization"] == "Bearer k"
    assert seen[0].headers["x-request-id"].startswith("c-")
    body = json.loads(seen[0].content)
    assert body == {"prompt": "x", "model": "m", "max_tokens": 4, "threshold": 0.5, "block_length": 8}


@pytest.mark.parametrize("transport", ["http", "websocket"])
@pytest.mark.parametrize(
    ("bad", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "x", "messages": []}, "prompt"),
        ({"prompt": "x", "n": 2}, "n"),
        ({"prompt": ["x", "y"]}, "prompt"),
        ({"prompt": "x", "temperature": float("nan")}, "temperature"),
        ({"prompt": "x", "top_p": float("inf")}, "top_p"),
        ({"prompt": "x", "stop": {"a"}}, "stop"),
        ({"prompt": "x", "threshold": object()}, "threshold"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "x", "timeout": "1"}, "timeout"),
        ({"prompt": "x", "timeout": float("nan")}, "timeout"),
        (b"x", "prompt"),
        (5, "prompt"),
    ],
)
def test_options_that_cannot_be_are_refused_before_they_are_sent(bad: Any, param: str, transport: str) -> None:
    """As ClientErrors, which say that nothing was sent; a NaN is no null."""
    how = {"http": lambda: against([], lambda client: client.generate(bad)), "websocket": lambda: _nowhere(bad)}
    with pytest.raises(InvalidRequestError) as refused:
        how[transport]()
    assert (refused.value.param, refused.value.status) == (param, None)


def _nowhere(bad: Any) -> None:
    """A call over a WebSocket whose server hears nothing of it."""
    asyncio.run(_sent_nowhere(bad))


async def _sent_nowhere(bad: Any) -> None:
    async def talk(socket: ServerConnection) -> None:
        await socket.send('{"status": "connected", "version": "1", "tenant_id": "t"}')
        heard.extend([text async for text in socket])

    heard: list[Any] = []
    async with serve(talk, "127.0.0.1", 0) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        async with AsyncWebSocketClient(f"ws://127.0.0.1:{port}") as client:
            try:
                await client.generate(bad)
            finally:
                await client.disconnect()
                await asyncio.sleep(0.05)
                assert heard == []


def test_token_ids_are_a_prompt() -> None:
    seen: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(json.loads(request.content)["prompt"])
        return ok(request)

    against([answer], lambda client: client.generate([5, 6]))
    assert seen == [[5, 6]]


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://x", "http://", "http://h:99999", "http://[::1"])
def test_no_address(url: str) -> None:
    """A mistyped address is no call that "may have run"."""
    for client in (AsyncClient, AsyncWebSocketClient):
        with pytest.raises(InvalidRequestError, match="url of a"):
            client(url)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "5", True])
def test_no_time_limit(timeout: Any) -> None:
    for client in (AsyncClient, AsyncWebSocketClient):
        with pytest.raises(InvalidRequestError, match="timeout"):
            client(timeout=timeout)


def test_a_closed_client_says_so() -> None:
    async def closed(client: AsyncClient) -> None:
        await client.aclose()
        await client.generate("x")

    with pytest.raises(ConnectionFailedError, match="client is closed"):
        against([], closed)
    client = Client("http://server", transport=httpx.MockTransport(ok))
    stream = client.generate_stream("x")
    client.close()
    for call in (lambda: client.generate("x"), client.health, lambda: next(stream)):
        with pytest.raises(ConnectionFailedError, match="client is closed"):
            call()
    stream.close()


def test_no_json_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError):
        against([lambda _: httpx.Response(200, content=b"<html>")], asks)
    with pytest.raises(ProtocolError):
        list(EventReader().feed(b"data: [1]\n"))


STATUSES = {
    400: InvalidRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    413: InvalidRequestError,
    429: RateLimitError,
    499: CancelledError,
    500: ServerError,
    502: ServerError,
    503: NotReadyError,
    504: TimeoutError,
}


@pytest.mark.parametrize(("status", "kind"), STATUSES.items())
def test_each_status_has_its_class_over_both_transports(status: int, kind: type[ClientError]) -> None:
    details = {"status": status, "code": "c", "type": "t", "param": "p"}
    over_http = of_response(status, {"error": {**details, "message": "m"}}, {"retry-after": "7"})
    frame = {"code": "INTERNAL_ERROR", "message": "m", "details": details, "retry_after": 7}
    for error in (over_http, of_frame(frame, None)):
        assert type(error) is kind
        assert (error.code, error.status, error.param, error.retry_after, str(error)) == ("c", status, "p", 7.0, "m")
        assert error.info["retry_after"] == 7.0


def test_backoff_is_bounded_jittered_and_never_below_what_was_asked() -> None:
    steady = Backoff(attempts=5, first=1.0, most=4.0, draw=lambda: 0.5)
    assert [steady.wait(i) for i in range(6)] == [0.5, 1.0, 2.0, 2.0, 2.0, None]
    assert steady.wait(0, retry_after=3.0) == 3.5
    assert steady.wait(0, retry_after=61.0) is None
    assert {Backoff(first=1.0).wait(3) for _ in range(9)} != {Backoff(first=1.0).wait(3)}
    with pytest.raises(ValueError, match="at least 0"):
        Backoff(attempts=-1)


def test_results_are_read_as_mappings_too() -> None:
    result = against([ok], asks)
    assert result["text"] == result.get("text") == str(result) == "42"
    assert result.get("nothing", 1) == 1
    with pytest.raises(KeyError):
        result["nothing"]


def test_the_sync_client_is_the_same_and_ends_its_thread() -> None:
    import threading

    body = Body([event("4", (1,)), event("2", (2,), "stop"), END], None)
    answers: list[Answer] = [ok, streams(body), refuses(404, None, "model_not_found")]
    with Client("http://server", transport=httpx.MockTransport(lambda r: answers.pop(0)(r))) as client:  # type: ignore[arg-type, return-value]
        assert client.generate("x").text == "42"
        stream = client.generate_stream("x")
        assert list(stream.text()) == ["4", "2"]
        assert stream.result.text == "42"
        with pytest.raises(NotFoundError):
            client.chat([{"role": "user", "content": "x"}])
    assert "dfastllm-client" not in {thread.name for thread in threading.enumerate()}


def test_closing_the_sync_client_ends_what_runs(caplog: pytest.LogCaptureFixture) -> None:
    body = Body([event("4", (1,))], 30.0)
    client = Client("http://server", transport=httpx.MockTransport(streams(body)))  # type: ignore[arg-type]
    stream = client.generate_stream("x")
    assert next(stream).text == "4"
    client.close()
    client.close()
    assert body.closed
    del stream
    gc.collect()
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []


def test_a_server_that_is_not_there() -> None:
    with Client("http://127.0.0.1:1", backoff=Backoff(attempts=0)) as client, pytest.raises(ConnectionFailedError):
        client.health()
