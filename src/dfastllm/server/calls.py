"""What completions and chats do alike with a call that was understood: its whole answer or its stream, what it took.

Knows no transport: HTTP answers by `answer`, the WebSocket by `whole` and `chunks`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Any, ClassVar, Generic, TypeVar

from fastapi import Request as HttpRequest
from fastapi.responses import Response

from dfastllm.core import StepEvent, Usage
from dfastllm.errors import DFastLLMError
from dfastllm.server.canvas import canvas_chunk
from dfastllm.server.jobs import Events, Job, first_event, total, while_connected
from dfastllm.server.options import on_the_wire
from dfastllm.server.replies import ChatChunk, CompletionChunk, Out, dump, figures, padded, usage_out
from dfastllm.server.schemas import GenerationRequest
from dfastllm.server.serving import ServedModel
from dfastllm.server.sse import EventStream

__all__ = ["Call", "Chunk"]

Body = TypeVar("Body", bound=GenerationRequest)
Chunk = ChatChunk | CompletionChunk


class Call(ABC, Generic[Body]):
    """One request to a generating route, understood. choices: answers to each prompt."""

    chunk_type: ClassVar[type[Chunk]]

    def __init__(self, body: Body, model: ServedModel, job: Job, choices: int) -> None:
        self.body = body
        self.model = model
        self.job = job
        self.choices = choices
        self.named: dict[str, Any] = {"id": job.id, "created": int(time.time()), "model": body.model or model.name}
        self._null_usage: dict[str, Any] = {"usage": None} if body.streams("include_usage") else {}
        self._usage_so_far = body.streams("continuous_usage_stats")
        self._pad = body.streams("include_obfuscation")

    @abstractmethod
    async def whole(self) -> Out:
        """The answer when all of it is there."""

    @abstractmethod
    def opening(self, index: int) -> Iterable[Chunk]:
        """Chunks that tell of the first token of engine request `index`, before what it brings. Not one comes earlier:
        clients take their time to first token from it."""

    @abstractmethod
    def deltas(self, index: int, event: StepEvent) -> Iterable[Chunk]:
        """Chunks of what an event of engine request `index` brings, its end included."""

    async def answer(self, http: HttpRequest) -> Response:
        """The response. Raises what ended the job, in the words of the body, unless the stream has begun."""
        try:
            if not self.body.stream:
                return Response(dump(await while_connected(http, self.whole())), media_type="application/json")
            events = await first_event(http, self.job)
        except DFastLLMError as error:
            raise on_the_wire(error, self.body) from None
        return EventStream(self._texts(events), self.job.cancel)

    async def _texts(self, events: Events) -> AsyncGenerator[str]:
        async with aclosing(self.chunks(events)) as chunks:
            async for chunk in chunks:
                yield self.written(chunk)

    def written(self, out: Out) -> str:
        """A part of the stream as JSON, filled up where that was asked for."""
        text = dump(out)
        return padded(text) if self._pad else text

    def took(self, usages: Sequence[Usage]) -> dict[str, Any]:
        """`usage` and `dfastllm` of the call. usages: of the engine requests, in order."""
        usage = total(usages, self.choices)
        timings = [request.out() for request in self.job.timings] if self.body.timings else []
        counted = usage_out(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
        return {"usage": counted, "dfastllm": figures(usage, timings, self.job.canvas_length)}

    def token_ids(self, tokens: Sequence[int]) -> dict[str, Any]:
        """`token_ids` of a choice, where they were asked for."""
        return {"token_ids": list(tokens)} if self.body.return_token_ids else {}

    def chunk(self, choice: Any, tokens: int) -> Chunk:
        """A chunk with one choice, of which `tokens` tokens have come."""
        request = self.job.requests[choice.index]
        usage = self._null_usage
        if self._usage_so_far:
            usage = {"usage": usage_out(len(request.prompt) + len(request.suffix), tokens)}
        return self._made([choice], usage)

    def _made(self, choices: list[Any], rest: dict[str, Any]) -> Chunk:
        return self.chunk_type(**self.named, choices=choices, **rest)

    async def chunks(self, events: Events) -> AsyncGenerator[Chunk]:
        """The stream: what the events of the job bring, as they come. Closes the events."""
        with_canvas = self.body.streams("canvas_events")
        steps = [0] * len(self.job.requests)
        begun: set[int] = set()
        usages: dict[int, Usage] = {}
        async with aclosing(events):
            async for index, event in events:
                if event.canvas is not None and with_canvas:
                    steps[index] += 1
                    shown = canvas_chunk(self.model.tokenizer, index, steps[index], event.canvas)
                    yield self._made([], {"canvas": shown, **self._null_usage})
                if index not in begun and (event.token_ids or event.finish is not None):
                    begun.add(index)
                    for chunk in self.opening(index):
                        yield chunk
                for chunk in self.deltas(index, event):
                    yield chunk
                if event.finish is not None:
                    usages[index] = event.finish.usage
        if self.body.streams("include_usage") or self.body.timings:
            took = self.took([usages[index] for index in sorted(usages)])
            if not self.body.streams("include_usage"):
                del took["usage"]
            yield self._made([], took)
