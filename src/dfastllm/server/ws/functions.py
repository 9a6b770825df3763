"""What a client may call over /ws: one table, by which calls are read and dispatched and from which `metadata` tells.

A function takes params of declared types and gives `data` of declared types: parts of a stream by `Asked.tell`, and its
result. A new one is a row of `FUNCTIONS`. `generate` makes the same `Call` as the HTTP routes do (`completion_call`,
`chat_call`), so that what is read, refused, limited, counted and timed there is so here.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

from dfastllm.errors import DFastLLMError, UnsupportedError, ValidationError
from dfastllm.options import HINTS, wire_fields
from dfastllm.server.body import Body
from dfastllm.server.bounds import read_json
from dfastllm.server.calls import Call, Chunk
from dfastllm.server.chat import chat_call
from dfastllm.server.completions import completion_call
from dfastllm.server.docs import type_expression
from dfastllm.server.options import on_the_wire
from dfastllm.server.pipelines.asking import begun, result_of
from dfastllm.server.pipelines.schema import PipelineParams, PipelineResult
from dfastllm.server.reading import validated
from dfastllm.server.replies import ChatChunkChoice, CompletionChoice, Figures, Out, UsageOut
from dfastllm.server.schemas import ChatRequest, CompletionRequest, GenerationRequest, StreamOptions
from dfastllm.server.serving import Serving
from dfastllm.server.ws.protocol import (
    MOST_ID,
    CallFrame,
    CancelParams,
    CancelResult,
    CanvasData,
    Code,
    FunctionInfo,
    GenerateResult,
    HealthResult,
    MetadataResult,
    NoParams,
    ParamInfo,
    TokenData,
)
from dfastllm.tenants import Identity

__all__ = ["FUNCTIONS", "Asked", "Function", "Incoming", "Refused", "metadata_of", "read_call"]

REFUSED: Mapping[str, str] = {"embed": "the models served here give no embeddings."}
_DEFAULTS: Mapping[str, Any] = {
    row.name: row.option.default
    for front in ("completions", "chat")
    for row in wire_fields(front)  # type: ignore[arg-type]
    # What the model's own files or its kind decide is told as null.
    if not (row.option.kinds or row.option.generation or row.option.many or row.option.keys)
}


@dataclass(frozen=True)
class Asked:
    """One call, for its function.

    identity    who asks; the key was proved for this call.
    request_id  its id among the requests of the server.
    arrived     when its frame came, on time.monotonic().
    tell        sends a part of a stream: its data, and whether the frame is filled up against guesses from its size.
                Waits while the client does not read.
    cancel      ends a call of the same connection, and waits until it has ended.
    """

    serving: Serving
    identity: Identity
    request_id: str
    arrived: float
    tell: Callable[[Any, bool], Awaitable[None]]
    cancel: Callable[[str], Awaitable[None]]


@dataclass(frozen=True)
class Function:
    """A row of the table.

    takes   the types of its params, and which of them some params are.
    run     its work. Raises errors of our tree.
    scope   that the key must have, None for none.
    """

    name: str
    description: str
    takes: tuple[type[Body], ...]
    returns: type[Out]
    run: Callable[[Asked, Any], Awaitable[Out]]
    scope: str | None = None
    streaming: bool = False
    pick: Callable[[Mapping[str, Any]], type[Body]] | None = None

    def read(self, params: Mapping[str, Any]) -> Body:
        """The params, validated. Raises ValidationError naming the field."""
        kind = self.takes[0] if self.pick is None else self.pick(params)
        return validated(kind, params)


@dataclass(frozen=True)
class Incoming:
    """A call that was read: its function is there and its params are of the right types."""

    frame: CallFrame
    function: Function
    params: Body


class Refused(Exception):
    """A frame that is no call. id: of the call that it would have been, None where that cannot be told. code: where the
    error's status does not say it."""

    def __init__(self, id: str | None, error: DFastLLMError, code: Code | None = None) -> None:
        super().__init__(error.message)
        self.id = id
        self.error = error
        self.code = code


def read_call(data: bytes, values: int) -> Incoming:
    """The call that a frame holds. values: as `read_json`. Raises Refused."""
    id = None
    code: Code | None = None
    try:
        given = read_json(data, values, "frame")
        if not isinstance(given, dict):
            raise ValidationError("A frame must be a JSON object.")
        if isinstance(given.get("id"), str) and 0 < len(given["id"]) <= MOST_ID:
            id = given["id"]
        frame = validated(CallFrame, given)
        code = "DISPATCH_ERROR"
        function = _function(frame.function)
        code = None
        return Incoming(frame, function, function.read(frame.params or {}))
    except DFastLLMError as error:
        refused = Refused(id, error, code)
    raise refused  # outside: what the error stands in for may be large


def _function(name: str) -> Function:
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    if name in REFUSED:
        raise UnsupportedError(f"{name} is not done: {REFUSED[name]}", param="function")
    near = difflib.get_close_matches(name[:80], FUNCTIONS, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(FUNCTIONS)}."
    raise UnsupportedError(f"There is no function {name[:80]!r}.", param="function", hint=hint)


# generate


def _prompted(params: Mapping[str, Any]) -> type[Body]:
    """Messages make a chat, a prompt a completion. Raises ValidationError where both or none are given."""
    chat, prompt = params.get("messages") is not None, params.get("prompt") is not None
    if chat and prompt:
        raise ValidationError("prompt and messages do not go together; send one of them.", param="messages")
    if not chat and not prompt:
        raise ValidationError("prompt or messages is required.", param="prompt")
    return ChatRequest if chat else CompletionRequest


async def _generate(asked: Asked, body: GenerationRequest) -> GenerateResult:
    """A completion of `prompt`, or an answer to `messages`."""
    if body.stream:
        options = body.stream_options or validated(StreamOptions, {})
        options.include_usage = options.continuous_usage_stats = True
        body.stream_options = options
    try:
        call: Call[Any]
        if isinstance(body, ChatRequest):
            call = await chat_call(asked.serving, asked.identity, body, asked.request_id)
        else:
            assert isinstance(body, CompletionRequest)
            call = await completion_call(asked.serving, asked.identity, body, asked.request_id)
        return await (_streamed(asked, call) if body.stream else _whole(asked, call))
    except DFastLLMError as error:
        raise on_the_wire(error, body) from None


async def _whole(asked: Asked, call: Call[Any]) -> GenerateResult:
    answer: Any = await call.whole()
    first = answer.choices[0]
    text = first.text if isinstance(first, CompletionChoice) else first.message.content or ""
    return _result(asked, call, text, first.finish_reason, answer.usage, answer.dfastllm, choices=answer.choices)


async def _streamed(asked: Asked, call: Call[Any]) -> GenerateResult:
    story = _Story()
    pad = call.body.streams("include_obfuscation")
    async with aclosing(call.chunks(call.job.timed_events())) as chunks:
        async for chunk in chunks:
            for data in story.parts(chunk):
                await asked.tell(data, pad)
    assert story.usage is not None
    assert story.figures is not None
    return _result(asked, call, "".join(story.texts), story.finish_reason, story.usage, story.figures)


def _result(
    asked: Asked, call: Call[Any], text: str, finish_reason: Any, usage: UsageOut, figures: Figures, **choices: Any
) -> GenerateResult:
    return GenerateResult(
        id=call.job.id,
        model=call.named["model"],
        text=text,
        finish_reason=finish_reason,
        tokens_generated=usage.completion_tokens,
        prompt_tokens=usage.prompt_tokens,
        time_ms=round((time.monotonic() - asked.arrived) * 1000, 3),
        usage=usage,
        dfastllm=figures,
        **choices,
    )


class _Story:
    """A stream's chunks as parts of ours, and what its end tells: the text of the first choice, usage, figures."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.finish_reason: str | None = None
        self.usage: UsageOut | None = None
        self.figures: Figures | None = None
        self._told: dict[int, int] = {}  # tokens of each choice that parts have told of

    def parts(self, chunk: Chunk) -> list[TokenData | CanvasData]:
        if chunk.canvas is not None:
            return [CanvasData(choice=chunk.canvas["index"], events=chunk.canvas["events"])]
        if not chunk.choices:
            self.usage, self.figures = chunk.usage, chunk.dfastllm
            return []
        choice = chunk.choices[0]
        assert chunk.usage is not None
        part = self._part(choice, chunk.usage.completion_tokens)
        if choice.index == 0:
            self.texts.append(part.text)
            self.finish_reason = choice.finish_reason or self.finish_reason
        extras = part.model_fields_set & {"tool_calls", "logprobs", "token_ids"}
        if not (part.text or part.is_final or extras):
            return []  # tokens whose text is held back: they are told with what comes next
        self._told[choice.index] = chunk.usage.completion_tokens
        return [part]

    def _part(self, choice: CompletionChoice | ChatChunkChoice, tokens: int) -> TokenData:
        before = self._told.get(choice.index, 0)
        extras: dict[str, Any] = {}
        if isinstance(choice, ChatChunkChoice):
            text = choice.delta.content or ""
            if choice.delta.tool_calls:
                extras["tool_calls"] = choice.delta.tool_calls
        else:
            text = choice.text
        if choice.logprobs is not None:
            extras["logprobs"] = choice.logprobs
            if (alone := _logprobs(choice)) is not None:
                extras["logprob"] = alone
        if choice.token_ids is not None:
            extras["token_ids"] = choice.token_ids
        if choice.finish_reason is not None:
            extras |= {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
        return TokenData(
            choice=choice.index,
            text=text,
            token=text,
            index=before,
            tokens=tokens - before,
            is_final=choice.finish_reason is not None,
            **extras,
        )


def _logprobs(choice: CompletionChoice | ChatChunkChoice) -> float | None:
    """The log probability of a part's only token."""
    if isinstance(choice, ChatChunkChoice):
        each = [token.logprob for token in choice.logprobs.content] if choice.logprobs else []
    else:
        each = choice.logprobs.token_logprobs if choice.logprobs else []
    return each[0] if len(each) == 1 else None


# The other functions


async def _pipeline(asked: Asked, params: PipelineParams) -> PipelineResult:
    """A run of a pipeline; with `stream` each step's events, as over HTTP."""
    events = await begun(asked.serving, asked.identity, asked.request_id, params.name, params.input)
    return await result_of(events, (lambda event: asked.tell(event, False)) if params.stream else None)


async def _health(asked: Asked, _: NoParams) -> HealthResult:
    """Whether requests are taken, and which models there are."""
    serving = asked.serving
    return HealthResult(
        status=serving.phase,
        version=version("dfastllm"),
        uptime_seconds=round(time.monotonic() - serving.started, 3),
        models=[name for name in serving.models if asked.identity.allows_model(name)],
    )


async def _metadata(_: Asked, __: NoParams) -> MetadataResult:
    """Every function with its params."""
    return _told()


@cache
def _told() -> MetadataResult:
    return metadata_of(FUNCTIONS.values())


async def _cancel(asked: Asked, params: CancelParams) -> CancelResult:
    """End a running call of this connection; its own last frame, `cancelled`, comes before this one's."""
    await asked.cancel(params.id)
    return CancelResult(id=params.id, cancelled=True)


def metadata_of(functions: Iterable[Function]) -> MetadataResult:
    """What the rows of a table say."""
    listed = [
        FunctionInfo(
            name=function.name,
            description=function.description,
            params=list(_params(function.takes)),
            returns=function.returns.__name__,
            streaming=function.streaming,
        )
        for function in functions
    ]
    return MetadataResult(version=version("dfastllm"), functions=listed)


@cache
def _params(takes: tuple[type[Body], ...]) -> tuple[ParamInfo, ...]:
    """Every field of the types, those of several once, with all the types that it has there."""
    schemas = [kind.model_json_schema() for kind in takes]
    names = dict.fromkeys(name for schema in schemas for name in schema.get("properties", {}))
    hints = {hint.name for hint in HINTS}
    params = []
    for name in names:
        fields = [schema["properties"][name] for schema in schemas if name in schema.get("properties", {})]
        params.append(
            ParamInfo(
                name=name,
                type=" | ".join(dict.fromkeys(map(type_expression, fields))),
                description=" / ".join(dict.fromkeys(filter(None, (field.get("description") for field in fields)))),
                required=all(name in schema.get("required", ()) for schema in schemas),
                default=None if name in hints else _DEFAULTS.get(name),
            )
        )
    return tuple(params)


FUNCTIONS: dict[str, Function] = {
    row.name: row
    for row in (
        Function(
            "generate",
            "Complete `prompt`, or answer `messages`; one of them is required.",
            (CompletionRequest, ChatRequest),
            GenerateResult,
            _generate,
            scope="generate",
            streaming=True,
            pick=_prompted,
        ),
        Function(
            "pipeline",
            "Run a pipeline that was registered.",
            (PipelineParams,),
            PipelineResult,
            _pipeline,
            scope="pipelines",
            streaming=True,
        ),
        Function(
            "health", "Whether requests are taken, and which models there are.", (NoParams,), HealthResult, _health
        ),
        Function("metadata", "Every function with its params.", (NoParams,), MetadataResult, _metadata),
        Function("cancel", "End a running call of this connection.", (CancelParams,), CancelResult, _cancel),
    )
}
