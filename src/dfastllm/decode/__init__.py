"""Decoders: pure policies that plan spans and turn logits into commits.

Here: the policy protocol and its law, sampling, autoregression, the unmasking rules, masked diffusion with its caches,
block diffusion, the registry. Not here: K,V storage, scheduling, models, tokenizers, stop strings.
"""

from dfastllm.decode.canvas.evidence import Scorer
from dfastllm.decode.canvas.scorer import ModelScorer
from dfastllm.decode.policy import Policy
from dfastllm.decode.registry import CACHES, POLICIES, RULES, policies, policy_for

__all__ = ["CACHES", "POLICIES", "RULES", "ModelScorer", "Policy", "Scorer", "policies", "policy_for"]
