"""From a body's fields to the parameters of a request, by the table of `dfastllm.options`.

Only what a body gives is passed on: the engine's admission fills in the rest and refuses what the model cannot honour.
Here is what the wire alone has: fields that are two names of one option, the two switches of the cache, log
probabilities of a chat, and the way back from an option's name to the field that gave it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from dfastllm.core import DecodeParams, SamplingParams, SpeculativeParams
from dfastllm.core import speculative_params as parse_speculative
from dfastllm.errors import DFastLLMError, UnsupportedError, ValidationError
from dfastllm.options import GROUPS, SPECULATIVE_WIRE, Front, Group, Option, RequestOptions, wire_fields
from dfastllm.server.schemas import ChatRequest, GenerationRequest
from dfastllm.server.serving import ServedModel

__all__ = ["decode_params", "on_the_wire", "request_options", "sampling_params", "speculative_params"]

SWITCHES = ("use_cache", "use_dual_cache")


def sampling_params(body: GenerationRequest) -> SamplingParams:
    """What the body says of sampling. Raises ValidationError naming the field."""
    given = _given(body, "sampling")
    logprobs = given.pop("logprobs", None)
    if isinstance(body, ChatRequest):
        top = getattr(body, "top_logprobs", None)
        logprobs = (top or 0) if getattr(body, "logprobs", None) else None
    if "logit_bias" in given:
        given["logit_bias"] = {_token(key): value for key, value in given["logit_bias"].items()}
    try:
        return SamplingParams(**given, logprobs=logprobs)
    except ValidationError as error:
        raise on_the_wire(error, body) from None


def decode_params(body: GenerationRequest, model: ServedModel) -> DecodeParams | None:
    """What the body says of the canvas; None for nothing. Raises ValidationError or UnsupportedError naming the
    field."""
    given = _given(body, "decode")
    cache = _cache(body, model)
    if cache is not None:
        given["cache"] = cache
    if given.get("provisional") is False or (model.diffuses and "mode" in given):
        given["provisional"] = bool(given.get("provisional"))  # guesses only for who watches, whatever the preset
    return DecodeParams(**given) if given else None


def speculative_params(body: GenerationRequest, model: ServedModel) -> SpeculativeParams | None:
    """How the request drafts; None: as the engine does by default. Raises ValidationError naming the field."""
    if body.speculative_config is None:
        return None
    try:
        return parse_speculative(_given(body, "speculative"), model.speculative)
    except ValidationError as error:
        if error.param not in SpeculativeParams.TABLE:
            raise
        where = SPECULATIVE_WIRE
        raise ValidationError(f"{where}.{error.message}", param=f"{where}.{error.param}") from None


def request_options(body: GenerationRequest, model: ServedModel) -> RequestOptions:
    """What the body says of the request itself. Raises ValidationError naming the field."""
    given = {option.name: value for _, option, value in _sent(body, "request")}
    named = {name: _adapter(value, name) for name, option, value in _sent(body, "request") if option.name == "lora"}
    if model.lora:
        named = {"model": model.lora, **named}
    if len(set(named.values())) > 1:
        raise ValidationError(
            " and ".join(f"{field} names the adapter {name!r:.80}" for field, name in named.items()) + "; send one.",
            param=[*named][-1],
        )
    return RequestOptions(**{**given, "lora": next(iter(named.values()), "")})


def _adapter(value: Any, field: str) -> str:
    """The name in a field that may hold a list of adapters with scales, as llama-server has it. Raises
    UnsupportedError for what is more than one whole adapter."""
    if isinstance(value, str):
        return value
    if len(value) != 1 or value[0].scale not in (None, 1):
        got = f"{len(value)} adapters" if len(value) != 1 else f"scale {value[0].scale}"
        raise UnsupportedError(
            f"{field} takes one adapter at scale 1, got {got}: adapters are not mixed or scaled here.",
            param=field,
            hint="Merge them into one by PEFT's add_weighted_adapter.",
        )
    return str(value[0].id)


def on_the_wire(error: DFastLLMError, body: GenerationRequest) -> DFastLLMError:
    """The error with the field that the body has in place of the option's or the engine's own name for it."""
    param = error.param
    if param == "prompt" and isinstance(body, ChatRequest):
        error.param = "messages"
        return error
    sent = [name for group in GROUPS for name, option, _ in _sent(body, group) if option.name == param]
    if param == "logprobs" and isinstance(body, ChatRequest):
        sent = ["top_logprobs"]
    if param == "cache" and not sent:
        sent = [name for name in SWITCHES if getattr(body, name, None) is not None]
    if param is not None and sent and param not in sent:
        error.param = sent[0]
        if error.message.startswith(param):
            error.message = sent[0] + error.message.removeprefix(param)
            error.args = (error.message,)
    return error


@cache
def _fields(front: Front, group: Group) -> tuple[frozenset[str], tuple[tuple[str, str, str, Option], ...]]:
    """The fields of a route's body that give an option of a group by themselves: their names in the body, and (name,
    part before a dot, part after it, option) of each."""
    apart = (*SWITCHES, "top_logprobs")
    found = [(f.name, f.option) for f in wire_fields(front) if f.option.group == group]
    rows = [(name, *name.partition(".")[::2], option) for name, option in found if name not in apart]
    return frozenset(top for _, top, _, _ in rows), tuple(rows)


def _sent(body: GenerationRequest, group: Group) -> Iterator[tuple[str, Option, Any]]:
    """(name, option, value) of each field of the body that gives an option of the group."""
    sent = body.model_fields_set
    tops, rows = _fields("chat" if isinstance(body, ChatRequest) else "completions", group)
    if tops.isdisjoint(sent):
        return
    for name, top, rest, option in rows:
        if top in sent:
            value = getattr(body, top)
            value = getattr(value, rest, None) if rest else value
            if value is not None:
                yield name, option, value


def _given(body: GenerationRequest, group: Group) -> dict[str, Any]:
    """Option -> value, of one group. Raises ValidationError when two names of one option say different things."""
    given: dict[str, Any] = {}
    names: dict[str, str] = {}
    for name, option, value in _sent(body, group):
        if given.setdefault(option.name, value) != value:
            raise ValidationError(
                f"{names[option.name]} ({given[option.name]}) and {name} ({value}) are two names of one option; "
                "send one.",
                param=name,
            )
        names.setdefault(option.name, name)
    return given


def _token(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 19):
        raise ValidationError(f"logit_bias maps token ids to numbers, got the key {key[:80]!r}.", param="logit_bias")
    return int(key)


def _cache(body: GenerationRequest, model: ServedModel) -> str | None:
    """The cache strategy that the switches ask for, or `cache` by name; None: they ask for nothing. What a model has
    anyway may be asked for: an autoregressive one keeps K,V, a block-diffusion one exact K,V of its finished blocks. A
    switch that is true says no more than its default does, so it stands against nothing."""
    kept, dual = (getattr(body, name, None) for name in SWITCHES)
    name: str | None = getattr(body, "cache", None)
    for switch, off, against in (
        (SWITCHES[0], kept is False, name != "none"),
        (SWITCHES[1], dual is False, name == "dual"),
    ):
        if name is not None and off and against:
            raise ValidationError(f"cache is {name!r}, but {switch} is false; send one of them.", param="cache")
    if name is not None or (kept is None and dual is None):
        return name
    if kept is False:
        return "none"
    if model.info.kind == "diffusion":
        return "dual" if dual is not False else "prefix"
    return None
