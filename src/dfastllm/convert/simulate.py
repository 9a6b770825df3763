"""What quantised kernels compute, in plain torch: dequantised weights, and activations rounded to int8 and back before
every linear layer. For measuring formats on any machine; nothing here is fast.

Integer products are exact and scales are applied in float32, so a kernel differs from this only in the order of float32
sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfastllm.errors import ValidationError
from dfastllm.kernels.packed import FORMS, QTensor
from dfastllm.models.basis import Basis, Turn
from dfastllm.models.decoder import Decoder

__all__ = ["ACTIVATIONS", "Activations", "SimulatedLinear", "round_activations", "simulate"]

Activations = Literal["none", "row", "group"]
# What the kernels do for each natural form: one scale per row, or one per 32 inputs.
ACTIVATIONS: Mapping[str, Activations] = {
    name: "row" if form.inputs == "row8" else "group" for name, form in FORMS.items() if form.quantised
}


def round_activations(x: Tensor, how: Activations) -> Tensor:
    """x [..., k] float32 -> the same after symmetric int8 rounding with the scale largest / 127 of a row, or of 32
    inputs. Raises ValidationError for groups that do not divide k."""
    if how == "none":
        return x
    k = x.shape[-1]
    if how == "group" and k % 32:
        raise ValidationError(f"groups of 32 activations do not divide {k} inputs.", param="activations")
    grouped = x.reshape(-1, k if how == "row" else 32)
    scale = grouped.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale == 0, torch.zeros_like(grouped), grouped / scale).round().clamp(-127, 127)
    return (codes * scale).view(x.shape)


class SimulatedLinear(nn.Module):
    """y = round(x) W^T + bias, float32; turn: of x before it is rounded."""

    def __init__(self, weight: Tensor, bias: Tensor | None, how: Activations, turn: Turn | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.float(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)
        self.how = how
        self.turn = turn

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if self.turn is None else self.turn.apply(x.float())
        return F.linear(round_activations(wide, self.how), self.weight, self.bias)


def simulate(
    model: Decoder,
    weights: Iterable[tuple[str, QTensor | Tensor]],
    *,
    activations: Activations | None = None,
    basis: Basis | None = None,
) -> Decoder:
    """Change a float32 model in place into what kernels would compute from these weights (own names); returned for
    convenience. activations: the same rounding everywhere; None: each format's own. basis: what the weights are
    turned to; norms come as they were."""
    for name, weight in weights:
        module, _, leaf = name.rpartition(".")
        if basis is not None and module in basis.norms:
            weight = torch.full(weight.shape, 1.0 - basis.norms[module])  # its gain is folded into what follows
        if not isinstance(weight, QTensor):
            setattr(model.get_submodule(module), leaf, nn.Parameter(weight.float(), requires_grad=False))
            continue
        how = ACTIVATIONS.get(weight.format, "none") if activations is None else activations
        wide = weight.dequantise()
        if name == "embed.weight":
            model.embed.weight = nn.Parameter(wide, requires_grad=False)
            if model.config.tied:
                model.lm_head = SimulatedLinear(wide, None, how)  # type: ignore[assignment]
            continue
        parent, _, child = module.rpartition(".")
        bias = getattr(getattr(model.get_submodule(parent), child), "bias", None)  # a tied model has no head yet
        side = None if basis is None else basis.sides[module]
        turn = side.inputs if side is not None and side.late else None
        setattr(model.get_submodule(parent), child, SimulatedLinear(wide, bias, how, turn))
    return model
