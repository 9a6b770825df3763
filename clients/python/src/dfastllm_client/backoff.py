"""How long to wait before something is tried again: exponential, with full jitter, never below what the server said."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Backoff"]


@dataclass(frozen=True)
class Backoff:
    """Attempt i (from 0) waits a uniformly random time of [0, min(most, first * 2**i)] seconds, so that a thousand
    clients cut off at once do not all come back at once.

    attempts: how many times something is tried again; 0 never.
    longest: a server that asks for a longer wait than this is not waited for: its error is raised at once.
    draw: gives a number of [0, 1); replaced in tests.
    """

    attempts: int = 4
    first: float = 0.25
    most: float = 8.0
    longest: float = 60.0
    draw: Callable[[], float] = random.random

    def __post_init__(self) -> None:
        if self.attempts < 0 or self.first < 0 or self.most < 0:
            raise ValueError(f"attempts, first and most of a Backoff must be at least 0, got {self}.")

    def wait(self, attempt: int, retry_after: float | None = None) -> float | None:
        """Seconds to wait before try number `attempt` is repeated, or None when it shall not be."""
        if attempt >= self.attempts or (retry_after or 0.0) > self.longest:
            return None
        jittered = self.draw() * min(self.most, self.first * 2.0 ** min(attempt, 60))
        return jittered if retry_after is None else retry_after + jittered
