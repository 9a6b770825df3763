"""Rows: what a policy gets of a forward pass, the wanted rows with the head not yet run.

At a vocabulary of 152k a [rows, vocab] array costs as much as the head's matrix product, and a greedy decision needs a
few numbers of each row. So a policy asks for statistics (`stats`), which a native head computes in the same pass as the
product, and for `logits` only of the rows whose options edit them, draw from them or compare them.

Which of the two a row takes is the policy's choice by the row's own request, never by its neighbours; and a number of
a row has the same bits whichever rows and whichever other numbers are asked for with it. That keeps batch invariance.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfastllm.core import value
from dfastllm.kernels.statistics import (
    best_of,
    best_tokens,
    log_normaliser,
    on_capable_device,
    row_chunks,
    spread,
)
from dfastllm.kernels.token_set import TokenSet, rows_by_set

__all__ = ["Barred", "DenseRows", "RowStats", "Rows", "int64s", "probabilities"]

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Barred = Sequence[TokenSet | None] | None  # per row

_NO_FLOATS: Floats = np.empty(0, dtype=np.float32)
_NO_INTS: Ints = np.empty(0, dtype=np.int64)


@value(frozen=True, slots=True)
class RowStats:
    """Statistics of `count` rows over the vocabulary without the banned ids. What was not asked for has length 0.

    token    int64 [count]: the best token that the row may choose, the lowest id of a tie. An id of the vocabulary even
             where not finite.
    best     float32 [count]: its logit.
    finite   bool [count]: no NaN or infinity among the row's logits (the banned ones may be left out).
    norm     float32 [count]: logsumexp.
    entropy  float32 [count]: nats.
    margin   float32 [count]: p1 - p2, the probabilities of the best two tokens.
    ids, logits  int64 and float32 [count, min(top, vocab)]: the best tokens, descending, the lowest id of a tie first;
             banned ones come last, with -inf.

    Banned ids are part of nothing. Ids that are barred for a row are never its `token`; they stay part of the
    distribution, of which all other numbers speak.
    """

    token: Ints
    best: Floats
    finite: Bools
    norm: Floats = field(default_factory=lambda: _NO_FLOATS)
    entropy: Floats = field(default_factory=lambda: _NO_FLOATS)
    margin: Floats = field(default_factory=lambda: _NO_FLOATS)
    ids: Ints = field(default_factory=lambda: _NO_INTS)
    logits: Floats = field(default_factory=lambda: _NO_FLOATS)


class Rows(ABC):
    """The wanted rows of a step, in order; the head runs when they are looked at.

    An implementation gives `_logits`, `_stats` and `_take`. Selected rows share the record of which rows were finite
    with those they were selected from.
    """

    def __init__(self, count: int, vocab: int) -> None:
        self.count = count
        self.vocab = vocab
        self._flags = np.ones(count, dtype=np.bool_)  # of the rows of the whole step
        self._at: slice | Ints = slice(None)  # which of those these are
        self._dense: Tensor | None = None

    def __len__(self) -> int:
        return self.count

    def logits(self) -> Tensor:
        """float32 [count, vocab], made at most once. The caller may overwrite banned ids' columns, nothing else."""
        if self._dense is None:
            self._dense, finite = self._logits()
            self._flags[self._at] &= finite
        return self._dense

    def stats(
        self,
        *,
        ban: tuple[int, ...] = (),
        barred: Barred = None,
        norm: bool = False,
        spread: bool = False,
        top: int = 0,
    ) -> RowStats:
        """Statistics without the ids in `ban`. barred: per row the set of ids that it may not choose, or None. token,
        best and finite always; norm, spread (entropy and margin) and the best `top` tokens when asked."""
        out = self._stats(ban, barred, norm, spread, top)
        self._flags[self._at] &= out.finite
        return out

    def select(self, index: Sequence[int]) -> Rows:
        """The rows at `index`, ascending, as Rows of their own."""
        at = np.asarray(index, dtype=np.int64)
        part = self._take(at)
        part._flags = self._flags
        part._at = np.arange(len(self._flags))[self._at][at]
        return part

    def finite(self) -> Bools:
        """bool [count]: whether the row's logits were all finite, as far as anyone has looked at them."""
        return self._flags[self._at]

    @abstractmethod
    def _logits(self) -> tuple[Tensor, Bools]:
        """(float32 [count, vocab], bool [count]: finite)."""

    @abstractmethod
    def _stats(self, ban: tuple[int, ...], barred: Barred, norm: bool, spread: bool, top: int) -> RowStats: ...

    @abstractmethod
    def _take(self, index: Ints) -> Rows:
        """New rows of the same kind; `select` fills in what they share."""


class DenseRows(Rows):
    """Rows whose logits are there already: the plain twin, on any device. Owns `logits` float32 [rows, vocab]."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__(logits.shape[0], logits.shape[1])
        self._values = on_capable_device(logits)
        self._checked: Bools | None = None

    def _finite(self) -> Bools:
        if self._checked is None:  # before anyone writes -inf; one NaN or infinity in a row shows in its sum
            self._checked = torch.isfinite(self._values.sum(dim=-1)).cpu().numpy()
        return self._checked

    def _logits(self) -> tuple[Tensor, Bools]:
        return self._values, self._finite()

    def _stats(self, ban: tuple[int, ...], barred: Barred, norm: bool, spread: bool, top: int) -> RowStats:
        finite, values, banned = self._finite(), self._values, list(ban)
        sets = [] if barred is None else rows_by_set(barred, self.count, self.vocab)
        held = values[:, banned] if banned else None
        if held is not None:
            values[:, banned] = float("-inf")
        try:
            return _dense_stats(values, finite, sets, norm or spread, spread, top)
        finally:
            if held is not None:
                values[:, banned] = held

    def _take(self, index: Ints) -> Rows:
        return DenseRows(self._values[torch.from_numpy(index).to(self._values.device)])


def _dense_stats(
    values: Tensor, finite: Bools, barred: list[tuple[TokenSet, list[int]]], norm: bool, spreads: bool, top: int
) -> RowStats:
    token = best_tokens(values)
    for closed, members in barred:
        where, left_out = torch.tensor(members, device=values.device), closed.tensor(values.device)
        for part in row_chunks(values[: len(members)]):
            left = values[where[part]]
            left[:, left_out] = float("-inf")
            token[where[part]] = best_tokens(left)
    best = values.gather(1, token[:, None])[:, 0]
    lse = log_normaliser(values) if norm else None
    entropy, margin = spread(values, lse) if spreads and lse is not None else (None, None)
    ids, logits = best_of(values, min(top, values.shape[1])) if top else (_NO_INTS, _NO_FLOATS)

    def host(x: Tensor | None) -> Floats:
        return _NO_FLOATS if x is None else x.cpu().numpy()

    return RowStats(token.cpu().numpy(), host(best), finite, host(lse), host(entropy), host(margin), ids, logits)


def probabilities(logits: Floats, norm: Floats) -> NDArray[np.float64]:
    """float64: exp(logits - norm), the difference in float32 as the logits are."""
    with np.errstate(invalid="ignore"):  # rows that are not finite; the engine fails their requests
        return np.exp((logits - norm).astype(np.float64))


def int64s(parts: Iterable[Sequence[int]], pad: int = 0) -> Ints:
    """int64 [sum of the lengths + pad]: the parts end to end, then zeros. By `struct`, which reads Python ints four
    times as fast as numpy does."""
    flat: list[int] = []
    for part in parts:
        flat += part
    out = np.zeros(len(flat) + pad, dtype=np.int64)
    struct.pack_into(f"{len(flat)}q", out.data, 0, *flat)
    return out
