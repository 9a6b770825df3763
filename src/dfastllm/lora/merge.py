"""A change written into the matrix that it changes: what serving is held against, and `dfastllm lora merge`."""

from __future__ import annotations

from torch import Tensor

from dfastllm.lora.adapter import EMBED, Delta

__all__ = ["merged", "merged_bias"]


def merged(name: str, delta: Delta, weight: Tensor) -> Tensor:
    """The matrix of this own name with its change, float32. weight [out, in]; of the embedding [vocabulary, hidden]."""
    whole = weight.float()
    if delta.full is not None:
        whole = whole.clone()
        whole[: len(delta.full)] = delta.full.float()
    b = delta.natural_b
    if delta.a is not None and b is not None:
        change = delta.a.float().T @ b.float() if name == EMBED else b.float().T @ delta.a.float()
        whole = whole + delta.scale * change
    if delta.factor is None:
        return whole
    return whole * (delta.factor if name == EMBED else delta.factor[:, None])  # of outputs: an embedding's columns


def merged_bias(delta: Delta, bias: Tensor | None) -> Tensor | None:
    """The bias [out] of the merged matrix, float32; None: there is none."""
    if bias is None:
        return delta.shift
    whole = bias.float() if delta.factor is None else bias.float() * delta.factor
    return whole if delta.shift is None else whole + delta.shift
