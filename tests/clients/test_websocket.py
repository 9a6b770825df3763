"""The Python client over a WebSocket: what a broken connection means for each call, and the opening exchange."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
from websockets.asyncio.server import ServerConnection, serve

from dfastllm_client import (
    AsyncWebSocketClient,
    AuthenticationError,
    Backoff,
    CancelledError,
    ConnectionFailedError,
    ConnectionLostError,
    InvalidRequestError,
    PermissionDeniedError,
    ProtocolError,
    RateLimitError,
    RealmWebSocketClient,
    TimeoutError,
    WebSocketClient,
)
from dfastllm_client.link import address

T = TypeVar("T")
Talk = Callable[[ServerConnection], Awaitable[None]]

CONNECTED = {"status": "connected", "version": "1", "tenant_id": "acme"}
RESULT = {
    "text": "42",
    "finish_reason": "stop",
    "tokens_generated": 2,
    "prompt_tokens": 3,
    "time_ms": 1.0,
    "model": "m",
}


async def say(socket: ServerConnection, frame: Any) -> None:
    await socket.send(json.dumps(frame))


async def hear(socket: ServerConnection) -> Any:
    return json.loads(await socket.recv())


async def complete(socket: ServerConnection, call: Any, data: Any = RESULT) -> None:
    await say(socket, {"id": call["id"], "status": "complete", "data": data})


async def piece(socket: ServerConnection, call: Any, text: str, index: int) -> None:
    data = {"type": "token", "choice": 0, "text": text, "token": text, "index": index, "tokens": 1, "is_final": False}
    await say(socket, {"id": call["id"], "status": "streaming", "data": data})


async def answers(socket: ServerConnection) -> None:
    """Every call completes."""
    await say(socket, CONNECTED)
    async for text in socket:
        await complete(socket, json.loads(text))


def against(talks: list[Talk], work: Callable[[AsyncWebSocketClient], Awaitable[T]], **options: Any) -> T:
    """What `work` gives with a client whose connections are talked to like this, one each."""

    async def talk(socket: ServerConnection) -> None:
        await talks.pop(0)(socket)

    async def run() -> T:
        async with serve(talk, "127.0.0.1", 0) as server:
            url = f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"
            client = AsyncWebSocketClient(url, **{"backoff": Backoff(attempts=2, first=0.0), **options})
            try:
                return await asyncio.wait_for(work(client), 20)
            finally:
                await client.disconnect()

    return asyncio.run(run())


async def asks(client: AsyncWebSocketClient) -> Any:
    return await client.generate("x")


async def cut(socket: ServerConnection) -> None:
    """The connection ends without a close frame."""
    socket.transport.abort()


def test_a_call_that_was_not_sent_is_sent_on_the_next_connection() -> None:
    async def gone(socket: ServerConnection) -> None:
        await say(socket, CONNECTED)
        await socket.close(1001)

    async def after_the_loss(client: AsyncWebSocketClient) -> Any:
        lost = asyncio.Event()
        client.on("disconnected", lambda why: lost.set())
        await client.connect()
        await lost.wait()
        return await client.generate("x")

    assert against([gone, answers], after_the_loss).text == "42"


def test_a_call_that_was_sent_is_not_sent_again() -> None:
    heard: list[Any] = []

    async def hears_and_goes(socket: ServerConnection) -> None:
        await say(socket, CONNECTED)
        heard.append(await hear(socket))
        await cut(socket)

    async def counts(socket: ServerConnection) -> None:
        await say(socket, CONNECTED)
        async for text in socket:
            heard.append(json.loads(text))
            await complete(socket, heard[-1])

    async def one_then_another(client: AsyncWebSocketClient) -> Any:
        with pytest.raises(ConnectionLostError) as caught:
            await client.generate("x")
        assert caught.value.received.text == ""
        return await client.generate("y")

    assert against([hears_and_goes, counts], one_then_another).text == "42"
    assert [call["params"]["prompt"] for call in heard] == ["x", "y"]


def test_a_stream_that_broke_says_what_came() -> None:
    async def half(socket: ServerConnection) -> None:
        await say(socket, CONNECTED)
        call = await hear(socket)
        await piece(socket, call, "4", 0)
        await piece(socket, call, "2", 1)
        await cut(socket)

    async def streams(client: AsyncWebSocketClient) -> Any:
        stream = client.generate_stream("x")
        with pytest.raises(ConnectionLostError) as caught:
            async for _ in stream:
                pass
        return caught.value.received

    received = against([half, answers], streams)
    assert (received.text, received.tokens) == ("42", 2)
    assert received.request_id.startswith("c-")


def test_a_call_that_is_larger_than_the_server_takes_is_refused_and_the_others_are_lost() -> None:
    """The server closes with 1009 and never read it: it did not run, so it is no call that may have."""

    async def work(client: AsyncWebSocketClient) -> list[Any]:
        small = asyncio.create_task(client.generate("x"))
        await asyncio.sleep(0.1)
        return await asyncio.gather(small, client.generate("x" * 3_000_000), return_exceptions=True)

    async def silent(socket: ServerConnection) -> None:  # which takes a megabyte, as the library's default is
        await say(socket, CONNECTED)
        async for _ in socket:
            pass

    small, large = against([silent, answers], work)
    assert isinstance(small, ConnectionLostError)
    assert isinstance(large, InvalidRequestError)
    assert (large.status, large.code) == (413, "payload_too_large")


def test_what_costs_nothing_is_asked_again() -> None:
    async def goes(socket: ServerConnection) -> None:
        await say(socket, CONNECTED)
        await hear(socket)
        await cut(socket)

    async def well(socket: ServerConnection) -> None:
        await say(socket, CONNECTED)
        await complete(socket, await hear(socket), {"status": "ready", "uptime_seconds": 2.0})
        await socket.wait_closed()

    health = against([goes, well], lambda client: client.health())
    assert (health.status, health.uptime_seconds) == ("ready", 2.0)


def test_a_refusal_is_asked_again_when_it_says_so_and_an_answer_that_began_is_not() -> None:
    limited = {"code": "RATE_LIMIT_EXCEEDED", "message": "Later.", "retry_after": 0}

    async def refuses_once(socket: ServerConnection) -> None:
        await say(socket, CONNECTED)
        await say(socket, {"id": (await hear(socket))["id"], "status": "error", "error": limited})
        await complete(socket, await hear(socket))
        call = await hear(socket)
        await piece(socket, call, "4", 0)
        await say(socket, {"id": call["id"], "status": "error", "error": limited})
        await socket.wait_closed()

    async def twice(client: AsyncWebSocketClient) -> None:
        assert (await client.generate("x")).text == "42"
        with pytest.raises(RateLimitError) as caught:
            async for _ in client.generate_stream("x"):
                pass
        assert (caught.value.retry_after, caught.value.received.text) == (0, "4")

    against([refuses_once], twice)


@pytest.mark.parametrize("how", ["leave", "timeout", "task"])
def test_a_call_that_is_left_is_cancelled_on_the_server(how: str) -> None:
    heard: list[Any] = []

    async def begins(socket: ServerConnection) -> None:
        await say(socket, CONNECTED)
        call = await hear(socket)
        await piece(socket, call, "4", 0)
        heard.extend([call, await hear(socket)])
        await say(socket, {"id": call["id"], "status": "cancelled"})
        await complete(socket, heard[-1], {"id": call["id"], "cancelled": True})
        await complete(socket, await hear(socket))
        await socket.wait_closed()

    async def leaves(client: AsyncWebSocketClient) -> None:
        if how == "leave":
            async with client.generate_stream("x") as stream:
                async for _ in stream:
                    break
        elif how == "timeout":
            client.timeout = 0.1
            with pytest.raises(TimeoutError):
                await client.generate("x")
        else:
            task = asyncio.create_task(client.generate("x"))
            while client._link is None or not client._link._exchanges:
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        client.timeout = 10
        assert (await client.generate("y")).text == "42"

    against([begins], leaves)
    assert heard[1] == {"id": f"{heard[0]['id']}-end", "function": "cancel", "params": {"id": heard[0]["id"]}}


def test_a_call_that_the_server_cancelled_says_so() -> None:
    async def cancels(socket: ServerConnection) -> None:
        await say(socket, CONNECTED)
        await say(socket, {"id": (await hear(socket))["id"], "status": "cancelled"})
        await socket.wait_closed()

    with pytest.raises(CancelledError):
        against([cancels], asks)


def test_calls_run_at_once_and_their_frames_may_mix() -> None:
    async def mixes(socket: ServerConnection) -> None:
        await say(socket, CONNECTED)
        calls = [await hear(socket) for _ in range(20)]
        for call in reversed(calls):
            await complete(socket, call, {**RESULT, "text": call["params"]["prompt"]})
        await socket.wait_closed()

    async def many(client: AsyncWebSocketClient) -> Any:
        return await asyncio.gather(*(client.generate(str(number)) for number in range(20)))

    assert [result.text for result in against([mixes], many)] == [str(number) for number in range(20)]


async def asks_for_a_key(socket: ServerConnection) -> None:
    await say(socket, {"type": "auth_required"})
    if (await hear(socket)) == {"type": "auth", "api_key": "good"}:
        await say(socket, {"type": "auth_success", "tenant_id": "acme"})
        await answers(socket)
    else:
        await say(socket, {"type": "auth_failed", "error": "The API key is wrong."})
        await socket.close(1008)


def test_the_opening_with_a_key() -> None:
    async def connects(client: AsyncWebSocketClient) -> Any:
        told: list[Any] = []
        client.on("connected", told.append)
        await client.connect()
        assert client.is_connected()
        return client.get_tenant_id(), told

    assert against([asks_for_a_key], connects, api_key="good") == ("acme", ["acme"])
    for key in ("bad", None):
        talks: list[Talk] = [asks_for_a_key, answers]
        with pytest.raises(AuthenticationError):
            against(talks, asks, api_key=key)
        assert talks == [answers], "a wrong key is not tried again"
    with pytest.raises(PermissionDeniedError, match="'acme', not of 'other'"):
        against([asks_for_a_key], asks, api_key="good", tenant_id="other")


def test_a_server_that_speaks_something_else() -> None:
    async def nonsense(socket: ServerConnection) -> None:
        await socket.send("hello")

    async def later(socket: ServerConnection) -> None:
        await say(socket, CONNECTED)
        await hear(socket)
        await socket.send("hello")
        await socket.wait_closed()

    with pytest.raises(ProtocolError):
        against([nonsense], asks)
    with pytest.raises(ConnectionLostError, match="no JSON"):
        against([later, answers], asks)


def test_it_comes_back_by_itself_and_tells() -> None:
    async def goes(socket: ServerConnection) -> None:
        await say(socket, CONNECTED)
        await cut(socket)

    async def waits(client: AsyncWebSocketClient) -> Any:
        told: list[str] = []
        again = asyncio.Event()
        for event in ("connected", "disconnected", "reconnecting"):
            client.on(event, lambda _, event=event: told.append(event))
        client.on("connected", lambda _: again.set() if told.count("connected") == 2 else None)
        await client.connect()
        await again.wait()
        return list(told)

    assert against([goes, answers], waits) == ["connected", "disconnected", "reconnecting", "connected"]


def test_without_reconnect_a_call_says_that_there_is_no_connection() -> None:
    with pytest.raises(ConnectionFailedError, match="connect\\(\\) makes one"):
        against([], asks, reconnect=False)

    async def after(client: AsyncWebSocketClient) -> Any:
        await client.connect()
        return await client.generate("x")

    assert against([answers], after, reconnect=False).text == "42"


def test_errors_of_no_call_reach_the_listener_and_a_bad_listener_harms_nobody() -> None:
    async def strays(socket: ServerConnection) -> None:
        await say(socket, CONNECTED)
        call = await hear(socket)
        await say(socket, {"id": None, "status": "error", "error": {"code": "INVALID_PARAMS", "message": "What?"}})
        await complete(socket, call)
        await socket.wait_closed()

    async def listens(client: AsyncWebSocketClient) -> Any:
        told: list[Any] = []
        client.on("error", lambda _: 1 / 0)
        client.on_error(told.append)
        with pytest.raises(ValueError, match="no event 'connect'"):
            client.on("connect", told.append)
        await client.generate("x")
        client.off("error", told.append)
        return told

    [error] = against([strays], listens)
    assert (type(error), str(error)) == (InvalidRequestError, "What?")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("ws://a:1", "ws://a:1/ws"),
        ("http://a:1/", "ws://a:1/ws"),
        ("https://a/x", "wss://a/x"),
        ("wss://a/ws?b=c", "wss://a/ws?b=c"),
    ],
)
def test_addresses(given: str, wanted: str) -> None:
    assert address(given) == wanted


def test_no_address() -> None:
    for bad in ("localhost:8000", "ftp://a", "ws://"):
        with pytest.raises(InvalidRequestError):
            address(bad)


def test_realms_name_and_the_sync_client_in_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    assert RealmWebSocketClient is AsyncWebSocketClient

    async def run() -> list[str]:
        async with serve(answers, "127.0.0.1", 0) as server:
            url = f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"

            def threads() -> list[str]:
                with WebSocketClient(url, model="m") as client, ThreadPoolExecutor(4) as pool:
                    assert client.get_model() == "m"
                    return [result["text"] for result in pool.map(client.generate, "abcd")]

            return await asyncio.to_thread(threads)

    assert asyncio.run(run()) == ["42"] * 4
