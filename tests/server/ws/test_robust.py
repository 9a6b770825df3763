"""What a client may do to a connection and to the others: bad frames, floods, not reading, going away, staying."""

from __future__ import annotations

import contextlib
import json
import socket as sockets
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI

from dfastllm.engine import Worker
from dfastllm.server.app import create_app
from dfastllm.server.listening import listen
from dfastllm.server.run import Server
from dfastllm.server.ws.session import UNREADABLE
from dfastllm.settings import Settings
from tests.kit.live import Live, serving
from tests.kit.served import random_engine, slow
from tests.kit.sockets import Frame, Socket, close_frame, front, raw_frame, socket, upgraded
from tests.server.test_lifecycle import idle, until

LONG: dict[str, Any] = {"prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
BIG = 65536  # of a message


@pytest.fixture(scope="module")
def slow_live() -> Iterator[Live]:
    """10 ms a step; hasty clocks."""
    settings: dict[str, Any] = {"websocket_calls": 4, "max_body_bytes": BIG, "write_timeout": 0.4}
    with serving({"slow": slow(random_engine("llama"), 0.01)}, **settings) as running:
        yield running


@pytest.fixture
def ws(slow_live: Live) -> Iterator[Socket]:
    with socket(slow_live) as made:
        yield made


def call(id: str = "1", function: str = "generate", **params: Any) -> Frame:
    return {"id": id, "function": function, "params": params}


def text_frame(frame: Any) -> bytes:
    return raw_frame(1, json.dumps(frame).encode())


# Messages that are no call: an error, and the connection goes on. The id of the reply is the call's where there is one.

NO_CALL: dict[str, tuple[str, str | None, str]] = {
    "nothing": ("", None, "INVALID_PARAMS"),
    "no JSON": ("hello", None, "INVALID_PARAMS"),
    "half of it": ('{"id": "1", "function": "hea', None, "INVALID_PARAMS"),
    "two of them": ('{"id": "1", "function": "health"}{"id": "2", "function": "health"}', None, "INVALID_PARAMS"),
    "a number": ("5", None, "INVALID_PARAMS"),
    "NaN": ('{"id": "1", "function": "health", "params": NaN}', "1", "INVALID_PARAMS"),
    "a list": ('[{"id": "1", "function": "health"}]', None, "INVALID_PARAMS"),
    "no id": ('{"function": "health"}', None, "INVALID_PARAMS"),
    "an empty id": ('{"id": "", "function": "health"}', None, "INVALID_PARAMS"),
    "an id that is a number": ('{"id": 1, "function": "health"}', None, "INVALID_PARAMS"),
    "an id too long": (json.dumps({"id": "x" * 129, "function": "health"}), None, "INVALID_PARAMS"),
    "no function": ('{"id": "1"}', "1", "INVALID_PARAMS"),
    "a function that is null": ('{"id": "1", "function": null}', "1", "INVALID_PARAMS"),
    "a function that is none": ('{"id": "1", "function": "__init__"}', "1", "DISPATCH_ERROR"),
    "params that are a list": ('{"id": "1", "function": "health", "params": []}', "1", "INVALID_PARAMS"),
    "a field that is none": ('{"id": "1", "function": "health", "parms": {}}', "1", "INVALID_PARAMS"),
    "nested too deep": (
        '{"id": "1", "function": "health", "params": ' + "[" * 99 + "]" * 99 + "}",
        None,
        "INVALID_PARAMS",
    ),
    "too many values": ('{"id": "1", "params": [' + "1," * 30_000 + "1]}", "1", "INVALID_PARAMS"),
    "an auth frame too late": ('{"type": "auth", "api_key": "x"}', None, "INVALID_PARAMS"),
    "a number of 5,000 digits": (
        '{"id": "1", "function": "health", "params": {"a": ' + "9" * 5000 + "}}",
        None,
        "INVALID_PARAMS",
    ),
    "another tenant": ('{"id": "1", "function": "health", "tenant_id": "acme"}', "1", "UNAUTHORIZED"),
}


@pytest.mark.parametrize("name", NO_CALL)
def test_what_is_no_call_is_refused_and_no_more(ws: Socket, name: str) -> None:
    text, id, code = NO_CALL[name]
    ws.ws.send(text)
    (frame,) = ws.until_end(id)
    assert (frame["status"], frame["error"]["code"]) == ("error", code)
    assert ws.result("health")["status"] == "ready"


def test_many_of_them_end_the_connection(ws: Socket) -> None:
    for _ in range(UNREADABLE):
        ws.ws.send("x")
        assert ws.receive()["id"] is None
    ws.ws.send("x")
    assert ws.close_code() == 1008


def test_an_id_that_is_in_use(ws: Socket) -> None:
    """The reply names no call, and the running one goes on: two last frames of one id would be nobody's."""
    ws.send(call("a", **{**LONG, "max_tokens": 20}))
    assert ws.receive()["status"] == "streaming"
    ws.send(call("a", "health"))
    frames = [ws.receive()]
    while frames[-1]["status"] in ("streaming", "error"):
        frames.append(ws.receive())
    errors = [frame for frame in frames if frame["status"] == "error"]
    assert [(frame["id"], frame["error"]["details"]["param"]) for frame in errors] == [(None, "id")]
    assert frames[-1]["data"]["tokens_generated"] == 20


# Messages that end the connection: its close code.

ENDS: dict[str, tuple[bytes, int]] = {
    "binary": (raw_frame(2, b'{"id": "1", "function": "health"}'), 1003),
    "an empty binary": (raw_frame(2, b""), 1003),
    "too long": (raw_frame(1, b"x" * (BIG + 1)), 1009),
    "much too long, all of it sent": (raw_frame(1, b"x" * (3 << 20)), 1009),
    "said to be too long": (raw_frame(1, b"x" * (BIG + 1))[:20], 1009),
    "too long in pieces": (raw_frame(1, b"x" * BIG, final=False) + raw_frame(0, b"x"), 1009),
    "of 20,000 empty pieces": (raw_frame(1, b"", final=False) + raw_frame(0, b"", final=False) * 20_000, 1009),
    "not UTF-8": (raw_frame(1, b'{"id": "\xff"}'), 1007),
    "half a character": (raw_frame(1, b'"\xe2\x82'), 1007),
    "without a mask": (raw_frame(1, b"{}", masked=False), 1002),
    "a piece of nothing": (raw_frame(0, b"{}"), 1002),
    "a beginning within a message": (raw_frame(1, b"{", final=False) + raw_frame(1, b"}"), 1002),
    "a reserved kind": (raw_frame(3, b"{}"), 1002),
    "a reserved bit": (bytes([0xC1]) + raw_frame(1, b"{}")[1:], 1002),
    "a ping in pieces": (raw_frame(9, b"", final=False), 1002),
    "a ping too long": (raw_frame(9, b"x" * 126), 1002),
    "a close of one byte": (raw_frame(8, b"x"), 1002),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_ends_the_connection(slow_live: Live, name: str) -> None:
    data, code = ENDS[name]
    with upgraded(slow_live) as client:
        _send(client, data)
        assert close_frame(client)[0] == code
    with socket(slow_live) as other:
        assert other.result("health")["status"] == "ready"


def test_an_upgrade_that_is_none(slow_live: Live) -> None:
    """Refused with an answer; without one the connection would stay open for ever."""
    head = "Host: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    many = "X: x\r\n" * 200
    for text, status in (
        (f"POST /ws HTTP/1.1\r\n{head}{key}Sec-WebSocket-Version: 13\r\nContent-Length: 0\r\n\r\n", b"405"),
        (f"GET /ws HTTP/1.1\r\n{head}Sec-WebSocket-Version: 13\r\n\r\n", b"400"),
        (f"GET /ws HTTP/1.1\r\n{head}Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: x\r\n\r\n", b"400"),
        (f"GET /ws HTTP/1.1\r\n{head}{key}Sec-WebSocket-Version: 8\r\n\r\n", b"400"),
        (f"GET /ws HTTP/1.1\r\n{head}{key}Sec-WebSocket-Version: 13\r\nX: {'x' * 9000}\r\n\r\n", b"400"),
        (f"GET /ws HTTP/1.1\r\n{head}{key}Sec-WebSocket-Version: 13\r\n{many}\r\n", b"400"),
    ):
        with slow_live.connect() as client:
            client.sendall(text.encode())
            answer = client.recv(65536)
            assert answer.split(b" ")[1] == status, answer
            with contextlib.suppress(ConnectionError):
                while client.recv(65536):
                    pass
    plain = slow_live.get("/ws")
    assert (plain.status_code, plain.headers["upgrade"]) == (426, "websocket")
    assert plain.json()["error"]["code"] == "malformed_request"


def test_a_message_in_pieces_is_one(ws: Socket) -> None:
    ws.ws.send(iter(['{"id": "1", ', '"function"', "", ': "health"}']))
    assert ws.until_end("1")[-1]["data"]["status"] == "ready"


def test_pings_are_answered_within_a_message(slow_live: Live) -> None:
    whole = json.dumps(call("1", "health")).encode()
    with upgraded(slow_live) as client:
        client.sendall(raw_frame(1, whole[:9], final=False) + raw_frame(9, b"are you there"))
        client.sendall(raw_frame(0, whole[9:]) + raw_frame(8, struct.pack("!H", 1000)))
        code, data = close_frame(client)
    assert code == 1000
    assert b"\x8a\x0dare you there" in data
    assert b'"uptime_seconds"' not in data or b'"complete"' in data


def test_a_long_message_waits_for_a_thread_that_reads_it(
    ws: Socket, slow_live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where too many are read at once HTTP is refused; a frame that is not read has no id to be refused by."""
    lane = slow_live.serving.readers.short
    monkeypatch.setattr(lane, "limit", 0)
    ws.send({**call("1", "health"), "tenant_id": None, "params": {"padding": None, "x" * 5000: None}})
    with pytest.raises(TimeoutError):
        ws.receive(timeout=0.3)
    monkeypatch.setattr(lane, "limit", 8)
    assert ws.until_end("1")[-1]["status"] == "complete"


def test_a_fault_of_ours_closes_the_connection(slow_live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfastllm.server.ws.session.read_call", None)
    with socket(slow_live) as ws:
        ws.send(call("1", "health"))
        assert ws.close_code() == 1011
    assert until(lambda: not front(slow_live).sessions)


# Floods.


def test_calls_beyond_the_limit_are_refused_and_the_others_go_on(ws: Socket, slow_live: Live) -> None:
    for at in range(12):
        ws.send(call(str(at), **{**LONG, "stream": False, "max_tokens": 30}))
    ends = {frame["id"]: frame for frame in (ws.receive() for _ in range(12))}
    done = sorted(id for id, frame in ends.items() if frame["status"] == "complete")
    assert done == ["0", "1", "2", "3"]
    for id in sorted(set(ends) - set(done)):
        error = ends[id]["error"]
        assert (error["code"], error["retry_after"]) == ("RATE_LIMIT_EXCEEDED", 1.0)
    assert until(lambda: idle(slow_live))


def test_cancel_is_taken_where_no_more_calls_are(ws: Socket) -> None:
    for at in range(4):
        ws.send(call(str(at), **{**LONG, "stream": False}))
    ws.send({"id": "stop", "function": "cancel", "params": {"id": "2"}})
    assert ws.receive() == {"id": "2", "status": "cancelled"}
    assert ws.receive()["id"] == "stop"


def test_one_that_does_not_read_is_bounded_and_cut(slow_live: Live) -> None:
    """It asks for what would be 60 MB and reads nothing: little of it is made, and then it is gone."""
    before = slow_live.metric("http_connections_ended_total", reason="slow_reader")
    most = 0
    with upgraded(slow_live, receive_buffer=4096) as client:
        client.settimeout(10)
        asks = b"".join(text_frame(call(str(at), "metadata")) for at in range(2000))
        sent = threading.Thread(target=_send, args=(client, asks))
        sent.start()
        assert until(lambda: bool(front(slow_live).sessions))
        (session,) = front(slow_live).sessions
        while slow_live.metric("http_connections_ended_total", reason="slow_reader") == before:
            most = max(most, session.connection.transport.get_write_buffer_size())
            assert len(session._tasks) <= 8
            time.sleep(0.01)
        sent.join(10)
    assert 0 < most < 3 * BIG  # asyncio's own mark, and a frame of 30 KB
    assert until(lambda: not front(slow_live).sessions)


def _send(client: Any, data: bytes) -> None:
    with contextlib.suppress(OSError):
        client.sendall(data)


def test_pings_that_are_not_read_are_bounded_and_cut(slow_live: Live) -> None:
    """Each would be answered into a buffer of ours: reading from it stops instead."""
    before = slow_live.metric("http_connections_ended_total", reason="slow_reader")
    with upgraded(slow_live, receive_buffer=4096) as client:
        client.settimeout(10)
        (session,) = front(slow_live).sessions
        most = [0]
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.005):
                most[0] = max(most[0], session.connection.transport.get_write_buffer_size())

        watching = threading.Thread(target=watch)
        watching.start()
        _send(client, raw_frame(9, b"x" * 125) * 100_000)
        assert until(lambda: slow_live.metric("http_connections_ended_total", reason="slow_reader") > before, 10)
        done.set()
        watching.join()
    assert 0 < most[0] < 1 << 20
    assert until(lambda: not front(slow_live).sessions)


# Going away.


@pytest.mark.parametrize("how", ["close", "reset", "half"])
def test_a_lost_connection_frees_its_work(slow_live: Live, how: str) -> None:
    engine = slow_live.worker.engines["slow"]
    with upgraded(slow_live) as client:
        client.sendall(b"".join(text_frame(call(str(at), **{**LONG, "stream": at < 2})) for at in range(4)))
        assert until(lambda: len(engine.scheduler.running) == 4)
        if how == "reset":
            client.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, struct.pack("ii", 1, 0))
        elif how == "half":
            client.shutdown(sockets.SHUT_WR)
            assert until(lambda: idle(slow_live), 2)
    began = time.monotonic()
    assert until(lambda: idle(slow_live), 2)
    assert time.monotonic() - began < 2  # to their end they take four seconds
    assert until(lambda: not front(slow_live).sessions)
    assert slow_live.metric("websocket_calls_total", function="generate", status="disconnected") > 0


def test_one_that_answers_no_ping_is_let_go() -> None:
    engine = slow(random_engine("llama"), 0.01)
    with serving({"m": engine}, websocket_ping_interval=0.15) as live:
        with upgraded(live) as client:
            client.sendall(text_frame(call("1", **{**LONG, "stream": False})))
            assert until(lambda: bool(live.serving.jobs))
            assert close_frame(client)[0] == 1011
        assert until(lambda: idle(live), 2)
        with socket(live) as ws:  # one that does is not
            time.sleep(0.5)
            assert ws.result("health")["status"] == "ready"


# The server goes away.


@contextlib.contextmanager
def stopping(grace: float, key: str | None = None) -> Iterator[tuple[FastAPI, Server, str]]:
    settings = Settings(port=0, shutdown_timeout=grace, api_key=key)
    engines = {"m": slow(random_engine("llama"), 0.01)}
    with Worker(engines) as worker, listen("127.0.0.1", 0) as listener:
        app = create_app(worker, engines, settings)
        server = Server(app, settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            assert server.up.wait(20)
            yield app, server, f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def test_a_stopping_server_lets_calls_end_and_closes(slow_live: Live) -> None:
    with stopping(5.0) as (app, server, url):
        live = Live(url, app.state.serving, slow_live.worker, app, set())
        with socket(live) as ws, socket(live) as idler:
            ws.send(call("1", **{**LONG, "max_tokens": 80}))
            assert ws.receive()["status"] == "streaming"
            server.should_exit = True
            assert until(lambda: app.state.serving.draining)
            assert idler.close_code() == 1001
            ws.send(call("2", "health"))
            frames = [ws.receive()]
            while not any(frame["id"] == "1" and frame["status"] != "streaming" for frame in frames):
                frames.append(ws.receive())
            (refused,) = [frame for frame in frames if frame["id"] == "2"]
            assert (refused["error"]["code"], refused["error"]["details"]["status"]) == ("DISPATCH_ERROR", 503)
            assert refused["error"]["retry_after"] == 1.0
            assert frames[-1]["data"]["tokens_generated"] == 80
            assert ws.close_code() == 1001


def test_calls_that_do_not_end_in_time_end_with_an_error(slow_live: Live) -> None:
    with stopping(0.3) as (app, server, url):
        live = Live(url, app.state.serving, slow_live.worker, app, set())
        with socket(live) as ws:
            ws.send(call("1", **LONG))
            assert ws.receive()["status"] == "streaming"
            server.should_exit = True
            last = ws.until_end("1")[-1]
            assert (last["status"], last["error"]["code"]) == ("error", "DISPATCH_ERROR")
            assert ws.close_code() == 1001


def test_one_that_has_sent_no_key_does_not_hold_up_the_end(slow_live: Live) -> None:
    with stopping(5.0, "s3cret") as (app, server, url):
        live = Live(url, app.state.serving, slow_live.worker, app, set())
        with socket(live, opened=False) as ws:
            assert ws.receive() == {"type": "auth_required"}
            server.should_exit = True
            began = time.monotonic()
            assert ws.close_code() == 1001
            assert time.monotonic() - began < 5  # it had ten seconds
