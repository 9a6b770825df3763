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
    if delta.a is not None and delta.b is not None:
        a, b = delta.a.float(), delta.b.float()  # [rank, in], [rank, out]
        whole = whole + delta.scale * (a.T @ b if name == EMBED else b.T @ a)
    return whole if delta.factor is None else whole * delta.factor[:, None]


def merged_bias(delta: Delta, bias: Tensor | None) -> Tensor | None:
    """The bias [out] of the merged matrix, float32; None: there is none."""
    if bias is None:
        return delta.shift
    whole = bias.float() if delta.factor is None else bias.float() * delta.factor
    return whole if delta.shift is None else whole + delta.shift
