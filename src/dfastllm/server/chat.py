"""POST /v1/chat/completions: conversations by the chat template, tool calls parsed back out of the text."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from fastapi import Request as HttpRequest
from fastapi.responses import Response

from dfastllm.core import FinishReason, StepEvent, TokenLogprob
from dfastllm.server.access import identity_of
from dfastllm.server.calls import Call, Chunk
from dfastllm.server.jobs import Job, collect, engine_requests, while_connected
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
    FunctionMore,
    ToolCallMore,
    ToolCallOut,
)
from dfastllm.server.schemas import ChatRequest, Tool
from dfastllm.server.serving import ServedModel, Serving
from dfastllm.server.tokens import chat_logprobs
from dfastllm.tenants import Identity
from dfastllm.text import CallBegin, CallReading, CallText, Piece, ToolCall, call_reading

__all__ = ["chat_call", "chat_completions"]


async def chat_completions(body: ChatRequest, request: HttpRequest) -> Response:
    """Answer a conversation."""
    serving: Serving = request.app.state.serving
    understood = chat_call(serving, identity_of(request), body, request.state.request_id)
    return await (await while_connected(request, understood)).answer(request)


async def chat_call(serving: Serving, identity: Identity, body: ChatRequest, request_id: str) -> Call[ChatRequest]:
    """The call that a body asks for, over any transport. Raises what is wrong with it, in the body's words."""
    model = serving.model(identity, body.model)
    # With tool_choice none the template does not show the tools, so there is nothing to call.
    tools = body.tools if body.tools and body.tool_choice != "none" else None
    calls = None if tools is None else await asyncio.to_thread(_reading, model, tools)
    ids = await chat_ids(model, body, body.messages, tools)
    if serving.recording is not None:
        serving.recording.see(body.messages, tools)
    id = f"chatcmpl-{uuid.uuid4().hex}"
    shown = calls.taught.shown_ids(model.tokenizer) if calls is not None else ()
    requests = engine_requests(serving, identity, model, id, body, [ids], shown=shown)
    choices = len(requests)
    job = Job(serving, identity, model.name, requests, id=id, request_id=request_id, calls=calls, choices=choices)
    return _Call(body, model, job, calls)


def _reading(model: ServedModel, tools: Sequence[Tool]) -> CallReading:
    """How calls of these tools are read. Raises UnsupportedError where the template teaches no form that is read."""
    return call_reading(model.tokenizer, {tool.function.name for tool in tools})


class _Call(Call[ChatRequest]):
    """calls: how calls in the text are read, None where there can be none."""

    chunk_type = ChatChunk

    def __init__(self, body: ChatRequest, model: ServedModel, job: Job, calls: CallReading | None) -> None:
        super().__init__(body, model, job, choices=len(job.requests))
        self.answers = [_Answer(self, index, calls) for index in range(len(job.requests))]

    def logprobs(self, records: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        if not self.body.logprobs:
            return None
        as_ids = bool(self.body.return_tokens_as_token_ids)
        return chat_logprobs(self.model.tokenizer, records, as_ids=as_ids)

    async def whole(self) -> ChatCompletion:
        ended = await collect(self.job, lambda index, event: self.answers[index].see(event))
        choices = [
            ChatChoice(
                index=answer.index,
                message=answer.message(),
                logprobs=self.logprobs(result.logprobs),
                finish_reason=answer.finish_word(result.finish_reason),
                stop_reason=result.stop,
                **self.token_ids(result.token_ids),
            )
            for answer, result in zip(self.answers, ended, strict=True)
        ]
        rest: dict[str, Any] = {}
        if self.body.return_token_ids:
            rest["prompt_token_ids"] = list(self.job.requests[0].prompt)
        return ChatCompletion(**self.named, choices=choices, **self.took([result.usage for result in ended]), **rest)

    def opening(self, index: int) -> Iterator[Chunk]:
        yield self._delta(self.answers[index], Delta(role="assistant", content=""))

    def deltas(self, index: int, event: StepEvent) -> Iterator[Chunk]:
        answer = self.answers[index]
        deltas = [delta for piece in answer.see(event) for delta in answer.deltas(piece)]
        tokens: dict[str, Any] = {}
        if event.token_ids and (self.body.logprobs or self.body.return_token_ids):
            # The tokens ride on the first delta, or on an empty one while their text is held back.
            deltas = deltas or [Delta(content="")]
            tokens = {"logprobs": self.logprobs(event.logprobs), **self.token_ids(event.token_ids)}
        for delta in deltas:
            yield self._delta(answer, delta, **tokens)
            tokens = {}
        if event.finish is not None:
            word = answer.finish_word(event.finish.reason)
            yield self._delta(answer, Delta(), finish_reason=word, stop_reason=event.finish.stop)

    def _delta(self, answer: _Answer, delta: Delta, **rest: Any) -> Chunk:
        choice = ChatChunkChoice(index=answer.index, delta=delta, **{"finish_reason": None, **rest})
        return self.chunk(choice, answer.tokens)


class _Answer:
    """One choice as it grows: its content, its calls and its tokens."""

    def __init__(self, call: _Call, index: int, calls: CallReading | None) -> None:
        self.call = call
        self.index = index
        self.reading = calls
        self.parser = calls.parser() if calls is not None else None
        self.content = ""
        self.calls: list[ToolCall] = []
        self.ids: list[str] = []  # of the calls, those included that have only begun
        self.sent = 0  # calls whose beginning became a delta
        self.tokens = 0

    def see(self, event: StepEvent) -> list[Piece]:
        """What became certain with this event: content, and calls piece by piece. Where one call is all that was asked
        for, it ends the answer."""
        self.tokens += len(event.token_ids)
        return list(self._take(self._pieces(event)))

    def _pieces(self, event: StepEvent) -> list[Piece]:
        if self.parser is None:
            return [event.text] if event.text else []
        pieces = self.parser.push(event.text)
        return pieces + self.parser.flush() if event.finish is not None else pieces

    def _take(self, pieces: list[Piece]) -> Iterator[Piece]:
        one = self.call.body.parallel_tool_calls is False
        for piece in pieces:
            if one and self.calls:
                return
            if isinstance(piece, str):
                self.content += piece
            elif isinstance(piece, CallBegin) and self.reading is not None:
                self.ids.append(self.reading.taught.new_id())
            elif isinstance(piece, ToolCall):
                self.calls.append(piece)
                if one:
                    self.call.job.enough(self.index, self.tokens)
            yield piece

    def message(self) -> ChatMessage:
        if not self.calls:
            return ChatMessage(role="assistant", content=self.content)
        calls = [
            ToolCallOut(id=id, function=FunctionCall(name=call.name, arguments=call.arguments))
            for id, call in zip(self.ids, self.calls, strict=True)
        ]
        return ChatMessage(role="assistant", content=self.content or None, tool_calls=calls)

    def deltas(self, piece: Piece) -> Iterator[Delta]:
        """A piece that `see` just gave, for a stream: a call's name when it begins, then its arguments as they come."""
        if isinstance(piece, str):
            yield Delta(content=piece)
        elif isinstance(piece, CallBegin):
            function = FunctionCall(name=piece.name, arguments="")
            yield Delta(tool_calls=[ToolCallOut(index=self.sent, id=self.ids[self.sent], function=function)])
            self.sent += 1
        elif isinstance(piece, CallText):
            yield Delta(tool_calls=[ToolCallMore(index=self.sent - 1, function=FunctionMore(arguments=piece.text))])

    def finish_word(self, reason: FinishReason) -> Literal["stop", "length", "tool_calls"]:
        """A limit that cut the answer is told before the calls it has, as OpenAI does."""
        if reason is FinishReason.LENGTH:
            return "length"
        return "tool_calls" if any(call.whole for call in self.calls) else "stop"
