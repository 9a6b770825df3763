"""Connections that the server ends: how many and why, and the clock of who does not read on.

Shared by HTTP and WebSocket connections. What else ends one is theirs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Literal

from dfastllm.metrics import Metrics

__all__ = ["LEAST_RATE", "QUIET", "Reason", "Tally", "WriteClock"]

Reason = Literal["capacity", "files", "host", "malformed", "shutdown", "slow_reader", "slow_request"]

LEAST_RATE = 8192  # bytes a second: a body that comes faster, and an answer that is read faster, has the time it takes
QUIET = 60.0  # s between two log lines of one reason

log = logging.getLogger("dfastllm.server")


class Tally:
    """Counts connections that the server ended, by reason, and tells of them at most once a minute for each."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self.metrics = metrics
        self.clock = clock
        self._told: dict[Reason, float] = {}
        self._untold: dict[Reason, int] = {}

    def note(self, reason: Reason, detail: str) -> None:
        """One more. detail: for the log, about this one."""
        self.metrics.connection_ended(reason)
        now = self.clock()
        if now - self._told.get(reason, -QUIET) < QUIET:
            self._untold[reason] = self._untold.get(reason, 0) + 1
            return
        self._told[reason] = now
        before = self._untold.pop(reason, 0)
        log.warning("connection ended (%s): %s%s", reason, detail, f"; {before} more before" if before else "")


class WriteClock:
    """Ends a connection whose client does not read on: `LEAST_RATE` over every `seconds` that writing is paused, or all
    that waits. cut: how it is ended, with a reason and a detail for the log."""

    def __init__(self, transport: asyncio.Transport, seconds: float, cut: Callable[[Reason, str], None]) -> None:
        self.transport = transport
        self.seconds = seconds
        self.cut = cut
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Writing was paused."""
        self._wait(self.transport.get_write_buffer_size())

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self, unsent: int) -> None:
        self._timer = asyncio.get_running_loop().call_later(self.seconds, self._check, unsent)

    def _check(self, before: int) -> None:
        """Writing was paused a while ago with `before` bytes unsent."""
        unsent = self.transport.get_write_buffer_size()
        if before - unsent < LEAST_RATE * self.seconds:
            self.cut("slow_reader", f"{unsent} bytes of an answer were not read in {self.seconds:g} s")
        else:
            self._wait(unsent)
