"""The law of every request body: tolerant where clients repeat, strict where people choose.

null is absence, in every object of a body; the output fields of a message that is sent back are dropped; a name that
does not exist is refused with the nearest that does; a field or a value that asks for what is not done is refused with
a sentence that names the missing feature (`MISSING`). Values are not coerced ("1" is no number).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from dfastllm.options import OPTIONS

__all__ = ["MISSING", "Body", "conflict", "missing_feature", "printable"]

_CONSTRAINED = "output is not constrained to a form yet; ask for the form in the prompt."
_TEXT_ONLY = "the models served here read and write text only."
_ALIKE = 0.75  # less, and `thinking` is told to be `timings`

# What a path of a body would need, in words. Indices of lists are left out of the path. A path with "=" is one value.
MISSING: Mapping[str, str] = {
    "add_special_tokens=True": "the template of a chat writes the special tokens itself.",
    "audio": _TEXT_ONLY,
    "best_of": "n choices are made and n are answered; ranking more than n is not done.",
    "chat_template": "a template is code, so the server's owner chooses it (--chat-template FILE).",
    "continue_final_message": "the template always opens a new turn; a begun answer is not continued.",
    "documents": "documents reach a template as a variable: send them in chat_template_kwargs.",
    "echo=True": "an answer of a chat does not repeat the prompt; /v1/completions echoes.",
    "enable_thinking": "it is a variable of the template: send it in chat_template_kwargs.",
    "function_call": "the older form of tool_choice is not taken; send tools and tool_choice.",
    "functions": "the older form of tools is not taken; send tools.",
    "guided_choice": _CONSTRAINED,
    "guided_grammar": _CONSTRAINED,
    "guided_json": _CONSTRAINED,
    "guided_regex": _CONSTRAINED,
    "length_penalty": "it belongs to beam search, which is not done.",
    "logits_processors": "code of a request is not run; logit_bias and allowed_token_ids change logits.",
    "messages.content.type=file": _TEXT_ONLY,
    "messages.content.type=image_url": _TEXT_ONLY,
    "messages.content.type=input_audio": _TEXT_ONLY,
    "messages.content.type=video_url": _TEXT_ONLY,
    "modalities": _TEXT_ONLY,
    "prediction": 'a predicted answer is not used; speculative_config {"method": "ngram"} drafts from the prompt.',
    "prompt_logprobs": "log probabilities of a prompt are not computed yet.",
    "response_format.type=json_object": _CONSTRAINED,
    "response_format.type=json_schema": _CONSTRAINED,
    "response_format.type=structural_tag": _CONSTRAINED,
    "service_tier": "there is one tier, without a promise of precedence.",
    "speculative_config.model": "the server's owner chooses the models (--speculative-config); `method` picks.",
    "store": "nothing is stored.",
    "structured_outputs": _CONSTRAINED,
    "tool_choice": "a call cannot be guaranteed yet; use auto and say in the prompt that a tool must be used.",
    "truncate_prompt_tokens": "a prompt is never cut; send what fits the context.",
    "use_beam_search": "beam search is not done.",
    "web_search_options": "the server does not search the web.",
}


def printable(text: str, limit: int = 2000) -> str:
    """Text that can be sent as UTF-8 (a request may name a field with a lone surrogate), cut to `limit`."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= limit else text[: limit - 1] + "…"


def missing_feature(field: str) -> PydanticCustomError:
    """What a validator raises for a field of its object that asks for what is not done; `MISSING` says what that is."""
    return PydanticCustomError("missing_feature", "it asks for what is not done", {"field": field})


def conflict(field: str, why: str) -> PydanticCustomError:
    """What a validator raises for a field that does not fit another one. why: the whole sentence."""
    return PydanticCustomError("conflict", "it does not fit another field", {"field": field, "why": why})


def _declare_tolerance(schema: dict[str, Any], cls: type[Body]) -> None:
    """What validation lets pass, in the JSON schema: any field may be null, replayed ones may be anything."""
    schema["additionalProperties"] = {"type": "null"}
    if cls.examples:
        schema["examples"] = list(cls.examples)
    for name in sorted(cls.replayed):
        schema["properties"][name] = {"description": "Taken and ignored: an output field that clients send back."}


class Body(BaseModel):
    """An object of a request. replayed: names that are dropped whatever they hold. kind: the one value of `type`, where
    other kinds carry other fields, so that the kind is refused rather than its fields. yaml: may be sent as YAML too.
    examples: for the documentation, and tried by its tests."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,  # Python's JSON reads NaN and 1e999
        protected_namespaces=(),
        json_schema_extra=_declare_tolerance,
    )
    replayed: ClassVar[frozenset[str]] = frozenset()
    kind: ClassVar[str | None] = None
    yaml: ClassVar[bool] = False
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _tidy(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {name: value for name, value in data.items() if value is not None and name not in cls.replayed}
        if cls.kind is not None and isinstance(got := kept.get("type", cls.kind), str) and got != cls.kind:
            details = {"field": "type", "got": printable(got, 80), "wanted": cls.kind}
            raise PydanticCustomError("wrong_kind", "another kind", details)
        fields = cls.model_fields
        for name in kept:
            if name not in fields:
                raise cls._unknown(name)
        return kept

    @classmethod
    def _unknown(cls, name: str) -> PydanticCustomError:
        shown = printable(name, 80)
        fields = cls.model_fields
        # The name that the option has here comes before names that look alike.
        also = [row.wire for row in OPTIONS if any(wire.name == name for wire in row.wire)]
        near = [wire.name for wires in also for wire in wires if wire.name in fields]
        near = near or difflib.get_close_matches(shown, fields, n=1, cutoff=_ALIKE)
        return PydanticCustomError("unknown_field", "unknown field", {"field": shown, "near": near[0] if near else ""})
