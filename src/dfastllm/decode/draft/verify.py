"""The next token of each row of an autoregressive step, and what of a draft stands.

A row decides the token that follows the text and the draft tokens before it. Coupled (the default): it makes the draw
that plain decoding would make there, keyed by (seed, step, position), and the draft stands as far as it says the same;
so the output is plain decoding's, token for token, whatever was drafted. Rejection (Leviathan et al. 2023, Chen et al.
2023): a draft token x stands with probability min(1, p(x) / q(x)), and in its place comes a draw from max(p - q, 0);
the output has the target's distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from dfastllm.core import Draft, SequenceState, TokenLogprob, value
from dfastllm.decode.records import token_logprob
from dfastllm.decode.sampling import Draw, barred, distribution, draw, edits, penalised, row_keys, take, uniform
from dfastllm.kernels.rows import DenseRows, Rows
from dfastllm.kernels.token_set import TokenSet

__all__ = ["DRAFT_SALT", "Cell", "bars", "cells_of", "choose", "draw_of", "edited", "odds", "rejects", "standing"]

# Kinds of draws under rejection; 0 is the plain draw of a token. They must be independent of each other.
DRAFT_SALT, ACCEPT_SALT, REST_SALT = 0xD4AF, 0xACCE, 0x4E57


@value(frozen=True, slots=True)
class Cell:
    """One row to decide: the token after the text of `seq` and the first `ahead` tokens of `draft`."""

    seq: SequenceState
    draft: Draft | None = None
    ahead: int = 0

    @property
    def position(self) -> int:
        return len(self.seq.tokens) + self.ahead

    @property
    def proposed(self) -> int | None:
        """What the draft says here; None after its end."""
        return self.draft.tokens[self.ahead] if self.draft and self.ahead < len(self.draft.tokens) else None


def cells_of(seq: SequenceState, draft: Draft | None) -> list[Cell]:
    """The rows of a deciding forward: after the text, and after each token of the draft."""
    return [Cell(seq)] if draft is None else [Cell(seq, draft, j) for j in range(1 + len(draft.tokens))]


def rejects(seq: SequenceState) -> bool:
    """Whether drafts are judged by rejection sampling. Greedy there is nothing to sample: the two rules are one."""
    asked = seq.request.speculative
    return asked is not None and asked.acceptance == "rejection" and seq.sampling.temperature > 0


def standing(chosen: Sequence[int], draft: Draft) -> int:
    """How many tokens of the draft stand: its longest prefix that was chosen."""
    pairs = enumerate(zip(chosen, draft.tokens, strict=False))
    return next((j for j, (token, proposed) in pairs if token != proposed), len(draft.tokens))


def choose(cells: Sequence[Cell], rows: Rows) -> tuple[list[int], list[TokenLogprob | None]]:
    """The token of each cell, and its record where asked for. Of greedy rows without edits that is the best one that is
    not barred; logits are made of the others only."""
    tokens, records = [0] * len(cells), cast("list[TokenLogprob | None]", [None] * len(cells))
    parts: dict[str, list[int]] = {}
    for row, cell in enumerate(cells):
        parts.setdefault(_route(cell), []).append(row)
    for route, members in parts.items():
        some = [cells[r] for r in members]
        model = some[0].seq.model
        ban = () if model.mask_id is None else (model.mask_id,)
        part = rows if len(members) == len(cells) else rows.select(members)
        tops = [cell.seq.sampling.logprobs for cell in some]
        wanted = [top for top in tops if top is not None]
        if route == "logits":
            logits = part.logits()
            logits[:, list(ban)] = float("-inf")
            drawn = _judge(some, logits, draw(logits, [draw_of(cell) for cell in some]))
            picked, chosen = drawn.tolist(), logits.gather(1, drawn[:, None])[:, 0].tolist() if wanted else []
            stats = DenseRows(logits).stats(norm=True, top=max(wanted)) if wanted else None
        else:
            stats = part.stats(ban=ban, barred=bars(some), norm=bool(wanted), top=max(wanted, default=0))
            picked, chosen = stats.token.tolist(), stats.best.tolist() if wanted else []
        for i, row in enumerate(members):
            tokens[row] = picked[i]
            top = tops[i]
            if top is not None and stats is not None:
                records[row] = token_logprob(stats, i, picked[i], chosen[i], top)
    return tokens, records


def _route(cell: Cell) -> str:
    """logits: the row is edited or drawn from; best: a best token is all; records: and the statistics of that."""
    if edited(cell):
        return "logits"
    return "best" if cell.seq.sampling.logprobs is None else "records"


def edited(cell: Cell) -> bool:
    """Whether the token is another than the row's best one that is not barred."""
    s = cell.seq.sampling
    return s.temperature > 0 or edits(s)


def bars(cells: Sequence[Cell], vocab: int | None = None) -> list[TokenSet | None] | None:
    """Per cell the ids, of the target's vocabulary or one of another size, that its options bar; None where no cell has
    any."""
    if not [1 for c in cells if c.seq.sampling.min_tokens or c.seq.sampling.allowed_token_ids is not None]:
        return None
    found = [barred(c.seq.sampling, c.seq.ends, c.position, vocab or c.seq.model.vocab_size) for c in cells]
    return found if any(found) else None


def draw_of(cell: Cell, salt: int = 0) -> Draw:
    """How plain decoding draws the token of this cell. Penalties count the draft tokens before it as text."""
    seq, n = cell.seq, cell.position
    s = seq.sampling
    counted = penalised(s)
    ahead = cell.draft.tokens[: cell.ahead] if cell.draft else ()
    return Draw(
        sampling=s,
        positions=(n,),
        seed=seq.seed,
        step=n - seq.canvas_start,
        first=seq.canvas_start,
        prompt=seq.request.prompt if counted else (),
        output=[*seq.tokens[seq.canvas_start :], *ahead] if counted else (),
        enders=seq.ends.barred,
        salt=salt,
    )


def odds(p: Tensor, q: Tensor, proposed: Tensor) -> tuple[Tensor, Tensor]:
    """The rule of rejection sampling: how likely a proposed token stands, float64 [rows], and the weights of what comes
    in its place, float64 [rows, vocab], not normalised.

    p, q: the target's and the draft's distribution, float64 [rows, vocab]; proposed int64 [rows], drawn from q. Then
    q(x) min(1, p(x) / q(x)) plus the rest's share is p(x) for every token x."""
    px, qx = (d.gather(1, proposed[:, None])[:, 0] for d in (p, q))
    # a token that q gave too little for never loses: a rounded quotient must not reject it and leave nothing to draw
    stands = torch.where(px >= qx, 1.0, px / qx)
    return stands, (p - q).clamp_(min=0.0)


def _judge(cells: Sequence[Cell], logits: Tensor, drawn: Tensor) -> Tensor:
    """`drawn` int64 [cells], where a draft is judged by rejection replaced by the draft's token or the draw from what
    is left. logits float32 [cells, vocab], unchanged."""
    judged = [i for i, cell in enumerate(cells) if cell.proposed is not None and rejects(cell.seq)]
    if not judged:
        return drawn
    some = [cells[i] for i in judged]
    where = torch.tensor(judged, device=logits.device)
    p = distribution(logits[where], [draw_of(cell) for cell in some])  # float64 [judged, vocab]
    proposed = torch.tensor([cast(int, cell.proposed) for cell in some], device=logits.device)
    q = torch.zeros_like(p)
    for i, cell in enumerate(some):
        assert cell.draft is not None
        if cell.draft.probs is None:
            q[i, proposed[i]] = 1.0
        else:
            q[i] = cell.draft.probs[cell.ahead]
    stands, weights = odds(p, q, proposed)
    seeds, at = [cell.seq.seed for cell in some], [cell.position for cell in some]
    steps = [cell.position - cell.seq.canvas_start for cell in some]
    luck = torch.from_numpy(uniform(row_keys(seeds, steps, at, ACCEPT_SALT))).to(p.device)
    rest = take(weights, row_keys(seeds, steps, at, REST_SALT))
    out = drawn.clone()
    out[where] = torch.where(luck < stands, proposed, rest)
    return out
