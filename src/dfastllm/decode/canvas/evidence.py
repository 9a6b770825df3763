"""What some unmasking rules need beyond the statistics of one row: credit, drift between steps, a second opinion.

Each function looks at the raw rows of one block and the block's memory, and is pure. Arrays are per masked row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dfastllm.decode.sampling import Draw, draw
from dfastllm.kernels.statistics import log_normaliser

__all__ = ["Drift", "Scorer", "add_credit", "agreement", "drift"]

Credit = tuple[tuple[int, int, float], ...]  # (position, token, credit)


class Scorer(Protocol):
    """An autoregressive model's opinion, for `apd`. Pure: equal tokens give equal scores."""

    vocab_size: int

    def __hash__(self) -> int:
        """By identity: policies with equal scorers are one policy."""
        ...

    def score(self, tokens: Sequence[int], count: int) -> Tensor:
        """Log-probabilities float32 [count, vocab_size] of the last `count` positions, each given all before it."""
        ...


def add_credit(
    logits: Tensor, positions: Sequence[int], memory: Credit | None, options: Mapping[str, Any]
) -> tuple[Tensor, Credit]:
    """Logits with 0.7 log(1 + credit) added, and the new credit (CreditDecoding, 2025, with its default numbers).

    Each step every credit of the block decays by decay_beta, then the best token of each masked row gains
    c ** boost_gamma. logits float32 [rows, vocab], unchanged; positions: of the rows."""
    top, best = logits.max(dim=-1)
    confidence = (top - log_normaliser(logits)).exp().tolist()
    credit = {(p, t): c * options["decay_beta"] for p, t, c in memory or ()}
    for p, t, c in zip(positions, best.tolist(), confidence, strict=True):
        credit[p, t] = credit.get((p, t), 0.0) + c ** options["boost_gamma"]
    row = {p: r for r, p in enumerate(positions)}
    kept = [(p, t, c) for (p, t), c in sorted(credit.items()) if p in row]  # committed rows are never asked again
    fused = logits.clone()
    at = torch.tensor([row[p] for p, _, _ in kept], dtype=torch.long, device=logits.device)
    tokens = torch.tensor([t for _, t, _ in kept], dtype=torch.long, device=logits.device)
    gain = torch.tensor([c for _, _, c in kept], dtype=torch.float64, device=logits.device)
    fused[at, tokens] += (options["credit_alpha"] * torch.log1p(gain)).float()
    return fused, tuple(kept)


@dataclass(frozen=True, eq=False)
class Drift:
    """What `klass` remembers of a step: positions, of the block and of the next one, their log-probabilities float32
    [rows, vocab] (never written again), the block, and the last divergences of its own positions."""

    positions: tuple[int, ...]
    logp: Tensor
    block: int
    history: tuple[tuple[float, ...], ...]


def drift(
    logits: Tensor,
    norm: Tensor,
    beside: Tensor,
    positions: tuple[Sequence[int], Sequence[int]],
    block: int,
    memory: Drift | None,
    options: Mapping[str, Any],
) -> tuple[np.ndarray, Drift]:
    """bool [rows]: whether the last kl_history_length divergences of each row, all of steps of this block, are below
    kl_threshold; and the new memory (KLASS: the divergence goes on from the last step of the block before; a row that
    has no step before diverges without bound).

    logits, norm: of the block's masked rows; beside: logits of the next block's rows. positions: of both."""
    own, next_ones = positions
    length, bound = options["kl_history_length"], options["kl_threshold"]
    logp = logits - norm[:, None]
    history: dict[int, tuple[float, ...]] = {}
    divergence = dict.fromkeys(own, math.inf)
    if memory is not None:
        old = {p: r for r, p in enumerate(memory.positions)}
        if memory.block == block:
            history = dict(zip(memory.positions, memory.history, strict=False))
        known = [r for r, p in enumerate(own) if p in old]
        before = memory.logp[torch.tensor([old[own[r]] for r in known], dtype=torch.long, device=logits.device)]
        now = logp[torch.tensor(known, dtype=torch.long, device=logits.device)]
        p = now.exp().double()
        terms = torch.where(p > 0, p * (now.double() - before.double()), torch.zeros_like(p))
        divergence.update(zip([own[r] for r in known], terms.sum(dim=-1).tolist(), strict=True))
    histories = tuple((*history.get(q, ()), divergence[q])[-length:] for q in own)
    stable = np.asarray([len(h) == length and max(h) < bound for h in histories], dtype=np.bool_)
    if len(next_ones):
        logp = torch.cat([logp, beside - log_normaliser(beside)[:, None]])
    return stable, Drift((*own, *next_ones), logp, block, histories)


def agreement(
    scorer: Scorer,
    logits: Tensor,
    norm: Tensor,
    tokens: Sequence[int],
    row: Draw,
    drafts: Tensor,
    options: Mapping[str, Any],
) -> np.ndarray:
    """bool [rows]: the leading rows whose drafts a draw from p_diffusion^w p_ar^(1-w), with the same noise, repeats.

    tokens: all that stands before the first masked position; row: the draw that made `drafts` int64 [rows], whose
    positions are contiguous from there on (rows after a gap are not looked at)."""
    start, weight = row.positions[0], options["apd_mixture_weight"]
    count = 0
    while count < min(len(row.positions), options["max_lookahead"]) and row.positions[count] == start + count:
        count += 1
    opinion = scorer.score([*tokens, *drafts[:count].tolist()], count).to(logits.device)
    own = logits[:count] - norm[:count, None]
    mixed = weight * own + (1 - weight) * opinion
    mixed = torch.where(torch.isneginf(own), own, mixed)  # what the canvas may not hold stays out, whatever the weight
    again = draw(mixed, [replace(row, positions=row.positions[:count])])
    same = (again == drafts[:count]).cpu().numpy()
    same[0] = True  # the leftmost is always taken, and the others are judged without it
    out = np.zeros(len(row.positions), dtype=np.bool_)
    out[:count] = np.logical_and.accumulate(same)
    return out
