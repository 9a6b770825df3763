"""The wire, outwards: response bodies, stream chunks and canvas events, each a declared type of openapi.json.

The forms of the OpenAI API, with dfastllm's figures beside the usage. A field that was not asked for is absent.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SkipValidation
from typing_extensions import TypedDict

from dfastllm.core import Usage

__all__ = [
    "Cancelled",
    "CanvasChunk",
    "CanvasEvent",
    "ChatChoice",
    "ChatChunk",
    "ChatChunkChoice",
    "ChatCompletion",
    "ChatLogprobs",
    "ChatMessage",
    "ChatTokenLogprob",
    "Completion",
    "CompletionChoice",
    "CompletionChunk",
    "CompletionLogprobs",
    "Delta",
    "ErrorBody",
    "Figures",
    "FunctionCall",
    "FunctionMore",
    "Health",
    "ModelCard",
    "ModelList",
    "Out",
    "Percentiles",
    "PromptTokensDetails",
    "Text",
    "Timings",
    "Tokens",
    "ToolCallMore",
    "ToolCallOut",
    "TopLogprob",
    "UsageOut",
    "Versions",
    "dump",
    "figures",
    "padded",
    "usage_out",
]


_CONSTANTS = frozenset({"object", "owned_by", "type"})
_PAD = 64


class Out(BaseModel):
    model_config = ConfigDict(protected_namespaces=(), extra="forbid")

    def model_post_init(self, _: Any, /) -> None:
        """Constants of the form count as set though they are defaults."""
        self.model_fields_set.update(_CONSTANTS.intersection(type(self).model_fields))


class PromptTokensDetails(Out):
    cached_tokens: int = Field(description="Prompt tokens whose K,V an earlier request had left.")


class UsageOut(Out):
    prompt_tokens: int
    completion_tokens: int = Field(
        description="Every generated token of the answers; an end of text that ended one is not part of it."
    )
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = Field(
        default=None, description="Not in the usage so far of a chunk."
    )


class Percentiles(Out):
    p50: float
    p90: float
    p95: float
    p99: float


class Timings(Out):
    """When the parts of one choice's answer came, in seconds."""

    tokens_per_second: float | None = Field(description="(n - 1) / (last - first token); null when all came at once.")
    time_per_output_token_seconds: float | None = Field(description="(end - first token) / (n - 1).")
    inter_token_seconds: Percentiles | None = Field(description="Tokens that came together share the gap.")
    block_seconds: list[float] = Field(description="Each finished block of a canvas; the first with the prompt.")
    first_tool_call_tokens: int | None = Field(description="Tokens until the first complete call of one of the tools.")
    first_tool_call_seconds: float | None


class Figures(Out):
    """What the answer took."""

    nfe: int = Field(description="Forward passes.")
    tokens_per_forward: float
    exactness: str = Field(
        description="Against the model's plain algorithm: reference (it is that), exact-fast (the same tokens), "
        "exact-distribution (the same distribution, other tokens for a seed) or approximate."
    )
    queue_seconds: float
    first_token_seconds: float | None
    total_seconds: float
    canvas_length: int | None = Field(
        None, description="Diffusion: tokens of the canvas, of the longest one where there are several."
    )
    drafts: int | None = Field(None, description="Forward passes that verified a draft; speculative requests only.")
    draft_tokens: int | None = None
    accepted_tokens: int | None = None
    accepted_per_position: list[int] | None = Field(
        None, description="Entry i: drafts of which at least i + 1 tokens were accepted."
    )
    acceptance_length: float | None = Field(None, description="1 + accepted_tokens / drafts.")
    timings: list[Timings] | None = Field(None, description="One per choice, when the request has timings: true.")


class CompletionLogprobs(Out):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(Out):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class CanvasToken(TypedDict):
    """Positions count from the first new token."""

    position: int
    token_id: int
    text: str


class RevisedToken(TypedDict):
    """null: the position is masked again."""

    position: int
    token_id: int | None
    text: str | None


class CommitEvent(TypedDict):
    """Masked positions that got their tokens."""

    type: Literal["commit"]
    tokens: list[CanvasToken]


class ReviseEvent(TypedDict):
    """Committed positions that changed."""

    type: Literal["revise"]
    tokens: list[RevisedToken]


class ProvisionalEvent(TypedDict):
    """The best guess of masked positions."""

    type: Literal["provisional"]
    tokens: list[CanvasToken]


class BlockDoneEvent(TypedDict):
    """A block became final."""

    type: Literal["block_done"]


class StatsEvent(TypedDict):
    """step: from 1. length: tokens of the canvas. masked: of them still masked."""

    type: Literal["stats"]
    step: int
    length: int
    masked: int


CanvasEvent = Annotated[
    CommitEvent | ReviseEvent | ProvisionalEvent | BlockDoneEvent | StatsEvent, Field(discriminator="type")
]


class CanvasChunk(TypedDict):
    """The events of one denoising step of choice `index`, in order."""

    index: int
    events: list[CanvasEvent]


class _Answer(Out):
    id: str
    created: int
    model: str


class _Chunk(_Answer):
    """A chunk of a stream. `usage`: null but in the last chunk where it was asked for, unless for every chunk."""

    usage: UsageOut | None = None
    dfastllm: Figures | None = None
    canvas: SkipValidation[CanvasChunk] | None = None  # ours; a hundred cells a step would cost more than the rest
    obfuscation: str | None = None


class Completion(_Answer):
    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: UsageOut
    dfastllm: Figures


class CompletionChunk(_Chunk):
    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class FunctionCall(Out):
    name: str
    arguments: str


class ToolCallOut(Out):
    """A call; in a stream its beginning, with an index, and arguments that are still empty."""

    index: int | None = None
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class FunctionMore(Out):
    arguments: str


class ToolCallMore(Out):
    """More of the arguments of a call that began earlier in the stream."""

    index: int
    function: FunctionMore


class TopLogprob(Out):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Out):
    content: list[ChatTokenLogprob]


class ChatMessage(Out):
    role: Literal["assistant"] = "assistant"
    content: str | None
    tool_calls: list[ToolCallOut] | None = None


class ChatChoice(Out):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatCompletion(_Answer):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: UsageOut
    dfastllm: Figures
    prompt_token_ids: list[int] | None = None


class Delta(Out):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallOut | ToolCallMore] | None = None


class ChatChunkChoice(Out):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatChunk(_Chunk):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]


class ErrorDetails(Out):
    message: str = Field(description="What, got, wanted, and the way out.")
    type: str
    param: str | None = Field(description="The field of the request.")
    code: str = Field(description="Stable, for programs.")


class ErrorBody(Out):
    error: ErrorDetails


class ModelCard(Out):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["dfastllm"] = "dfastllm"
    root: str = Field(description="The checkpoint's own name; of an adapter its directory.")
    parent: str | None = Field(default=None, description="Of an adapter: the model that it changes.")
    max_model_len: int = Field(description="Prompt and answer together.")
    family: str
    kind: Literal["ar", "diffusion", "block"]


class AdapterGone(Out):
    id: str
    object: Literal["model"] = "model"
    parent: str
    deleted: Literal[True] = True


class ModelList(Out):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(Out):
    status: Literal["loading", "ready", "stopping", "failed"]
    models: list[str] | None = Field(default=None, description="Of a server that is ready and has no tenants.")


class Versions(Out):
    version: str
    torch: str
    python: str


class Tokens(Out):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | None = Field(
        default=None, description="The vocabulary's own spelling, on request; null for an id that has none."
    )


class Text(Out):
    prompt: str


class Cancelled(Out):
    id: str
    object: Literal["request"] = "request"
    cancelled: int = Field(description="Calls of the API that were ended.")


def usage_out(prompt_tokens: int, completion_tokens: int, cached_tokens: int | None = None) -> UsageOut:
    """cached_tokens: None for the usage so far of one choice in the middle of its stream."""
    details = (
        {} if cached_tokens is None else {"prompt_tokens_details": PromptTokensDetails(cached_tokens=cached_tokens)}
    )
    return UsageOut(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        **details,
    )


def figures(usage: Usage, timings: Sequence[Timings] = (), canvas_length: int | None = None) -> Figures:
    """timings: one per choice where they were asked for. canvas_length: of a diffusion model's answer."""
    more: dict[str, Any] = {"timings": list(timings)} if timings else {}
    if canvas_length is not None:
        more["canvas_length"] = canvas_length
    if usage.drafts:
        more |= {
            "drafts": usage.drafts,
            "draft_tokens": usage.draft_tokens,
            "accepted_tokens": usage.accepted_tokens,
            "accepted_per_position": list(usage.accepted_per_position),
            "acceptance_length": usage.acceptance_length,
        }
    return Figures(
        nfe=usage.forwards,
        tokens_per_forward=usage.tokens_per_forward,
        exactness=usage.exactness,
        queue_seconds=usage.queue_s,
        first_token_seconds=usage.first_token_s,
        total_seconds=usage.total_s,
        **more,
    )


def dump(body: Out) -> str:
    """JSON of what was set: a field that was not asked for is absent rather than null."""
    return body.model_dump_json(exclude_unset=True)


def padded(text: str) -> str:
    """The JSON object with an `obfuscation` of random characters that fills its bytes up to a multiple of 64, so that
    the size of a chunk tells less about its token."""
    room = -(len(text.encode()) + len(',"obfuscation":""')) % _PAD
    return f'{text[:-1]},"obfuscation":"{secrets.token_hex(_PAD)[:room]}"}}'
