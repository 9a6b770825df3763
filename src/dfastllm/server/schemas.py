"""The wire: request bodies of the OpenAI API and of dfastllm's extensions.

Options of a request and hints come from the one table of `options`, by their names on the wire; declared here is what
belongs to the HTTP API alone. Every field is honoured or is one whose honouring means doing nothing. What else a body
may and may not hold is the law of `body`. Ranges of options are told in the schema and checked where the parameters
are made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, create_model, model_validator

from dfastllm.options import HINTS, SPECULATIVE_HELP, SPECULATIVE_WIRE, Front, Hint, WireField, wire_fields
from dfastllm.server.body import Body, conflict, missing_feature
from dfastllm.server.bounds import MOST, AtMost
from dfastllm.text.messages import REPLAYED

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "GenerationRequest",
    "LoadLoraRequest",
    "LoraChoice",
    "Message",
    "StreamOptions",
    "TokenizeRequest",
    "Tool",
    "UnloadLoraRequest",
]

Int = Annotated[int, Field(ge=-(2**63), lt=2**63)]
TokenIds = Annotated[list[Annotated[Int, Field(json_schema_extra={"minimum": 0})]], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
_BOUNDED: dict[Any, Any] = {int: Int, list[int]: TokenIds, str | list[str]: str | Texts}
TemplateKwargs = Annotated[dict[str, Any], AtMost("chat_template_kwargs")]
_GENERATION_PROMPT: Any = Field(None, description="Whether the template opens the assistant's turn. Default true.")
_TEMPLATE_KWARGS: Any = Field(
    None, description="Variables of the chat template, such as enable_thinking. They win over the server's own."
)
_PARSE_SPECIAL: Any = Field(
    None, description="Whether special tokens that a text prompt spells out become those tokens. Default true."
)
_PARSE_SPECIAL_IN_CHAT: Any = Field(
    None,
    description="Whether special tokens that messages and tools spell out become those tokens. Default: as the server"
    " was started (--chat-parse-special), else false: they stay text.",
)
_MODEL = "demo-diffusion"  # of the examples
_CACHE_CONTROL = frozenset({"cache_control"})


class LoraChoice(Body):
    """An adapter of a request in llama-server's form."""

    id: Annotated[str, Field(min_length=1, max_length=256)] = Field(description="Its name; numbers are not taken.")
    scale: float | None = Field(None, description="1; another number is refused.")


_BOUNDED[str | list[dict[str, Any]]] = (
    Annotated[str, Field(min_length=1, max_length=256)] | Annotated[list[LoraChoice], Field(max_length=64)]
)


def _option_field(row: WireField) -> tuple[Any, Any]:
    annotation = _BOUNDED.get(row.annotation, row.annotation)
    limits: dict[str, Any] = {"minimum": row.low, "maximum": row.high, "exclusiveMinimum": row.above}
    told = Field(json_schema_extra={name: limit for name, limit in limits.items() if limit is not None})
    if row.annotation is str:
        low, high = (None if limit is None else int(limit) for limit in (row.low, row.high))
        annotation = Annotated[str, Field(min_length=low, max_length=high)]
    elif row.annotation in (int, float):
        annotation = Annotated[annotation, told]
    elif row.annotation == dict[str, float]:
        annotation = dict[str, Annotated[float, told]]
    if row.name in MOST:
        annotation = Annotated[annotation, AtMost(row.name)]
    return annotation | None, Field(None, description=row.help)


def _hint_field(hint: Hint) -> tuple[Any, Any]:
    annotation = hint.annotation
    if hint.accepts is not None:
        annotation = Literal[hint.accepts]
        if hint.annotation is float:
            annotation = Annotated[float, Field(ge=min(hint.accepts), le=max(hint.accepts))]
    if hint.name in MOST:
        annotation = Annotated[annotation, AtMost(hint.name)]
    return annotation | None, Field(None, description=f"No effect. {hint.help}")


def _fields(front: Front, where: str = "") -> dict[str, Any]:
    """The fields that the table gives to a route's body, or to the object `where` in it."""
    prefix = f"{where}." if where else ""
    fields: dict[str, Any] = {
        row.name.removeprefix(prefix): _option_field(row)
        for row in wire_fields(front)
        if row.name.startswith(prefix) and "." not in row.name.removeprefix(prefix)
    }
    if not where:
        fields |= {hint.name: _hint_field(hint) for hint in HINTS if front in hint.fronts}
    return fields


class _StreamOptions(Body):
    include_usage: bool | None = Field(None, description="A last chunk with empty choices carries the usage.")
    continuous_usage_stats: bool | None = Field(
        None, description="Every chunk with a choice carries the usage of that choice so far."
    )
    include_obfuscation: bool | None = Field(
        None, description="Every chunk is filled up to a multiple of 64 bytes by `obfuscation`. Default false."
    )


if TYPE_CHECKING:

    class StreamOptions(_StreamOptions): ...

    class SpeculativeOptions(Body): ...

else:
    StreamOptions = create_model("StreamOptions", __base__=_StreamOptions, **_fields("chat", "stream_options"))
    SpeculativeOptions = create_model("SpeculativeOptions", __base__=Body, **_fields("chat", SPECULATIVE_WIRE))


class GenerationRequest(Body):
    """What completions and chat completions share and no other front has."""

    if TYPE_CHECKING:  # fields of the table that this room itself acts on
        n: int | None = None
        priority: int | None = None
        timeout: float | None = None
        cache_salt: str | None = None

    model: str | None = Field(
        None, description="A name that GET /v1/models lists. May be left out where one model is served."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    speculative_config: SpeculativeOptions | None = Field(None, description=SPECULATIVE_HELP)
    return_token_ids: bool | None = Field(None, description="Choices carry token_ids too.")
    return_tokens_as_token_ids: bool | None = Field(
        None, description='Log probabilities name tokens by their ids, "token_id:123".'
    )
    timings: bool | None = Field(
        None,
        description="The dfastllm block (of a stream: a last chunk) also says when the parts of each answer came.",
    )
    best_of: Annotated[Int, Field(ge=1)] | None = Field(None, description="As n; another number is refused.")

    @model_validator(mode="after")
    def _agree(self) -> GenerationRequest:
        if self.best_of is not None and self.best_of != (getattr(self, "n", None) or 1):
            raise missing_feature("best_of")
        if self.stream_options is not None and not self.stream and any(value for _, value in self.stream_options):
            raise conflict("stream_options", "stream_options needs stream: true.")
        return self

    def streams(self, option: str) -> bool:
        """Whether the stream was asked for this option of stream_options."""
        return self.stream_options is not None and bool(getattr(self.stream_options, option))


if TYPE_CHECKING:

    class _CompletionOptions(GenerationRequest): ...

    class _ChatOptions(GenerationRequest): ...

else:
    _CompletionOptions = create_model("_CompletionOptions", __base__=GenerationRequest, **_fields("completions"))
    _ChatOptions = create_model("_ChatOptions", __base__=GenerationRequest, **_fields("chat"))


class CompletionRequest(_CompletionOptions):
    if TYPE_CHECKING:
        logprobs: int | None = None

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"model": _MODEL, "prompt": "What is 12 + 30?", "max_tokens": 32},
        {"model": _MODEL, "prompt": ["one", "two"], "n": 2, "seed": 7, "temperature": 0.8, "logprobs": 1},
        {"model": _MODEL, "prompt": "The capital of", "suffix": " is Oslo.", "max_tokens": 8},
        {
            "model": _MODEL,
            "prompt": [5, 6, 7],
            "max_tokens": 32,
            "block_length": 8,
            "threshold": 0.9,
            "stream": True,
            "stream_options": {"include_usage": True, "canvas_events": True},
        },
    )

    prompt: str | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)] = Field(
        description="Text, token ids, or a list of either. The end-of-text token is not added."
    )
    suffix: str | None = Field(None, description="Diffusion models: text after the completion (infilling).")
    echo: bool | None = Field(None, description="The prompt precedes the completion. Not together with logprobs.")
    add_special_tokens: bool | None = Field(
        None, description="Whether the tokenizer puts its own special tokens around a text prompt. Default true."
    )
    parse_special: bool | None = _PARSE_SPECIAL

    @model_validator(mode="after")
    def _no_prompt_logprobs(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            why = "echo does not go with logprobs: the log probabilities of a prompt are not computed yet."
            raise conflict("echo", why)
        return self


class Function(Body):
    name: str
    description: str | None = None
    parameters: Annotated[dict[str, Any], AtMost("parameters")] | None = None
    strict: bool | None = Field(None, description="A hint: arguments are not constrained yet.")


class Tool(Body):
    replayed: ClassVar[frozenset[str]] = _CACHE_CONTROL

    type: Literal["function"]
    function: Function


class CalledFunction(Body):
    replayed: ClassVar[frozenset[str]] = frozenset({"parsed_arguments"})

    name: str
    arguments: str | None = Field(None, description="A JSON object as text; empty or left out: no arguments.")


class MessageToolCall(Body):
    replayed: ClassVar[frozenset[str]] = frozenset({"cache_control", "index", "provider_specific_fields"})

    id: str
    type: Literal["function"] | None = None
    function: CalledFunction


class TextPart(Body):
    replayed: ClassVar[frozenset[str]] = frozenset({"annotations", "cache_control"})
    kind: ClassVar[str | None] = "text"

    type: Literal["text"]
    text: str


class RefusalPart(Body):
    """Of an assistant's message: it stands for its text."""

    replayed: ClassVar[frozenset[str]] = TextPart.replayed
    kind: ClassVar[str | None] = "refusal"

    type: Literal["refusal"]
    refusal: str


def _part_kind(part: Any) -> str:
    """The name of the class that a part of a message is read as; what is neither is refused as no text."""
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return "RefusalPart" if kind == "refusal" else "TextPart"


Part = Annotated[
    Annotated[TextPart, Tag("TextPart")] | Annotated[RefusalPart, Tag("RefusalPart")], Discriminator(_part_kind)
]


class Message(Body):
    """One turn. What an assistant's message holds beside content and calls is taken, as clients send back whole
    answers."""

    replayed: ClassVar[frozenset[str]] = REPLAYED

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], AtMost("content")] | None = None
    name: str | None = None
    tool_calls: Annotated[list[MessageToolCall], AtMost("tool_calls")] | None = Field(
        None, description="An empty list counts as none."
    )
    tool_call_id: str | None = None
    function_call: CalledFunction | None = Field(None, description="The older form of one call in tool_calls.")
    refusal: str | None = Field(None, description="The text of an assistant's message without content.")


class ResponseFormat(Body):
    kind: ClassVar[str | None] = "text"

    type: Literal["text"] = Field(description="json_object and json_schema are refused: output is not constrained yet.")


class ChatRequest(_ChatOptions):
    if TYPE_CHECKING:
        logprobs: bool | None = None
        top_logprobs: int | None = None

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"model": _MODEL, "messages": [{"role": "user", "content": "What is 12 + 30?"}]},
        {
            "model": _MODEL,
            "messages": [{"role": "user", "content": "Weather in Oslo?"}],
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": "weather",
                        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
                    },
                }
            ],
            "max_tokens": 64,
            "logprobs": True,
            "top_logprobs": 2,
        },
        {
            "model": _MODEL,
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 32,
            "mode": "streaming",
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True, "canvas_events": True},
            "timings": True,
        },
    )

    messages: Annotated[list[Message], Field(min_length=1), AtMost("messages")]
    tools: Annotated[list[Tool], AtMost("tools")] | None = None
    tool_choice: Literal["none", "auto"] | None = Field(
        None, description="auto when tools are given. required and a named function are refused: not guaranteed yet."
    )
    parallel_tool_calls: bool | None = Field(
        None, description="false: an answer ends with its first call. Default true: the model decides."
    )
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[Literal["text"]], AtMost("modalities")] | None = Field(
        None, description="No effect: text is all there is."
    )
    add_generation_prompt: bool | None = _GENERATION_PROMPT
    chat_template_kwargs: TemplateKwargs | None = _TEMPLATE_KWARGS
    parse_special: bool | None = _PARSE_SPECIAL_IN_CHAT
    continue_final_message: Literal[False] | None = Field(None, description="true is refused: a turn is always new.")

    @model_validator(mode="after")
    def _fit_together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise conflict("top_logprobs", "top_logprobs needs logprobs: true.")
        if self.tool_choice == "auto" and not self.tools:
            raise conflict("tool_choice", "tool_choice auto needs tools.")
        return self


class TokenizeRequest(Body):
    """A prompt or messages. `model` may be left out where one model is served."""

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"model": _MODEL, "prompt": "Hello", "return_token_strs": True},
        {"model": _MODEL, "messages": [{"role": "user", "content": "Hello"}]},
    )

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1), AtMost("messages")] | None = None
    tools: Annotated[list[Tool], AtMost("tools")] | None = None
    add_special_tokens: bool | None = Field(None, description="Of a prompt's text. Default true.")
    parse_special: bool | None = Field(
        None, description="As in a completion of the prompt, or in a chat of the messages."
    )
    add_generation_prompt: bool | None = _GENERATION_PROMPT
    chat_template_kwargs: TemplateKwargs | None = _TEMPLATE_KWARGS
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"model": _MODEL, "tokens": [5, 6, 7]},)

    model: str | None = None
    tokens: TokenIds


class LoadLoraRequest(Body):
    """The body of /v1/load_lora_adapter, vLLM's."""

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"lora_name": "capitals", "lora_path": "capitals"},)

    lora_name: Annotated[str, Field(min_length=1, max_length=256)] = Field(
        description="The name that requests will choose it by; without a colon."
    )
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)] = Field(
        description="A PEFT directory below the server's --lora-root; a relative path begins there."
    )
    model: str | None = Field(None, description="The model that it is for. May be left out where one is served.")
    load_inplace: bool | None = Field(
        None,
        description="Also where an adapter of that name is loaded: requests that run go on with the one they have.",
    )


class UnloadLoraRequest(Body):
    """The body of /v1/unload_lora_adapter, vLLM's."""

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"lora_name": "capitals"},)

    lora_name: Annotated[str, Field(min_length=1, max_length=256)] = Field(description="Also MODEL:ADAPTER.")
    model: str | None = Field(None, description="Where several models have an adapter of that name.")
    lora_int_id: Int | None = Field(None, description="No effect: adapters are known by their names.")
