"""The client over a WebSocket: many calls at once on one connection, which comes back by itself when it breaks.

What a broken connection means for a call: one that was not sent yet is sent on the next connection; one that was sent
ends with ConnectionLostError, whose `received` holds what had come, because the server may have run and billed it.
`health`, `metadata` and `cancel` cost nothing and are asked again.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any

from .backoff import Backoff
from .calls import AsyncCalls
from .deadline import again, limited, within
from .errors import (
    ClientError,
    ConnectionFailedError,
    ConnectionLostError,
    NotFoundError,
    PermissionDeniedError,
    of_frame,
)
from .link import Exchange, Frame, Link, address
from .options import GenerationOptions, http_body
from .reading import AnswerReader, PipelineReader, health, metadata
from .results import GenerationResult, HealthStatus, PipelineEvent, PipelineResult, RuntimeMetadata, TokenData
from .streams import End

__all__ = ["EVENTS", "AsyncWebSocketClient"]

EVENTS = ("connected", "disconnected", "reconnecting", "error")
Callback = Callable[[Any], object]

log = logging.getLogger("dfastllm_client")


class AsyncWebSocketClient(AsyncCalls):
    """Calls over a WebSocket. `async with AsyncWebSocketClient(url) as client`, or connect and disconnect.

    url: of the server, ws:// or http://; /ws is added where it has no path.
    api_key: sent in the opening exchange.
    model: what calls run on that name none.
    tenant_id: a tenant follows from its key; one that is given must be the key's, or connecting fails.
    reconnect: come back by itself when the connection breaks, and connect for a call that finds none.
    reconnect_interval: seconds, the `first` of the backoff (Realm's name).
    timeout: seconds that a call without a limit of its own may take; None: no limit.
    connect_timeout: seconds to connect and authenticate in.
    """

    def __init__(
        self,
        url: str = "ws://127.0.0.1:8000/ws",
        api_key: str | None = None,
        model: str | None = None,
        tenant_id: str | None = None,
        reconnect: bool = True,
        reconnect_interval: float | None = None,
        timeout: float | None = 300.0,
        *,
        connect_timeout: float = 10.0,
        backoff: Backoff | None = None,
    ) -> None:
        super().__init__(model, timeout)
        self.url = address(url)
        self.api_key = api_key
        self.tenant_id = tenant_id
        self.reconnect = reconnect
        self.connect_timeout = connect_timeout
        self.backoff = backoff or Backoff(first=0.25 if reconnect_interval is None else reconnect_interval)
        self._link: Link | None = None
        self._opening = asyncio.Lock()
        self._closed = False
        self._numbers = itertools.count()
        self._reader: asyncio.Task[None] | None = None
        self._returning: asyncio.Task[None] | None = None
        self._callbacks: dict[str, list[Callback]] = {event: [] for event in EVENTS}

    async def __aenter__(self) -> AsyncWebSocketClient:
        await self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.disconnect()

    async def connect(self) -> None:
        """Connect and authenticate; nothing where it is connected. Raises ConnectionFailedError after the backoff's
        attempts, AuthenticationError at once."""
        self._closed = False
        await again(self._open, self.backoff)

    async def disconnect(self) -> None:
        """Close the connection. Calls that run end with ConnectionLostError."""
        self._closed = True
        if self._returning is not None:
            self._returning.cancel()
        async with self._opening:
            link, self._link = self._link, None
        if link is not None:
            await link.close()
        tasks = [task for task in (self._reader, self._returning) if task not in (None, asyncio.current_task())]
        await asyncio.gather(*filter(None, tasks), return_exceptions=True)

    aclose = disconnect

    def is_connected(self) -> bool:
        return self._link is not None and self._link.is_open

    def get_model(self) -> str | None:
        return self.model

    def get_tenant_id(self) -> str | None:
        """The tenant of the key, once connected."""
        return self._link.tenant_id if self._link is not None else self.tenant_id

    def on(self, event: str, callback: Callback) -> None:
        """Call `callback` at each "connected" (with the tenant), "disconnected" (with why), "reconnecting" or "error"
        (with the ClientError). Raises ValueError for another event."""
        self._listeners(event).append(callback)

    def off(self, event: str, callback: Callback) -> None:
        if callback in self._listeners(event):
            self._listeners(event).remove(callback)

    def on_error(self, callback: Callback) -> None:
        """Call `callback` with each error that belongs to no call."""
        self.on("error", callback)

    async def health(self) -> HealthStatus:
        return health(await self._ask("health", {}))

    async def metadata(self) -> RuntimeMetadata:
        return metadata(await self._ask("metadata", {}))

    async def cancel(self, request_id: str) -> bool:
        try:
            return bool((await self._ask("cancel", {"id": request_id}))["cancelled"])
        except NotFoundError:
            return False

    def _listeners(self, event: str) -> list[Callback]:
        if event not in self._callbacks:
            raise ValueError(f"There is no event {event!r}; there are {', '.join(EVENTS)}.")
        return self._callbacks[event]

    def _emit(self, event: str, data: Any = None) -> None:
        for callback in list(self._callbacks[event]):
            try:
                callback(data)
            except Exception:
                log.exception("a callback of %r failed", event)

    async def _open(self) -> Link:
        """The connection, opened where there is none. Raises ConnectionFailedError after one try."""
        async with self._opening:
            if self._link is not None and self._link.is_open:
                return self._link
            link = await Link.open(self.url, self.api_key, self.connect_timeout)
            if self.tenant_id not in (None, link.tenant_id):
                await link.close()
                raise PermissionDeniedError(
                    f"The key is of the tenant {link.tenant_id!r}, not of {self.tenant_id!r}.", param="tenant_id"
                )
            self._link = link
            self._reader = asyncio.get_running_loop().create_task(self._attend(link))
            self._emit("connected", link.tenant_id)
            return link

    async def _attend(self, link: Link) -> None:
        """Read a connection to its end, and then come back where that is wanted."""
        await link.read(lambda frame: self._emit("error", of_frame(frame.get("error") or {}, None)))
        self._emit("disconnected", link.why)
        if self.reconnect and not self._closed:
            self._returning = asyncio.get_running_loop().create_task(self._return())

    async def _return(self) -> None:
        self._emit("reconnecting")
        try:
            await again(self._open, self.backoff)
        except ClientError as error:
            self._emit("error", error)

    async def _ready(self, id: str) -> Link:
        if self._link is not None and self._link.is_open:
            return self._link
        if self._closed or not self.reconnect:
            raise ConnectionFailedError("There is no connection; connect() makes one. Nothing was sent.", request_id=id)
        return await self._open()

    async def _begin(self, function: str, params: Frame, id: str, repeat: bool) -> tuple[Exchange, Frame]:
        """Send a call and wait for its first frame. Raises ConnectionFailedError where it was not sent, or (repeat)
        where that makes no difference."""
        exchange = (await self._ready(id)).begin(id)
        call = {"id": id, "function": function, "params": params}
        try:
            await exchange.send(call if self.tenant_id is None else {**call, "tenant_id": self.tenant_id})
            return exchange, await exchange.next()
        except ConnectionLostError as error:
            exchange.close()
            if repeat:
                raise ConnectionFailedError(error.message, request_id=id) from error
            raise
        except BaseException:
            exchange.close()
            raise

    async def _frames(
        self, function: str, params: Frame, id: str, limit: float | None, repeat: bool = False
    ) -> AsyncGenerator[Frame, None]:
        """The frames of a call, `complete` last. Closing it early cancels the call on the server."""
        reconnect = self.reconnect and not self._closed
        begin = partial(self._begin, function, params, id, repeat)
        exchange, frame = await again(begin, self.backoff, limit, connect=reconnect)
        try:
            while frame["status"] == "streaming":
                yield frame
                frame = await exchange.next()
            yield frame
        finally:
            exchange.close()

    async def _last(self, frames: AsyncGenerator[Frame, None], limit: float | None, id: str) -> Mapping[str, Any]:
        """The data of the `complete` frame."""

        async def reading() -> Mapping[str, Any]:
            last: Frame = {}
            async for frame in frames:
                last = frame
            return last.get("data") or {}

        return await within(reading(), limit, id)

    async def _ask(self, function: str, params: Frame) -> Mapping[str, Any]:
        """The data of a call that costs nothing."""
        id = f"{function}-{next(self._numbers)}"
        return await self._last(self._frames(function, params, id, self.timeout, repeat=True), self.timeout, id)

    async def _whole(self, options: GenerationOptions, id: str, limit: float | None) -> GenerationResult:
        _, params = http_body(options, stream=False)
        return AnswerReader(id).complete(await self._last(self._frames("generate", params, id, limit), limit, id))

    def _parts(
        self, options: GenerationOptions, id: str, limit: float | None
    ) -> AsyncGenerator[TokenData | End[GenerationResult], None]:
        return limited(self._tokens(options, id, limit), limit, id)

    async def _tokens(
        self, options: GenerationOptions, id: str, limit: float | None
    ) -> AsyncGenerator[TokenData | End[GenerationResult], None]:
        _, params = http_body(options, stream=True)
        reader = AnswerReader(id)
        async with aclosing(self._frames("generate", params, id, limit)) as frames:
            async for frame in frames:
                ends = frame["status"] == "complete"
                yield End(reader.complete(frame["data"])) if ends else reader.frame(frame["data"])

    def _steps(
        self, name: str, input: Any, id: str, limit: float | None
    ) -> AsyncGenerator[PipelineEvent | End[PipelineResult], None]:
        return limited(self._pipeline(name, input, id, limit), limit, id)

    async def _pipeline(
        self, name: str, input: Any, id: str, limit: float | None
    ) -> AsyncGenerator[PipelineEvent | End[PipelineResult], None]:
        reader = PipelineReader(id)
        call = {"name": name, "input": input, "stream": True}
        async with aclosing(self._frames("pipeline", call, id, limit)) as frames:
            async for frame in frames:
                ends = frame["status"] == "complete"
                yield End(reader.ended(frame["data"])) if ends else reader.event(frame["data"])
