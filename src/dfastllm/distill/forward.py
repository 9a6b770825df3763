"""A student's forward pass over a batch of padded rows: hidden rows, and what its layers give.

Causal models only: canvas models are trained by objectives of their own (`train.objectives`, `distill.students`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dfastllm.models import dense_attention
from dfastllm.models.decoder import Decoder
from dfastllm.models.parts import AttendFunction
from dfastllm.train.objectives import Rows, short_attention

__all__ = ["hidden_rows", "layer_rows"]

SHORT = 512  # rows up to which plain products beat the fused kernel on a CPU (see `short_attention`)


def hidden_rows(model: Decoder, ids: Tensor, *, bf16: bool = False) -> Tensor:
    """ids [B, T] int64, padded on the right -> the rows before the head [B, T, H], with gradient. Row t depends on the
    tokens up to t, so padding changes nothing. bf16: matrix products in bfloat16 (autocast)."""
    count, length = ids.shape
    positions = torch.arange(length, device=ids.device).repeat(count)
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        hidden: Tensor = model(ids.flatten(), positions, _attention(ids, positions))
    return hidden.view(count, length, -1)


def _attention(ids: Tensor, positions: Tensor) -> AttendFunction:
    count, length = ids.shape
    if ids.device.type != "cpu" or length > SHORT:
        return dense_attention(count, length, "causal")
    none = positions[:0]
    return short_attention(Rows(count, length, ids.flatten(), positions, None, none, none, none.float()))


@contextmanager
def layer_rows(model: Decoder, layers: Collection[int]) -> Iterator[dict[int, Tensor]]:
    """What these layers give in forward passes within, by number: the stream behind each [tokens, hidden]."""
    found: dict[int, Tensor] = {}

    def note(number: int) -> Any:
        def keep(_: object, __: object, out: Tensor) -> None:
            found[number] = out

        return keep

    hooks = [model.layers[number].register_forward_hook(note(number)) for number in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
