"""One connection of /ws from its upgrade to its end: the key, then calls at once, each with one last frame.

What bounds it: a number of calls, the length of a message, and the client's reading. Every call sends its own frames
and waits while the client does not read on, so that nothing is queued here but one frame a call; who does not read at
all is cut off (`connection`). When the connection ends, in whatever way, its calls end with it and free their compute.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, cast

from starlette.types import Receive, Scope, Send

from dfastllm.errors import (
    AuthenticationError,
    CancelledError,
    DFastLLMError,
    ForbiddenError,
    GenerationError,
    NotReadyError,
    QueueFullError,
    RateLimitError,
    RequestNotFoundError,
    TooManyConnectionsError,
    ValidationError,
)
from dfastllm.server.bounds import read_json
from dfastllm.server.readers import SHORT
from dfastllm.server.reading import validated
from dfastllm.server.refusals import error_response
from dfastllm.server.replies import Out, dump, padded
from dfastllm.server.serving import Serving
from dfastllm.server.ws.connection import EXTENSION, WebSocketConnection
from dfastllm.server.ws.functions import Asked, Incoming, Refused, read_call
from dfastllm.server.ws.protocol import (
    AuthFailed,
    AuthFrame,
    AuthRequired,
    AuthSuccess,
    CancelledReply,
    Close,
    CompleteReply,
    Connected,
    ErrorReply,
    StreamingReply,
    error_info,
)
from dfastllm.tenants import ANYONE, Identity

__all__ = ["Front", "Session", "takes_origin"]

UNREADABLE = 16  # frames of a connection that are no call; the next one ends it
PAUSE = 0.05  # s between two tries to have a long frame read
NEW = 1.0  # s in which a connection without a key is not the one that makes room for another

log = logging.getLogger("dfastllm.server")


class Front:
    """The endpoint: refuses a connection before its upgrade, or runs its session."""

    path = "/ws"

    def __init__(self) -> None:
        self.sessions: set[Session] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = self
        serving: Serving = scope["app"].state.serving
        await receive()  # websocket.connect
        try:
            self._check(scope, serving)
        except DFastLLMError as error:
            await error_response(error)(scope, receive, send)
            return
        session = Session(serving, scope, receive, send)
        self.sessions.add(session)
        serving.metrics.websockets.inc()
        try:
            await session.run()
        finally:
            self.sessions.discard(session)
            serving.metrics.websockets.dec()

    def _check(self, scope: Scope, serving: Serving) -> None:
        """Raises what refuses the upgrade."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get(b"origin")
        if origin is not None and not takes_origin(origin, headers.get(b"host", ""), serving.settings.allowed_origins):
            raise ForbiddenError(
                f"Pages of {origin[:200]!r} may not connect.", hint="The server's owner allows them: --allowed-origins."
            )
        if serving.phase in ("stopping", "failed"):
            serving.require_ready()
        most = serving.settings.websocket_connections
        if len(self.sessions) >= most and not self._make_room():
            raise TooManyConnectionsError(f"This server has {most} WebSockets, its most.", hint="Try again soon.")

    def _make_room(self) -> bool:
        """End the connection that has been longest without a key, if there is one that may go."""
        now = time.monotonic()
        spare = [session for session in self.sessions if session.identity is None and now - session.opened > NEW]
        if not spare:
            return False
        oldest = min(spare, key=lambda session: session.opened)
        self.sessions.discard(oldest)
        oldest.connection.drop("capacity", "a WebSocket without a key made room")
        return True


def takes_origin(origin: str, host: str, allowed: Sequence[str]) -> bool:
    """Whether a browser's page of `origin` may connect: browsers ask no server before they open a WebSocket, they send
    the page's origin and leave it to the server (RFC 6455, 10.2). host: the Host header. The server's own pages may."""
    own = origin.partition("://")[2].lower() == host.strip().lower()
    return own or "*" in allowed or origin in allowed


class _Fault(Exception):
    """Ends the connection with a close frame."""

    def __init__(self, code: Close, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class _Gone(Exception):
    """The client is no longer there."""


class _Call:
    """One that runs."""

    def __init__(self, task: asyncio.Task[None]) -> None:
        self.task = task
        self.cancelled = False  # by `cancel`; else by the end of the connection


class Session:
    """identity: who is connected, None until a key was taken. opened: when, on time.monotonic()."""

    def __init__(self, serving: Serving, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["state"]
        self.serving = serving
        self.metrics = serving.metrics
        self.opened = time.monotonic()
        self.credential: str | None = state.get("credential")
        self.identity: Identity | None = state.get("identity") if serving.identify is not None else ANYONE
        self.connection: WebSocketConnection = scope["extensions"][EXTENSION]
        self._receive_raw = receive
        self._send_raw = send
        self._sending = asyncio.Lock()
        self._calls: dict[str, _Call] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # of calls, their last frame included
        self._unreadable = 0
        self._leaving = self.connection.going  # set: no more calls are taken, and when the last has ended, so has this
        self._farewell = _Fault(1001, "the server is shutting down")

    async def run(self) -> None:
        """From the upgrade to the end."""
        try:
            await self._send_raw({"type": "websocket.accept"})
            await self._open()
            await self._serve()
        except _Fault as fault:
            await self._close(fault)
        except _Gone:
            pass
        except Exception:
            await self._close(_Fault(1011, "the server failed"))
            raise
        finally:
            await self._end_calls()

    async def _close(self, fault: _Fault) -> None:
        await self._end_calls()
        self.metrics.websocket_closes.labels(str(fault.code)).inc()
        with contextlib.suppress(_Gone):
            await self._write({"type": "websocket.close", "code": fault.code, "reason": fault.reason})

    # The key.

    async def _open(self) -> None:
        """Until calls are taken. Raises _Fault and _Gone."""
        if self.identity is None:
            await self._send(AuthRequired())
            self.identity = await self._ask()
        if self.serving.identify is not None:
            await self._send(AuthSuccess(tenant_id=self.identity.tenant.id))
        self.connection.admit()
        await self._send(Connected(status="connected", version=version("dfastllm"), tenant_id=self.identity.tenant.id))

    async def _ask(self) -> Identity:
        """Who proves to be there. One try: who guesses has to connect for each guess."""
        text = await self._first()
        try:
            frame = validated(AuthFrame, read_json(text.encode(), self.serving.settings.max_body_values, "frame"))
        except DFastLLMError:  # not told further: it may name what was sent, a key
            raise await self._denied('The first frame must be {"type": "auth", "api_key": KEY}.') from None
        self.credential = frame.api_key
        try:
            return await self._prove()
        except DFastLLMError as error:
            raise await self._denied(error.message) from None

    async def _first(self) -> str:
        """The first message, which has its time, and less where the server stops."""
        limit = self.serving.settings.websocket_auth_timeout
        message, leaving = asyncio.create_task(self._receive()), asyncio.create_task(self._leaving.wait())
        try:
            await asyncio.wait((message, leaving), timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if message.done():
                return message.result()
            if leaving.done():
                raise self._farewell
            raise await self._denied(f"No key came within {limit:g} s.")
        finally:
            await _dropped(message, leaving)

    async def _denied(self, why: str) -> _Fault:
        await self._send(AuthFailed(error=why))
        return _Fault(1008, "no key was taken")

    async def _prove(self) -> Identity:
        """Whose the key is, now: it may have been disabled or have expired since. Raises AuthenticationError."""
        if self.serving.identify is None:
            return ANYONE
        assert self.credential is not None
        return await self.serving.identify(self.credential)

    # Calls.

    async def _serve(self) -> None:
        """Until the client goes (_Gone), breaks a rule (_Fault), or the server lets it go and the calls have ended
        (_Fault)."""
        reading = asyncio.create_task(self._read())
        leaving = asyncio.create_task(self._leaving.wait())
        try:
            await asyncio.wait((reading, leaving), return_when=asyncio.FIRST_COMPLETED)
            while self._tasks and not reading.done():
                await asyncio.wait((reading, *self._tasks), return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                reading.result()
            raise self._farewell
        finally:
            await _dropped(reading, leaving)

    async def _read(self) -> None:
        values = self.serving.settings.max_body_values
        while True:
            text = await self._receive()
            arrived = time.monotonic()
            data = text.encode()
            try:
                incoming = read_call(data, values) if len(data) <= SHORT else await self._read_long(data, values)
                self._check(incoming)
            except Refused as refused:
                await self._refuse(refused)
            else:
                self._start(incoming, arrived)
            await asyncio.sleep(0)  # a client may send thousands of frames in one piece: others have their turn between

    async def _read_long(self, data: bytes, values: int) -> Incoming:
        """A long frame, on a thread. Where too many wait for one this connection waits too: a refusal could not say
        which call it is of."""
        while True:
            with contextlib.suppress(QueueFullError):
                return await self.serving.readers.run(len(data), read_call, data, values)
            await asyncio.sleep(PAUSE)

    def _check(self, incoming: Incoming) -> None:
        """Whether the call may begin. Raises Refused."""
        frame = incoming.frame
        if frame.id in self._calls:
            raise Refused(None, ValidationError(f"A call with the id {frame.id!r} is running.", param="id"))
        assert self.identity is not None
        if frame.tenant_id not in (None, self.identity.tenant.id):
            other = f"This connection is of the tenant {self.identity.tenant.id!r}."
            hint = "The tenant comes from the key; leave tenant_id out."
            raise Refused(frame.id, ForbiddenError(other, param="tenant_id", hint=hint))
        if self._leaving.is_set() and incoming.function.name != "cancel":
            raise Refused(frame.id, NotReadyError(f"The connection ends: {self._farewell.reason}."))
        most = self.serving.settings.websocket_calls
        if len(self._tasks) >= most and incoming.function.name != "cancel":
            raise Refused(frame.id, RateLimitError(f"{most} calls run on this connection, its most.", param="id"))
        if len(self._tasks) >= 2 * most:
            raise Refused(frame.id, RateLimitError(f"{len(self._tasks)} calls run on this connection.", param="id"))

    async def _refuse(self, refused: Refused) -> None:
        self.metrics.websocket_calls.labels("none", "error").inc()
        id = None if refused.id in self._calls else refused.id
        await self._send(ErrorReply(id=id, status="error", error=error_info(refused.error, refused.code)))
        if id is None:
            self._unreadable += 1
            if self._unreadable > UNREADABLE:
                raise _Fault(1008, "too many frames that are no call")

    def _start(self, incoming: Incoming, arrived: float) -> None:
        task = asyncio.create_task(self._run(incoming, arrived))
        self._calls[incoming.frame.id] = _Call(task)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, incoming: Incoming, arrived: float) -> None:
        """One call, to its last frame."""
        id, name = incoming.frame.id, incoming.function.name
        call = self._calls[id]
        last: Out
        try:
            last = await self._answer(incoming, arrived)
        except CancelledError:
            last = CancelledReply(id=id, status="cancelled")
        except DFastLLMError as error:
            last = ErrorReply(id=id, status="error", error=error_info(error))
        except asyncio.CancelledError:
            if not call.cancelled:
                self.metrics.websocket_call(name, "disconnected", time.monotonic() - arrived)
                raise
            last = CancelledReply(id=id, status="cancelled")
        except _Gone:
            self.metrics.websocket_call(name, "disconnected", time.monotonic() - arrived)
            return
        except Exception:
            log.exception("a call of %s over /ws failed", name)
            failure = GenerationError("The server failed on this call.", hint="Its log says why.")
            last = ErrorReply(id=id, status="error", error=error_info(failure))
        finally:
            if self._calls.get(id) is call:
                del self._calls[id]  # before its last frame: who has read that may use the id again
        self.metrics.websocket_call(name, cast(Any, last).status, time.monotonic() - arrived)
        with contextlib.suppress(_Gone):
            await self._send(last)

    async def _answer(self, incoming: Incoming, arrived: float) -> Out:
        id, function = incoming.frame.id, incoming.function
        try:
            self.identity = identity = await self._prove()
        except AuthenticationError:
            self._farewell = _Fault(1008, "the key is no longer taken")
            self._leaving.set()
            raise
        if function.scope is not None:
            identity.require(function.scope)

        async def tell(data: Any, pad: bool) -> None:
            await self._send(StreamingReply(id=id, status="streaming", data=data), pad)

        asked = Asked(self.serving, identity, uuid.uuid4().hex, arrived, tell, self._cancel)
        data: Any = await function.run(asked, incoming.params)
        return CompleteReply(id=id, status="complete", data=data)

    async def _cancel(self, id: str) -> None:
        """End a call by its id. Raises RequestNotFoundError."""
        call = self._calls.get(id)
        if call is None or call.task is asyncio.current_task():
            raise RequestNotFoundError(f"No call {id!r} is running on this connection.", param="id")
        call.cancelled = True
        call.task.cancel()
        await asyncio.wait((call.task,))

    async def _end_calls(self) -> None:
        await _dropped(*self._tasks)

    # Messages.

    async def _receive(self) -> str:
        """The next text. Raises _Gone, and _Fault for a binary message."""
        message = await self._receive_raw()
        if message["type"] == "websocket.disconnect":
            raise _Gone
        self.metrics.websocket_frames.labels("received").inc()
        text: str | None = message.get("text")
        if text is None:
            raise _Fault(1003, "frames are text")
        return text

    async def _send(self, frame: Out, pad: bool = False) -> None:
        """Raises _Gone. Waits while the client does not read on; frames leave in the order in which they began to."""
        text = dump(frame)
        async with self._sending:
            await self._write({"type": "websocket.send", "text": padded(text) if pad else text})
        self.metrics.websocket_frames.labels("sent").inc()

    async def _write(self, message: dict[str, Any]) -> None:
        try:
            await self._send_raw(message)
        except OSError:
            raise _Gone from None


async def _dropped(*tasks: asyncio.Task[Any]) -> None:
    """Once tasks that nobody waits for any more have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
