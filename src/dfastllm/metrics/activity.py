"""What an engine has done in the last seconds, for a person who looks on: rates, not totals."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from dfastllm.core import StepStats

__all__ = ["WINDOW", "Activity", "Rates"]

WINDOW = 5.0  # s


@dataclass(frozen=True)
class Rates:
    """Of the last `WINDOW` seconds, and how things stand.

    running, waiting     requests.
    tokens_per_second    tokens decided.
    steps_per_second     turns of the engine's loop.
    tokens_per_forward   tokens decided for each sequence of a step; None without steps.
    pages, pages_total   of K,V in use, and that there are.
    prefix_hits          part of the prompt tokens looked up that were found in shared K,V; None without any.
    accepted             part of the drafted tokens that stood; None without drafts.
    """

    running: int
    waiting: int
    tokens_per_second: float
    steps_per_second: float
    tokens_per_forward: float | None
    pages: int
    pages_total: int
    prefix_hits: float | None
    accepted: float | None


class Activity:
    """Sees every step of one engine. Thread-safe. clock: seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._steps: deque[tuple[float, StepStats]] = deque()
        self._last: StepStats | None = None

    def see(self, stats: StepStats) -> None:
        """One step; called on the engine's thread."""
        now = self._clock()
        with self._lock:
            self._last = stats
            self._steps.append((now, stats))
            self._forget(now)

    def rates(self) -> Rates:
        now = self._clock()
        with self._lock:
            self._forget(now)
            steps = [stats for _, stats in self._steps]
            last = self._last
        committed, sequences = sum(s.committed for s in steps), sum(s.sequences for s in steps)
        drafts = [draft for s in steps for draft in s.drafts]
        drafted, accepted = sum(d for d, _ in drafts), sum(a for _, a in drafts)
        looked, found = sum(s.prefix_queries for s in steps), sum(s.prefix_hits for s in steps)
        return Rates(
            running=last.running if last is not None else 0,
            waiting=last.waiting if last is not None else 0,
            tokens_per_second=committed / WINDOW,
            steps_per_second=len(steps) / WINDOW,
            tokens_per_forward=committed / sequences if sequences else None,
            pages=last.pages_used if last is not None else 0,
            pages_total=last.pages_total if last is not None else 0,
            prefix_hits=found / looked if looked else None,
            accepted=accepted / drafted if drafted else None,
        )

    def _forget(self, now: float) -> None:
        while self._steps and self._steps[0][0] < now - WINDOW:
            self._steps.popleft()
