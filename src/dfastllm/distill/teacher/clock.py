"""Time as the teacher's parts see it, so that a test can let an hour pass at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

__all__ = ["SYSTEM", "Clock"]


@dataclass(frozen=True)
class Clock:
    """now: seconds that only grow. wall: seconds since 1970, which dates in headers are compared with. sleep: seconds
    to wait."""

    now: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


SYSTEM = Clock()
