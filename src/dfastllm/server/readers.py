"""Threads that read what requests hold: validation, templates, tokenising. The event loop keeps to waiting.

Short work and long work have a lane each, so that a text of megabytes holds up other such texts and nobody else. What
waits is bounded: one more is refused at once with 429 rather than served late. Bounds on the work itself are elsewhere
(`bounds`, `prompts`); here it is only put where it does not hold up the answers of others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from dfastllm.errors import QueueFullError

__all__ = ["LONG", "SHORT", "Readers"]

LONG = 1 << 16  # bytes or characters: the tokenizers library reads about 1 to 3 of them in a microsecond
SHORT = 1 << 12  # a body up to here takes no longer to read than to hand to a thread

P = ParamSpec("P")
T = TypeVar("T")


class _Lane:
    """A pool with a bounded queue."""

    def __init__(self, name: str, threads: int, waiting: int) -> None:
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix=f"dfastllm-{name}")
        self.limit = threads + waiting
        self.held = 0  # works that run or wait; counted on the event loop's thread

    async def run(self, work: Callable[[], T]) -> T:
        if self.held >= self.limit:
            raise QueueFullError("Too many requests are being read at once.", hint="Try again later.")
        self.held += 1
        future = self.pool.submit(work)
        future.add_done_callback(partial(self._release, asyncio.get_running_loop()))
        return await asyncio.wrap_future(future)

    def _release(self, loop: asyncio.AbstractEventLoop, _: object) -> None:
        """On the thread that ended the work, or on the loop's where it was cancelled before it began: a work whose
        client has gone holds its place until it has really ended."""
        try:
            loop.call_soon_threadsafe(self._free)
        except RuntimeError:  # the event loop ended first
            self._free()

    def _free(self) -> None:
        self.held -= 1


class Readers:
    """Two lanes of threads. One event loop uses it."""

    def __init__(self, *, waiting: int = 1024, waiting_long: int = 16) -> None:
        """waiting: short works that may wait; waiting_long: long ones."""
        self.short = _Lane("read", 2, waiting)
        self.long = _Lane("read-long", 1, waiting_long)

    async def run(self, size: int, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """The result of work(*args, **options), on a thread. size: characters or bytes that it reads. Raises
        QueueFullError when too much waits already, and what the work raises. Cancelled before its turn it is not done
        at all."""
        lane = self.long if size > LONG else self.short
        return await lane.run(partial(work, *args, **options))

    def close(self) -> None:
        """Drop what waits; what runs is not waited for."""
        for lane in (self.short, self.long):
            lane.pool.shutdown(wait=False, cancel_futures=True)
