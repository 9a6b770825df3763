"""The client's own cost, measured while requests run: CPU of the event loop's thread per chunk, and how late the loop
wakes up. Drawing questions, grading and writing records happen between requests and cost none of their time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Final

import numpy as np

from dfastllm.bench.suite.client import Client as HttpClient
from dfastllm.bench.suite.schema import Client

__all__ = ["CPU_SHARE_LIMIT", "LAG_LIMIT_MS", "Watch"]

PERIOD: Final = 0.02  # s between two looks at the clock
LAG_LIMIT_MS: Final = 5.0  # p99 of the loop's lateness above which latencies may be the client's
CPU_SHARE_LIMIT: Final = 0.8  # of a core


class Watch:
    """Adds up over every `async with watch.on(client)`."""

    def __init__(self) -> None:
        self.lags: list[float] = []
        self.cpu = 0.0
        self.wall = 0.0
        self.chunks = 0

    @contextlib.asynccontextmanager
    async def on(self, client: HttpClient) -> AsyncIterator[None]:
        """Count what happens inside."""
        chunks, cpu, wall = client.chunks, time.thread_time(), time.perf_counter()
        ticker = asyncio.create_task(self._tick())
        try:
            yield
        finally:
            ticker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ticker
            self.cpu += time.thread_time() - cpu
            self.wall += time.perf_counter() - wall
            self.chunks += client.chunks - chunks

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + PERIOD
            await asyncio.sleep(PERIOD)
            self.lags.append(max(0.0, loop.time() - due))

    def result(self) -> Client | None:
        """None when nothing was measured."""
        if not self.wall or not self.chunks:
            return None
        p50, p99, most = (float(p) * 1e3 for p in np.percentile(self.lags or [0.0], (50, 99, 100)))
        share = self.cpu / self.wall
        return Client(
            chunks=self.chunks,
            cpu_us_per_chunk=self.cpu / self.chunks * 1e6,
            cpu_share=share,
            loop_lag_p50_ms=p50,
            loop_lag_p99_ms=p99,
            loop_lag_max_ms=most,
            bounded=p99 <= LAG_LIMIT_MS and share <= CPU_SHARE_LIMIT,
        )
