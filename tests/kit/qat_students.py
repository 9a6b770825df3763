"""A small student that was trained on rounded weights for some steps, of any format."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfastllm.distill.qat import Qat, QatConfig, prepare_qat
from dfastllm.models import Decoder, Ids, dense_attention, tiny
from tests.kit.convert_models import SIZES


def logits(model: Decoder, ids: Tensor) -> Tensor:
    """ids [B, T] -> [B, T, vocabulary], causal."""
    count, length = ids.shape
    positions = torch.arange(length).repeat(count)
    hidden = model(ids.flatten(), positions, dense_attention(count, length, "causal"))
    return model.head(hidden).view(count, length, -1)


def texts(seed: int, count: int = 4, length: int = 24) -> Tensor:
    return torch.randint(3, 200, (count, length), generator=torch.Generator().manual_seed(seed))


def trained(format: str, family: str = "llama", *, steps: int = 4, ids: Ids | None = None, **options: Any) -> Qat:
    """Next-token prediction on noise: the weights move, and so do codes and scales."""
    overrides = {name: options.pop(name) for name in ("tied", "logits_factor") if name in options}
    model = tiny(family, ids=ids, **{**SIZES, **overrides})
    qat = prepare_qat(model, QatConfig(enabled=True, format=format, **options))
    qat.enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    for step in range(steps):
        ids_ = texts(step)
        found = logits(model, ids_)[:, :-1]
        F.cross_entropy(found.flatten(0, 1), ids_[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return qat
