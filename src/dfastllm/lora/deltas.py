"""From the tensors of one module to its delta: the low-rank part as it lies in the file, DoRA's factor and the biases
computed once, against the base as it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from dfastllm.errors import AdapterError
from dfastllm.lora.adapter import EMBED, HEAD, Delta

__all__ = ["Parts", "build", "norms"]

Parts = Mapping[str, Tensor]
CHUNK = 1 << 24  # elements of a matrix that are looked at together


class Weights(Protocol):
    """What is needed of the base; see `lora.Base`."""

    shapes: Mapping[str, tuple[int, ...]]
    tied: bool

    def value(self, own: str) -> Tensor: ...


def build(own: str, parts: Parts, scale: float, base: Weights, notes: list[str]) -> Delta | None:
    """The delta of a matrix of the base; None: nothing changes. Rows of a resized vocabulary beyond the base's are left
    out, with a note. Raises AdapterError where DoRA divides by zero."""
    matrix = EMBED if own == HEAD and base.tied else own
    rows = base.shapes[f"{matrix}.weight"][0]
    full = _full(own, matrix, parts, base, notes)
    a, b = (parts["embed_a"], parts["embed_b"].T) if own == EMBED and "embed_a" in parts else _pair(parts)
    if own == EMBED and a is not None:
        a = a[:, :rows]
    elif own == HEAD and b is not None:
        b = b[:, :rows]
    if a is not None and b is not None and a.dtype != b.dtype:
        a, b = a.float(), b.float()
    factor = shift = None
    if "magnitude" in parts:
        assert a is not None
        assert b is not None
        weight = base.value(f"{matrix}.weight") if full is None else full
        factor = parts["magnitude"].float() / norms(weight, a, b, scale, by_column=own == EMBED)
        if not bool(torch.isfinite(factor).all()):
            raise AdapterError(f"{own}: W + scale * B A of the adapter has a row of zeros, which DoRA divides by.")
    bias = f"{own}.bias"
    if bias in base.shapes and (factor is not None or "bias" in parts):
        old = base.value(bias)
        shift = parts.get("bias", old).float() - (old if factor is None else factor * old)
    if "b_bias" in parts:
        more = parts["b_bias"].float() * scale
        shift = more if shift is None else shift + more
    if a is None and factor is None and shift is None and full is None:
        return None
    return Delta.of(a, b, scale, factor, shift, full)


def norms(weight: Tensor, a: Tensor, b: Tensor, scale: float, *, by_column: bool) -> Tensor:
    """Norms float32 [out] of the rows of W [out, in] + scale * B A, a [rank, in], b [rank, out]. by_column: of an
    embedding W [vocabulary, hidden], whose outputs are its columns; there a is [rank, vocabulary], b [rank, hidden]."""
    left, right = (a, b) if by_column else (b, a)
    step = max(1, CHUNK // weight.shape[1])
    found = []
    for start in range(0, weight.shape[0], step):
        piece = slice(start, start + step)
        part = weight[piece].float()
        some = left[:, piece].float()
        part = part[: some.shape[1]] + scale * (some.T @ right.float())
        found.append(part.square().sum(0, dtype=torch.float64)[None] if by_column else part.norm(dim=1))
    return torch.cat(found).sum(0).sqrt().float() if by_column else torch.cat(found)


def _pair(parts: Parts) -> tuple[Tensor | None, Tensor | None]:
    return (parts["a"], parts["b"].T) if "a" in parts else (None, None)


def _full(own: str, matrix: str, parts: Parts, base: Weights, notes: list[str]) -> Tensor | None:
    """The matrix that takes the place of the base's. One that PEFT wrote beside an adapter of it is the base's own,
    unless the vocabulary was resized."""
    shape = base.shapes[f"{matrix}.weight"]
    full = parts.get("full", parts.get("base"))
    if full is None or ("full" not in parts and tuple(full.shape) == shape):
        return None
    if len(full) > shape[0]:
        notes.append(
            f"{own} has {len(full)} rows, the base {shape[0]}: the tokens from {shape[0]} on cannot be asked for."
        )
        return full[: shape[0]].clone()
    return full
