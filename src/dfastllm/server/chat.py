"""POST /v1/chat/completions: conversations by the chat template, tool calls parsed back out of the text."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi import Request as HttpRequest
from fastapi.responses import Response

from dfastllm.core import Finish, StepEvent
from dfastllm.errors import DFastLLMError
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
from dfastllm.server.prompts import chat_ids
from dfastllm.server.replies import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    Delta,
    FunctionCall,
    Timings,
    ToolCallOut,
    dump,
    figures,
    padded,
    usage_out,
    usage_so_far,
)
from dfastllm.server.schemas import ChatRequest
from dfastllm.server.serving import ServedModel, Serving
from dfastllm.server.sse import EventStream
from dfastllm.server.tokens import chat_logprobs
from dfastllm.text import ToolCall, ToolCallParser

__all__ = ["chat_completions"]


@dataclass(frozen=True)
class Call:
    """One request to this route, understood. `tools`: the text is searched for calls."""

    body: ChatRequest
    model: ServedModel
    job: Job
    tools: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def timings(self) -> list[Timings]:
        return [request.out() for request in self.job.timings] if self.body.timings else []

    def logprobs(self, result: Result | StepEvent) -> ChatLogprobs | None:
        return chat_logprobs(self.model.tokenizer, result.logprobs) if self.body.logprobs else None

    def token_ids(self, result: Result | StepEvent) -> dict[str, Any]:
        return {"token_ids": list(result.token_ids)} if self.body.return_token_ids else {}

    def chunk(self, choices: list[ChatChunkChoice], **rest: Any) -> str:
        chunk = ChatChunk(id=self.job.id, created=self.created, model=self.model.name, choices=choices, **rest)
        return padded(dump(chunk)) if self.body.streams("include_obfuscation") else dump(chunk)


async def chat_completions(body: ChatRequest, request: HttpRequest) -> Response:
    """Answer a conversation."""
    serving: Serving = request.app.state.serving
    call = await _understand(serving, body, request.state.request_id)
    try:
        if not body.stream:
            return Response(dump(await while_connected(request, _whole(call))), media_type="application/json")
        events = await first_event(request, call.job)
    except DFastLLMError as error:
        raise on_the_wire(error, body) from None
    return EventStream(_chunks(call, events), call.job.cancel)


async def _understand(serving: Serving, body: ChatRequest, request_id: str) -> Call:
    model = serving.model(body.model)
    # With tool_choice none the template does not show the tools, so there is nothing to call.
    tools = body.tools if body.tools and body.tool_choice != "none" else None
    ids = await chat_ids(model, body, body.messages, tools)
    id = f"chatcmpl-{uuid.uuid4().hex}"
    requests = engine_requests(serving, model, id, body, [ids])
    names = {tool.function.name for tool in tools or ()}
    job = Job(serving, model.name, requests, id=id, request_id=request_id, tools=names)
    return Call(body, model, job, tools is not None)


async def _whole(call: Call) -> ChatCompletion:
    answers = [_Answer(call, index) for index in range(len(call.job.requests))]
    ended = await collect(call.job, lambda index, event: answers[index].see(event))
    choices = []
    for answer, (result, finish) in zip(answers, ended, strict=True):
        message = ChatMessage(role="assistant", content=answer.content)
        if answer.calls:
            calls = [_call_out(call) for call in answer.calls]
            message = ChatMessage(role="assistant", content=answer.content or None, tool_calls=calls)
        choices.append(
            ChatChoice(
                index=answer.index,
                message=message,
                logprobs=call.logprobs(result),
                finish_reason=answer.finish_word(finish),
                stop_reason=finish.stop,
                **call.token_ids(result),
            )
        )
    usage = total([finish for _, finish in ended], len(ended))
    rest: dict[str, Any] = {}
    if call.body.return_token_ids:
        rest["prompt_token_ids"] = list(call.job.requests[0].prompt)
    return ChatCompletion(
        id=call.job.id,
        created=call.created,
        model=call.model.name,
        choices=choices,
        usage=usage_out(usage),
        dfastllm=figures(usage, call.timings(), call.job.canvas_length),
        **rest,
    )


def _call_out(call: ToolCall, **index: Any) -> ToolCallOut:
    function = FunctionCall(name=call.name, arguments=call.arguments)
    return ToolCallOut(id=f"call_{uuid.uuid4().hex[:24]}", function=function, **index)


class _Answer:
    """One choice as it grows: its content and its calls, its tokens and its denoising steps."""

    def __init__(self, call: Call, index: int) -> None:
        self.call = call
        self.index = index
        self.parser = ToolCallParser() if call.tools else None
        self.content = ""
        self.calls: list[ToolCall] = []
        self.sent = 0  # calls that became deltas
        self.tokens = 0
        self.steps = 0

    def see(self, event: StepEvent) -> list[str | ToolCall]:
        """What became certain with this event: content, and whole calls. Where one call is all that was asked for, it
        ends the answer."""
        self.tokens += len(event.token_ids)
        self.steps += event.canvas is not None
        return list(self._take(self._pieces(event)))

    def _pieces(self, event: StepEvent) -> list[str | ToolCall]:
        if self.parser is None:
            return [event.text] if event.text else []
        pieces = self.parser.push(event.text)
        return pieces + self.parser.flush() if event.finish is not None else pieces

    def _take(self, pieces: list[str | ToolCall]) -> Iterator[str | ToolCall]:
        one = self.call.body.parallel_tool_calls is False
        for piece in pieces:
            if one and self.calls:
                return
            if isinstance(piece, str):
                self.content += piece
            else:
                self.calls.append(piece)
                if one:
                    self.call.job.enough(self.index, self.tokens)
            yield piece

    def delta(self, piece: str | ToolCall) -> Delta:
        """A piece that `see` just gave, for a stream."""
        if isinstance(piece, str):
            return Delta(content=piece)
        self.sent += 1
        return Delta(tool_calls=[_call_out(piece, index=self.sent - 1)])

    def finish_word(self, finish: Finish) -> Literal["stop", "length", "tool_calls"]:
        if finish.reason.value == "length":
            return "length"
        return "tool_calls" if self.calls else "stop"


async def _chunks(call: Call, events: Events) -> AsyncGenerator[str]:
    body = call.body
    with_usage, with_canvas = body.streams("include_usage"), body.streams("canvas_events")
    so_far = body.streams("continuous_usage_stats")
    with_tokens = bool(body.logprobs or body.return_token_ids)
    null_usage: dict[str, Any] = {"usage": None} if with_usage else {}
    prompt = len(call.job.requests[0].prompt)
    answers = [_Answer(call, index) for index in range(len(call.job.requests))]
    finishes: dict[int, Finish] = {}

    def chunk(answer: _Answer, delta: Delta, **rest: Any) -> str:
        usage = {"usage": usage_so_far(prompt, answer.tokens)} if so_far else null_usage
        choice = ChatChunkChoice(index=answer.index, delta=delta, **{"finish_reason": None, **rest})
        return call.chunk([choice], **usage)

    async with aclosing(events):
        for answer in answers:
            yield chunk(answer, Delta(role="assistant", content=""))
        async for index, event in events:
            answer = answers[index]
            pieces = answer.see(event)
            if event.canvas is not None and with_canvas:
                shown = canvas_chunk(call.model.tokenizer, index, answer.steps, event.canvas)
                yield call.chunk([], canvas=shown, **null_usage)
            deltas = [answer.delta(piece) for piece in pieces]
            tokens: dict[str, Any] = {}
            if with_tokens and event.token_ids:
                # The tokens ride on the first delta, or on an empty one while their text is held back.
                deltas = deltas or [Delta(content="")]
                tokens = {"logprobs": call.logprobs(event), **call.token_ids(event)}
            for delta in deltas:
                yield chunk(answer, delta, **tokens)
                tokens = {}
            if event.finish is not None:
                finishes[index] = event.finish
                yield chunk(
                    answer, Delta(), finish_reason=answer.finish_word(event.finish), stop_reason=event.finish.stop
                )
    if with_usage or body.timings:
        usage = total([finishes[index] for index in sorted(finishes)], len(answers))
        counted = {"usage": usage_out(usage)} if with_usage else {}
        yield call.chunk([], dfastllm=figures(usage, call.timings(), call.job.canvas_length), **counted)
