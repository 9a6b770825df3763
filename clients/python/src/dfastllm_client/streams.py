"""An answer as it grows: an async iterator of its pieces that knows, at any moment, what has come."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

from .errors import ClientError, Received
from .results import GenerationResult, PipelineEvent, PipelineResult, TokenData

__all__ = ["AsyncPipelineStream", "AsyncStream", "AsyncTokenStream", "End"]

Piece = TypeVar("Piece", bound=TokenData | PipelineEvent)
Result = TypeVar("Result", bound=GenerationResult | PipelineResult)


@dataclass(frozen=True)
class End(Generic[Result]):
    """The last part of a stream: what it came to."""

    result: Result


class AsyncStream(Generic[Piece, Result]):
    """Iterate over it; leave it early with `aclose()` (or `async with`), which ends the work on the server.

    parts: the pieces, and last their end.
    An error that ends the stream carries `received`: the text and the number of tokens that had come.
    """

    def __init__(self, parts: AsyncGenerator[Piece | End[Result], None], request_id: str) -> None:
        self._parts = parts
        self._result: Result | None = None
        self._text: list[str] = []
        self._tokens = 0
        self.request_id = request_id

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        try:
            part = await self._parts.__anext__()
        except ClientError as error:
            error.received = self.received
            raise
        if isinstance(part, End):
            self._result = part.result
            await self._parts.aclose()
            raise StopAsyncIteration
        self._text.append(part.text)
        self._tokens += part.tokens if isinstance(part, TokenData) else 0
        return part

    async def __aenter__(self) -> AsyncStream[Piece, Result]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def received(self) -> Received:
        """What has come so far."""
        return Received("".join(self._text), self._tokens, self.request_id)

    @property
    def result(self) -> Result:
        """The whole answer. Raises RuntimeError before the stream has ended."""
        if self._result is None:
            raise RuntimeError("The stream has not ended; its result is there when it has.")
        return self._result

    async def text(self) -> AsyncIterator[str]:
        """Only the texts that are not empty."""
        async for piece in self:
            if piece.text:
                yield piece.text

    async def aclose(self) -> None:
        """End the call where it stands; nothing after its end."""
        await self._parts.aclose()


AsyncTokenStream = AsyncStream[TokenData, GenerationResult]
AsyncPipelineStream = AsyncStream[PipelineEvent, PipelineResult]
