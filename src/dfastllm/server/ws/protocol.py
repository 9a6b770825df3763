"""The frames of /ws, each one JSON object in one text message: what a client may send and what the server sends.

Realm's protocol with everything typed. docs/websocket.md tells it in words; openapi.json has every type of this file
among its schemas. Reads and writes frames; does nothing with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SkipValidation

from dfastllm.errors import DFastLLMError, NotReadyError, RateLimitError
from dfastllm.server.body import Body, printable
from dfastllm.server.pipelines.schema import PipelineResult, StepDone, StepSkipped, StepStarted, StepText
from dfastllm.server.replies import (
    CanvasEvent,
    ChatChoice,
    ChatLogprobs,
    CompletionChoice,
    CompletionLogprobs,
    Figures,
    Out,
    ToolCallMore,
    ToolCallOut,
    UsageOut,
)

__all__ = [
    "CLIENT_FRAMES",
    "CLOSES",
    "MOST_ID",
    "SERVER_FRAMES",
    "AuthFailed",
    "AuthFrame",
    "AuthRequired",
    "AuthSuccess",
    "CallFrame",
    "CancelParams",
    "CancelResult",
    "CancelledReply",
    "CanvasData",
    "Close",
    "Code",
    "CompleteReply",
    "Connected",
    "ErrorInfo",
    "ErrorOrigin",
    "ErrorReply",
    "FunctionInfo",
    "GenerateResult",
    "HealthResult",
    "MetadataResult",
    "NoParams",
    "ParamInfo",
    "StreamingReply",
    "TokenData",
    "error_info",
]

Code = Literal["UNAUTHORIZED", "RATE_LIMIT_EXCEEDED", "INVALID_PARAMS", "DISPATCH_ERROR", "INTERNAL_ERROR"]
Close = Literal[1000, 1001, 1002, 1003, 1007, 1008, 1009, 1011]
CLOSES: Mapping[Close, str] = {
    1000: "the client closed",
    1001: "the server is shutting down; the calls have ended",
    1002: "what is no frame of RFC 6455",
    1003: "a binary message: frames are text",
    1007: "a message that is not UTF-8",
    1008: "no or a wrong key, a key that is no longer taken, or many frames that cannot be read",
    1009: "a message that is too long",
    1011: "the client did not answer a ping, or the server failed",
}
MOST_ID = 128  # characters of a call's id


# What a client sends.


class AuthFrame(Body):
    """The answer to `auth_required`."""

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"type": "auth", "api_key": "dfk_…"},)

    type: Literal["auth"]
    api_key: Annotated[str, Field(min_length=1, max_length=512)]


class CallFrame(Body):
    """A call. Its id is the client's; no two calls that run on a connection have the same."""

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"id": "1", "function": "generate", "params": {"prompt": "What is 12 + 30?", "max_tokens": 32, "stream": True}},
    )

    id: Annotated[str, Field(min_length=1, max_length=MOST_ID)]
    function: str
    params: dict[str, Any] | None = Field(None, description="As `metadata` lists them for the function.")
    tenant_id: str | None = Field(
        None, description="May be left out: the tenant comes from the key. Another one than the key's is refused."
    )


class NoParams(Body):
    """Of a function without params."""


class CancelParams(Body):
    """What `cancel` takes."""

    id: Annotated[str, Field(min_length=1, max_length=MOST_ID, description="The id of a call of this connection.")]


# What the server sends before calls are taken.


class AuthRequired(Out):
    """The first frame where the server has keys and the request's head carried none."""

    type: Literal["auth_required"] = "auth_required"


class AuthSuccess(Out):
    type: Literal["auth_success"] = "auth_success"
    tenant_id: str


class AuthFailed(Out):
    """The last frame; the connection closes with 1008."""

    type: Literal["auth_failed"] = "auth_failed"
    error: str


class Connected(Out):
    """Calls are taken from now on."""

    status: Literal["connected"]
    version: str = Field(description="Of the server.")
    tenant_id: str


# What functions answer with.


class TokenData(Out):
    """A part of one choice's answer as it grows."""

    type: Literal["token"] = "token"
    choice: int = Field(description="Which answer it belongs to, from 0; n of them were asked for.")
    text: str = Field(description="New text; may be empty, as in the last part of an answer.")
    token: str = Field(description="The same as text: Realm's name for it. Not always one token.")
    index: int = Field(description="Tokens of this choice that came before; from 0.")
    tokens: int = Field(description="Tokens that came with this part.")
    is_final: bool = Field(description="The last part of this choice.")
    logprob: float | None = Field(None, description="Where log probabilities were asked for and one token came.")
    logprobs: CompletionLogprobs | ChatLogprobs | None = Field(None, description="As in a chunk over HTTP.")
    token_ids: list[int] | None = Field(None, description="With return_token_ids.")
    tool_calls: list[ToolCallOut | ToolCallMore] | None = Field(None, description="Pieces of calls, as over HTTP.")
    finish_reason: Literal["stop", "length", "tool_calls"] | None = Field(None, description="Of the last part.")
    stop_reason: str | int | None = None


class CanvasData(Out):
    """The typed events of one denoising step, with stream_options.canvas_events."""

    type: Literal["canvas"] = "canvas"
    choice: int
    events: SkipValidation[list[CanvasEvent]]


class GenerateResult(Out):
    """The end of `generate`, streamed or not."""

    id: str = Field(description="Of the response; DELETE /v1/requests/{id} knows it while it runs.")
    model: str
    text: str = Field(description="The whole text of the first choice.")
    finish_reason: Literal["stop", "length", "tool_calls"] = Field(description="Of the first choice.")
    tokens_generated: int = Field(description="Of all choices; usage.completion_tokens.")
    prompt_tokens: int
    time_ms: float = Field(description="From the frame's arrival at the server to this one.")
    choices: list[CompletionChoice] | list[ChatChoice] | None = Field(
        None, description="Not of a streamed call: the choices as over HTTP, with logprobs, tool calls and token ids."
    )
    usage: UsageOut
    dfastllm: Figures


class HealthResult(Out):
    status: Literal["loading", "ready", "stopping", "failed"]
    version: str
    uptime_seconds: float
    models: list[str] = Field(description="Those that are served and that this key may use.")


class ParamInfo(Out):
    name: str
    type: str = Field(description="A short type expression: string, integer, list[string], a | b.")
    description: str
    required: bool
    default: Any = Field(description="What it is where it is not given; null: the model's own, or nothing.")


class FunctionInfo(Out):
    name: str
    description: str
    params: list[ParamInfo]
    returns: str = Field(description="The type of `data` of the `complete` frame, among openapi.json's schemas.")
    streaming: bool = Field(description="Whether `streaming` frames may come before.")


class MetadataResult(Out):
    version: str
    functions: list[FunctionInfo]


class CancelResult(Out):
    id: str = Field(description="Of the call that was ended; its own last frame has been sent.")
    cancelled: bool


# Replies: any number of `streaming`, then one of the three others, once per call.


class ErrorOrigin(Out):
    """The error as HTTP would tell it."""

    status: int
    code: str = Field(description="Stable, for programs.")
    type: str
    param: str | None = Field(description="The param, or the field of the frame.")


class ErrorInfo(Out):
    code: Code
    message: str = Field(description="What, got, wanted, and the way out.")
    details: ErrorOrigin | None = None
    retry_after: float | None = Field(None, description="Seconds.")


class StreamingReply(Out):
    id: str
    status: Literal["streaming"]
    data: SkipValidation[TokenData | CanvasData | StepStarted | StepText | StepDone | StepSkipped]
    obfuscation: str | None = None  # with stream_options.include_obfuscation


class CompleteReply(Out):
    id: str
    status: Literal["complete"]
    data: SkipValidation[GenerateResult | PipelineResult | HealthResult | MetadataResult | CancelResult]


class ErrorReply(Out):
    id: str | None = Field(
        description="null: it is about a frame that no call can be told of: not readable, or its id missing or in use."
    )
    status: Literal["error"]
    error: ErrorInfo


class CancelledReply(Out):
    """The call was ended by `cancel` or by DELETE /v1/requests/{id}."""

    id: str
    status: Literal["cancelled"]


CLIENT_FRAMES: tuple[type[Body], ...] = (AuthFrame, CallFrame)
SERVER_FRAMES: tuple[type[Out], ...] = (
    AuthRequired,
    AuthSuccess,
    AuthFailed,
    Connected,
    StreamingReply,
    CompleteReply,
    ErrorReply,
    CancelledReply,
)


def error_info(error: DFastLLMError, code: Code | None = None) -> ErrorInfo:
    """The error object of an error of our tree. code: where the status does not say it."""
    details = ErrorOrigin(status=error.status, code=error.code, type=error.type, param=error.param)
    again: dict[str, Any] = {}
    if isinstance(error, RateLimitError):
        again["retry_after"] = error.retry_after
    elif isinstance(error, NotReadyError):
        again["retry_after"] = 1.0
    return ErrorInfo(code=code or _code(error.status), message=printable(error.message), details=details, **again)


def _code(status: int) -> Code:
    if status in (401, 403):
        return "UNAUTHORIZED"
    if status == 429:
        return "RATE_LIMIT_EXCEEDED"
    if status == 503:
        return "DISPATCH_ERROR"
    return "INVALID_PARAMS" if status < 499 else "INTERNAL_ERROR"
