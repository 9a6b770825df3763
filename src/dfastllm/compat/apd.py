"""APDDecoder: adaptive parallel decoding. A small autoregressive model decides how many tokens a step may commit.

The rule is decode's `apd` (Israel et al., 2025) and the scoring decode's ModelScorer; here they are put together under
the documents' names. Generating is DiffusionGenerator's.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfastllm import models
from dfastllm.compat.config import DiffusionConfig, one_config
from dfastllm.compat.generator import DiffusionGenerator, build_engine
from dfastllm.core import DecodeParams, ModelInfo
from dfastllm.decode.canvas.scorer import ModelScorer
from dfastllm.decode.registry import policy_for
from dfastllm.engine import Engine
from dfastllm.errors import ValidationError
from dfastllm.llm import LLM, resolve
from dfastllm.text import Tokenizer

__all__ = ["APDConfig", "APDDecoder"]


@dataclass(frozen=True)
class APDConfig(DiffusionConfig):
    """DiffusionConfig with the apd rule in place of threshold and factor (which are refused beside it).

    enabled              False: the fixed schedule, no second model.
    max_parallel_tokens  at most so many tokens a step, 0: no limit.
    mixture_weight       w of p_diffusion^w p_ar^(1-w), in [0, 1]: 1 trusts the diffusion model alone.
    max_lookahead        tokens the small model scores a step.
    """

    enabled: bool = True
    max_parallel_tokens: int | None = 8
    mixture_weight: float = 0.7
    max_lookahead: int = 100

    def __post_init__(self, early_stop_threshold: float | None) -> None:
        super().__post_init__(early_stop_threshold)
        if not 0 <= self.mixture_weight <= 1:
            raise ValidationError(
                f"mixture_weight must be in [0, 1], got {self.mixture_weight}.", param="mixture_weight"
            )
        if self.max_lookahead < 1:
            raise ValidationError(f"max_lookahead must be at least 1, got {self.max_lookahead}.", param="max_lookahead")
        other = "confidence_threshold" if self.confidence_threshold is not None else "factor"
        if self.enabled and getattr(self, other) is not None:
            raise ValidationError(
                f"apd is a rule of its own; got {other} {getattr(self, other)} too.",
                param=other,
                hint="Leave it out (and mode at standard), or set enabled=False.",
            )

    def decode_params(self, max_tokens: int, model: ModelInfo) -> DecodeParams:
        plain = super().decode_params(max_tokens, model)
        if not self.enabled:
            return plain
        own = {"apd_mixture_weight": self.mixture_weight, "max_lookahead": self.max_lookahead}
        return dataclasses.replace(plain, rule="apd", options={**plain.options, **own})


class APDDecoder(DiffusionGenerator):
    """A DiffusionGenerator whose steps a small autoregressive model judges.

    model, tokenizer: as for DiffusionGenerator; an LLM or Engine lends its weights. draft: the small model, with the
    same vocabulary, in the same forms. config, or its fields as keywords: APDDecoder(max_lookahead=20). Raises
    UnsupportedError when draft is not autoregressive, ValidationError when
    the vocabularies differ.
    """

    default_config = APDConfig()

    def __init__(
        self,
        model: Any = "demo-diffusion",
        draft: Any = "demo-draft",
        tokenizer: Tokenizer | None = None,
        config: APDConfig | None = None,
        **fields: Any,
    ) -> None:
        chosen = one_config(config, APDConfig, fields)
        choose = functools.partial(policy_for, scorer=_scorer(draft)) if chosen.enabled else None
        super().__init__(build_engine(model, tokenizer, choose=choose), config=chosen)


def _scorer(draft: Any) -> ModelScorer:
    if isinstance(draft, str | Path):
        draft = models.load(resolve(draft))
    if isinstance(draft, LLM):
        draft = draft.engine
    if isinstance(draft, Engine):
        draft = draft.model
    if getattr(draft, "info", None) is None:
        raise ValidationError(
            f"draft must be an autoregressive model, its name, directory, LLM or Engine, got {type(draft).__name__}.",
            param="draft",
        )
    return ModelScorer(draft, getattr(draft, "device", "cpu"))
