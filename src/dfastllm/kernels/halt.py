"""Giving up a forward pass that is under way, from another thread: it is asked between two layers whether to go on."""

from __future__ import annotations

import numpy as np

__all__ = ["Halt", "Interrupted"]


class Interrupted(Exception):
    """A forward was given up. K,V that it was to write are void until a forward writes them again; all others stand."""


class Halt:
    """Of one runner. words: int64 [2]: the run that is to be given up, and the one that was begun last. Runs count from
    1, and asking for one that is over changes nothing, so who asks too late hits no other."""

    def __init__(self) -> None:
        self.words = np.zeros(2, dtype=np.int64)

    @property
    def runs(self) -> int:
        """How many were begun."""
        return int(self.words[1])

    def begin(self) -> None:
        self.words[1] += 1

    def ask(self, run: int) -> None:
        """Give up that run if it is under way. Thread-safe."""
        self.words[0] = run

    @property
    def asked(self) -> bool:
        """Whether the run that was begun last is to be given up."""
        return bool(self.words[0] == self.words[1])
