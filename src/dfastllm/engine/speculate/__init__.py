"""Drafts in the engine: who drafts, how many tokens, and the drafters that run a model of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dfastllm.engine.config import EngineConfig
from dfastllm.engine.runners import Runnable
from dfastllm.engine.speculate.canvas import DraftCanvas
from dfastllm.engine.speculate.drafting import Drafting
from dfastllm.engine.speculate.model import DraftModel, check_vocabulary
from dfastllm.models.bigram import Bigram
from dfastllm.options import SpeculativeMethod

if TYPE_CHECKING:
    from dfastllm.models import DeviceDecoder, PackedDecoder

__all__ = ["DraftCanvas", "DraftModel", "Drafting", "check_vocabulary", "model_drafter"]


def model_drafter(
    method: SpeculativeMethod,
    model: Runnable | PackedDecoder | DeviceDecoder,
    config: EngineConfig,
    *,
    bigram: Bigram | None = None,
    device: torch.device | str = "cpu",
) -> DraftModel | DraftCanvas:
    """The drafter of a method that has a model, draft_model or diffusion. config: the engine's. bigram: the head that
    came with a masked model. Raises UnsupportedError for a model of another kind than the method's."""
    if method == "draft_model":
        return DraftModel(model, config, device=device)
    return DraftCanvas(model, config, bigram=bigram, device=device)
