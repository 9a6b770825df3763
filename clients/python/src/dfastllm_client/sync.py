"""The same clients for code that is not async: every call runs on an event loop in a thread of the client's own."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

from .calls import AsyncCalls, GivenOptions
from .errors import ConnectionFailedError, Received
from .http import AsyncClient
from .results import GenerationResult, HealthStatus, PipelineEvent, PipelineResult, RuntimeMetadata, TokenData
from .streams import AsyncStream
from .websocket import AsyncWebSocketClient, Callback

__all__ = ["Client", "PipelineStream", "Stream", "TokenStream", "WebSocketClient"]

T = TypeVar("T")
Piece = TypeVar("Piece", bound=TokenData | PipelineEvent)
Result = TypeVar("Result", bound=GenerationResult | PipelineResult)


class _Loop:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="dfastllm-client", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` gives. An interrupt (Ctrl-C) cancels it, on the server too. Raises ConnectionFailedError after
        `stop`."""
        if self._loop.is_closed():
            work.close()
            raise ConnectionFailedError("This client is closed; make another. Nothing was sent.")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """End what still runs on it, and the thread."""
        if threading.current_thread() is self._thread:  # the client's last reference died in a callback
            self._loop.stop()
        elif not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(_wind_up(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


async def _wind_up() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()


class Stream(Generic[Piece, Result]):
    """An iterator of pieces. Leave it early with `close()` (or `with`), which ends the work on the server."""

    def __init__(self, loop: _Loop, stream: AsyncStream[Piece, Result]) -> None:
        self._loop = loop
        self._stream = stream

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        try:
            return self._loop.run(self._stream.__anext__())
        except StopAsyncIteration:
            raise StopIteration from None

    def __enter__(self) -> Stream[Piece, Result]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def request_id(self) -> str:
        return self._stream.request_id

    @property
    def received(self) -> Received:
        """What has come so far."""
        return self._stream.received

    @property
    def result(self) -> Result:
        """The whole answer. Raises RuntimeError before the stream has ended."""
        return self._stream.result

    def text(self) -> Iterator[str]:
        """Only the texts that are not empty."""
        return (piece.text for piece in self if piece.text)

    def close(self) -> None:
        """End the call where it stands; nothing after its end, or the client's."""
        with suppress(ConnectionFailedError):
            self._loop.run(self._stream.aclose())


TokenStream = Stream[TokenData, GenerationResult]
PipelineStream = Stream[PipelineEvent, PipelineResult]


class _Calls:
    """What `AsyncCalls` has, without await."""

    def __init__(self, client: AsyncCalls) -> None:
        self._loop = _Loop()
        self._calls = client
        self._finalizer = weakref.finalize(self, self._loop.stop)

    def generate(self, options: GivenOptions = None, **more: Any) -> GenerationResult:
        """The whole answer to a prompt, or to messages. `more` are options too, and win. Raises ClientError."""
        return self._loop.run(self._calls.generate(options, **more))

    def generate_stream(self, options: GivenOptions = None, **more: Any) -> TokenStream:
        """The answer as it grows: an iterator of TokenData."""
        return Stream(self._loop, self._calls.generate_stream(options, **more))

    def chat(self, messages: Sequence[Mapping[str, Any]], **more: Any) -> GenerationResult:
        """The answer to a conversation."""
        return self._loop.run(self._calls.chat(messages, **more))

    def chat_stream(self, messages: Sequence[Mapping[str, Any]], **more: Any) -> TokenStream:
        return Stream(self._loop, self._calls.chat_stream(messages, **more))

    def execute_pipeline(self, name: str, input: Any, *, timeout: float | None = None) -> PipelineResult:
        """Run a pipeline that the server knows, to its end."""
        return self._loop.run(self._calls.execute_pipeline(name, input, timeout=timeout))

    def stream_pipeline(self, name: str, input: Any, *, timeout: float | None = None) -> PipelineStream:
        """Run a pipeline: an iterator of what its steps do."""
        return Stream(self._loop, self._calls.stream_pipeline(name, input, timeout=timeout))

    def health(self) -> HealthStatus:
        return self._loop.run(self._calls.health())

    def metadata(self) -> RuntimeMetadata:
        return self._loop.run(self._calls.metadata())

    def cancel(self, request_id: str) -> bool:
        """End one of one's own calls. False: it does not run (any more)."""
        return self._loop.run(self._calls.cancel(request_id))


class Client(_Calls):
    """Calls over HTTP; the arguments are those of AsyncClient. `with Client(url) as client`, or close() at the end."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self._client = AsyncClient(*arguments, **named)
        super().__init__(self._client)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._finalizer.alive:
            self._loop.run(self._client.aclose())
            self._finalizer()

    def models(self) -> Sequence[Mapping[str, Any]]:
        """The models and adapters that this key may use; an adapter's `parent` is its base."""
        return self._loop.run(self._client.models())

    def load_adapter(
        self, name: str, path: str, *, model: str | None = None, replace: bool = False
    ) -> Mapping[str, Any]:
        """As AsyncClient.load_adapter."""
        return self._loop.run(self._client.load_adapter(name, path, model=model, replace=replace))

    def unload_adapter(self, name: str, *, model: str | None = None) -> None:
        """Forget an adapter; calls that run on it end as they would have."""
        self._loop.run(self._client.unload_adapter(name, model=model))

    def usage(self, **filters: Any) -> Mapping[str, Any]:
        """As AsyncClient.usage."""
        return self._loop.run(self._client.usage(**filters))

    def metrics(self) -> str:
        """Prometheus metrics, as text."""
        return self._loop.run(self._client.metrics())

    def register_pipeline(self, pipeline: Mapping[str, Any]) -> Mapping[str, Any]:
        """Register a pipeline, {name, steps: [...]}, on the running server."""
        return self._loop.run(self._client.register_pipeline(pipeline))

    def request(self, method: str, path: str, body: Mapping[str, Any] | None = None, **more: Any) -> Any:
        """Any route of the server; its JSON, None for an answer without. Raises ClientError."""
        return self._loop.run(self._client.request(method, path, body, **more))


class WebSocketClient(_Calls):
    """Calls over a WebSocket; the arguments are those of AsyncWebSocketClient. Threads may share it: their calls run at
    once. Callbacks run in the client's thread."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self._client = AsyncWebSocketClient(*arguments, **named)
        super().__init__(self._client)

    def __enter__(self) -> WebSocketClient:
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connect(self) -> None:
        """Connect and authenticate; nothing where it is connected."""
        self._loop.run(self._client.connect())

    def disconnect(self) -> None:
        """Close the connection; connect() opens another."""
        self._loop.run(self._client.disconnect())

    def close(self) -> None:
        """Close the connection for good."""
        if self._finalizer.alive:
            self.disconnect()
            self._finalizer()

    def is_connected(self) -> bool:
        return self._client.is_connected()

    def get_model(self) -> str | None:
        return self._client.get_model()

    def get_tenant_id(self) -> str | None:
        """The tenant of the key, once connected."""
        return self._client.get_tenant_id()

    def on(self, event: str, callback: Callback) -> None:
        """As AsyncWebSocketClient.on."""
        self._client.on(event, callback)

    def off(self, event: str, callback: Callback) -> None:
        self._client.off(event, callback)

    def on_error(self, callback: Callback) -> None:
        self._client.on_error(callback)
