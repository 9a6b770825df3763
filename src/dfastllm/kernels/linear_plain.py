"""The linear layers in plain torch: the twins of dfastllm.kernels.linear, and the definition of what the native kernels
compute. They read natural weights (QTensor) or panels, and trust what `linear` has checked.

The twins multiply in float32 and may differ from the native kernels by rounding. Those agree with each other: prepared
rows, products of the integer formats (w8, w4s, w8g, w4g, w6g, with minima or without), gates, caps and the head's
statistics over them are the same bits on every instruction set, by one law that rounds in the same places
(native/linear_tiles.h):

    w8         y = (float(sum) * scale[n]) * act_scale[m], the integer sum over all inputs
    w4s        the same with the codes (code - zero) * step, which are bytes of w8
    the others y = fma(float(sum) * 2^p, factor * scale[g, n], y) for each group in order, or half of a group that has
               its own scale; where there are minima then y = fma(-min[g, n], act_scale[m, g] * float(sum of codes), y)

act_scale = factor * 2^p with a factor of 1, 1.25, 1.5 or 1.75, so that all products but those of fma and of w8 are
exact.
Products of float32 and bfloat16 weights differ between instruction sets by rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dfastllm.kernels.activations import Acts, HeadStats
from dfastllm.kernels.packed import Packed, QTensor, unpack_panels
from dfastllm.kernels.token_set import TokenSet

__all__ = ["gate_product", "hadamard", "linear", "linear_gated", "prepare", "softcap", "stats_of", "weight_rows"]

LEAST_AMAX = 2.0**-100  # below it codes are zero: 127 / amax would overflow


def prepare(x: Tensor, kind: str, *, norm: Tensor | None = None, eps: float = 0.0) -> Acts:
    """x [rows, k], or RMSNorm of it, as inputs of a kind. bf16: round half to even. int8, over a row (row8) or over 32
    inputs (group8): amax = max |x|, scale = amax / 127, code = round half even of x * (127 / amax); amax below 2^-100:
    scale 0, codes 0; amax not finite: scale NaN, codes 0. group8 rounds the scale up to the next of
    {1, 1.25, 1.5, 1.75} x 2^n, with which the native tiles multiply at no cost."""
    rows, k = x.shape
    if norm is not None:
        x = x * (1.0 / torch.sqrt((x * x).mean(dim=1, keepdim=True) + eps)) * norm
    x = F.pad(x, (0, -k % 32)).contiguous()
    if kind == "f32":
        return Acts(kind, rows, k, x)
    if kind == "bf16":
        return Acts(kind, rows, k, x.bfloat16())
    stride = x.shape[1]
    groups = x.view(rows, 1, stride) if kind == "row8" else x.view(rows, stride // 32, 32)
    amax = groups.abs().amax(dim=-1)  # NaN wins
    codable = amax.isfinite() & (amax >= LEAST_AMAX)
    inverse, scales = torch.full_like(amax, 127.0) / amax, amax / 127.0  # 127.0 / amax would round twice
    if kind == "group8":  # two bits of the scale's fraction, rounded up
        scales = ((scales.view(torch.int32) + 0x1FFFFF) & ~0x1FFFFF).view(torch.float32)
        inverse = torch.ones_like(scales) / scales
    inverse = torch.where(codable, inverse, 0.0)
    codes = torch.where(codable[..., None], torch.round(groups * inverse[..., None]), 0.0).to(torch.int8)
    scales = torch.where(amax.isfinite(), torch.where(codable, scales, 0.0), torch.nan)
    data, span = codes.view(rows, stride), stride if kind == "row8" else 16
    sums = data.view(rows, stride // span, span).sum(dim=-1, dtype=torch.int32)
    if kind == "row8":
        scales, sums = scales[:, 0], sums[:, 0]
    return Acts(kind, rows, k, data, scales, sums)


def hadamard(x: Tensor, block: int) -> Tensor:
    """x float32 [rows, k], each stretch of `block` (a power of two that divides k) times the Hadamard matrix of that
    order in Sylvester's arrangement, over sqrt(block); x itself where block is 1. Stages of butterflies (a, b) -> (a +
    b, a - b), partners 1, 2, 4 ... apart, then the factor in float32: the native kernels give the same bits."""
    if block == 1:
        return x
    y, apart = x.contiguous(), 1
    while apart < block:
        a, b = y.view(len(x), -1, 2, apart).unbind(dim=2)
        y = torch.stack((a + b, a - b), dim=2).view(x.shape)
        apart *= 2
    return y * (1.0 / torch.tensor(float(block), dtype=x.dtype).sqrt())


def linear(
    x: Acts, weight: Packed | QTensor, bias: Tensor | None = None, *, accumulate: Tensor | None = None
) -> Tensor:
    """float32 [rows, n], added to `accumulate` in place if given."""
    wide = x.dequantise()
    # torch multiplies few rows with other kernels, which sum in another order: a row would depend on its neighbours
    wide = F.pad(wide, (0, 0, 0, max(0, max(16, 8 * torch.get_num_threads()) - x.rows)))
    y = F.linear(wide, natural(weight).dequantise(), bias)[: x.rows]
    return y if accumulate is None else accumulate.add_(y)


def linear_gated(
    x: Acts, weight: Packed | QTensor, bias: Tensor | None, *, kind: str, width: int, activation: str, block: int
) -> Acts:
    """activation(gate) * up of a weight that holds 32 channels of the gate and the same 32 of up in turn."""
    return prepare(hadamard(gate_product(linear(x, weight, bias), width, activation), block), kind)


def gate_product(y: Tensor, width: int, activation: str) -> Tensor:
    """activation(gate) * up [rows, width] of 32 channels of the gate and the same 32 of up in turn [rows, n]."""
    gate, up = y.view(len(y), y.shape[1] // 64, 2, 32).unbind(dim=2)
    inner = gate if activation == "silu" else 1.59576912 * (gate + 0.044715 * gate * gate * gate)  # 2 sqrt(2 / pi)
    return (gate / (1.0 + torch.exp(-inner)) * up).reshape(len(y), y.shape[1] // 2)[:, :width]


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap) in place; NaN where x is not finite, which a cap would hide."""
    return x.copy_(cap * torch.tanh(x / cap) + x * 0.0)


def stats_of(
    logits: Tensor,
    ban: tuple[int, ...],
    entropy: bool,
    topk: int,
    barred: Sequence[tuple[TokenSet, Sequence[int]]] = (),
) -> HeadStats:
    """The statistics of logits float32 [rows, n] that are there already. barred: sets of ids and the rows whose choice
    leaves them out."""
    rows = logits.shape[0]
    finite = logits.isfinite().all(dim=1)
    values = logits.double()
    values[:, list(ban)] = -torch.inf
    values[~finite] = -torch.inf
    wide, index = F.pad(values, (0, max(2, topk)), value=-torch.inf).sort(dim=1, descending=True, stable=True)
    token = torch.where(wide[:, 0] > -torch.inf, index[:, 0], -1)
    best = torch.where(token >= 0, wide[:, 0], 0.0)
    below = values - best[:, None]  # of logits so large that adding log_sum changes nothing, the entropy is still right
    log_sum = torch.logsumexp(below, dim=1)
    norm, spread = best + log_sum, torch.zeros(rows, dtype=torch.float64)
    if entropy:
        log_p = below - log_sum[:, None]
        spread = -torch.where(below > -torch.inf, log_p.exp() * log_p, 0.0).sum(dim=1).clamp(max=0.0)
    ids = torch.where(wide > -torch.inf, index, -1)[:, :topk]
    choice, choice_logit = token.clone(), wide[:, 0].clone()
    for left_out, rows_of in barred:
        left = values[rows_of]
        left[:, left_out.tensor(left.device)] = -torch.inf
        choice_logit[rows_of], at = left.max(dim=1)
        choice[rows_of] = torch.where(choice_logit[rows_of] > -torch.inf, at, -1)

    def floats(value: Tensor) -> Tensor:
        return torch.where(finite.view(-1, *[1] * (value.ndim - 1)), value, torch.nan).float()

    return HeadStats(
        token.int().numpy(),
        finite.numpy(),
        floats(wide[:, 0]).numpy(),
        floats(wide[:, 1]).numpy(),
        floats(norm).numpy(),
        (floats(spread) if entropy else spread.float()).numpy(),
        floats(wide[:, :topk]).numpy(),
        ids.int().numpy(),
        choice.int().numpy(),
        floats(choice_logit).numpy(),
    )


def weight_rows(weight: Packed | QTensor, ids: Tensor) -> Tensor:
    """float32 [count, k]."""
    return natural(weight).rows(ids).dequantise() if len(ids) else torch.empty(0, natural(weight).shape[1])


def natural(weight: Packed | QTensor) -> QTensor:
    return weight if isinstance(weight, QTensor) else unpack_panels(weight)
