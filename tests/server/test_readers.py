"""The threads that read: a bounded queue, long work beside short, nothing done for who has gone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from dfastllm.errors import QueueFullError
from dfastllm.server.readers import LONG, Readers


@pytest.fixture
def readers() -> Iterator[Readers]:
    made = Readers(waiting=2, waiting_long=1)
    yield made
    made.close()


def test_one_more_than_may_wait_is_refused_at_once(readers: Readers) -> None:
    async def main() -> None:
        gate = threading.Event()
        held = [asyncio.ensure_future(readers.run(1, gate.wait)) for _ in range(4)]  # two threads, two that wait
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            await readers.run(1, gate.wait)
        gate.set()
        assert await asyncio.gather(*held) == [True] * 4
        assert await readers.run(1, int, "3") == 3  # there is room again

    asyncio.run(main())


def test_long_work_holds_up_only_long_work(readers: Readers) -> None:
    async def main() -> None:
        gate = threading.Event()
        held = [asyncio.ensure_future(readers.run(LONG + 1, gate.wait)) for _ in range(2)]
        await asyncio.sleep(0)
        assert await asyncio.wait_for(readers.run(1, int, "3"), 10) == 3
        with pytest.raises(QueueFullError):
            await readers.run(LONG + 1, gate.wait)
        gate.set()
        await asyncio.gather(*held)

    asyncio.run(main())


def test_what_is_cancelled_before_its_turn_is_not_done(readers: Readers) -> None:
    async def main() -> None:
        gate, done = threading.Event(), threading.Event()
        first = asyncio.ensure_future(readers.run(LONG + 1, gate.wait))
        second = asyncio.ensure_future(readers.run(LONG + 1, done.set))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        third = asyncio.ensure_future(readers.run(LONG + 1, int, "3"))  # its place is free again
        gate.set()
        assert await third == 3
        await first
        assert not done.is_set()

    asyncio.run(main())


def test_running_work_keeps_its_place_when_its_client_goes(readers: Readers) -> None:
    """Else who hangs up and comes back would have any number of works running."""

    async def main() -> None:
        gate, begun = threading.Event(), threading.Event()

        def work() -> None:
            begun.set()
            gate.wait()

        first = asyncio.ensure_future(readers.run(LONG + 1, work))
        await asyncio.to_thread(begun.wait, 10)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        waits = asyncio.ensure_future(readers.run(LONG + 1, int, "3"))
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            await readers.run(LONG + 1, int, "4")
        gate.set()
        assert await waits == 3

    asyncio.run(main())
