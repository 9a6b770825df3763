"""Sets of token ids, a bit each: what a row of logits may not choose, as the fused head and its twin take it.

A set belongs to a request and is made once; a row names the one that holds for it. Knows no request and no option.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfastllm.errors import ValidationError

__all__ = ["TokenSet", "rows_by_set"]

_WORD = 64  # as many as a panel of the head has channels: a panel's bits are one word


class TokenSet:
    """Ids of a vocabulary of `size`. Immutable.

    words  uint64 [ceil(size / 64)]: id i is bit i % 64 of word i // 64. Bits beyond `size` are 0.
    """

    __slots__ = ("_ids", "size", "words")

    def __init__(self, ids: Iterable[int], size: int) -> None:
        """Duplicates count once. Raises ValidationError for an id outside the vocabulary."""
        found = np.fromiter(ids, dtype=np.int64)
        if len(found) and not (found.min() >= 0 and found.max() < size):
            bad = found[(found < 0) | (found >= size)][:5].tolist()
            raise ValidationError(f"ids of a set must be 0 to {size - 1}, got {bad}.", param="ids")
        self.size = size
        bits = np.zeros(-(-size // _WORD) * _WORD, dtype=np.bool_)
        bits[found] = True
        self.words: NDArray[np.uint64] = np.packbits(bits, bitorder="little").view("<u8")
        self._ids: NDArray[np.int64] = np.flatnonzero(bits)

    @classmethod
    def outside(cls, ids: Iterable[int], size: int) -> TokenSet:
        """All ids of the vocabulary but these. Raises ValidationError as the constructor does."""
        inside = cls(ids, size)
        left = np.ones(size, dtype=np.bool_)
        left[inside._ids] = False
        return cls(np.flatnonzero(left), size)

    def __or__(self, other: TokenSet) -> TokenSet:
        """The ids of both."""
        return TokenSet(np.concatenate([self._ids, other._ids]), max(self.size, other.size))

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, token: int) -> bool:
        return 0 <= token < self.size and bool(self.words[token // _WORD] >> np.uint64(token % _WORD) & np.uint64(1))

    def holds(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """bool, as many as ids of the vocabulary: which of them are in the set."""
        at, bit = np.divmod(ids, _WORD)
        found: NDArray[np.bool_] = (self.words[at] >> bit.astype(np.uint64) & np.uint64(1)) != 0
        return found

    def tensor(self, device: torch.device) -> Tensor:
        """int64 [len]: the ids, ascending."""
        return torch.from_numpy(self._ids).to(device)


def rows_by_set(barred: Sequence[TokenSet | None], count: int, size: int) -> list[tuple[TokenSet, list[int]]]:
    """The sets that rows name, each with its rows, ascending. Raises ValidationError unless there is a set or None for
    each of `count` rows, all of a vocabulary of `size`."""
    if len(barred) != count:
        raise ValidationError(f"barred must name a set for each of {count} rows, got {len(barred)}.", param="barred")
    found: dict[int, tuple[TokenSet, list[int]]] = {}
    for row, ids in enumerate(barred):
        if ids is None:
            continue
        if ids.size != size:
            raise ValidationError(f"barred sets must be of {size} ids, got one of {ids.size}.", param="barred")
        found.setdefault(id(ids), (ids, []))[1].append(row)
    return list(found.values())
