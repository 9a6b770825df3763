"""Which decoder serves a request: every policy by name, and the one that fits a model's kind."""

from __future__ import annotations

from functools import cache

from dfastllm.core import ModelInfo, Request
from dfastllm.decode.ar import Autoregressive
from dfastllm.decode.block import BlockDiffusion
from dfastllm.decode.canvas import CACHES
from dfastllm.decode.diffusion import MaskedDiffusion
from dfastllm.decode.evidence import Scorer
from dfastllm.decode.policy import Policy
from dfastllm.decode.unmask import RULES
from dfastllm.errors import UnsupportedError

__all__ = ["CACHES", "POLICIES", "RULES", "policies", "policy_for"]


@cache
def policies(scorer: Scorer | None) -> dict[str, Policy]:
    """Every policy by the kind of model it serves. The same objects for the same scorer, so an engine can group by it.

    scorer: the draft model's opinion for rule `apd` (see `scorer.ModelScorer`)."""
    return {p.name: p for p in (Autoregressive(), BlockDiffusion(scorer), MaskedDiffusion(scorer))}


POLICIES = policies(None)


def policy_for(request: Request, model: ModelInfo, scorer: Scorer | None = None) -> Policy:
    """The policy that decodes `request` on `model`, the request checked. Raises ValidationError or UnsupportedError
    naming the field."""
    policy = policies(scorer).get(model.kind)
    if policy is None:
        raise UnsupportedError(f"no decoder for models of kind {model.kind!r}.", param="model")
    policy.check(request, model)
    return policy
