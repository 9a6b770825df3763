"""What calls give back, and how it is read from an HTTP answer or a WebSocket frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .record import Record
from .wire import CanvasEvent

__all__ = [
    "FunctionMetadata",
    "GenerationResult",
    "HealthStatus",
    "ParamMetadata",
    "PipelineEvent",
    "PipelineResult",
    "RuntimeMetadata",
    "TokenData",
]


@dataclass(frozen=True)
class GenerationResult(Record):
    """A whole answer.

    text: of the answer.
    tokens_generated: tokens of the answer, as the server counted them.
    prompt_tokens: tokens of the prompt.
    time_ms: how long the server took, milliseconds.
    finish_reason: "stop", "length" or "tool_calls".
    model: that answered.
    request_id: what the server knows the call by.
    cost_usd: only where the server has a price configured, else None.
    tool_calls: calls of functions, in the form of the OpenAI API.
    raw: the server's own words, with what has no name here.
    """

    text: str
    tokens_generated: int
    prompt_tokens: int
    time_ms: float
    finish_reason: str | None = None
    model: str | None = None
    request_id: str | None = None
    cost_usd: float | None = None
    tool_calls: Sequence[Mapping[str, Any]] = ()
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class TokenData(Record):
    """A piece of a stream, as it came.

    text: the new text; "" where the tokens end no character yet, or only the canvas changed.
    token: the same: Realm's name for it. Not always one token.
    index: tokens of the answer that came before this piece.
    tokens: how many came with it; a diffusion model often gives several at once.
    is_final: whether the answer is complete.
    finish_reason: of the final piece: "stop", "length" or "tool_calls".
    token_ids: of the new tokens.
    logprob: where log probabilities were asked for and one token came.
    tool_calls: pieces of calls of functions, in the form of the OpenAI API.
    canvas: what a denoising step did, where canvas_events were asked for.
    """

    text: str
    token: str
    index: int
    tokens: int
    is_final: bool
    finish_reason: str | None = None
    token_ids: tuple[int, ...] = ()
    logprob: float | None = None
    tool_calls: Sequence[Mapping[str, Any]] = ()
    canvas: tuple[CanvasEvent, ...] = ()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class HealthStatus(Record):
    """status: "ready", "loading", "stopping" or "failed", in the words of the server."""

    status: str
    version: str | None = None
    uptime_seconds: float | None = None
    models: Sequence[str] = ()


@dataclass(frozen=True)
class ParamMetadata(Record):
    name: str
    type: str
    description: str = ""
    required: bool = False
    default: Any = None


@dataclass(frozen=True)
class FunctionMetadata(Record):
    name: str
    description: str = ""
    params: Sequence[ParamMetadata] = ()
    returns: Any = None
    streaming: bool = False


@dataclass(frozen=True)
class RuntimeMetadata(Record):
    """What the server can do."""

    version: str
    functions: Sequence[FunctionMetadata]


@dataclass(frozen=True)
class PipelineEvent(Record):
    """type: "step_started", "step_text" (with new `text`), "step_done" or "step_skipped". step: its id. data: the whole
    event."""

    type: str
    step: str
    text: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class PipelineResult(Record):
    """A run of a pipeline.

    output: its text.
    steps: what each step did: id, status ("done" or "skipped"), text, model, usage, time_ms.
    tokens_generated, prompt_tokens: of all steps.
    raw: the server's own words.
    """

    output: str
    steps: Sequence[Mapping[str, Any]]
    tokens_generated: int
    prompt_tokens: int
    time_ms: float
    request_id: str | None = None
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
