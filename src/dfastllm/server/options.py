"""From a body's fields to SamplingParams and DecodeParams: defaults per kind of model, presets, and what is refused.

Defaults follow the documents: diffusion models take temperature 0.0, max_tokens 128, steps 128, block_length 32,
use_cache and use_dual_cache true; autoregressive ones follow OpenAI. A field that the model cannot honour is refused by
name. Ranges are checked by the params themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dfastllm.compat import DiffusionConfig
from dfastllm.core import Cache, DecodeParams, SamplingParams, SpeculativeParams
from dfastllm.core import speculative_params as parse_speculative
from dfastllm.errors import ContextLengthError, UnsupportedError, ValidationError
from dfastllm.server.schemas import ChatRequest, GenerationRequest
from dfastllm.server.serving import ServedModel

__all__ = ["decode_params", "sampling_params", "speculative_params"]

DIFFUSION_TOKENS = 128
DIFFUSION_STEPS = 128
DIFFUSION_BLOCK = 32
COMPLETION_TOKENS = 16

_DECODE_FIELDS = (
    *("use_cache", "use_dual_cache", "cache", "threshold", "factor", "steps", "block_length", "remasking", "mode"),
    *("rule", "rule_options", "early_stop"),
)


def sampling_params(
    body: GenerationRequest, model: ServedModel, *, longest: int, logprobs: int | None
) -> SamplingParams:
    """Sampling of one choice. `longest`: tokens of the longest prompt of the call with its suffix."""
    given: dict[str, Any] = {
        name: value
        for name in (
            *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
            *("seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens", "allowed_token_ids"),
            *("include_stop_str_in_output", "skip_special_tokens"),
        )
        if (value := getattr(body, name)) is not None
    }
    if model.diffuses:
        given.setdefault("temperature", 0.0)
    return SamplingParams(
        **given, max_tokens=_max_tokens(body, model, longest), logprobs=logprobs, logit_bias=_logit_bias(body)
    )


def _max_tokens(body: GenerationRequest, model: ServedModel, longest: int) -> int:
    asked = body.max_tokens
    if isinstance(body, ChatRequest) and body.max_completion_tokens is not None:
        if asked not in (None, body.max_completion_tokens):
            raise ValidationError(
                f"max_tokens ({asked}) and max_completion_tokens ({body.max_completion_tokens}) are two names of one "
                "option; send one.",
                param="max_completion_tokens",
            )
        asked = body.max_completion_tokens
    if asked is not None:
        return asked
    left = model.context - longest
    if left < 1:
        raise ContextLengthError(
            f"The prompt has {longest} tokens; the context of {model.name!r} is {model.context} with the answer.",
            param="messages" if isinstance(body, ChatRequest) else "prompt",
        )
    if model.diffuses:
        return DIFFUSION_TOKENS
    return left if isinstance(body, ChatRequest) else COMPLETION_TOKENS


def _logit_bias(body: GenerationRequest) -> dict[int, float]:
    bias: dict[int, float] = {}
    for key, value in (body.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 19):
            raise ValidationError(
                f"logit_bias maps token ids to numbers, got the key {key[:80]!r}.", param="logit_bias"
            )
        bias[int(key)] = value
    return bias


def decode_params(body: GenerationRequest, model: ServedModel, max_tokens: int) -> DecodeParams | None:
    """How the canvas is unmasked; None for an autoregressive model, which refuses these fields."""
    given = {name: value for name in _DECODE_FIELDS if (value := getattr(body, name)) is not None}
    events = body.stream_options is not None and bool(body.stream_options.canvas_events)
    if not model.diffuses:
        if events:
            given["stream_options.canvas_events"] = True
        if given:
            name = next(iter(given))
            raise UnsupportedError(
                f"{name} is an option of diffusion models; {model.name!r} is autoregressive.", param=name
            )
        return None
    options = _preset(given.pop("mode"), max_tokens, model) if "mode" in given else {}
    if model.info.kind == "block":
        options.pop("cache", None)
        _block_cache(given, model)
    else:
        options["cache"] = _cache(given, options.get("cache", "dual"))
    for name in ("use_cache", "use_dual_cache", "cache"):
        given.pop(name, None)
    if given.keys() & {"rule", "factor", "threshold"}:  # the preset's own rule gives way
        options = {name: value for name, value in options.items() if name not in ("factor", "threshold")}
    if "rule_options" in given:
        given["options"] = {**options.get("options", {}), **given.pop("rule_options")}
    options.update(given)
    if model.info.kind == "diffusion":
        block = options.setdefault("block_length", DIFFUSION_BLOCK)
        if block >= 1:
            # a canvas of more than 128 blocks needs at least one step for each
            options.setdefault("steps", max(DIFFUSION_STEPS, -(-max_tokens // block)))
    return DecodeParams(provisional=events, **options)


def speculative_params(body: GenerationRequest, model: ServedModel) -> SpeculativeParams | None:
    """How the request drafts; None: as the engine does by default."""
    if body.speculative_config is None:
        return None
    return parse_speculative(body.speculative_config, model.speculative)


def _preset(mode: str, max_tokens: int, model: ServedModel) -> dict[str, Any]:
    """The fields that a mode sets, those of the Python API's DiffusionConfig."""
    preset = DiffusionConfig(mode=mode).decode_params(max_tokens, model.info)
    chosen = {"cache", "block_length", "threshold", "factor", "options"}
    return {name: value for name in sorted(chosen) if (value := getattr(preset, name))}


def _cache(given: Mapping[str, Any], default: Cache) -> Cache:
    """The cache strategy that follows from use_cache and use_dual_cache, or `cache` by name."""
    names = [name for name in ("use_cache", "use_dual_cache") if name in given]
    if "cache" in given:
        if names:
            raise ValidationError(f"cache and {names[0]} are two forms of one option; send one.", param="cache")
        cache: Cache = given["cache"]
        return cache
    if not names:
        return default
    if not given.get("use_cache", True):
        if given.get("use_dual_cache"):
            raise ValidationError("use_dual_cache needs use_cache.", param="use_dual_cache")
        return "none"
    return "dual" if given.get("use_dual_cache", True) else "prefix"


def _block_cache(given: Mapping[str, Any], model: ServedModel) -> None:
    """Block-diffusion models keep the exact K,V of finished blocks: that cannot be switched off or made dual."""
    for name, harmless in (("use_cache", True), ("use_dual_cache", False), ("cache", None)):
        if name in given and given[name] is not harmless:
            raise UnsupportedError(
                f"{name}={given[name]!r} cannot be honoured: {model.name!r} is a block-diffusion model, which keeps "
                "exact K,V of its finished blocks.",
                param=name,
                hint="Leave it out.",
            )
