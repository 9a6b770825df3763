"""Who may connect: keys in the head and in a frame, origins, the number of connections; and that nothing reaches the
engine before."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from dfastllm.core import Request
from dfastllm.errors import AuthenticationError
from dfastllm.server.access import Access, Keys
from dfastllm.server.middleware import Trace
from dfastllm.server.ws.session import takes_origin
from dfastllm.tenants import OWNER, Identity, Key, Tenant
from tests.kit.live import Live, serving
from tests.kit.served import random_engine
from tests.kit.sockets import Socket, front, raw_frame, socket, upgraded
from tests.server.test_lifecycle import until

ASK = {"id": "1", "function": "generate", "params": {"prompt": "x", "max_tokens": 1}}
SECRET = "s3cret"


@pytest.fixture(scope="module")
def keyed() -> Iterator[Live]:
    with serving({"m": random_engine("llama")}, api_key=SECRET, websocket_auth_timeout=0.3) as live:
        yield live


@pytest.fixture
def reached(keyed: Live, monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """What reaches the engine."""
    seen: list[Request] = []
    submit = keyed.worker.submit

    def watched(model: str, request: Request, *more: Any, **options: Any) -> Any:
        seen.append(request)
        return submit(model, request, *more, **options)

    monkeypatch.setattr(keyed.worker, "submit", watched)
    return seen


def status_of(live: Live, **options: Any) -> tuple[int, Any]:
    """Of a refused upgrade: its status and its error."""
    with pytest.raises(InvalidStatus) as refused, socket(live, **options):
        pass
    answer = refused.value.response
    assert answer.headers["X-Request-ID"]
    return answer.status_code, json.loads(answer.body)["error"]


def test_a_server_without_keys_asks_for_none(live: Live) -> None:
    for key in (None, "whatever"):
        with socket(live, key) as ws:
            assert [frame["status"] for frame in ws.first] == ["connected"]
            assert ws.first[0]["tenant_id"] == "default"
            ws.send({"type": "auth", "api_key": "x"})  # nobody asked: it is no call
            assert ws.receive()["id"] is None


def test_a_key_in_the_head(keyed: Live, reached: list[Request]) -> None:
    with socket(keyed, SECRET) as ws:
        assert [frame.get("type") for frame in ws.first] == ["auth_success", None]
        assert ws.result("generate", **ASK["params"])["tokens_generated"] <= 1
    assert len(reached) == 1
    for wrong in ("s3cre", "s3crets", "é"):
        status, error = status_of(keyed, key=wrong)
        assert (status, error["code"]) == (401, "invalid_api_key")
    assert len(reached) == 1


def test_a_key_in_a_frame(keyed: Live, reached: list[Request]) -> None:
    with socket(keyed, opened=False) as ws:
        assert ws.receive() == {"type": "auth_required"}
        ws.send({"type": "auth", "api_key": SECRET})
        assert ws.receive() == {"type": "auth_success", "tenant_id": "default"}
        assert ws.receive()["status"] == "connected"
        assert ws.result("generate", **ASK["params"])
    assert len(reached) == 1


FIRST: dict[str, Any] = {
    "a call": ASK,
    "a wrong key": {"type": "auth", "api_key": "wrong"},
    "a beginning of the key": {"type": "auth", "api_key": SECRET[:-1]},
    "no key": {"type": "auth"},
    "an empty key": {"type": "auth", "api_key": ""},
    "a key that is a number": {"type": "auth", "api_key": 5},
    "a key too long": {"type": "auth", "api_key": "k" * 513},
    "a key and more": {"type": "auth", "api_key": SECRET, "tenant_id": "default"},
    "another type": {"type": "login", "api_key": SECRET},
    "a list": [SECRET],
    "a text": SECRET,
    "null": None,
}


@pytest.mark.parametrize("name", FIRST)
def test_nothing_is_taken_before_a_key(keyed: Live, reached: list[Request], name: str) -> None:
    with socket(keyed, opened=False) as ws:
        assert ws.receive() == {"type": "auth_required"}
        ws.send(FIRST[name])
        with contextlib.suppress(ConnectionClosed):
            ws.send(ASK)  # behind it, at once
        told = ws.receive()
        assert told["type"] == "auth_failed"
        assert SECRET not in told["error"]
        assert ws.close_code() == 1008
    assert reached == []


def test_a_client_that_sends_no_key_in_time(keyed: Live, reached: list[Request]) -> None:
    began = time.monotonic()
    with socket(keyed, opened=False) as ws:
        assert ws.receive() == {"type": "auth_required"}
        assert "0.3 s" in ws.receive()["error"]
        assert ws.close_code() == 1008
    assert 0.25 < time.monotonic() - began < 3
    assert reached == []


def test_a_message_before_the_key_has_four_kilobytes(keyed: Live) -> None:
    with socket(keyed, opened=False) as ws:
        ws.receive()
        ws.ws.send("x" * 4097)
        assert ws.close_code() == 1009
    with socket(keyed, SECRET) as ws:
        ws.ws.send("x" * 100_000)
        assert ws.receive()["error"]["code"] == "INVALID_PARAMS"


def test_frames_in_one_piece_with_the_upgrade(keyed: Live, reached: list[Request]) -> None:
    """A client may not wait for the answer: what it sends behind its head is read all the same, and no sooner."""
    with keyed.connect() as client:
        head = (
            "GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        client.sendall(head.encode() + raw_frame(1, json.dumps(ASK).encode()))
        data = b""
        while b'"auth_failed"' not in data and (more := client.recv(65536)):
            data += more
    assert b'"auth_required"' in data
    assert b'"auth_failed"' in data
    assert reached == []


# Tenants: the identity is the key's, proved for each call.

ACME = Tenant("t1", "acme", models=frozenset({"m"}))
KEYS = {
    "all": Identity(ACME, Key("k1", "t1", frozenset({"generate"}))),
    "metrics": Identity(ACME, Key("k2", "t1", frozenset({"metrics"}))),
    "blind": Identity(ACME, Key("k3", "t1", frozenset({"generate"}), models=frozenset({"other"}))),
}


@pytest.fixture
def tenants(keyed: Live, monkeypatch: pytest.MonkeyPatch) -> dict[str, Identity]:
    """Keys that may be taken away."""
    keys = dict(KEYS)

    async def identify(text: str) -> Identity:
        await asyncio.sleep(0)
        if text not in keys:
            raise AuthenticationError("The key is disabled.")
        return keys[text]

    monkeypatch.setattr(keyed.serving, "identify", identify)
    return keys


def opened(ws: Socket, key: str) -> None:
    ws.receive()
    ws.send({"type": "auth", "api_key": key})
    assert ws.receive()["type"] == "auth_success"
    assert ws.receive()["status"] == "connected"


def test_the_tenant_comes_from_the_key(keyed: Live, tenants: dict[str, Identity], reached: list[Request]) -> None:
    with socket(keyed, opened=False) as ws:
        opened(ws, "all")
        assert ws.result("health")["models"] == ["m"]
        ws.send({**ASK, "tenant_id": "t2"})
        error = ws.until_end("1")[-1]["error"]
        assert (error["code"], error["details"]["param"]) == ("UNAUTHORIZED", "tenant_id")
        assert reached == []
        ws.send({**ASK, "tenant_id": "t1"})
        assert ws.until_end("1")[-1]["status"] == "complete"


def test_scopes_are_looked_at(keyed: Live, tenants: dict[str, Identity], reached: list[Request]) -> None:
    with socket(keyed, opened=False) as ws:
        opened(ws, "metrics")
        error = ws.refusal("generate", **ASK["params"])
        assert (error["code"], error["details"]["status"]) == ("UNAUTHORIZED", 403)
        assert ws.result("health")["status"] == "ready"
    assert reached == []


def test_health_lists_what_the_key_may_use(keyed: Live, tenants: dict[str, Identity]) -> None:
    with socket(keyed, opened=False) as ws:
        opened(ws, "blind")
        assert ws.result("health")["models"] == []


def test_a_key_that_is_taken_away_takes_no_more_calls(keyed: Live, tenants: dict[str, Identity]) -> None:
    """Those that run end; the connection then closes."""
    with socket(keyed, opened=False) as ws:
        opened(ws, "all")
        ws.send(
            {"id": "long", "function": "generate", "params": {"prompt": "x", "max_tokens": 200, "ignore_eos": True}}
        )
        assert until(lambda: bool(keyed.serving.jobs))
        del tenants["all"]
        ws.send(ASK)
        ends = {frame["id"]: frame for frame in (ws.receive(), ws.receive())}
        assert ends["1"]["error"]["code"] == "UNAUTHORIZED"
        assert "disabled" in ends["1"]["error"]["message"]
        assert ends["long"]["status"] == "complete"
        assert ws.close_code() == 1008


# Origins.


@pytest.mark.parametrize(
    ("origin", "allowed", "taken"),
    [
        ("https://page.example", (), False),
        ("https://page.example", ("https://page.example",), True),
        ("https://page.example", ("https://other.example",), False),
        ("https://page.example.evil.example", ("https://page.example",), False),
        ("http://page.example", ("https://page.example",), False),
        ("https://page.example", ("*",), True),
        ("null", (), False),
        ("null", ("null",), True),
        ("", (), False),
        ("http://server.example:8000", (), True),
        ("http://SERVER.example:8000", (), True),
        ("http://server.example", (), False),
        ("http://server.example:80000", (), False),
        ("server.example:8000", (), False),
    ],
)
def test_origins(origin: str, allowed: tuple[str, ...], taken: bool) -> None:
    assert takes_origin(origin, "server.example:8000", allowed) is taken


def test_pages_of_others_get_no_connection() -> None:
    with serving({"m": random_engine("llama")}, allowed_origins=("https://page.example",)) as live:
        status, error = status_of(live, origin="https://evil.example")
        assert (status, error["code"]) == (403, "forbidden")
        assert "evil.example" in error["message"]
        for mine in ("https://page.example", live.url):
            with socket(live, origin=mine) as ws:  # type: ignore[arg-type]
                assert ws.result("health")["status"] == "ready"


def test_a_name_that_is_not_ours_gets_no_connection(live: Live) -> None:
    """The Host header of an upgrade is looked at too: a page whose name was bound to this machine sends its own."""
    with live.connect() as client:
        client.sendall(
            b"GET /ws HTTP/1.1\r\nHost: rebound.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        assert client.recv(4096).startswith(b"HTTP/1.1 421 ")


# How many.


def test_one_connection_too_many() -> None:
    with serving({"m": random_engine("llama")}, websocket_connections=2) as live:
        with socket(live), socket(live) as second:
            status, error = status_of(live)
            assert (status, error["code"]) == (503, "too_many_connections")
            assert second.result("health")["status"] == "ready"
        assert until(lambda: not front(live).sessions)
        with socket(live):
            pass


def test_one_without_a_key_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfastllm.server.ws.session.NEW", 0.05)
    with (
        serving({"m": random_engine("llama")}, websocket_connections=2, api_key=SECRET) as live,
        socket(live, SECRET) as first,
        socket(live, opened=False) as idler,
    ):
        idler.receive()
        time.sleep(0.1)
        with socket(live, SECRET) as third:
            assert third.result("health")["status"] == "ready"
            assert idler.close_code() is None
            assert first.result("health")["status"] == "ready"
            status, _ = status_of(live, key=SECRET)  # the others have one
            assert status == 503


def test_an_upgrade_while_it_stops(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live.serving, "draining", True)
    status, error = status_of(live)
    assert (status, error["code"]) == (503, "not_ready")


def test_other_paths_are_no_websockets(keyed: Live, reached: list[Request]) -> None:
    """Routes of HTTP and none, asked for with an upgrade: none runs, and the refusal is typed as any other."""
    for path in ("/v1/completions", "/v1/models", "/metrics", "/nowhere", "/ws/"):
        with keyed.connect() as client:
            client.sendall(
                f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
            )
            answer = client.recv(65536)
            while b"\r\n\r\n" not in answer or not answer.endswith(b"}"):
                answer += client.recv(65536)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 404 "), path
        assert b"x-request-id: " in head.lower()
        error = json.loads(body)["error"]
        assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "not_found", None)
        assert error["message"] == f"There is no WebSocket at {path}; there is one at /ws."
    assert reached == []
    with upgraded(keyed) as client:
        assert client


# Each layer on the scope of a WebSocket.


def scope(**headers: str) -> dict[str, Any]:
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    extensions: dict[str, Any] = {"websocket.http.response": {}}
    return {"type": "websocket", "path": "/ws", "headers": raw, "extensions": extensions, "state": {}}


class Inside:
    """An application that notes the scopes that reach it, and accepts."""

    def __init__(self) -> None:
        self.scopes: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        await send({"type": "websocket.accept"})


def through(layer: Any, asked: dict[str, Any]) -> list[Any]:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(layer(asked, receive, send))
    return sent


def test_the_key_on_a_websocket() -> None:
    inside = Inside()
    layer = Access(inside, Keys(SECRET))
    sent = through(layer, scope(authorization=f"Bearer {SECRET}"))
    assert sent == [{"type": "websocket.accept"}]
    assert inside.scopes[-1]["state"] == {"identity": OWNER, "credential": SECRET}
    through(layer, scope())  # it may prove itself, and nothing else
    assert inside.scopes[-1]["state"] == {"identity": None, "credential": None}
    for wrong in ("Bearer wrong", "Basic s3cret", SECRET, "Bearer", ""):
        sent = through(layer, scope(authorization=wrong))
        assert (sent[0]["type"], sent[0]["status"]) == ("websocket.http.response.start", 401)
    assert len(inside.scopes) == 2


def test_the_trace_on_a_websocket() -> None:
    inside = Inside()
    observed: list[Any] = []
    layer = Trace(inside, lambda *seen: observed.append(seen[:3]))
    sent = through(layer, scope(**{"x-request-id": "mine-1"}))
    assert inside.scopes[-1]["state"]["request_id"] == "mine-1"
    assert (b"x-request-id", b"mine-1") in sent[0]["headers"]

    async def broken(*_: Any) -> None:
        raise ZeroDivisionError("a fault of ours")

    sent = through(Trace(broken, lambda *seen: observed.append(seen[:3])), scope())
    assert (sent[0]["type"], sent[0]["status"]) == ("websocket.http.response.start", 500)
    assert observed == [("GET", "unmatched", 101), ("GET", "unmatched", 500)]


def test_a_session_trusts_no_scope_without_an_identity(keyed: Live) -> None:
    """Were the key's layer left out, a session would still ask for one."""
    from dfastllm.server.ws.connection import EXTENSION
    from dfastllm.server.ws.session import Session

    class Link:
        going = asyncio.Event()

    bare = {**scope(), "extensions": {EXTENSION: Link()}}
    made = Session(keyed.serving, bare, None, None)  # type: ignore[arg-type]
    assert made.identity is None
