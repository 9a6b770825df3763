"""POST /v1/chat/completions: conversations by the chat template, tool calls parsed back out of the text."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi import Request as HttpRequest
from fastapi.responses import Response

from dfastllm.core import Finish, StepEvent
from dfastllm.errors import DFastLLMError, ValidationError
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
from dfastllm.server.options import decode_params, sampling_params, speculative_params
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
    usage_out,
)
from dfastllm.server.schemas import ChatRequest
from dfastllm.server.serving import ServedModel, Serving
from dfastllm.server.sse import EventStream
from dfastllm.server.tokens import chat_logprobs
from dfastllm.text import ToolCall, ToolCallParser, parse_tool_calls

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
        if not self.body.logprobs or not result.logprobs:
            return None
        return chat_logprobs(self.model.tokenizer, result.logprobs)

    def token_ids(self, result: Result | StepEvent) -> dict[str, Any]:
        return {"token_ids": list(result.token_ids)} if self.body.return_token_ids else {}

    def chunk(self, choices: list[ChatChunkChoice], **rest: Any) -> str:
        return dump(ChatChunk(id=self.job.id, created=self.created, model=self.model.name, choices=choices, **rest))


async def chat_completions(body: ChatRequest, request: HttpRequest) -> Response:
    """Answer a conversation."""
    serving: Serving = request.app.state.serving
    call = await _understand(serving, body, request.state.request_id)
    try:
        if not body.stream:
            return Response(dump(await while_connected(request, _whole(call))), media_type="application/json")
        events = await first_event(request, call.job)
    except DFastLLMError as error:
        if error.param == "prompt":  # what the engine calls it
            error.param = "messages"
        raise
    return EventStream(_chunks(call, events), call.job.cancel)


async def _understand(serving: Serving, body: ChatRequest, request_id: str) -> Call:
    model = serving.model(body.model)
    if body.stream_options is not None and not body.stream:
        raise ValidationError("stream_options needs stream: true.", param="stream_options")
    if body.top_logprobs is not None and not body.logprobs:
        raise ValidationError("top_logprobs needs logprobs: true.", param="top_logprobs")
    if body.tool_choice == "auto" and not body.tools:
        raise ValidationError("tool_choice auto needs tools.", param="tool_choice")
    # With tool_choice none the template does not show the tools, so there is nothing to call.
    tools = body.tools if body.tools and body.tool_choice != "none" else None
    ids = await chat_ids(model, body.messages, tools)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = sampling_params(body, model, longest=len(ids), logprobs=logprobs)
    decode = decode_params(body, model, sampling.max_tokens)
    id = f"chatcmpl-{uuid.uuid4().hex}"
    requests = engine_requests(serving, id, body, [ids], body.n or 1, sampling, decode, speculative_params(body, model))
    names = {tool.function.name for tool in tools or ()}
    job = Job(serving, model.name, requests, id=id, request_id=request_id, tools=names)
    return Call(body, model, job, tools is not None)


async def _whole(call: Call) -> ChatCompletion:
    ended = await collect(call.job)
    choices = []
    for index, (result, finish) in enumerate(ended):
        parsed = parse_tool_calls(result.text) if call.tools else None
        calls = parsed.tool_calls if parsed else ()
        message = ChatMessage(role="assistant", content=parsed.content if parsed else result.text)
        if calls:
            message = ChatMessage(
                role="assistant", content=message.content or None, tool_calls=[_call_out(call) for call in calls]
            )
        choices.append(
            ChatChoice(
                index=index,
                message=message,
                logprobs=call.logprobs(result),
                finish_reason=_finish_word(finish, bool(calls)),
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
        dfastllm=figures(usage, call.timings()),
        **rest,
    )


def _call_out(call: ToolCall, **index: Any) -> ToolCallOut:
    function = FunctionCall(name=call.name, arguments=call.arguments)
    return ToolCallOut(id=f"call_{uuid.uuid4().hex[:24]}", function=function, **index)


def _finish_word(finish: Finish, called: bool) -> Literal["stop", "length", "tool_calls"]:
    if finish.reason.value == "length":
        return "length"
    return "tool_calls" if called else "stop"


class _Choice:
    """The state of one streamed choice: its tool parser and how many calls it has made."""

    def __init__(self, tools: bool) -> None:
        self.parser = ToolCallParser() if tools else None
        self.calls = 0
        self.steps = 0

    def deltas(self, event: StepEvent) -> list[Delta]:
        """What became certain with this event: content, and whole calls."""
        if self.parser is None:
            return [Delta(content=event.text)] if event.text else []
        pieces = self.parser.push(event.text)
        if event.finish is not None:
            pieces += self.parser.flush()
        return list(self._deltas(pieces))

    def _deltas(self, pieces: Sequence[str | ToolCall]) -> Iterable[Delta]:
        for piece in pieces:
            if isinstance(piece, str):
                yield Delta(content=piece)
            else:
                yield Delta(tool_calls=[_call_out(piece, index=self.calls)])
                self.calls += 1


async def _chunks(call: Call, events: Events) -> AsyncGenerator[str]:
    options = call.body.stream_options
    with_usage = options is not None and bool(options.include_usage)
    with_canvas = options is not None and bool(options.canvas_events)
    with_tokens = bool(call.body.logprobs or call.body.return_token_ids)
    null_usage: dict[str, Any] = {"usage": None} if with_usage else {}
    choices = [_Choice(call.tools) for _ in call.job.requests]
    finishes: dict[int, Finish] = {}

    def chunk(index: int, delta: Delta, **rest: Any) -> str:
        return call.chunk([ChatChunkChoice(index=index, delta=delta, **{"finish_reason": None, **rest})], **null_usage)

    async with aclosing(events):
        for index in range(len(choices)):
            yield chunk(index, Delta(role="assistant", content=""))
        async for index, event in events:
            choice = choices[index]
            if event.canvas is not None and with_canvas:
                choice.steps += 1
                shown = canvas_chunk(call.model.tokenizer, index, choice.steps, event.canvas)
                yield call.chunk([], canvas=shown, **null_usage)
            deltas = choice.deltas(event)
            tokens: dict[str, Any] = {}
            if with_tokens and event.token_ids:
                # The tokens ride on the first delta, or on an empty one while their text is held back.
                deltas = deltas or [Delta(content="")]
                tokens = {"logprobs": call.logprobs(event), **call.token_ids(event)}
            for delta in deltas:
                yield chunk(index, delta, **tokens)
                tokens = {}
            if event.finish is not None:
                finishes[index] = event.finish
                word = _finish_word(event.finish, choice.calls > 0)
                yield chunk(index, Delta(), finish_reason=word, stop_reason=event.finish.stop)
    if with_usage or call.body.timings:
        usage = total([finishes[index] for index in sorted(finishes)], len(choices))
        counted = {"usage": usage_out(usage)} if with_usage else {}
        yield call.chunk([], dfastllm=figures(usage, call.timings()), **counted)
