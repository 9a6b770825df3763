"""Input rows prepared for linear layers of one kind: what `prepare` makes and the products read. No arithmetic of its
own but `dequantise`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfastllm.errors import ValidationError
from dfastllm.kernels.packed import FORMATS, FORMS

__all__ = ["ACT_KINDS", "Acts", "HeadStats", "act_kind"]

ACT_KINDS = ("f32", "bf16", "row8", "group8")


def act_kind(format: str) -> str:
    """How a weight format wants its input rows: f32, bf16, row8 (int8, one scale a row) or group8 (one per 32 inputs).
    Raises ValidationError for an unknown format."""
    check_choice("format", format, FORMATS)
    return FORMS[format].inputs


@dataclass(frozen=True, eq=False)
class Acts:
    """rows x k inputs, all tensors contiguous.

    data    [rows, stride] float32, bfloat16 or int8; stride is k rounded up to 32, zero beyond k.
    scales  float32; row8 [rows], group8 [rows, stride / 32]: input = code * scale. None for floats.
    sums    int32, sums of codes; row8 [rows], group8 [rows, stride / 16]: of 16 codes each. None for floats.
    """

    kind: str
    rows: int
    k: int
    data: Tensor
    scales: Tensor | None = None
    sums: Tensor | None = None

    def dequantise(self) -> Tensor:
        """float32 [rows, k]."""
        wide = self.data.float()
        if self.kind == "row8" and self.scales is not None:
            wide = wide * self.scales[:, None]
        elif self.kind == "group8" and self.scales is not None:
            wide = (wide.view(*self.scales.shape, 32) * self.scales[..., None]).view(wide.shape)
        return wide[:, : self.k]


@dataclass(frozen=True, slots=True)
class HeadStats:
    """Statistics of each row of logits, the banned ids left out (they count for `finite` only).

    token    int32 [rows]: the best logit's id, the lowest of a tie; -1 where not finite or everything is banned.
    finite   bool [rows]: no NaN or infinity among the row's logits. The floats of the other rows are NaN.
    top, second  float32 [rows]: the best two logits; -inf where there is none.
    norm     float32 [rows]: logsumexp.
    entropy  float32 [rows]: nats; zeros unless asked for.
    top_values, top_ids  float32 and int32 [rows, topk]: the best, descending, lowest ids of ties first; -inf and -1
             beyond the number of candidates.
    choice, choice_logit  int32 and float32 [rows]: the best id that the row's set of barred ids leaves, the lowest of a
             tie, and its logit; token and top of a row without a set; -1 and -inf where nothing is left.
    """

    token: NDArray[np.int32]
    finite: NDArray[np.bool_]
    top: NDArray[np.float32]
    second: NDArray[np.float32]
    norm: NDArray[np.float32]
    entropy: NDArray[np.float32]
    top_values: NDArray[np.float32]
    top_ids: NDArray[np.int32]
    choice: NDArray[np.int32]
    choice_logit: NDArray[np.float32]


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValidationError listing the choices for another value."""
    if value not in choices:
        raise ValidationError(f"{name} must be one of {', '.join(choices)}, got {value!r}.", param=name)


def check_rows(x: Tensor, k: int | None = None) -> None:
    """Raises ValidationError unless x is float32 [rows, k] on the CPU with contiguous rows."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or x.ndim != 2:
        raise ValidationError(
            f"inputs must be float32 [rows, k] on the CPU, got {x.dtype} {list(x.shape)} on {x.device}.", param="x"
        )
    if k is not None and x.shape[1] != k:
        raise ValidationError(f"inputs must have {k} columns like the weight, got {x.shape[1]}.", param="x")
    if x.shape[1] < 1:
        raise ValidationError("inputs must have at least one column.", param="x")
    if x.shape[0] > 0 and ((x.stride(1) != 1 and x.shape[1] > 1) or (x.stride(0) < x.shape[1] and x.shape[0] > 1)):
        raise ValidationError(
            f"rows of the inputs must be contiguous, got strides {x.stride()}.", param="x", hint="Call .contiguous()."
        )


def check_vector(name: str, value: Tensor | None, n: int) -> None:
    """Raises ValidationError unless value is None or contiguous float32 [n] on the CPU."""
    if value is None:
        return
    if value.dtype != torch.float32 or tuple(value.shape) != (n,) or not value.is_contiguous() or value.is_cuda:
        raise ValidationError(
            f"{name} must be contiguous float32 [{n}] on the CPU, got {value.dtype} {list(value.shape)}.", param=name
        )


def check_acts(x: Acts, format: str, k: int) -> None:
    """Raises ValidationError unless x is what a weight of this format with k inputs takes."""
    if x.kind != act_kind(format) or x.k != k:
        raise ValidationError(
            f"a {format} weight with {k} inputs takes rows prepared as {act_kind(format)}, got {x.kind} with {x.k}.",
            param="x",
        )


def check_ban(ban: tuple[int, ...], topk: int, n: int) -> None:
    """Raises ValidationError for ids outside of [0, n) or a negative topk."""
    if any(not 0 <= i < n for i in ban):
        raise ValidationError(
            f"banned ids must be 0 to {n - 1}, got {[i for i in ban if not 0 <= i < n][:5]}.", param="ban"
        )
    if topk < 0:
        raise ValidationError(f"topk must not be negative, got {topk}.", param="topk")


def check_block(block: int, k: int) -> None:
    """Raises ValidationError unless block is a power of two that divides k."""
    if block < 1 or block & (block - 1) or k % block:
        raise ValidationError(f"block must be a power of two that divides {k}, got {block}.", param="block")


def check_ids(ids: Tensor, n: int) -> None:
    """Raises ValidationError unless ids is contiguous int64 [count] on the CPU with values in [0, n)."""
    if ids.dtype != torch.int64 or ids.ndim != 1 or not ids.is_contiguous() or ids.is_cuda:
        raise ValidationError(f"ids must be contiguous int64 [count], got {ids.dtype} {list(ids.shape)}.", param="ids")
    if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < n):
        raise ValidationError(f"ids must be 0 to {n - 1}, got {int(ids.min())} to {int(ids.max())}.", param="ids")
