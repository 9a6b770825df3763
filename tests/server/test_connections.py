"""Connections that do not behave, over raw sockets: what a client leaves unfinished ends, what can be answered is."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import resource
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from dfastllm.errors import ValidationError
from dfastllm.metrics import Metrics
from dfastllm.server import listening
from dfastllm.server.app import create_app
from dfastllm.server.cuts import QUIET, Tally
from dfastllm.server.hosts import Hosts, host_of
from dfastllm.server.listening import connections_allowed, listen, listen_unix
from dfastllm.server.run import Server
from dfastllm.settings import Settings
from tests.kit.live import Live, serving
from tests.kit.served import random_engine, slow
from tests.server.test_lifecycle import idle, post_completions, until

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
SHORT: dict[str, Any] = {"model": "slow", "prompt": "x", "max_tokens": 3, "ignore_eos": True}
LONG = {**SHORT, "max_tokens": 400}
WAITS = {"header_timeout": 0.3, "body_timeout": 0.3, "write_timeout": 0.3, "keep_alive_timeout": 0.4}


@pytest.fixture(scope="module")
def hasty() -> Iterator[Live]:
    """A server with deadlines of a moment; its model takes 10 ms a step."""
    with serving({"slow": slow(random_engine("llama", max_len=2048), 0.01)}, **WAITS) as running:
        yield running


def received(client: socket.socket, seconds: float = 20.0) -> bytes:
    """All that comes until the server ends the connection. Fails where it does not."""
    client.settimeout(seconds)
    data = b""
    while more := client.recv(65536):
        data += more
    return data


def answer_of(live: Live, data: bytes) -> bytes:
    """What the server sends back, and that it ends the connection then."""
    with live.connect() as client:
        client.sendall(data)
        return received(client)


def ask_health(client: socket.socket) -> None:
    """Send it and read the whole answer, which must be good. Leaves the connection open."""
    client.sendall(HEALTH)
    client.settimeout(20)
    answer = b""
    while not answer.endswith(b"}"):
        more = client.recv(1000)
        assert more
        answer += more
    assert answer.startswith(b"HTTP/1.1 200 ")


def ended(live: Live, reason: str) -> float:
    return live.metric("http_connections_ended_total", reason=reason)


# What is left unfinished.


@pytest.mark.parametrize("sent", [b"G", b"GET /health HTTP/1.1\r\nHost: x\r\n", HEALTH + b"GET /hea"])
def test_a_head_has_a_deadline(hasty: Live, sent: bytes) -> None:
    began = time.monotonic()
    answer = answer_of(hasty, sent)
    assert 0.2 < time.monotonic() - began < 10
    last = answer[answer.rindex(b"HTTP/1.1 ") :]
    assert last.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_too_slow"' in last
    assert answer.count(b"HTTP/1.1 ") == (2 if sent.startswith(HEALTH) else 1)


def test_a_head_that_dribbles_has_the_same_deadline(hasty: Live) -> None:
    with hasty.connect() as client:
        began = time.monotonic()
        with contextlib.suppress(OSError):
            for byte in b"GET /health HTTP/1.1\r\nX: " + b"y" * 100:
                client.sendall(bytes([byte]))
                time.sleep(0.02)
                if time.monotonic() - began > 0.6:
                    break
        assert received(client).startswith(b"HTTP/1.1 408 ")


def test_a_connection_that_says_nothing_is_closed_without_a_word(hasty: Live) -> None:
    assert answer_of(hasty, b"") == b""


def test_an_idle_connection_is_closed(hasty: Live) -> None:
    began = time.monotonic()
    answer = answer_of(hasty, HEALTH)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b"HTTP/1.1") == 1
    assert 0.3 < time.monotonic() - began < 10


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 1000\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n5\r\n{"], ids=["length", "chunks"]
)
def test_a_body_has_a_deadline(hasty: Live, framing: bytes) -> None:
    before = ended(hasty, "slow_request")
    answer = answer_of(hasty, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + framing)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert ended(hasty, "slow_request") == before + 1


def test_a_body_that_keeps_coming_has_the_time_it_takes(hasty: Live) -> None:
    """30 KB in a second: 0.3 s would not do, but 8 KiB a second is fast enough."""
    data = post_completions({**SHORT, "max_tokens": 1, "user": "x" * 30_000})
    with hasty.connect() as client:
        for start in range(0, len(data), 3000):
            client.sendall(data[start : start + 3000])
            time.sleep(0.1)
        client.settimeout(20)
        assert client.recv(100).startswith(b"HTTP/1.1 200 ")


def test_a_body_that_dribbles_ends(hasty: Live) -> None:
    with hasty.connect() as client:
        client.sendall(post_completions(SHORT)[:-40])
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - began < 0.8:
                client.sendall(b" ")
                time.sleep(0.05)
        assert received(client).startswith(b"HTTP/1.1 408 ")


def test_a_client_that_does_not_read_is_let_go(hasty: Live) -> None:
    """It asks for more than the two kernels take for it, and reads nothing."""
    before = ended(hasty, "slow_reader")
    asks = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
    with hasty.connect() as client:
        client.sendall(asks * 300)
        assert until(lambda: ended(hasty, "slow_reader") > before, 20)
    assert until(lambda: idle(hasty))


def test_nothing_is_left_of_them(hasty: Live) -> None:
    assert until(lambda: hasty.metric("http_connections") == 0)
    assert idle(hasty)


# Requests that can be read in two ways, or in none.

REFUSED = {
    "length and chunks": (
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        400,
    ),
    "chunks and length": (
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n",
        400,
    ),
    "two lengths": (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello", 400),
    "two lengths in one": (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5, 6\r\n\r\nhello", 400),
    "a length of +5": (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: +5\r\n\r\nhello", 400),
    "a length of -1": (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
    "a length of 0x5": (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0x5\r\n\r\nhello", 400),
    "a length without end": (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 50 + b"\r\n\r\n", 400),
    "chunks of 1.0": (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "chunks twice": (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", 501),
    "another coding": (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
    "a coding in disguise": (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501),
    "a chunk's size": (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
    "a chunk's sign": (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n", 400),
    "a chunk's end": (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhelloXX0\r\n\r\n", 400),
    "a chunk too large": (
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"f" * 30 + b"\r\n",
        400,
    ),
    "a space before the colon": (b"GET /health HTTP/1.1\r\nHost : x\r\n\r\n", 400),
    "a name with a space": (b"GET /health HTTP/1.1\r\nHost: x\r\nContent Length: 5\r\n\r\n", 400),
    "a fold at first": (b"GET /health HTTP/1.1\r\n Host: x\r\n\r\n", 400),
    "a NUL": (b"GET /health HTTP/1.1\r\nHost: x\r\nA: b\0c\r\n\r\n", 400),
    "a bare CR": (b"GET /health HTTP/1.1\r\nHost: x\r\nA: b\rContent-Length: 5\r\n\r\n", 400),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET /health HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
    "no version": (b"GET /health\r\n\r\n", 400),
    "version 2": (b"GET /health HTTP/2.0\r\nHost: x\r\n\r\n", 505),
    "the preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)) + b"\n\n", 400),
    "a large field": (b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"y" * 70_000 + b"\r\n\r\n", 431),
    "many fields": (b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"Abc: def\r\n" * 20_000 + b"\r\n", 431),
    "a blank line before": (b"\r\n", 400),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_one_reading_is_refused_and_ends_the_connection(live: Live, name: str) -> None:
    """What follows it would be read as another request: it must not be answered."""
    sent, status = REFUSED[name]
    answer = answer_of(live, sent + HEALTH)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer
    assert b"connection: close" in head.lower()
    assert b'"code":"malformed_request"' in body
    assert answer.count(b"HTTP/1.1 ") == 1
    assert int(re.search(rb"content-length: (\d+)", head.lower())[1]) == len(body)  # type: ignore[index]


def test_a_head_without_end(live: Live) -> None:
    assert answer_of(live, b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"y" * 70_000).startswith(b"HTTP/1.1 431 ")


def test_what_the_standard_lets_pass_is_answered(live: Live) -> None:
    """RFC 9112: equal lengths (6.3), folded values (5.2), bare line feeds (2.2)."""
    body = b"Content-Length: 2\r\nContent-Type: application/json\r\n"
    for sent in (
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n" + body + b"Connection: close\r\n\r\n{}",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\nConnection: close\r\n" + body + b"\r\n{}",
        b"POST /tokenize HTTP/1.1\nHost: x\nConnection: close\n" + body.replace(b"\r", b"") + b"\n{}",
    ):
        answer = answer_of(live, sent)
        assert answer.startswith(b"HTTP/1.1 400 "), sent  # read whole and checked by the route
        assert b"required" in answer


def test_a_refusal_can_be_read_while_the_body_still_comes(live: Live) -> None:
    """Closing at once on unread bytes would reset the connection, and the answer would be lost."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50000000\r\n\r\n"
    with live.connect() as client:
        client.sendall(head)
        with contextlib.suppress(OSError):
            for _ in range(20):
                client.sendall(b" " * 100_000)
        assert received(client).startswith(b"HTTP/1.1 413 ")


def test_many_bad_requests_write_few_lines(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    before = ended(live, "malformed")
    with caplog.at_level(logging.WARNING):
        for _ in range(20):
            answer_of(live, b"nonsense\r\n\r\n")
    assert ended(live, "malformed") == before + 20
    assert len(caplog.records) <= 1


def test_the_tally_tells_what_it_left_out(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    tally = Tally(Metrics(), lambda: now)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            tally.note("malformed", "first")
        tally.note("files", "another reason")
        now = QUIET
        tally.note("malformed", "later")
    assert [record.getMessage() for record in caplog.records] == [
        "connection ended (malformed): first",
        "connection ended (files): another reason",
        "connection ended (malformed): later; 4 more before",
    ]


# Half-closed clients.


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_shut_its_writing_side_gets_its_answer(hasty: Live, stream: bool) -> None:
    with hasty.connect() as client:
        client.sendall(post_completions({**SHORT, "max_tokens": 40, "stream": stream}))
        client.shutdown(socket.SHUT_WR)
        answer = received(client)
    answer = answer.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert (b"data: [DONE]" if stream else b'"finish_reason":"length"') in answer


def test_half_closed_with_requests_in_line(hasty: Live) -> None:
    with hasty.connect() as client:
        client.sendall(HEALTH * 3)
        client.shutdown(socket.SHUT_WR)
        assert received(client).count(b"HTTP/1.1 200 OK") == 3


def test_half_closed_in_the_middle_of_a_request_is_gone(hasty: Live) -> None:
    for sent in (b"GET /hea", post_completions(SHORT)[:-5]):
        with hasty.connect() as client:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
            assert received(client) == b""


def test_a_client_of_1_0_that_shut_its_writing_side_is_sent_nothing_it_does_not_know(hasty: Live) -> None:
    with hasty.connect() as client:
        client.sendall(post_completions({**SHORT, "max_tokens": 40}).replace(b"HTTP/1.1", b"HTTP/1.0"))
        client.shutdown(socket.SHUT_WR)
        assert received(client).startswith(b"HTTP/1.1 200 ")


# How many there may be.


@pytest.fixture
def narrow() -> Iterator[Live]:
    with serving({"slow": slow(random_engine("llama"), 0.01)}, max_connections=4) as running:
        yield running


def test_one_connection_too_many_is_told_at_once(narrow: Live) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(narrow.connect()).sendall(post_completions(LONG))
        assert until(lambda: len(narrow.serving.jobs) >= 4)
        began = time.monotonic()
        answer = answer_of(narrow, HEALTH)
        assert time.monotonic() - began < 2
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in answer.lower()
        assert b'"code":"too_many_connections"' in answer
    assert until(lambda: idle(narrow))
    assert narrow.get("/health").status_code == 200


def test_an_idle_connection_makes_room(narrow: Live) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(narrow.connect()) for _ in range(4)]
        for client in clients[::-1]:  # the last is idle for longest
            ask_health(client)
        ask_health(stack.enter_context(narrow.connect()))
        with contextlib.suppress(ConnectionResetError):
            assert clients[3].recv(10) == b""
        ask_health(clients[0])
    assert ended(narrow, "capacity") == 1


def test_files_that_run_out(live: Live, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Accepting fails for a while: few lines in the log, no busy loop, and those who waited are answered after it."""
    accept, calls, failing = socket.socket.accept, 0, True

    def broken(self: socket.socket) -> Any:
        nonlocal calls
        calls += 1
        if failing:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return accept(self)

    monkeypatch.setattr(listening, "REST", 0.1)
    monkeypatch.setattr(socket.socket, "accept", broken)
    with caplog.at_level(logging.WARNING), live.connect() as client:
        client.sendall(HEALTH)
        time.sleep(0.5)
        assert 2 <= calls <= 10
        failing = False
        client.settimeout(20)
        assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
    assert len([r for r in caplog.records if "Too many open files" in r.getMessage()]) == 1


def test_connections_leave_files_for_others() -> None:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert connections_allowed(1) == 1
    assert connections_allowed(10**9) == soft - listening.RESERVE


def test_a_stopping_server_does_not_wait_for_what_is_not_sent() -> None:
    with serving({"slow": slow(random_engine("llama"), 0.01)}, shutdown_timeout=20) as running:
        clients = [running.connect() for _ in range(3)]
        clients[0].sendall(b"GET /hea")
        clients[1].sendall(post_completions(SHORT)[:-5])
        ask_health(clients[2])
        time.sleep(0.1)
        began = time.monotonic()
    assert time.monotonic() - began < 15
    assert clients[1].recv(1000).startswith(b"HTTP/1.1 503 ")
    for client in clients:
        client.close()


# Names.


def test_a_page_under_another_name_is_refused(live: Live) -> None:
    port = live.url.rpartition(":")[2].encode()
    for name in (b"evil.example", b"evil.example:" + port, b"localhost.evil.example", b"127.0.0.1.nip.example"):
        answer = answer_of(live, b"GET /v1/models HTTP/1.1\r\nHost: " + name + b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 421 "), name
        assert b"--allowed-hosts" in answer
        assert b'"code":"wrong_host"' in answer
    names = (b"localhost:" + port, b"LOCALHOST", b"127.0.0.1:" + port, b"[::1]:8000", b"box", b"app.localhost", b"")
    for name in names:
        answer = answer_of(live, b"GET /v1/models HTTP/1.1\r\nConnection: close\r\nHost: " + name + b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 "), name


@pytest.mark.parametrize(
    ("settings", "taken", "refused"),
    [
        (
            {},
            ["127.0.0.2:1", "10.0.0.1", "host.docker.internal:80", "localhost."],
            ["a.example", "x.localhost.example"],
        ),
        ({"host": "0.0.0.0"}, ["a.example"], []),
        ({"host": "localhost"}, ["localhost"], ["a.example"]),
        ({"host": "[::1]"}, ["[::1]:1"], ["a.example"]),
        ({"api_key": "k"}, ["a.example"], []),
        ({"uds": "/x"}, ["a.example"], []),
        (
            {"allowed_hosts": ("A.example", "*.b.example")},
            ["a.EXAMPLE:1", "x.b.example", "y.x.b.example"],
            ["b.example"],
        ),
        ({"allowed_hosts": ("a.example",), "host": "0.0.0.0"}, ["a.example", "10.1.1.1"], ["c.example", "a.example.c"]),
        ({"allowed_hosts": ("a.example",), "api_key": "k"}, ["a.example"], ["c.example"]),
        ({"allowed_hosts": ("*",)}, ["c.example"], []),
        ({"host": "models.example"}, ["models.example", "c.example"], []),
    ],
)
def test_whose_names_are_taken(settings: dict[str, Any], taken: list[str], refused: list[str]) -> None:
    hosts = Hosts(Settings(**settings))
    assert [name for name in taken if not hosts.takes(name)] == []
    assert [name for name in refused if hosts.takes(name)] == []


def test_the_host_of_a_header() -> None:
    assert [host_of(h) for h in ("A.b:80", "[::1]:80", "[FE80::1]", "x.", "", "1.2.3.4:1", " x ")] == [
        *("a.b", "::1", "fe80::1", "x", "", "1.2.3.4", "x")
    ]


# Where it listens.


@contextlib.contextmanager
def running(listener: socket.socket, settings: Settings) -> Iterator[None]:
    """A server that still loads, on this socket."""
    server = Server(create_app(settings=settings), settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert server.up.wait(20)
        yield
    finally:
        server.should_exit = True
        thread.join(20)


def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    settings = Settings(uds=str(path))
    with listen_unix(str(path), 0o660) as listener, running(listener, settings):
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
            assert client.get("http://any.example/health/live").status_code == 200
        with pytest.raises(ValidationError, match="in use"), listen_unix(str(path), 0o600):
            pass
    assert not path.exists()


def test_the_socket_of_a_server_that_was_killed_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    with listen_unix(str(path), 0o600) as listener:
        assert listening.address_of(listener) == f"unix:{path}"
        path.unlink()
        path.write_text("of another")
    assert path.read_text() == "of another"


def test_unix_sockets_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for path, match in (("file", "another kind"), ("no/such/x", "cannot be made"), ("x" * 200, "cannot be made")):
        with pytest.raises(ValidationError, match=match) as refused, listen_unix(str(tmp_path / path), 0o600):
            pass
        assert refused.value.param == "uds"
    assert (tmp_path / "file").read_text() == "precious"
    with pytest.raises(ValidationError, match="three octal digits"):
        Settings(uds_mode="999")


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_an_ipv6_address_in_brackets() -> None:
    for host in ("[::1]", "::1"):
        try:
            listener = listen(host, 0)
        except ValidationError as error:
            pytest.skip(str(error))  # none on this machine
        with listener, running(listener, Settings(host=host)):
            url = listening.address_of(listener)
            assert url.startswith("http://[::1]:")
            assert httpx.get(f"{url}/health/live").status_code == 200
