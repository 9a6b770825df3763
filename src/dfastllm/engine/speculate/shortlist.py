"""Rows of a draft model whose head has some tokens of the vocabulary only, as rows of the whole vocabulary."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfastllm.kernels.rows import Barred, Rows, RowStats
from dfastllm.kernels.token_set import TokenSet

__all__ = ["Shortlisted"]

NEVER = -1e30  # a logit; -inf would make the draw's arithmetic no number


class Shortlisted(Rows):
    """`rows` of a head of len(ids) tokens; column j is token ids[j] of a vocabulary of `vocab`. ids: int64 [n],
    ascending. A token that is not listed is never the best one, and has no part in the distribution."""

    def __init__(self, rows: Rows, ids: Tensor, vocab: int) -> None:
        super().__init__(rows.count, vocab)
        self._rows, self._ids = rows, ids
        self._numbers: NDArray[np.int64] = ids.numpy()

    def _logits(self) -> tuple[Tensor, NDArray[np.bool_]]:
        listed = self._rows.logits()
        whole = torch.full((self.count, self.vocab), NEVER, device=listed.device)
        whole[:, self._ids.to(listed.device)] = listed
        return whole, self._rows.finite()

    def _stats(self, ban: tuple[int, ...], barred: Barred, norm: bool, spread: bool, top: int) -> RowStats:
        sets: dict[int, TokenSet] = {}
        for closed in barred or ():
            if closed is not None and id(closed) not in sets:
                sets[id(closed)] = TokenSet(np.flatnonzero(closed.holds(self._numbers)), len(self._numbers))
        found = self._rows.stats(
            ban=tuple(self._places(ban)),
            barred=None if barred is None else [None if closed is None else sets[id(closed)] for closed in barred],
            norm=norm,
            spread=spread,
            top=top,
        )
        return replace(found, token=self._numbers[found.token], ids=self._numbers[found.ids])

    def _places(self, ids: tuple[int, ...]) -> list[int]:
        """Columns of those of these ids that are listed."""
        at = np.searchsorted(self._numbers, ids)
        return [int(a) for a, i in zip(at, ids, strict=True) if a < len(self._numbers) and self._numbers[a] == i]

    def _take(self, index: NDArray[np.int64]) -> Rows:
        return Shortlisted(self._rows.select(index.tolist()), self._ids, self.vocab)
