"""Mixtures of experts: the two routers and the sum over experts. No expert parallelism, no load-balancing loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfastllm.models.config import MoEConfig
from dfastllm.models.parts import Adapt, Expert

__all__ = ["Mixture", "Router", "route"]


class Router(nn.Module):
    """Scores rows against experts in float32. `bias` (sigmoid router only) steers selection, never the weights."""

    def __init__(self, hidden: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.experts, hidden))
        self.bias = nn.Parameter(torch.zeros(config.experts)) if config.router == "sigmoid" else None

    def forward(self, x: Tensor, adapt: Adapt | None = None, name: str = "") -> tuple[Tensor, Tensor]:
        """x [tokens, hidden] -> weights float32, experts int64, both [tokens, top_k]. name: its own."""
        logits = F.linear(x.float(), self.weight.float())  # [tokens, experts]
        if adapt is not None:
            logits = adapt(name, x, logits)
        return route(logits, self.bias, self.config)


def route(logits: Tensor, bias: Tensor | None, config: MoEConfig) -> tuple[Tensor, Tensor]:
    """The router's logits float32 [tokens, experts] -> weights float32, experts int64, both [tokens, top_k], the best
    first, equal ones by their number. bias: of a sigmoid router, None: softmax. See `MoEConfig`."""
    if bias is None:
        chosen = _highest(logits, config.top_k)
        weights = logits.softmax(-1).gather(-1, chosen)
    else:
        scores = 1 / (1 + torch.exp(-logits))  # not torch.sigmoid: see parts.silu
        chosen = _highest(_within_best_groups(scores + bias.float(), config), config.top_k)
        weights = scores.gather(-1, chosen)
    if config.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * config.scale, chosen


def _highest(values: Tensor, count: int) -> Tensor:
    """int64 [rows, count]: where the highest of each row lie, the lowest index first of equal ones."""
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def _within_best_groups(biased: Tensor, config: MoEConfig) -> Tensor:
    """biased [tokens, experts] with every expert outside the row's best groups at -inf."""
    grouped = biased.view(len(biased), config.groups, -1)
    group_score = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)  # [tokens, groups]
    best = _highest(group_score, config.groups_kept)
    kept = torch.zeros_like(group_score, dtype=torch.bool).scatter(-1, best, True)
    return grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1)


class Mixture(nn.Module):
    """Sum of the chosen experts' outputs times their weights, plus the shared expert's."""

    def __init__(self, hidden: int, config: MoEConfig) -> None:
        super().__init__()
        self.router = Router(hidden, config)
        self.experts = nn.ModuleList(Expert(hidden, config.intermediate_size) for _ in range(config.experts))
        self.shared = Expert(hidden, config.shared_size) if config.shared_size else None

    def forward(self, x: Tensor, adapt: Adapt | None = None, name: str = "") -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden]. name: its own. Only experts that some row chose run, each on its rows
        at once, and a row's sum runs over its experts in ascending order, so it does not depend on the other rows."""
        weights, chosen = self.router(x, adapt, f"{name}.router")
        out = torch.zeros_like(x, dtype=torch.float32)
        for expert in chosen.unique().tolist():
            row, slot = (chosen == expert).nonzero(as_tuple=True)
            part = _padded(self.experts[expert], x[row], adapt, f"{name}.experts.{expert}", row)
            update = part.float() * weights[row, slot, None]
            out = out.index_add(0, row, update)
        if self.shared is not None:
            out = out + self.shared(x, adapt, f"{name}.shared").float()
        return out.to(x.dtype)


def _padded(expert: nn.Module, x: Tensor, adapt: Adapt | None, name: str, rows: Tensor) -> Tensor:
    """expert(x), run on at least as many rows as the engine pads a forward to: matrix products of a few rows use other
    kernels with another order of summation, so a row's last bits would depend on how many rows chose its expert."""
    least = max(16, 8 * torch.get_num_threads())
    if len(x) >= least:
        return expert(x, adapt, name, rows)  # type: ignore[no-any-return]
    return expert(F.pad(x, (0, 0, 0, least - len(x))), adapt, name, rows)[: len(x)]  # type: ignore[no-any-return]
