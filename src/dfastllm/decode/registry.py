"""Which decoder serves a request: every policy by name, and the one that fits a model's kind."""

from __future__ import annotations

from dfastllm.core import ModelInfo, Request
from dfastllm.decode.ar import Autoregressive
from dfastllm.decode.diffusion import MaskedDiffusion
from dfastllm.decode.policy import Policy
from dfastllm.errors import UnsupportedError

__all__ = ["POLICIES", "policy_for"]

POLICIES: dict[str, Policy] = {policy.name: policy for policy in (Autoregressive(), MaskedDiffusion())}


def policy_for(request: Request, model: ModelInfo) -> Policy:
    """The policy that decodes `request` on `model`, the request checked. The same object for every request it serves,
    so an engine can group by it. Raises ValidationError or UnsupportedError naming the field."""
    policy = POLICIES.get(model.kind)
    if policy is None:
        raise UnsupportedError(f"no decoder for models of kind {model.kind!r}.", param="model")
    policy.check(request, model)
    return policy
