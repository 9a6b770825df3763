"""One upgraded connection: uvicorn's WebSocket protocol with an end to everything that a client can leave unfinished.

Bounds what a client may send before and after its key was taken, stops reading from one that does not read, cuts it off
in the end, and leaves the close at shutdown to the session, which first lets its calls end. Knows no frames of ours.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.frames import Frame

from dfastllm.server.cuts import Reason, Tally, WriteClock

__all__ = ["EXTENSION", "WebSocketConnection"]

EXTENSION = "dfastllm.connection"  # in the scope's extensions: the connection itself, for its session
BEFORE_KEY = 4096  # bytes of a message until a key was taken
FRAGMENTS = 1 << 14  # pieces of one message
CLOSE = 2.0  # s that a client has to answer a close frame, and to read what was written before it
UNREADABLE = b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"

# uvicorn tells of each bad frame on its own, so a client could fill the disk; `Tally` tells of them by the minute, and
# the middleware of what the application raises.
_quiet = logging.getLogger("dfastllm.server.ws")
_quiet.setLevel(logging.CRITICAL)


class WebSocketConnection(WebSocketsSansIOProtocol):
    """Runs on the event loop's thread alone.

    going  set when the server shuts down.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        *,
        max_bytes: int,
        write_timeout: float,
        tally: Tally,
    ) -> None:
        super().__init__(config, server_state, app_state)
        self.logger = _quiet
        self.conn.logger = _quiet
        self.conn.max_message_size = min(BEFORE_KEY, max_bytes)
        self.close_timeout = CLOSE
        self.max_bytes = max_bytes
        self.write_timeout = write_timeout
        self.tally = tally
        self.going = asyncio.Event()
        self._write_clock: WriteClock
        self._deaf = False  # what comes is thrown away: a close frame was the last answer to it

    # What the session does with it.

    def admit(self) -> None:
        """A key was taken: messages may have their full length."""
        self.conn.max_message_size = self.max_bytes

    # What `listening` asks of every connection.

    waiting_since = 0.0

    def expendable(self, now: float) -> bool:
        """Never: it ends by its own clocks."""
        return False

    def drop(self, reason: Reason, detail: str) -> None:
        """End it without a word."""
        self.tally.note(reason, detail)
        self.transport.abort()

    # asyncio's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._write_clock = WriteClock(self.transport, self.write_timeout, self.drop)

    def connection_lost(self, exc: Exception | None) -> None:
        self._write_clock.stop()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Nor is anything read: each ping would be answered into a buffer that nobody empties."""
        super().pause_writing()
        self.transport.pause_reading()
        self._write_clock.start()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._write_clock.stop()
        if not self.read_paused:
            self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        super().data_received(data)
        if not self.handshake_initiated and self.conn.handshake_exc is not None:
            self.tally.note("malformed", f"no WebSocket upgrade: {self.conn.handshake_exc}")
            self.transport.write(UNREADABLE)
            self.transport.close()

    # uvicorn's side.

    def handle_connect(self, event: Any) -> None:
        super().handle_connect(event)
        if hasattr(self, "scope"):
            extensions: dict[str, Any] = self.scope["extensions"]  # type: ignore[assignment]
            extensions[EXTENSION] = self

    def handle_cont(self, event: Frame) -> None:
        if len(self.frames) >= FRAGMENTS:
            self.conn.fail(1009, "too many fragments")
            self.handle_parser_exception()
            return
        super().handle_cont(event)

    def handle_parser_exception(self) -> None:
        """A frame that is none, or too long. Closing on unread bytes would take the close frame from the client, so
        what it still sends is heard out for a while."""
        assert self.conn.close_sent is not None
        code, reason = self.conn.close_sent.code, self.conn.close_sent.reason
        self.tally.note("malformed", f"{code} {reason}")
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = self._deaf = True
        self.frames = []
        self.stop_keepalive()
        self.transport.write_eof()
        self.transport.resume_reading()
        self.close_timer = self.loop.call_later(CLOSE, self.transport.abort)

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        self.loop.call_later(CLOSE, self.transport.abort)

    async def send(self, message: Any) -> None:
        await super().send(message)
        if message["type"] == "websocket.close":
            self.loop.call_later(2 * CLOSE, self.transport.abort)

    async def receive(self) -> Any:
        message = await self.queue.get()
        if self.read_paused and self.queue.empty():
            self.read_paused = False
            if self.writable.is_set():
                self.transport.resume_reading()
        return message

    def shutdown(self) -> None:
        """The session ends itself; one that has is not waited for."""
        self.going.set()
        if self.close_sent:
            super().shutdown()
