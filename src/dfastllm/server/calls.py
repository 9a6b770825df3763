"""What the two generating routes do alike with a call they understood: its whole answer or its stream, what it took."""

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

__all__ = ["Call"]

Body = TypeVar("Body", bound=GenerationRequest)


class Call(ABC, Generic[Body]):
    """One request to a generating route, understood. choices: answers to each prompt."""

    chunk_type: ClassVar[type[ChatChunk | CompletionChunk]]

    def __init__(self, body: Body, model: ServedModel, job: Job, choices: int) -> None:
        self.body = body
        self.model = model
        self.job = job
        self.choices = choices
        self.named: dict[str, Any] = {"id": job.id, "created": int(time.time()), "model": model.name}
        self._null_usage: dict[str, Any] = {"usage": None} if body.streams("include_usage") else {}
        self._usage_so_far = body.streams("continuous_usage_stats")
        self._pad = body.streams("include_obfuscation")

    @abstractmethod
    async def whole(self) -> Out:
        """The answer when all of it is there."""

    @abstractmethod
    def opening(self, index: int) -> Iterable[str]:
        """Chunks that tell of the first token of engine request `index`, before what it brings. Not one comes earlier:
        clients take their time to first token from it."""

    @abstractmethod
    def deltas(self, index: int, event: StepEvent) -> Iterable[str]:
        """Chunks of what an event of engine request `index` brings, its end included."""

    async def answer(self, http: HttpRequest) -> Response:
        """The response. Raises what ended the job, in the words of the body, unless the stream has begun."""
        try:
            if not self.body.stream:
                return Response(dump(await while_connected(http, self.whole())), media_type="application/json")
            events = await first_event(http, self.job)
        except DFastLLMError as error:
            raise on_the_wire(error, self.body) from None
        return EventStream(self._chunks(events), self.job.cancel)

    def took(self, usages: Sequence[Usage]) -> dict[str, Any]:
        """`usage` and `dfastllm` of the call. usages: of the engine requests, in order."""
        usage = total(usages, self.choices)
        timings = [request.out() for request in self.job.timings] if self.body.timings else []
        counted = usage_out(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
        return {"usage": counted, "dfastllm": figures(usage, timings, self.job.canvas_length)}

    def token_ids(self, tokens: Sequence[int]) -> dict[str, Any]:
        """`token_ids` of a choice, where they were asked for."""
        return {"token_ids": list(tokens)} if self.body.return_token_ids else {}

    def chunk(self, choice: Any, tokens: int) -> str:
        """A chunk with one choice, of which `tokens` tokens have come."""
        request = self.job.requests[choice.index]
        usage = self._null_usage
        if self._usage_so_far:
            usage = {"usage": usage_out(len(request.prompt) + len(request.suffix), tokens)}
        return self._dump([choice], usage)

    def _dump(self, choices: list[Any], rest: dict[str, Any]) -> str:
        text = dump(self.chunk_type(**self.named, choices=choices, **rest))
        return padded(text) if self._pad else text

    async def _chunks(self, events: Events) -> AsyncGenerator[str]:
        with_canvas = self.body.streams("canvas_events")
        steps = [0] * len(self.job.requests)
        begun: set[int] = set()
        usages: dict[int, Usage] = {}
        async with aclosing(events):
            async for index, event in events:
                if event.canvas is not None and with_canvas:
                    steps[index] += 1
                    shown = canvas_chunk(self.model.tokenizer, index, steps[index], event.canvas)
                    yield self._dump([], {"canvas": shown, **self._null_usage})
                if index not in begun and (event.token_ids or event.finish is not None):
                    begun.add(index)
                    for text in self.opening(index):
                        yield text
                for text in self.deltas(index, event):
                    yield text
                if event.finish is not None:
                    usages[index] = event.finish.usage
        if self.body.streams("include_usage") or self.body.timings:
            took = self.took([usages[index] for index in sorted(usages)])
            if not self.body.streams("include_usage"):
                del took["usage"]
            yield self._dump([], took)
