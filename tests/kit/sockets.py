"""A client of /ws for tests: every frame that it receives is held against the type that it says it is."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from starlette.routing import WebSocketRoute
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from dfastllm.server.replies import Out
from dfastllm.server.ws.protocol import (
    AuthFailed,
    AuthRequired,
    AuthSuccess,
    CancelledReply,
    CompleteReply,
    Connected,
    ErrorReply,
    StreamingReply,
)
from dfastllm.server.ws.session import Front
from tests.kit.live import Live

TYPES: dict[str, type[Out]] = {
    "auth_required": AuthRequired,
    "auth_success": AuthSuccess,
    "auth_failed": AuthFailed,
    "connected": Connected,
    "streaming": StreamingReply,
    "complete": CompleteReply,
    "error": ErrorReply,
    "cancelled": CancelledReply,
}
Frame = dict[str, Any]


def checked(text: str | bytes) -> Frame:
    """A frame of the server; fails where it is not of its type, whole and nothing more."""
    frame: Frame = json.loads(text)
    TYPES[frame.get("type") or frame["status"]].model_validate(frame)
    return frame


class Socket:
    """A connection whose first frames have been read, unless `opened` is False."""

    def __init__(self, ws: ClientConnection) -> None:
        self.ws = ws
        self.first: list[Frame] = []

    def send(self, frame: Any) -> None:
        self.ws.send(json.dumps(frame))

    def receive(self, timeout: float = 20.0) -> Frame:
        return checked(self.ws.recv(timeout=timeout))

    def until_end(self, id: str | None) -> list[Frame]:
        """Frames up to the last one of a call; others' are not expected."""
        frames = [self.receive()]
        while frames[-1]["status"] == "streaming":
            frames.append(self.receive())
        assert all(frame["id"] == id for frame in frames), frames
        return frames

    def call(self, function: str, call_id: str = "1", **params: Any) -> list[Frame]:
        self.send({"id": call_id, "function": function, "params": params})
        return self.until_end(call_id)

    def result(self, function: str, **params: Any) -> Any:
        frame = self.call(function, **params)[-1]
        assert frame["status"] == "complete", frame
        return frame["data"]

    def refusal(self, function: str, **params: Any) -> Any:
        frame = self.call(function, **params)[-1]
        assert frame["status"] == "error", frame
        return frame["error"]

    def close_code(self, timeout: float = 20.0) -> int | None:
        """The code of the server's close frame, once it has come; None: there was none."""
        try:
            while True:
                self.ws.recv(timeout=timeout)
        except ConnectionClosed as closed:
            return None if closed.rcvd is None else closed.rcvd.code


@contextlib.contextmanager
def socket(live: Live, key: str | None = None, *, opened: bool = True, **options: Any) -> Iterator[Socket]:
    """A connection to a server; key: in the head."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    url = live.url.replace("http", "ws", 1) + "/ws"
    with connect(url, additional_headers=headers, compression=None, proxy=None, **options) as ws:
        made = Socket(ws)
        if opened:
            made.first.append(made.receive())
            while made.first[-1].get("status") != "connected":
                made.first.append(made.receive())
        yield made


def front(live: Live) -> Front:
    """The server's end of /ws."""
    return next(route.app for route in live.app.routes if isinstance(route, WebSocketRoute))  # type: ignore[return-value]


def raw_frame(opcode: int, data: bytes, *, final: bool = True, masked: bool = True) -> bytes:
    """A frame of RFC 6455, 5.2, as no client library sends it."""
    head = bytes([(0x80 if final else 0) | opcode])
    mask = 0x80 if masked else 0
    if len(data) < 126:
        head += bytes([mask | len(data)])
    elif len(data) < 1 << 16:
        head += bytes([mask | 126]) + len(data).to_bytes(2, "big")
    else:
        head += bytes([mask | 127]) + len(data).to_bytes(8, "big")
    return head + (b"\0\0\0\0" if masked else b"") + data  # a mask of zeros changes nothing


def upgraded(live: Live, *, receive_buffer: int = 0, key: str | None = None) -> Any:
    """A raw socket behind its upgrade; what the server sends is not read further than the head of its answer."""
    client = live.connect()
    if receive_buffer:
        import socket as sockets

        client.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, receive_buffer)
    lines = [
        "GET /ws HTTP/1.1",
        "Host: localhost",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    ]
    if key is not None:
        lines.append(f"Authorization: Bearer {key}")
    client.sendall("\r\n".join([*lines, "", ""]).encode())
    answer = b""
    while b"\r\n\r\n" not in answer:
        more = client.recv(1)
        assert more, answer
        answer += more
    assert answer.startswith(b"HTTP/1.1 101 "), answer
    return client


def close_frame(client: Any) -> tuple[int | None, bytes]:
    """(close code, all bytes) of what a raw socket receives up to a close frame; None: there was none."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while more := client.recv(65536):
            data += more
            if (code := _close_code(data)) is not None:
                return code, data
    return None, data


def _close_code(data: bytes) -> int | None:
    at = 0
    while at + 2 <= len(data):
        length, start = data[at + 1], at + 2
        if length == 126:
            length, start = int.from_bytes(data[at + 2 : at + 4], "big"), at + 4
        elif length == 127:
            length, start = int.from_bytes(data[at + 2 : at + 10], "big"), at + 10
        if data[at] & 0x0F == 8 and start + 2 <= len(data):
            return int.from_bytes(data[start : start + 2], "big")
        at = start + length
    return None
