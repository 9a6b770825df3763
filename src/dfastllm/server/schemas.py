"""The wire: request bodies of the OpenAI API and of dfastllm's extensions.

Every field declared here is honoured or, where this says "no effect", is one whose honouring means doing nothing. A
field that is not declared is refused by name (`extra="forbid"`), and values are not coerced ("1" is no number). Ranges
of sampling and decoder options are checked in one place, `core.SamplingParams` and `core.DecodeParams`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "GenerationRequest",
    "Message",
    "StreamOptions",
    "TokenizeRequest",
]

Int = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[Int], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="A last chunk with empty choices carries the usage.")
    canvas_events: bool | None = Field(
        None,
        description="Diffusion models: further chunks with empty choices carry typed events of each denoising step in "
        "`canvas`: commit, provisional, revise, block_done, stats.",
    )


class GenerationRequest(Body):
    """What completions and chat completions share."""

    model: str = Field(description="A name that GET /v1/models lists.")
    max_tokens: Count | None = Field(
        None,
        description="New tokens; for diffusion models the canvas length, rounded up to whole blocks. Default 128 for "
        "diffusion models; for autoregressive ones 16 (completions) or what the context leaves (chat).",
    )
    min_tokens: Count | None = Field(None, description="No end of text before so many tokens. Default 0.")
    n: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(
        None, description="Choices for each prompt. Choice i of a seeded request draws with seed + i."
    )
    temperature: float | None = Field(None, description="0 is greedy. Default 1.0; 0.0 for diffusion models.")
    top_p: float | None = None
    top_k: Int | None = Field(None, description="0 or -1: off.")
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = Field(None, description="Token id (as text) to bias in [-100, 100].")
    allowed_token_ids: TokenIds | None = None
    seed: Int | None = Field(None, description="The same request with the same seed gives the same tokens.")
    stop: str | Texts | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = Field(None, description="Choices carry token_ids too.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    timings: bool | None = Field(
        None,
        description="The dfastllm block (of a stream: a last chunk) also says when the parts of each answer came.",
    )
    priority: Int | None = Field(None, description="Lower runs first. Default 0.")
    timeout: float | None = Field(None, description="Seconds until 504, waiting included; the server's limit at most.")

    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = Field(
        None,
        description="K,V of a common beginning are shared only among requests of the same salt; by default among those "
        "without one. Refused by masked-diffusion models, which share nothing.",
    )

    speculative_config: dict[str, Any] | None = Field(
        None,
        description="Autoregressive: how this request drafts, as in --speculative-config but without a model: method "
        "(none, ngram, suffix, draft_model, diffusion), num_speculative_tokens, acceptance, adaptive, "
        "prompt_lookup_min, prompt_lookup_max, suffix_decoding_*. What is left out is the server's default.",
    )

    # diffusion
    use_cache: bool | None = Field(None, description="Diffusion: keep K,V between steps. Default true.")
    use_dual_cache: bool | None = Field(
        None,
        description="Diffusion: keep the K,V of what follows the block too. Default: as use_cache. The cache is none "
        "(use_cache false), prefix (use_cache true, use_dual_cache false) or dual (both true).",
    )
    cache: Literal["none", "prefix", "dual", "windowed"] | None = Field(
        None, description="Diffusion: the cache by name, in place of use_cache and use_dual_cache."
    )
    threshold: float | None = Field(None, description="Diffusion: commit every token at least this sure, in (0, 1].")
    factor: float | None = Field(None, description="Diffusion: factor of dynamic parallel decoding; beats threshold.")
    steps: Int | None = Field(None, description="Diffusion: denoising steps over the canvas. Default 128.")
    block_length: Int | None = Field(
        None,
        description="Diffusion: tokens per block. Default 32, or the block a block-diffusion model was trained on.",
    )
    remasking: str | None = Field(None, description="Diffusion: low_confidence (default), random, entropy or margin.")
    mode: Literal["standard", "fast", "streaming", "turbo"] | None = Field(
        None, description="Diffusion: a preset of the fields here; a field that is given wins over it."
    )
    rule: str | None = Field(None, description="Diffusion: unmasking rule by name; default from threshold and factor.")
    rule_options: dict[str, Any] | None = Field(None, description="Diffusion: the rule's own options by name.")
    early_stop: bool | None = Field(None, description="Diffusion: stop at a settled end of text. Default true.")

    # no effect: bookkeeping of the caller, and options that ask for what is done anyway
    user: str | None = Field(None, description="No effect.")
    metadata: dict[str, str] | None = Field(None, description="No effect: nothing is stored.")
    store: Literal[False] | None = Field(None, description="No effect: nothing is stored. true is refused.")
    safety_identifier: str | None = Field(None, description="No effect.")
    service_tier: Literal["auto", "default"] | None = Field(None, description="No effect: there is one tier.")


class CompletionRequest(GenerationRequest):
    prompt: str | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)] = Field(
        description="Text, token ids, or a list of either. The end-of-text token is not added."
    )
    suffix: str | None = Field(None, description="Diffusion models: text after the completion (infilling).")
    echo: bool | None = Field(None, description="The prompt precedes the completion. Not together with logprobs.")
    logprobs: Count | None = Field(None, description="Log probabilities of so many best tokens, at most 20.")
    add_special_tokens: bool | None = Field(
        None, description="Whether the tokenizer puts its own special tokens around a text prompt. Default true."
    )


class Function(Body):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = Field(None, description="true is refused: arguments are not constrained yet.")


class Tool(Body):
    type: Literal["function"]
    function: Function


class CalledFunction(Body):
    name: str
    arguments: str


class MessageToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None


class ResponseFormat(Body):
    type: Literal["text"] = Field(description="json_object and json_schema are refused: output is not constrained yet.")


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Count | None = Field(None, description="The newer name of max_tokens.")
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto"] | None = Field(
        None, description="auto when tools are given. required and a named function are refused: not guaranteed yet."
    )
    parallel_tool_calls: Literal[True] | None = Field(
        None, description="No effect: the model decides. false is refused."
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = Field(None, description="No effect: text is all there is.")


class TokenizeRequest(Body):
    """A prompt or messages. `model` may be left out where one model is served."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: TokenIds
