"""One WebSocket connection: opening it, and the calls whose frames mix on it.

Knows nothing of reconnecting: a connection that broke ends its calls with ConnectionLostError, and is thrown away.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.protocol import State

from .errors import (
    AuthenticationError,
    CancelledError,
    ClientError,
    ConnectionFailedError,
    ConnectionLostError,
    InvalidRequestError,
    ProtocolError,
    of_frame,
    of_response,
)
from .options import packed

__all__ = ["Exchange", "Frame", "Link", "address"]

Frame = Mapping[str, Any]
TOO_LARGE = 1009  # the close code
_MOST_BYTES = 16 * 2**20  # of a message; an answer of a hundred thousand tokens is one


def address(url: str) -> str:
    """A server's address as that of its WebSocket: http becomes ws, and no path becomes /ws. Raises
    InvalidRequestError."""
    try:
        parts = urlsplit(url)
        scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
        known = scheme in ("ws", "wss") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, half an IPv6 address
        known = False
    if not known:
        raise InvalidRequestError(f"The url of a WebSocket is like ws://host:8000/ws, got {url!r}.", param="url")
    return urlunsplit((scheme, parts.netloc, parts.path if parts.path.strip("/") else "/ws", parts.query, ""))


class Exchange:
    """One call on a connection: it is sent once, and its frames come until a last one."""

    def __init__(self, link: Link, id: str) -> None:
        self._link = link
        self._id = id
        self._frames: asyncio.Queue[Frame | None] = asyncio.Queue()
        self._running = False
        self.size = 0  # bytes that were sent

    async def send(self, call: Frame) -> None:
        """Raises ConnectionFailedError while it is certain that nothing was sent, InvalidRequestError for what cannot
        be."""
        text = packed(call)
        self.size = len(text.encode())
        self._running = True  # before it is: a cancelled write may have gone out
        try:
            await self._link.send(text, self._id)
        except ConnectionFailedError:
            self._running = False
            raise

    def take(self, frame: Frame | None) -> None:
        """A frame of this call; None: the connection is no more."""
        self._frames.put_nowait(frame)

    async def next(self) -> Frame:
        """The next frame, `streaming` or `complete`. Raises ClientError for the other ends of a call."""
        frame = await self._frames.get()
        if frame is None:
            self._running = False
            raise ConnectionLostError(
                f"The connection broke ({self._link.why}). The call was sent and is not sent again: it may have run.",
                request_id=self._id,
            )
        status = frame.get("status")
        self._running = status == "streaming"
        if status == "error":
            raise of_frame(frame.get("error") or {}, self._id)
        if status == "cancelled":
            raise CancelledError("The call was cancelled.", status=499, request_id=self._id)
        if status not in ("streaming", "complete"):
            raise ProtocolError(f"A reply with the status {status!r}.", request_id=self._id)
        return frame

    def close(self) -> None:
        """No more is wanted of this call. What still runs is cancelled on the server; nothing is waited for."""
        self._link.forget(self._id)
        if self._running:
            self._running = False
            self._link.post({"id": f"{self._id}-end", "function": "cancel", "params": {"id": self._id}})


class Link:
    """tenant_id, version: as the server said. why: the end of the connection in words."""

    def __init__(self, socket: ClientConnection, tenant_id: str, version: str) -> None:
        self.tenant_id = tenant_id
        self.version = version
        self.why = "it is open"
        self._socket = socket
        self._exchanges: dict[str, Exchange] = {}
        self._posts: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(cls, url: str, api_key: str | None, timeout: float) -> Link:
        """Connect and authenticate. Raises ConnectionFailedError, AuthenticationError, or what a refused upgrade
        says."""
        try:
            socket = await connect(url, open_timeout=timeout, max_size=_MOST_BYTES, user_agent_header="dfastllm-client")
        except InvalidStatus as error:
            raise _refused(error) from error
        except (OSError, InvalidHandshake, InvalidURI, asyncio.TimeoutError, ConnectionClosed) as error:
            raise _unreachable(url, error) from error
        try:
            return await asyncio.wait_for(cls._greet(socket, api_key), timeout)
        except BaseException as error:
            await socket.close()
            if isinstance(error, asyncio.TimeoutError | ConnectionClosed):
                raise _unreachable(url, error) from error
            raise

    @classmethod
    async def _greet(cls, socket: ClientConnection, api_key: str | None) -> Link:
        while True:
            frame = _read(await socket.recv())
            kind = frame.get("type", frame.get("status"))
            if kind == "auth_required":
                if api_key is None:
                    raise AuthenticationError("The server asks for an API key; give api_key.", status=401)
                await socket.send(json.dumps({"type": "auth", "api_key": api_key}))
            elif kind == "auth_failed":
                raise AuthenticationError(str(frame.get("error")), status=401)
            elif kind == "connected":
                return cls(socket, str(frame["tenant_id"]), str(frame["version"]))
            elif kind != "auth_success":
                raise ProtocolError(f"The server opened with {str(frame)[:200]}.")

    @property
    def is_open(self) -> bool:
        return self._socket.state is State.OPEN

    def begin(self, id: str) -> Exchange:
        self._exchanges[id] = Exchange(self, id)
        return self._exchanges[id]

    def forget(self, id: str) -> None:
        self._exchanges.pop(id, None)

    async def send(self, text: str, id: str) -> None:
        """Raises ConnectionFailedError where the connection was closed before: nothing was sent then. A connection that
        breaks later ends the exchanges that wait on it."""
        if not self.is_open:
            raise ConnectionFailedError(f"The connection had ended ({self.why}). The call was not sent.", request_id=id)
        try:
            await self._socket.send(text)
        except ConnectionClosed:
            return  # it may be on its way: `read` ends the exchange

    def post(self, frame: Frame) -> None:
        """Send without waiting, where the connection is still there."""

        async def sending() -> None:
            if self.is_open:
                await self.send(packed(frame), "")

        task = asyncio.get_running_loop().create_task(sending())
        self._posts.add(task)
        task.add_done_callback(self._posts.discard)

    async def read(self, stray: Callable[[Frame], object]) -> None:
        """Gives every frame to its call until the connection ends, and then every call its end. stray: is shown frames
        that are about no call."""
        try:
            async for message in self._socket:
                frame = _read(message)
                if (exchange := self._exchanges.get(str(frame.get("id")))) is not None:
                    exchange.take(frame)
                elif frame.get("id") is None:
                    stray(frame)
        except ConnectionClosed:
            pass
        except ProtocolError as error:
            self.why = error.message
            await self._socket.close(1002)
        finally:
            if self.why == "it is open":
                self.why = f"close code {self._socket.close_code} {self._socket.close_reason or ''}".strip()
            waiting = list(self._exchanges.values())
            largest = max((exchange.size for exchange in waiting), default=0)
            for exchange in waiting:
                too_large = self._socket.close_code == TOO_LARGE and exchange.size == largest
                exchange.take(_refusal(largest, self._socket.close_reason) if too_large else None)

    async def close(self) -> None:
        await asyncio.gather(*self._posts, return_exceptions=True)
        await self._socket.close()


def _refusal(size: int, why: str | None) -> Frame:
    """The end of a call that was the message for whose size the server closed the connection: it did not run."""
    message = f"The call has {size:,} bytes, which is more than the server takes{f': {why}' if why else ''}."
    details = {"status": 413, "code": "payload_too_large"}
    return {"status": "error", "error": {"code": "INVALID_PARAMS", "message": message, "details": details}}


def _read(message: str | bytes) -> Frame:
    try:
        frame = json.loads(message)
    except ValueError as error:
        raise ProtocolError(f"A frame that is no JSON: {message[:200]!r}") from error
    if not isinstance(frame, dict):
        raise ProtocolError(f"A frame that is no object: {message[:200]!r}")
    return frame


def _unreachable(url: str, error: BaseException) -> ClientError:
    return ConnectionFailedError(f"No connection to {url}: {str(error) or type(error).__name__}.")


def _refused(error: InvalidStatus) -> ClientError:
    """What a server says that does not take the upgrade."""
    body: Any = (error.response.body or b"").decode("utf-8", "replace")
    with suppress(ValueError):
        body = json.loads(body)
    headers = {name.lower(): value for name, value in error.response.headers.raw_items()}
    return of_response(error.response.status_code, body, headers)
