"""One client's connection: uvicorn's HTTP/1.1 protocol with an end to everything that a client can leave unfinished.

A head and a body have until their deadline, a reader has to read, an idle connection is closed. What is refused here
never reaches the application: requests that cannot be framed in one way only (RFC 9112), and names that are not this
server's (`hosts`). What is written last can be read: a connection whose request was not read to its end is shut for
writing first and closed when the client has had time (RFC 9112, 9.6). A client that shuts its writing side after the
request gets its answer.

Knows nothing of routes and models. How connections are taken in is `listening`.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any, Literal, cast

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from dfastllm.errors import (
    DFastLLMError,
    MalformedRequestError,
    MisdirectedRequestError,
    NotReadyError,
    SlowRequestError,
)
from dfastllm.server.cuts import LEAST_RATE, Reason, Tally, WriteClock
from dfastllm.server.hosts import Hosts
from dfastllm.server.refusals import error_response
from dfastllm.server.ws.connection import WebSocketConnection
from dfastllm.settings import Settings

__all__ = ["Connection", "Limits", "refusal"]

MOST_HEAD = 65536  # bytes of a head
LINGER = 5.0  # s after its last byte that a client which still sends has to read the last answer
LINGER_MOST = 30.0  # s that it has in all
NEW = 1.0  # s in which a connection that has sent nothing is not the one that makes room for another
# What is done about a half-closed connection, in turns: whether something is written, and the seconds until the next.
PROBES = ((False, 0.05), (True, 0.05), (False, 0.25), (False, 3.0))
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
COMMENT = b":\n\n"  # of an event stream

# uvicorn tells of each bad request on its own, so a client could fill the disk; `Tally` tells of them by the minute.
_quiet = logging.getLogger("dfastllm.server.http")
_quiet.setLevel(logging.ERROR)


@dataclass(frozen=True)
class Limits:
    """What a client may take, from the settings of the same names; times in seconds.

    hosts  the names that are answered to.
    """

    header_timeout: float
    body_timeout: float
    write_timeout: float
    keep_alive_timeout: float
    max_body_bytes: int
    hosts: Hosts

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        return cls(
            settings.header_timeout,
            settings.body_timeout,
            settings.write_timeout,
            settings.keep_alive_timeout,
            settings.max_body_bytes,
            Hosts(settings),
        )


def refusal(error: DFastLLMError) -> bytes:
    """The whole answer that says so, after which the connection ends."""
    response = error_response(error)
    lines = [f"HTTP/1.1 {response.status_code} {http.HTTPStatus(response.status_code).phrase}"]
    lines += [f"date: {formatdate(usegmt=True)}", "connection: close"]
    lines += [f"{name.decode()}: {value.decode()}" for name, value in response.raw_headers]
    return "\r\n".join([*lines, "", ""]).encode() + bytes(response.body)


def _malformed(message: str, status: int = 400) -> MalformedRequestError:
    error = MalformedRequestError(message)
    error.status = status
    return error


class _Parser(h11.Connection):
    """h11's side of a server, stricter. `fault` is why the last event could not be had.

    answers_events  whether the answer that is being sent is an event stream.
    """

    def __init__(self, hosts: Hosts) -> None:
        super().__init__(h11.SERVER, MOST_HEAD)
        self.hosts = hosts
        self.fault: DFastLLMError | None = None
        self.answers_events = False

    def next_event(self) -> Any:
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            self.fault = _malformed(f"The request is not HTTP/1.1: {error}.", status=error.error_status_hint)
            raise
        if isinstance(event, h11.Request):
            self.fault = self._fault_of(event)
            if self.fault is not None:
                raise h11.RemoteProtocolError(self.fault.message, self.fault.status)
        return event

    def _fault_of(self, request: h11.Request) -> DFastLLMError | None:
        """What h11 lets pass: a message whose end a proxy may see elsewhere (RFC 9112, 6.1), another server's name."""
        headers: dict[bytes, bytes] = dict(request.headers)
        if request.http_version not in (b"1.1", b"1.0"):
            return _malformed(f"HTTP/{request.http_version.decode()} is not spoken here.", status=505)
        if sum(len(name) + len(value) for name, value in request.headers) > MOST_HEAD:  # h11's bound is of what is cut
            return _malformed(f"The request's head must have at most {MOST_HEAD} bytes.", status=431)
        if b"transfer-encoding" in headers:
            if b"content-length" in headers:
                return _malformed("The request has both Content-Length and Transfer-Encoding; one ends a body.")
            if request.http_version != b"1.1":
                return _malformed("A request of HTTP/1.0 cannot have Transfer-Encoding.")
        host = headers.get(b"host", b"").decode("latin-1")
        if not self.hosts.takes(host):
            return MisdirectedRequestError(
                f"This server does not answer to the name {host[:200]!r}.",
                hint="If that is its name, start it with --allowed-hosts and the name, or with --api-key.",
            )
        return None

    def send(self, event: Any) -> bytes | None:  # type: ignore[override]
        """The event's bytes, as h11's."""
        if isinstance(event, h11.Response):
            kinds = [value for name, value in event.headers if name == b"content-type"]
            self.answers_events = bool(kinds) and kinds[0].startswith(b"text/event-stream")
        return cast("bytes | None", super().send(event))


class _Transport:
    """A transport whose `close` lets the client read what was written last. Everything else is the transport's."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.transport = transport
        self.close = close
        self.closing = False

    def is_closing(self) -> bool:
        return self.closing or self.transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)


class Connection(H11Protocol):
    """uvicorn's protocol with deadlines. Runs on the event loop's thread alone."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        *,
        limits: Limits,
        tally: Tally,
    ) -> None:
        super().__init__(config, server_state, app_state)
        self.conn: _Parser = _Parser(limits.hosts)
        self.logger = _quiet
        self.timeout_keep_alive = limits.keep_alive_timeout  # type: ignore[assignment]
        self.limits = limits
        self.tally = tally
        self.raw: asyncio.Transport
        self._reading: Literal["head", "body"] | None = None
        self._began = 0.0  # when the client's turn began: of the head, of the body, of the pause between requests
        self._bytes = 0  # received since then
        self._used = False  # whether a byte was ever received
        self._deaf = False  # what comes is thrown away: the last answer is written
        self._half_closed = False
        self._clock: asyncio.TimerHandle | None = None  # of reading, of a half-closed client, of lingering
        self._write_clock: WriteClock

    # What a client may do to make room for others.

    def expendable(self, now: float) -> bool:
        """Whether nothing is lost when this connection ends: it is idle, or has been sending a head for a while, or was
        answered for the last time."""
        if self._deaf:
            return not self.raw.is_closing() and now - self._began > NEW
        if self.transport.is_closing() or self._reading == "body":
            return False
        waits = self.cycle is None or self.cycle.response_complete
        return waits and (self._reading is None or now - self._began > NEW)

    @property
    def waiting_since(self) -> float:
        """When it last began to wait for the client, on the loop's clock."""
        return self._began

    def drop(self, reason: Reason, detail: str) -> None:
        """End it without a word."""
        self.tally.note(reason, detail)
        self.raw.abort()

    # asyncio's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:  # type: ignore[override]
        self.raw = cast(asyncio.Transport, transport)
        self._write_clock = WriteClock(self.raw, self.limits.write_timeout, self.drop)
        super().connection_made(self.raw)
        self.transport = cast(asyncio.Transport, _Transport(self.raw, self._close))
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clocks()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            self._bytes += len(data)
            return
        self._used = True
        self._bytes += len(data)
        super().data_received(data)
        if self.raw.get_protocol() is self:  # an upgrade has handed the connection over, which has no clock of ours
            self._watch()

    def eof_received(self) -> bool:  # type: ignore[override]
        """True keeps the connection open for the answer of a request that came whole."""
        waits = self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body
        if self._deaf or not waits:
            return False
        self._half_closed = True
        self._stop_clocks()
        self._probe(0)
        return True

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_clock.start()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._write_clock.stop()

    # uvicorn's side.

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._began = self.loop.time()
        self._watch()
        if self._half_closed and self.cycle.response_complete:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        fault = self.conn.fault or MalformedRequestError(msg)
        self._refuse(fault, "host" if isinstance(fault, MisdirectedRequestError) else "malformed")

    def shutdown(self) -> None:
        if self._deaf:
            self.raw.abort()
        elif self._reading == "body":
            self._refuse(NotReadyError("The server is shutting down."), "shutdown")
        else:
            super().shutdown()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Hand the connection over, with what has come behind the request."""
        self._stop_clocks()
        self.connections.discard(self)
        line = b" ".join((event.method, event.target, b"HTTP/1.1"))
        head = b"\r\n".join([line, *(name + b": " + value for name, value in self.headers), b"", b""])
        upgraded = WebSocketConnection(
            self.config,
            self.server_state,
            self.app_state,
            max_bytes=self.limits.max_body_bytes,
            write_timeout=self.limits.write_timeout,
            tally=self.tally,
        )
        upgraded.connection_made(self.raw)
        self.raw.set_protocol(upgraded)
        upgraded.data_received(head + self.conn.trailing_data[0])

    # Deadlines of reading.

    def _watch(self) -> None:
        """Start the clock of what the client has begun to send, stop that of what has come whole."""
        phase = self._phase()
        if phase == self._reading or self._half_closed or self.transport.is_closing():
            return
        self._reading = phase
        self._stop_reading_clock()
        if phase is not None:
            self._began, self._bytes = self.loop.time(), 0
            self._clock = self._after(self._limit(), self._check_sender)

    def _phase(self) -> Literal["head", "body"] | None:
        state = self.conn.their_state
        if state is h11.SEND_BODY:
            return "body"
        begun = state is h11.IDLE and (self.cycle is None or bool(self.conn.trailing_data[0]))
        return "head" if begun else None

    def _limit(self) -> float:
        """Seconds for what is being read. A body has more, the more of it has come."""
        if self._reading == "head":
            return self.limits.header_timeout
        return self.limits.body_timeout + self._bytes / LEAST_RATE

    def _check_sender(self) -> None:
        left = self._began + self._limit() - self.loop.time()
        if left > 0:
            self._clock = self._after(left, self._check_sender)
        elif not self._used:
            self.transport.close()  # opened ahead of need, as browsers do: nothing was asked
        else:
            error = SlowRequestError(
                f"The request's {self._reading} did not come whole within {self._limit():.0f} s.",
                hint=f"A body has --body-timeout and what it takes at {LEAST_RATE} bytes a second."
                if self._reading == "body"
                else None,
            )
            self._refuse(error, "slow_request")

    # Ends.

    def _refuse(self, error: DFastLLMError, reason: Reason) -> None:
        """Answer with the error where no answer has begun, and end the connection."""
        self.tally.note(reason, error.message)
        begun = self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE)
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._deaf = True
        if not begun and not self.raw.is_closing():
            self.raw.write(refusal(error))
        self.transport.close()

    def _close(self) -> None:
        """What `transport.close()` does: at once where the client has sent all it wanted to, else after a while."""
        guarded = cast(_Transport, self.transport)
        unread = self._deaf or self.conn.their_state in (h11.SEND_BODY, h11.ERROR)
        if guarded.closing or self.raw.is_closing():
            return
        guarded.closing = True
        self._unset_keepalive_if_required()
        if not unread or self._half_closed:
            self.raw.close()
            return
        self._deaf = True
        self._stop_reading_clock()
        self.flow.resume_reading()
        with contextlib.suppress(OSError):  # gone already
            self.raw.write_eof()
        self._began, self._bytes = self.loop.time(), 0
        self._clock = self._after(LINGER, self._check_leaving, 0)

    def _check_leaving(self, before: int) -> None:
        """End it unless it still sends, as one does that is in the middle of a large body."""
        if self._bytes == before or self.loop.time() - self._began > LINGER_MOST:
            self.raw.abort()
        else:
            self._clock = self._after(LINGER, self._check_leaving, self._bytes)

    def _probe(self, turn: int) -> None:
        """A client that shut its writing side either reads on or is gone, and only writing tells: its machine refuses
        what comes for a socket that is gone. What is written means nothing: an interim answer, a comment."""
        if self.raw.is_closing() or self.cycle.response_complete:
            return
        if self.raw.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.raw.abort()
            return
        writes, pause = PROBES[turn % len(PROBES)]
        if writes and not self.flow.write_paused:
            if self.conn.our_state is h11.SEND_RESPONSE and self.scope["http_version"] == "1.1":
                self.raw.write(CONTINUE)
            elif self.conn.our_state is h11.SEND_BODY and self.conn.answers_events:
                self.raw.write(self.conn.send(h11.Data(data=COMMENT)) or b"")
        self._clock = self._after(pause, self._probe, turn + 1)

    # Clocks.

    def _after(self, seconds: float, call: Callable[..., None], *arguments: Any) -> asyncio.TimerHandle:
        return self.loop.call_later(seconds, call, *arguments)

    def _stop_reading_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _stop_clocks(self) -> None:
        self._stop_reading_clock()
        self._write_clock.stop()
