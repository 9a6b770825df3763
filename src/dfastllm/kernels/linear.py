"""Linear layers over quantised weights: rows are prepared (normed, quantised) once and go through the products that
share them. The native kernels run where they are built and the weight is in panels (Packed); else the torch twins of
linear_plain.py, which also read natural weights, do the same.

With the native kernels a row's result depends on that row alone, to the bit: not on its neighbours, not on threads.
Whoever calls keeps tensors on the CPU; ValidationError says what does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfastllm.errors import ValidationError
from dfastllm.kernels import hugepages
from dfastllm.kernels import linear_plain as plain
from dfastllm.kernels.activations import (
    ACT_KINDS,
    Acts,
    HeadStats,
    act_kind,
    check_acts,
    check_ban,
    check_block,
    check_choice,
    check_ids,
    check_rows,
    check_vector,
)
from dfastllm.kernels.extension import native
from dfastllm.kernels.packed import FORMATS, FORMS, PANEL, Packed, QTensor, aligned, pack_panels
from dfastllm.kernels.token_set import TokenSet, rows_by_set

__all__ = [
    "ACTIVATIONS",
    "bound",
    "describe",
    "describe_acts",
    "head_stats",
    "linear",
    "linear_gated",
    "pack",
    "prepare",
    "softcap",
    "weight_rows",
]

ACTIVATIONS = ("silu", "gelu_tanh")  # of a gate; gelu_tanh: the approximation by tanh

_STATS = np.dtype(
    [("token", "i4"), ("finite", "i4"), ("top", "f4"), ("second", "f4"), ("norm", "f4"), ("entropy", "f4")]
)
_CHOICE = np.dtype([("token", "i4"), ("logit", "f4")])


def prepare(x: Tensor, kind: str, *, norm: Tensor | None = None, eps: float = 0.0, block: int = 1) -> Acts:
    """x float32 [rows, k] as inputs of `kind` (see `act_kind`); with norm [k], RMSNorm first: x / sqrt(mean(x^2) + eps)
    * norm. block above 1: stretches of so many inputs go through the Hadamard transform first (linear_plain.hadamard),
    of rows without a norm. linear_plain.prepare states the quantisation."""
    check_rows(x)
    check_vector("norm", norm, x.shape[1])
    check_choice("kind", kind, ACT_KINDS)
    check_block(block, x.shape[1])
    if block > 1 and norm is not None:
        raise ValidationError("rows are normed or turned, not both.", param="block")
    module = native()
    if module is None:
        return plain.prepare(plain.hadamard(x, block), kind, norm=norm, eps=eps)
    out = _acts(kind, *x.shape)
    if block > 1:
        module.prepare_turned(x.data_ptr(), x.stride(0), block, describe_acts(out))
        return out
    module.prepare(x.data_ptr(), x.stride(0), _address(norm), eps, describe_acts(out))
    return out


def linear(
    x: Tensor | Acts, weight: Packed | QTensor, bias: Tensor | None = None, *, accumulate: Tensor | None = None
) -> Tensor:
    """x [rows, k] times the weight's rows plus bias [n] -> float32 [rows, n]. With `accumulate` float32 [rows, n] the
    result is added to it in place, and it is returned."""
    n, k = _shape(weight)
    check_vector("bias", bias, n)
    acts = _prepared(x, weight.format, k)
    if accumulate is not None:
        check_rows(accumulate, n)
        if accumulate.shape[0] != acts.rows:
            raise ValidationError(
                f"accumulate must have the inputs' {acts.rows} rows, got {accumulate.shape[0]}.", param="accumulate"
            )
    module = native()
    if module is None or isinstance(weight, QTensor):
        return plain.linear(acts, weight, bias, accumulate=accumulate)
    y = torch.empty(acts.rows, n) if accumulate is None else accumulate
    module.linear(describe(weight, bias), describe_acts(acts), y.data_ptr(), y.stride(0), accumulate is not None)
    return y


def linear_gated(
    x: Tensor | Acts,
    weight: Packed | QTensor,
    bias: Tensor | None = None,
    *,
    kind: str,
    width: int | None = None,
    activation: str = "silu",
    block: int = 1,
) -> Acts:
    """activation(gate) * up prepared for the next linear, `block` as in `prepare`. The weight holds 32 channels of the
    gate and the same 32 of the up projection in turn (bias [n] too), n a multiple of 64; width (default n / 2): how
    many of the products exist, the last up to 31 pairs of channels being padding."""
    n, k = _shape(weight)
    width = n // 2 if width is None else width
    if n % PANEL or not n // 2 - 32 < width <= n // 2:
        raise ValidationError(
            f"gate and up must alternate by 32 channels, {PANEL} * ceil(width / 32) in all, got {n} for width {width}.",
            param="weight",
        )
    check_choice("kind", kind, ACT_KINDS)
    check_choice("activation", activation, ACTIVATIONS)
    check_vector("bias", bias, n)
    check_block(block, width)
    acts = _prepared(x, weight.format, k)
    module = native()
    if module is None or isinstance(weight, QTensor):
        return plain.linear_gated(acts, weight, bias, kind=kind, width=width, activation=activation, block=block)
    out = _acts(kind, acts.rows, width)
    h = torch.empty(acts.rows, width) if kind == "row8" or block > 1 else None
    number = ACTIVATIONS.index(activation)
    module.linear_gated(describe(weight, bias), describe_acts(acts), number, _address(h), describe_acts(out), block)
    return out


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap) of float32 rows, in place, NaN where x is not finite; x itself where cap is 0."""
    if not cap:
        return x
    check_rows(x)
    module = native()
    if module is None or not x.is_contiguous():
        return plain.softcap(x, cap)
    module.softcap(x.data_ptr(), x.numel(), cap)
    return x


def head_stats(
    x: Tensor | Acts,
    weight: Packed | QTensor,
    bias: Tensor | None = None,
    *,
    ban: tuple[int, ...] = (),
    barred: Sequence[TokenSet | None] | None = None,
    entropy: bool = False,
    topk: int = 0,
    cap: float = 0.0,
) -> HeadStats:
    """What a decoder asks about each row of logits x @ weight.T + bias, capped where `cap` is not 0 (as by `softcap`),
    the ids in `ban` left out. barred: per row the ids, of the weight's n, that its choice leaves out too; they stay
    part of all other numbers. The native kernels never write the logits out; the numbers are those of the logits that
    `linear` and `softcap` give, and the same bits whatever else is asked for."""
    n, k = _shape(weight)
    check_vector("bias", bias, n)
    check_ban(ban, topk, n)
    acts = _prepared(x, weight.format, k)
    sets = [] if barred is None else rows_by_set(barred, acts.rows, n)
    module = native()
    if module is None or isinstance(weight, QTensor):
        logits = plain.linear(acts, weight, bias)
        return plain.stats_of(plain.softcap(logits, cap) if cap else logits, ban, entropy, topk, sets)
    out = np.empty(acts.rows, dtype=_STATS)
    choices = np.empty(acts.rows if sets else 0, dtype=_CHOICE)
    words = np.stack([ids.words for ids, _ in sets]) if sets else None
    of_row = np.full(len(choices), -1, dtype=np.int32)
    for number, (_, rows) in enumerate(sets):
        of_row[rows] = number
    values, ids = np.empty((acts.rows, topk), dtype=np.float32), np.empty((acts.rows, topk), dtype=np.int32)
    banned = np.array(ban, dtype=np.int32)
    choose = (0 if words is None else words.ctypes.data, of_row.ctypes.data, choices.ctypes.data)
    wanted = (cap, banned.ctypes.data, len(banned), choose, entropy, topk)
    module.head_stats(
        describe(weight, bias), describe_acts(acts), *wanted, *(a.ctypes.data for a in (out, values, ids))
    )
    return HeadStats(
        out["token"],
        out["finite"] != 0,
        out["top"],
        out["second"],
        out["norm"],
        out["entropy"],
        values,
        ids,
        choices["token"] if sets else out["token"],
        choices["logit"] if sets else out["top"],
    )


def weight_rows(weight: Packed | QTensor, ids: Tensor) -> Tensor:
    """Rows `ids` int64 [count] of the weight as float32 [count, k]: an embedding that shares the head's matrix."""
    n, k = _shape(weight)
    check_ids(ids, n)
    module = native()
    if module is None or isinstance(weight, QTensor):
        return plain.weight_rows(weight, ids)
    out = torch.empty(len(ids), k)
    module.weight_rows(describe(weight, None), ids.data_ptr(), len(ids), out.data_ptr())
    return out


def pack(tensor: QTensor) -> Packed:
    """Natural to panels; the bytes are those of packed.pack_panels, which runs where there are no native kernels."""
    module = native()
    if module is None:
        return pack_panels(tensor)
    n, k = tensor.shape
    codes, scales, mins, steps = (
        None if t is None else t.detach().contiguous() for t in (tensor.codes, tensor.scales, tensor.mins, tensor.steps)
    )
    sizes = _sizes(tensor.format, n, k)
    dtype = tensor.codes.dtype if tensor.format in ("f32", "bf16") else torch.uint8
    given = [t.dtype for t in (scales, mins) if t is not None]
    data, *sides = hugepages.together([(sizes[0], dtype), *((sizes[1], side) for side in given)])
    parts = (data, sides[0] if sides else None, sides[1] if len(sides) > 1 else None)
    module.pack(FORMATS.index(tensor.format), n, k, *(_address(t) for t in (codes, scales, mins, steps, *parts)))
    return Packed(tensor.format, n, k, *parts)


def _sizes(format: str, n: int, k: int) -> tuple[int, int]:
    """Elements of a Packed's data and of its scales."""
    form, channels = FORMS[format], -(-n // PANEL) * PANEL
    elements = channels * (-(-k // form.step) * form.step)
    if not form.quantised:
        return elements, 0
    return int(elements * form.panel_bits / 8), channels * (k // form.group if form.group else 1)


def _shape(weight: Packed | QTensor) -> tuple[int, int]:
    return weight.shape if isinstance(weight, QTensor) else (weight.n, weight.k)


def _prepared(x: Tensor | Acts, format: str, k: int) -> Acts:
    if isinstance(x, Acts):
        check_acts(x, format, k)
        return x
    check_rows(x, k)
    return prepare(x, act_kind(format))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def describe(weight: Packed, bias: Tensor | None = None) -> tuple[int, ...]:
    """The weight as the extension takes it: addresses, so the tensors must outlive the call. Raises ValidationError
    when its parts have the wrong size."""
    sizes = _sizes(weight.format, weight.n, weight.k)
    parts = [weight.data.numel(), *(sizes[1] if t is None else t.numel() for t in (weight.scales, weight.mins))]
    if parts != [sizes[0], sizes[1], sizes[1]] or (weight.scales is None) != (sizes[1] == 0):
        raise ValidationError(
            f"a packed {weight.format} weight [{weight.n}, {weight.k}] must have {sizes[0]} elements of data and "
            f"{sizes[1]} scales, got {parts}.",
            param="weight",
        )
    where = (_address(t) for t in (weight.data, weight.scales, weight.mins, bias))
    return (FORMATS.index(weight.format), weight.n, weight.k, *where)


def bound(weight: Packed, bias: Tensor | None = None) -> Any:
    """The weight as a native forward takes it, which keeps its arrays alive. Raises ValidationError when its parts have
    the wrong size or type."""
    try:
        return native().Linear(
            weight.format, weight.n, weight.k, weight.data, scales=weight.scales, mins=weight.mins, bias=bias
        )
    except ValueError as error:
        raise ValidationError(str(error), param="weight") from error


def _acts(kind: str, rows: int, k: int) -> Acts:
    """Uninitialised."""
    stride = -(-k // 32) * 32
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}.get(kind, torch.int8)
    data = aligned(rows * stride, dtype).view(rows, stride)
    if kind in ("f32", "bf16"):
        return Acts(kind, rows, k, data)
    if kind == "row8":
        return Acts(kind, rows, k, data, torch.empty(rows), torch.empty(rows, dtype=torch.int32))
    return Acts(
        kind, rows, k, data, torch.empty(rows, stride // 32), torch.empty(rows, stride // 16, dtype=torch.int32)
    )


def describe_acts(acts: Acts) -> tuple[int, ...]:
    """Prepared rows as the extension takes them; see `describe`."""
    where = (_address(t) for t in (acts.data, acts.scales, acts.sums))
    return (ACT_KINDS.index(acts.kind), acts.rows, acts.k, *where)
