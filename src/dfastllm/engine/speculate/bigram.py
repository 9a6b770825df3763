"""Tokens of a block drafter chosen from left to right: each row's likeliest ones, with a bigram head's term for the
token before them (see `models.bigram`).

Only the `CANDIDATES` likeliest tokens of a row can be drafted then. They come from one pass over the head for all rows,
and a term costs `rank` products for each of them, so what is added does not grow with the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfastllm.core import Draft, SequenceState, value
from dfastllm.decode.draft.proposal import Proposal, pick
from dfastllm.decode.draft.verify import Cell, edited
from dfastllm.kernels.rows import DenseRows, Rows
from dfastllm.models.bigram import Bigram

__all__ = ["CANDIDATES", "Candidates", "Wanted", "best_chain", "candidates", "chained", "likeliest"]

CANDIDATES = 32
NEVER = -1e30  # a logit; -inf would make the draw's arithmetic no number

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Wanted = tuple[SequenceState, int]  # a sequence and how many tokens are drafted for it, a row each


@value(frozen=True, slots=True)
class Candidates:
    """What can be drafted at each row, likeliest first.

    ids     int64 [rows, n].
    logits  float32 [rows, n].
    after   float32 [rows, n, rank]: what a bigram head has of them.
    """

    ids: Ints
    logits: Floats
    after: Floats

    def after_tokens(self, before: Floats) -> Floats:
        """Logits float32 [rows, n] with the terms of the tokens before them, of which the head has `before` float32
        [rows, rank]. Each sum is along the last axis, so its bits do not depend on how many rows there are."""
        terms: Floats = (self.after * before[:, None]).sum(axis=-1)
        return self.logits + terms

    def take(self, index: Ints) -> Candidates:
        return Candidates(self.ids[index], self.logits[index], self.after[index])


def candidates(head: Bigram, rows: Rows, ban: tuple[int, ...]) -> Candidates:
    """What `likeliest` gives, with what the head has of it."""
    ids, logits = likeliest(rows, ban)
    return Candidates(ids, logits, head.after.numpy()[ids])


def likeliest(rows: Rows, ban: tuple[int, ...]) -> tuple[Ints, Floats]:
    """The tokens of each row that can be drafted, likeliest first, and their logits. ban: ids that never are."""
    told = rows.stats(ban=ban, top=min(CANDIDATES, rows.vocab - len(ban)))
    return told.ids, told.logits


def chained(head: Bigram, wanted: Sequence[Wanted], rows: Rows, ban: tuple[int, ...]) -> list[list[Proposal]]:
    """For each wanted draft its proposals, one for each token. rows: those of all drafts, one after the other. A draft
    depends on its own rows alone, whoever drafts beside it. What follows a token that ends the text means nothing."""
    told = candidates(head, rows, ban)
    starts = np.cumsum([0, *(most for _, most in wanted)])
    bare = [n for n, (seq, _) in enumerate(wanted) if _is_bare(seq, rows.vocab)]
    found: list[list[Proposal]] = [[] for _ in wanted]
    if bare:
        own = np.concatenate([np.arange(starts[n], starts[n + 1]) for n in bare])
        lasts = np.array([wanted[n][0].tokens[-1] for n in bare])
        tokens = iter(best_chain(head, told.take(own), lasts, np.array([wanted[n][1] for n in bare])).tolist())
        for n in bare:
            found[n] = [Proposal(next(tokens)) for _ in range(wanted[n][1])]
    rest = sorted(set(range(len(wanted))) - set(bare))
    for ahead in range(max((wanted[n][1] for n in rest), default=0)):
        going = [n for n in rest if ahead < wanted[n][1]]
        previous = [found[n][-1].token if ahead else wanted[n][0].tokens[-1] for n in going]
        part = told.take(starts[going] + ahead)
        whole = _whole(part.ids, part.after_tokens(head.before.numpy()[previous]), rows.vocab)
        cells = [_cell(wanted[n][0], found[n]) for n in going]
        for n, proposal in zip(going, pick(cells, DenseRows(whole), ban), strict=True):
            found[n].append(proposal)
    return found


def best_chain(head: Bigram, told: Candidates, lasts: Ints, lengths: Ints) -> Ints:
    """int64 [rows]: from left to right the best candidate after the one before it. Of equal ones it is the one that the
    row itself says is likelier.

    lasts: the token before each chain. lengths: rows of each, at least 1; together all rows of `told`.

    All rows are decided at once, each after what the row before it said last; where that changes nothing any more, it
    is what deciding one after the other gives. A chain that a head does not change takes one round, none more than it
    has rows.
    """
    before = head.before.numpy()
    firsts = np.cumsum(lengths) - lengths
    row = np.arange(len(told.ids))
    best = told.ids[:, 0]
    while True:
        previous = np.empty_like(best)
        previous[1:] = best[:-1]
        previous[firsts] = lasts
        now: Ints = told.ids[row, told.after_tokens(before[previous]).argmax(axis=1)]
        if np.array_equal(now, best):
            return now
        best = now


def _is_bare(seq: SequenceState, vocab: int) -> bool:
    """Whether nothing but the best token of a row of `vocab` logits decides what is drafted."""
    s = seq.sampling
    return vocab <= seq.model.vocab_size and not edited(Cell(seq)) and not s.min_tokens and s.allowed_token_ids is None


def _whole(ids: Ints, logits: Floats, vocab: int) -> Tensor:
    """float32 [rows, vocab]: the candidates' logits, and none that counts for any other token."""
    whole = torch.full((len(ids), vocab), NEVER)
    return whole.scatter_(1, torch.from_numpy(ids), torch.from_numpy(np.maximum(logits, np.float32(NEVER))))


def _cell(seq: SequenceState, said: Sequence[Proposal]) -> Cell:
    return Cell(seq, Draft(tuple([p.token for p in said]), len(seq.tokens)), len(said))
