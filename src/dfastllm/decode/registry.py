"""Which decoder serves a request: every policy by name, and the one that fits a model's kind."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from dfastllm.core import ModelInfo, Request
from dfastllm.decode.ar import Autoregressive
from dfastllm.decode.canvas.block import BlockDiffusion
from dfastllm.decode.canvas.choice import CACHES
from dfastllm.decode.canvas.diffusion import MaskedDiffusion
from dfastllm.decode.canvas.evidence import Scorer
from dfastllm.decode.canvas.rules import RULES
from dfastllm.decode.draft.self_draft import SelfSpeculation
from dfastllm.decode.policy import Policy
from dfastllm.errors import UnsupportedError, ValidationError

__all__ = ["CACHES", "POLICIES", "RULES", "policies", "policy_for", "seen_by"]


@cache
def policies(scorer: Scorer | None) -> dict[str, Policy]:
    """Every policy by its name, which is the kind of model it serves; `self` serves kind ar where a request asks for
    its drafts. The same objects for the same scorer, so an engine can group by it.

    scorer: the draft model's opinion for rule `apd` (see `scorer.ModelScorer`)."""
    every: tuple[Policy, ...] = (
        Autoregressive(),
        BlockDiffusion(scorer),
        MaskedDiffusion(scorer),
        SelfSpeculation(),
    )
    return {p.name: p for p in every}


POLICIES = policies(None)


def seen_by(request: Request, model: ModelInfo) -> ModelInfo:
    """The model as this request decodes on it: one that also decodes causally is of kind ar for a request of rule "ar"
    or speculative method "self". Raises UnsupportedError or ValidationError naming the field."""
    rule = request.decode.rule if request.decode is not None else None
    drafts = request.speculative is not None and request.speculative.method == "self"
    if rule != "ar" and not drafts:
        return model
    if drafts and rule not in (None, "ar"):
        raise ValidationError(
            f"speculative method 'self' verifies by autoregression; rule {rule!r} does not apply.",
            param="rule",
            hint="Leave out the rule or the method.",
        )
    if not model.causal and (drafts or model.kind != "ar"):
        what = "speculative method 'self'" if drafts else "rule 'ar'"
        lacks = "has no bidirectional mode" if model.kind == "ar" else "does not decode autoregressively"
        raise UnsupportedError(
            f"{what} needs a checkpoint of both modes; {model.name} {lacks}.",
            param="speculative_config" if drafts else "rule",
        )
    return _causal(model) if model.causal else model


@cache
def _causal(model: ModelInfo) -> ModelInfo:
    return replace(model, kind="ar", block=0, ar_first=False)


def policy_for(request: Request, model: ModelInfo, scorer: Scorer | None = None) -> Policy:
    """The policy that decodes `request` on `model`, as the request sees it (`seen_by`). Raises UnsupportedError."""
    asked = request.speculative
    policy = policies(scorer).get("self" if asked is not None and asked.method == "self" else model.kind)
    if policy is None:
        raise UnsupportedError(f"no decoder for models of kind {model.kind!r}.", param="model")
    return policy
