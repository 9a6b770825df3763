"""How exact a result is."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

__all__ = ["Tier"]


class Tier(StrEnum):
    """How a result relates to the model's plain algorithm, the closest first."""

    REFERENCE = "reference"  # it is the plain algorithm
    EXACT_FAST = "exact-fast"  # the same tokens, in fewer or cheaper forwards
    EXACT_DISTRIBUTION = "exact-distribution"  # tokens of the same distribution, not those of the seed
    APPROXIMATE = "approximate"  # K,V or rows are approximated: other tokens may come

    @classmethod
    def least(cls, tiers: Iterable[Tier]) -> Tier:
        """Of parts of one answer: as exact as the least exact of them."""
        return max(tiers, key=tuple(cls).index)
