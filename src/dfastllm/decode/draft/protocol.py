"""What the engine asks of a drafter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dfastllm.core import Draft, ModelInfo, Request, SequenceState

__all__ = ["Drafter"]


class Drafter(Protocol):
    """Proposes what follows. It may hold state of its own (K,V, an index), never of the sequences.

    The draft of a text must depend on the text, the request and the length asked for alone (and, for an index over past
    outputs, on those): under rejection sampling a draft decides which tokens come.
    """

    def check(self, request: Request, model: ModelInfo) -> None:
        """Raise ValidationError or UnsupportedError (naming the field) if it cannot draft for this request."""
        ...

    def passes(self, most: int) -> int:
        """Forwards of a model that drafts of `most` tokens take together; 0: a lookup, which costs next to nothing."""
        ...

    def propose(self, wanted: Sequence[tuple[SequenceState, int]]) -> list[Draft]:
        """One draft per (sequence, most tokens >= 1), in order; an empty one where there is nothing to propose."""
        ...

    def release(self, seq: SequenceState) -> None:
        """The sequence ended: what is held for it can go, and what it said can be learned."""
        ...
