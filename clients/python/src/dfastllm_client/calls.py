"""What both transports offer: the calls, made of two things that a transport must do."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from .errors import InvalidRequestError
from .options import GenerationOptions, generation_options, seconds
from .results import GenerationResult, HealthStatus, PipelineEvent, PipelineResult, RuntimeMetadata, TokenData
from .streams import AsyncPipelineStream, AsyncStream, AsyncTokenStream, End

__all__ = ["GRACE", "AsyncCalls", "GivenOptions"]

GivenOptions = GenerationOptions | Mapping[str, Any] | str | Sequence[int] | None
GRACE = 2.0  # seconds after a call's own time limit, in which the server's word about it comes


class AsyncCalls(ABC):
    """The calls of AsyncClient (HTTP) and AsyncWebSocketClient.

    model: what calls run on that name none.
    timeout: seconds that a call without a limit of its own may take; None: no limit.

    Raises InvalidRequestError for a limit that is none.
    """

    def __init__(self, model: str | None, timeout: float | None) -> None:
        if timeout is not None and seconds(timeout) <= 0:
            raise InvalidRequestError(f"timeout must be above 0, or None, got {timeout!r}.", param="timeout")
        self.model = model
        self.timeout = timeout

    async def generate(self, options: GivenOptions = None, **more: Any) -> GenerationResult:
        """The whole answer to a prompt, or to messages. `more` are options too, and win.

        Raises ClientError: its subclasses say which. A call that was sent is never sent again; one that was refused
        (429, 503), or could not be sent, is.
        """
        chosen = generation_options(options, more, self.model)
        return await self._whole(chosen, _request_id(), self._deadline(chosen))

    def generate_stream(self, options: GivenOptions = None, **more: Any) -> AsyncTokenStream:
        """The answer as it grows: an async iterator of TokenData."""
        chosen = generation_options(options, more, self.model)
        name = _request_id()
        return AsyncStream(self._parts(chosen, name, self._deadline(chosen)), name)

    async def chat(self, messages: Sequence[Mapping[str, Any]], **more: Any) -> GenerationResult:
        """The answer to a conversation."""
        return await self.generate(messages=messages, **more)

    def chat_stream(self, messages: Sequence[Mapping[str, Any]], **more: Any) -> AsyncTokenStream:
        return self.generate_stream(messages=messages, **more)

    async def execute_pipeline(self, name: str, input: Any, *, timeout: float | None = None) -> PipelineResult:
        """Run a pipeline that the server knows, to its end."""
        stream = self.stream_pipeline(name, input, timeout=timeout)
        async for _ in stream:
            pass
        return stream.result

    def stream_pipeline(self, name: str, input: Any, *, timeout: float | None = None) -> AsyncPipelineStream:
        """Run a pipeline: an async iterator of what its steps do."""
        id = _request_id()
        return AsyncStream(self._steps(name, input, id, self.timeout if timeout is None else timeout), id)

    @abstractmethod
    async def health(self) -> HealthStatus: ...

    @abstractmethod
    async def metadata(self) -> RuntimeMetadata: ...

    @abstractmethod
    async def cancel(self, request_id: str) -> bool:
        """End one of one's own calls, by the `request_id` of its stream or answer. False: it does not run."""

    @abstractmethod
    async def _whole(self, options: GenerationOptions, id: str, limit: float | None) -> GenerationResult: ...

    @abstractmethod
    def _parts(
        self, options: GenerationOptions, id: str, limit: float | None
    ) -> AsyncGenerator[TokenData | End[GenerationResult], None]:
        """The pieces of a stream, and last its result. Closing it early ends the work on the server."""

    @abstractmethod
    def _steps(
        self, name: str, input: Any, id: str, limit: float | None
    ) -> AsyncGenerator[PipelineEvent | End[PipelineResult], None]: ...

    def _deadline(self, options: GenerationOptions) -> float | None:
        """Seconds until this client itself gives up: some time after the server should have."""
        return self.timeout if options.timeout is None else options.timeout + GRACE


def _request_id() -> str:
    return f"c-{uuid.uuid4().hex}"
