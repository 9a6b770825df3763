"""Speculative decoding, as a caller asks for it and a drafter answers: which drafter, how many tokens, judged how."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dfastllm.core.check import require
from dfastllm.core.value import value
from dfastllm.errors import ValidationError
from dfastllm.options import Acceptance, SpeculativeMethod, SpeculativeParams, changed

__all__ = [
    "Acceptance",
    "Draft",
    "SpeculativeConfig",
    "SpeculativeMethod",
    "SpeculativeParams",
    "speculative_params",
]

MOST_TOKENS = int(SpeculativeParams.TABLE["num_speculative_tokens"].high or 0)


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
    table = SpeculativeParams.TABLE
    for name in given:
        require(
            name in table,
            f"speculative_config has no field {name!r:.80}; there are: {', '.join(table)}.",
            "speculative_config",
        )
    chosen = {name: value for name, value in given.items() if value is not None}
    require("method" in chosen or default is not None, "speculative_config names no method.", "speculative_config")
    return changed(default or SpeculativeParams(), **chosen)
