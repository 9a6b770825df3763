"""The wire, outwards: response bodies and stream chunks of the OpenAI API, with dfastllm's figures beside the usage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dfastllm.core import Usage

__all__ = [
    "ChatChoice",
    "ChatChunk",
    "ChatChunkChoice",
    "ChatCompletion",
    "ChatLogprobs",
    "ChatMessage",
    "ChatTokenLogprob",
    "Completion",
    "CompletionChoice",
    "CompletionLogprobs",
    "Delta",
    "Figures",
    "FunctionCall",
    "Percentiles",
    "PromptTokensDetails",
    "Timings",
    "ToolCallOut",
    "TopLogprob",
    "UsageOut",
    "dump",
    "figures",
    "usage_out",
]


class Out(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    def model_post_init(self, _: Any, /) -> None:
        """`object` and `type` are part of the form, so they count as set though they are defaults."""
        self.model_fields_set.update({"object", "type"}.intersection(type(self).model_fields))


class PromptTokensDetails(Out):
    cached_tokens: int = Field(description="Prompt tokens whose K,V an earlier request had left.")


class UsageOut(Out):
    prompt_tokens: int
    completion_tokens: int = Field(description="Committed tokens up to the end of text, which is not counted itself.")
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


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


class Completion(Out):
    """A response, or a chunk of a stream (then `usage` is null but in the last chunk, when it was asked for)."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageOut | None = None
    dfastllm: Figures | None = None
    canvas: dict[str, Any] | None = None


class FunctionCall(Out):
    name: str
    arguments: str


class ToolCallOut(Out):
    index: int | None = None
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


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


class ChatCompletion(Out):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageOut
    dfastllm: Figures
    prompt_token_ids: list[int] | None = None


class Delta(Out):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallOut] | None = None


class ChatChunkChoice(Out):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatChunk(Out):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: UsageOut | None = None
    dfastllm: Figures | None = None
    canvas: dict[str, Any] | None = None


def usage_out(usage: Usage) -> UsageOut:
    return UsageOut(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
    )


def figures(usage: Usage, timings: Sequence[Timings] = ()) -> Figures:
    """timings: one per choice where they were asked for."""
    more: dict[str, Any] = {"timings": list(timings)} if timings else {}
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
