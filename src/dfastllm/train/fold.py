"""Warm start across wirings: a model with q/k norms as the beginning of one without.

RMS norm divides every head's q and k by their size. Sizes vary little over tokens, so a constant (their mean over a
batch of data, per head) in the rows of the projection stands in for it; training then mends the rest.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dfastllm.models.decoder import Decoder
from dfastllm.train.objectives import Rows, loss

__all__ = ["fold_norms"]


@torch.no_grad()
def fold_norms(model: Decoder, rows: Rows) -> Mapping[str, Tensor]:
    """The parameters of `model` without q_norm and k_norm: row d of head h of q_proj is scaled by norm weight[d] over
    the root mean square size of head h's q on these rows; k likewise. Leaves `model` unchanged."""
    sizes: dict[str, Tensor] = {}
    hooks = []

    def watch(name: str, dim: int, module: nn.Module) -> None:
        def note(_: nn.Module, __: object, out: Tensor) -> None:
            heads = out.float().view(len(out), -1, dim)  # [tokens, heads, dim]
            sizes[name] = heads.pow(2).mean((0, 2)).sqrt()

        hooks.append(module.register_forward_hook(note))

    for i, layer in enumerate(model.layers):
        for which in ("q", "k"):
            watch(f"layers.{i}.attn.{which}", model.config.head_dim, getattr(layer.attn, f"{which}_proj"))
    loss(model, rows)
    for hook in hooks:
        hook.remove()
    folded = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, size in sizes.items():
        weight = folded.pop(f"{name}_norm.weight")
        scale = (weight[None, :] / size[:, None]).reshape(-1, 1)  # [heads * dim, 1]
        folded[f"{name}_proj.weight"] *= scale
    return folded
