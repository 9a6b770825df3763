"""The worker thread: streams on threads and event loops, cancelling, stopping, faults."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from dfastllm.core import DecodeParams, FinishReason, Request, SamplingParams, StepEvent
from dfastllm.engine import Engine, EngineConfig, Worker
from dfastllm.errors import (
    CancelledError,
    GenerationError,
    ModelNotFoundError,
    NotReadyError,
    QueueFullError,
    TimeoutError,
    ValidationError,
)
from tests.engine.test_loop import either, long_request, solo
from tests.kit.fake import FakeModel


@pytest.fixture
def worker() -> Iterator[Worker]:
    engines = {
        "one": Engine(FakeModel(), config=EngineConfig(), choose=either),
        "two": Engine(FakeModel(eos_bias=1.0), config=EngineConfig(max_waiting=2, max_sequences=1), choose=either),
    }
    with Worker(engines) as worker:
        yield worker
    assert not worker.is_alive


def tokens(events: list[StepEvent]) -> tuple[int, ...]:
    return tuple(t for e in events for t in e.token_ids)


def endless(name: str, **options: Any) -> Request:
    return long_request(name, tokens=500, **options)


def test_many_threads_get_their_own_answers(worker: Worker) -> None:
    def request(i: int) -> Request:
        decode = DecodeParams(cache="dual", block_length=4) if i % 2 else None
        sampling = SamplingParams(temperature=0.9, seed=i, max_tokens=5 + i)
        return Request(f"r{i}", (1, 2, i), sampling, decode)

    got: dict[int, tuple[int, ...]] = {}

    def ask(i: int) -> None:
        got[i] = tokens(list(worker.submit("one", request(i))))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert got == {i: solo(request(i)).tokens for i in range(16)}


def test_async_streams(worker: Worker) -> None:
    async def ask(i: int) -> tuple[int, ...]:
        return tokens([e async for e in worker.submit("one", long_request(f"a{i}", tokens=10 + i))])

    async def main() -> list[tuple[int, ...]]:
        return await asyncio.gather(*(ask(i) for i in range(8)))

    assert asyncio.run(main()) == [solo(long_request("x", tokens=10 + i)).tokens for i in range(8)]


def test_two_models_at_once(worker: Worker) -> None:
    streams = [worker.submit(name, long_request(name, tokens=30)) for name in ("one", "two")]
    assert tokens(list(streams[0])) == solo(long_request("x", tokens=30)).tokens
    assert tokens(list(streams[1])) == solo(long_request("x", tokens=30), eos_bias=1.0).tokens


def test_cancel_raises_in_the_reader_and_frees_the_pages(worker: Worker) -> None:
    stream = worker.submit("one", endless("c"))
    seen: list[StepEvent] = []

    def read() -> None:
        for event in stream:
            seen.append(event)
            stream.cancel()

    with pytest.raises(CancelledError):
        read()
    assert seen[-1].finish is not None
    assert seen[-1].finish.reason is FinishReason.CANCELLED
    assert worker.engines["one"].pages.used == 0
    assert not worker.cancel("c")


def test_timeout_raises(worker: Worker) -> None:
    with pytest.raises(TimeoutError):
        list(worker.submit("one", long_request("t", timeout=1e-6)))


def test_refusals_come_at_once(worker: Worker) -> None:
    with pytest.raises(ModelNotFoundError, match="one, two"):
        worker.submit("three", long_request("x"))
    with pytest.raises(ValidationError):
        worker.submit("one", Request("x", (999,)))


def test_duplicate_id_is_an_error_on_the_second_stream(worker: Worker) -> None:
    first = worker.submit("one", endless("same"))
    next(iter(first))
    with pytest.raises(ValidationError, match="already in use"):
        list(worker.submit("one", endless("same")))
    first.cancel()


def test_full_queue(worker: Worker) -> None:
    streams = [worker.submit("two", long_request("q0", tokens=400))]

    def flood() -> None:
        for i in range(1, 10):
            streams.append(worker.submit("two", long_request(f"q{i}", tokens=400)))
            time.sleep(0.005)

    with pytest.raises(QueueFullError) as error:
        flood()
    assert error.value.status == 429
    for stream in streams:
        stream.cancel()


def test_stop_ends_streams_with_not_ready() -> None:
    worker = Worker({"one": Engine(FakeModel(), config=EngineConfig(), choose=either)}).start()
    stream = worker.submit("one", endless("s"))
    next(iter(stream))
    worker.stop()
    with pytest.raises(NotReadyError):
        list(stream)
    with pytest.raises(NotReadyError):
        worker.submit("one", long_request("later"))
    assert not worker.is_alive


def test_a_fault_in_the_loop_ends_requests_and_the_worker_lives(worker: Worker, monkeypatch: Any) -> None:
    engine = worker.engines["one"]
    real = engine.scheduler.schedule

    def broken(step: int) -> Any:
        raise RuntimeError("bug")

    monkeypatch.setattr(engine.scheduler, "schedule", broken)
    with pytest.raises(GenerationError):
        list(worker.submit("one", long_request("f")))
    monkeypatch.setattr(engine.scheduler, "schedule", real)
    assert tokens(list(worker.submit("one", long_request("g")))) == solo(long_request("g")).tokens
    assert engine.pages.used == 0
