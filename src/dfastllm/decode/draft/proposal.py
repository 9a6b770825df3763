"""What a drafting model says of its rows: the token it proposes at each cell, and for rejection what it was drawn from.

Coupled, a draft stands where it says what the target's keyed draw says, so the drafting model makes the same draw: the
same noise and options on its own logits agree more often than two independent draws, and more than its best token.
Judged by rejection its draw must be independent of the judgement's, so it has a salt of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from dfastllm.core import value
from dfastllm.decode.draft.verify import DRAFT_SALT, Cell, bars, draw_of, edited, rejects
from dfastllm.decode.sampling import distribution, draw
from dfastllm.kernels.rows import Rows

__all__ = ["Proposal", "pick"]

NEVER = -1e30  # a logit; -inf would make a row without any other token not a number


@value(frozen=True, slots=True)
class Proposal:
    """A token, and for rejection the distribution it was drawn from, float32 [vocab of the target]."""

    token: int
    probs: Tensor | None = None


def pick(cells: Sequence[Cell], rows: Rows, ban: tuple[int, ...] = ()) -> list[Proposal]:
    """One proposal per cell, from the drafting model's rows in the same order. ban: ids that are never proposed (its
    mask token). Its vocabulary may be padded to another width than the target's; only the target's ids are proposed."""
    out = cast("list[Proposal]", [None] * len(cells))
    width = cells[0].seq.model.vocab_size if cells else 0
    plain = [r for r, cell in enumerate(cells) if rows.vocab <= width and not edited(cell)]
    bare = set(plain)
    rest = [r for r in range(len(cells)) if r not in bare]
    if plain:
        part = rows if not rest else rows.select(plain)
        tokens = part.stats(ban=ban, barred=bars([cells[r] for r in plain], rows.vocab)).token
        for r, token in zip(plain, tokens.tolist(), strict=True):
            out[r] = Proposal(token)
    if rest:
        part = rows if not plain else rows.select(rest)
        for r, proposal in zip(rest, _drawn([cells[r] for r in rest], _fit(part.logits(), width, ban)), strict=True):
            out[r] = proposal
    return out


def _fit(logits: Tensor, width: int, ban: tuple[int, ...]) -> Tensor:
    """A copy float32 [rows, width]."""
    fitted = torch.full((logits.shape[0], width), NEVER, device=logits.device)
    shared = min(width, logits.shape[1])
    fitted[:, :shared] = logits[:, :shared]
    fitted[:, [i for i in ban if i < width]] = NEVER
    return fitted


def _drawn(cells: Sequence[Cell], logits: Tensor) -> list[Proposal]:
    judged = [rejects(cell.seq) for cell in cells]
    draws = [draw_of(cell, DRAFT_SALT if own else 0) for cell, own in zip(cells, judged, strict=True)]
    tokens = draw(logits, draws).tolist()
    probs: dict[int, Tensor] = {}
    hot = [r for r, own in enumerate(judged) if own]
    if hot:
        made = distribution(logits[torch.tensor(hot, device=logits.device)], [draws[r] for r in hot]).float()
        probs = dict(zip(hot, made, strict=True))
    return [Proposal(token, probs.get(r)) for r, token in enumerate(tokens)]
