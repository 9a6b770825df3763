"""POST /v1/completions: prompts in any form, infilling by `suffix`, streaming or not."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import Response

from dfastllm.core import Finish, StepEvent
from dfastllm.errors import DFastLLMError, UnsupportedError
from dfastllm.server.canvas import canvas_chunk
from dfastllm.server.jobs import (
    Events,
    Job,
    Result,
    collect,
    engine_requests,
    first_event,
    total,
    while_connected,
)
from dfastllm.server.options import on_the_wire
from dfastllm.server.prompts import completion_prompts, encode
from dfastllm.server.replies import (
    Completion,
    CompletionChoice,
    CompletionChunk,
    Timings,
    dump,
    figures,
    padded,
    usage_out,
    usage_so_far,
)
from dfastllm.server.schemas import CompletionRequest
from dfastllm.server.serving import ServedModel, Serving
from dfastllm.server.sse import EventStream
from dfastllm.server.tokens import completion_logprobs

__all__ = ["completions"]


@dataclass(frozen=True)
class Call:
    """One request to this route, understood."""

    body: CompletionRequest
    model: ServedModel
    job: Job
    prompts: Sequence[tuple[tuple[int, ...], str]]
    choices: int  # for each prompt
    created: int = field(default_factory=lambda: int(time.time()))

    def timings(self) -> list[Timings]:
        return [request.out() for request in self.job.timings] if self.body.timings else []

    def chunk(self, choices: list[CompletionChoice], **rest: Any) -> str:
        chunk = CompletionChunk(id=self.job.id, created=self.created, model=self.model.name, choices=choices, **rest)
        return padded(dump(chunk)) if self.body.streams("include_obfuscation") else dump(chunk)

    def choice(self, index: int, text: str, result: Result | StepEvent, offset: int, **rest: Any) -> CompletionChoice:
        """Choice `index` with the tokens of `result`; `offset` is where its text begins (for the logprobs)."""
        wanted = self.body.logprobs is not None
        logprobs = completion_logprobs(self.model.tokenizer, result.logprobs, offset) if wanted else None
        if self.body.return_token_ids:
            rest["token_ids"] = list(result.token_ids)
        return CompletionChoice(index=index, text=text, logprobs=logprobs, **rest)

    def echoed(self, index: int) -> str:
        return self.prompts[index // self.choices][1] if self.body.echo else ""


async def completions(body: CompletionRequest, request: HttpRequest) -> Response:
    """Complete a prompt, or several."""
    serving: Serving = request.app.state.serving
    call = await _understand(serving, body, request.state.request_id)
    try:
        if not body.stream:
            return Response(dump(await while_connected(request, _whole(call))), media_type="application/json")
        events = await first_event(request, call.job)
    except DFastLLMError as error:
        raise on_the_wire(error, body) from None
    return EventStream(_chunks(call, events), call.job.cancel)


async def _understand(serving: Serving, body: CompletionRequest, request_id: str) -> Call:
    model = serving.model(body.model)
    if body.suffix and not model.diffuses:
        raise UnsupportedError(f"suffix (infilling) needs a diffusion model; {model.name!r} is not.", param="suffix")
    prompts = await completion_prompts(body, model)
    suffix = await encode(model, body.suffix, param="suffix") if body.suffix else ()
    id = f"cmpl-{uuid.uuid4().hex}"
    requests = engine_requests(serving, model, id, body, [ids for ids, _ in prompts], suffix)
    job = Job(serving, model.name, requests, id=id, request_id=request_id)
    return Call(body, model, job, prompts, choices=body.n or 1)


async def _whole(call: Call) -> Completion:
    ended = await collect(call.job)
    choices = []
    for index, (result, finish) in enumerate(ended):
        echo = call.echoed(index)
        rest: dict[str, Any] = {"finish_reason": finish.reason.value, "stop_reason": finish.stop}
        if call.body.return_token_ids:
            rest["prompt_token_ids"] = list(call.job.requests[index].prompt)
        choices.append(call.choice(index, echo + result.text, result, len(echo), **rest))
    usage = total([finish for _, finish in ended], call.choices)
    return Completion(
        id=call.job.id,
        created=call.created,
        model=call.model.name,
        choices=choices,
        usage=usage_out(usage),
        dfastllm=figures(usage, call.timings(), call.job.canvas_length),
    )


async def _chunks(call: Call, events: Events) -> AsyncGenerator[str]:
    body = call.body
    with_usage, with_canvas = body.streams("include_usage"), body.streams("canvas_events")
    so_far = body.streams("continuous_usage_stats")
    with_tokens = body.logprobs is not None or bool(body.return_token_ids)
    null_usage: dict[str, Any] = {"usage": None} if with_usage else {}
    requests = call.job.requests
    offsets, steps, tokens = [0] * len(requests), [0] * len(requests), [0] * len(requests)
    finishes: dict[int, Finish] = {}

    def chunk(choice: CompletionChoice) -> str:
        request = requests[choice.index]
        prompt = len(request.prompt) + len(request.suffix)
        usage = {"usage": usage_so_far(prompt, tokens[choice.index])} if so_far else null_usage
        return call.chunk([choice], **usage)

    async with aclosing(events):
        for index in range(len(requests)):
            if echo := call.echoed(index):
                offsets[index] = len(echo)
                yield chunk(CompletionChoice(index=index, text=echo, logprobs=None, finish_reason=None))
        async for index, event in events:
            tokens[index] += len(event.token_ids)
            if event.canvas is not None and with_canvas:
                steps[index] += 1
                shown = canvas_chunk(call.model.tokenizer, index, steps[index], event.canvas)
                yield call.chunk([], canvas=shown, **null_usage)
            if not event.text and event.finish is None and not (with_tokens and event.token_ids):
                continue  # its text is held back: it may become a stop string, or is half a character
            rest: dict[str, Any] = {"finish_reason": None}
            if event.finish is not None:
                finishes[index] = event.finish
                rest = {"finish_reason": event.finish.reason.value, "stop_reason": event.finish.stop}
            choice = call.choice(index, event.text, event, offsets[index], **rest)
            offsets[index] += sum(map(len, choice.logprobs.tokens)) if choice.logprobs else 0
            yield chunk(choice)
    if with_usage or body.timings:
        usage = total([finishes[index] for index in sorted(finishes)], call.choices)
        counted = {"usage": usage_out(usage)} if with_usage else {}
        yield call.chunk([], dfastllm=figures(usage, call.timings(), call.job.canvas_length), **counted)
