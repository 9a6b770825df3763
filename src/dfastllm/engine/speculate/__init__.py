"""Drafts in the engine: who drafts, how many tokens, and the drafters that run a model of their own."""

from dfastllm.engine.speculate.canvas import DraftCanvas
from dfastllm.engine.speculate.drafting import Drafting
from dfastllm.engine.speculate.model import DraftModel, check_vocabulary

__all__ = ["DraftCanvas", "DraftModel", "Drafting", "check_vocabulary"]
