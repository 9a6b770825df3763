"""Speculative decoding, as a caller asks for it and a drafter answers: which drafter, how many tokens, judged how."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from dfastllm.core.check import require
from dfastllm.core.value import value
from dfastllm.errors import ValidationError

__all__ = [
    "Acceptance",
    "Draft",
    "SpeculativeConfig",
    "SpeculativeMethod",
    "SpeculativeParams",
    "speculative_params",
]

SpeculativeMethod = Literal["none", "ngram", "suffix", "draft_model", "diffusion", "self"]
Acceptance = Literal["coupled", "rejection"]
MOST_TOKENS = 64


@dataclass(frozen=True)
class SpeculativeParams:
    """Drafter x verifier of one request. Names are those of vLLM's `--speculative-config` where it has them.

    method       none: no drafts. ngram: prompt lookup. suffix: a suffix tree over the text and past outputs.
                 draft_model: a smaller autoregressive model. diffusion: a masked model drafts a block in one forward.
                 self: the model's own bidirectional mode drafts for its causal one.
    num_speculative_tokens  most tokens drafted per step, 1 to 64.
    prompt_lookup_min/max   lengths of the n-gram that is looked up.
    acceptance   coupled: the draft counts where it is the token that the request's own keyed draw gives, so the output
                 is that of plain decoding, token for token, at any temperature. rejection: accept with min(1, p/q),
                 else draw from the rest (Leviathan et al. 2023, Chen et al. 2023): accepts a little more where a draft
                 model samples, keeps the distribution but not the tokens of a seed. Greedy, the two are the same.
    adaptive     the length follows the measured acceptance and cost, down to no drafts at all; False: always
                 num_speculative_tokens.
    suffix_decoding_max_tree_depth, _max_cached_requests, _max_spec_factor, _min_token_prob: of the suffix tree: longest
                 pattern; past outputs kept, 0 for the request's own text only; tokens drafted per matched token; least
                 frequency of a drafted continuation.

    Raises ValidationError naming the field.
    """

    method: SpeculativeMethod = "none"
    num_speculative_tokens: int = 5
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 5
    acceptance: Acceptance = "coupled"
    adaptive: bool = True
    suffix_decoding_max_tree_depth: int = 24
    suffix_decoding_max_cached_requests: int = 1000
    suffix_decoding_max_spec_factor: float = 2.0
    suffix_decoding_min_token_prob: float = 0.1

    def __post_init__(self) -> None:
        for name, known in (("method", SpeculativeMethod), ("acceptance", Acceptance)):
            got = getattr(self, name)
            require(got in get_args(known), f"{name} must be one of {', '.join(get_args(known))}, got {got!r}.", name)
        k = self.num_speculative_tokens
        require(
            1 <= k <= MOST_TOKENS, f"num_speculative_tokens must be in [1, {MOST_TOKENS}], got {k}.",
            "num_speculative_tokens",
        )  # fmt: skip
        low, high = self.prompt_lookup_min, self.prompt_lookup_max
        require(low >= 1, f"prompt_lookup_min must be at least 1, got {low}.", "prompt_lookup_min")
        require(
            high >= low, f"prompt_lookup_max must be at least prompt_lookup_min {low}, got {high}.", "prompt_lookup_max"
        )
        for name, least in (("suffix_decoding_max_tree_depth", 1), ("suffix_decoding_max_cached_requests", 0)):
            require(getattr(self, name) >= least, f"{name} must be at least {least}, got {getattr(self, name)}.", name)
        factor, prob = self.suffix_decoding_max_spec_factor, self.suffix_decoding_min_token_prob
        name = "suffix_decoding_max_spec_factor"
        require(0 < factor < float("inf"), f"{name} must be finite and above 0, got {factor}.", name)
        name = "suffix_decoding_min_token_prob"
        require(0 <= prob <= 1, f"{name} must be in [0, 1], got {prob}.", name)


@value(frozen=True, slots=True)
class Draft:
    """Tokens that a drafter proposes to follow those of a sequence, made for a text of `length` tokens.

    probs  None: each token stands for itself with probability 1 (lookup, greedy drafts). Else the distributions that
           the tokens were drawn from, after the request's own sampling options: a torch float32 [len(tokens), vocab].
    """

    tokens: tuple[int, ...]
    length: int
    probs: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class SpeculativeConfig:
    """What an engine is started with: how requests that say nothing draft, and the model that drafts for them.

    model  of the methods draft_model and diffusion: a shipped model's name, a directory or a GGUF file.
    """

    params: SpeculativeParams
    model: str | None = None

    def __post_init__(self) -> None:
        method = self.params.method
        needs = method in ("draft_model", "diffusion")
        require(self.model is not None or not needs, f"method {method} needs a model.", "speculative_config")
        require(needs or self.model is None, f"method {method} takes no model, got {self.model!r}.", "model")

    @classmethod
    def parse(cls, text: str) -> tuple[SpeculativeConfig, ...]:
        """Of vLLM's JSON object {"method": ..., "model": ..., "num_speculative_tokens": ...}, or of a list of them: the
        first is the default, the others are there for requests to choose. A model without a method is a draft_model.
        Raises ValidationError."""
        try:
            given = json.loads(text)
        except ValueError as error:
            raise ValidationError(f"speculative_config is not JSON: {error}.", param="speculative_config") from error
        parts = given if isinstance(given, list) else [given]
        require(bool(parts), "speculative_config holds no configuration.", "speculative_config")
        return tuple(cls._of(part) for part in parts)

    @classmethod
    def _of(cls, given: Any) -> SpeculativeConfig:
        require(
            isinstance(given, dict), f"speculative_config must be an object, got {given!r:.80}.", "speculative_config"
        )
        chosen = dict(given)
        model = chosen.pop("model", None)
        require(model is None or isinstance(model, str), f"model must be a path or name, got {model!r}.", "model")
        chosen.setdefault("method", "draft_model" if model is not None else None)
        return cls(speculative_params(chosen), model)


def speculative_params(given: Mapping[str, Any], default: SpeculativeParams | None = None) -> SpeculativeParams:
    """Of JSON fields; what is left out is the default's. Raises ValidationError for an unknown field, a wrong type, a
    bad value, or no method at all."""
    types = {f.name: type(f.default) for f in fields(SpeculativeParams)}
    for name, got in given.items():
        require(
            name in types,
            f"speculative_config has no field {name!r:.80}; there are: {', '.join(types)}.",
            "speculative_config",
        )
        wanted = types[name]
        fits = type(got) is wanted or (wanted is float and type(got) is int)
        require(
            fits or (name == "method" and got is None), f"{name} must be a {wanted.__name__}, got {got!r:.80}.", name
        )
    chosen = {name: value for name, value in given.items() if value is not None}
    require("method" in chosen or default is not None, "speculative_config names no method.", "speculative_config")
    return replace(default or SpeculativeParams(), **chosen)
