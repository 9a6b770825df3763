"""The worker thread: streams on threads and event loops, cancelling, stopping, faults."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dfastllm import assemble
from dfastllm.core import DecodeParams, FinishReason, Request, SamplingParams, StepEvent, StepStats
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
from dfastllm.kernels import native
from dfastllm.llm import resolve
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


def test_a_step_wakes_an_event_loop_once_for_all_its_streams() -> None:
    """Each waking writes to the loop's pipe, on the engine's thread: one for each stream and step would be 480 here."""
    engine, wakings, count = Engine(FakeModel(), config=EngineConfig(), choose=either), [], 24

    async def main(worker: Worker) -> list[tuple[int, ...]]:
        loop = asyncio.get_running_loop()
        inner = loop.call_soon_threadsafe

        def counted(callback: Any, *args: Any, **options: Any) -> asyncio.Handle:
            wakings.append(threading.current_thread().name)
            return inner(callback, *args, **options)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign,assignment]

        async def ask(i: int) -> tuple[int, ...]:
            return tokens([e async for e in worker.submit("m", long_request(f"a{i}", tokens=20))])

        return await asyncio.gather(*(ask(i) for i in range(count)))

    with Worker({"m": engine}) as worker:
        answers = asyncio.run(main(worker))
        assert answers == [solo(long_request("x", tokens=20)).tokens] * count
    from_engine = wakings.count("dfastllm-engine")
    assert 20 <= from_engine <= engine.steps


def test_a_loop_that_is_gone_holds_up_no_other(worker: Worker) -> None:
    """What it read is cancelled; who reads in a loop that lives, and on a thread, gets everything."""
    ended: list[FinishReason] = []
    worker.engines["one"].subscribe(lambda stats: ended.extend(finish.reason for finish in stats.finished))

    async def leave() -> None:
        for i in range(3):
            await anext(aiter(worker.submit("one", endless(f"gone{i}"))))

    async def stay() -> tuple[int, ...]:
        return tokens([e async for e in worker.submit("one", long_request("stay", tokens=40))])

    asyncio.run(leave())
    on_thread = worker.submit("one", long_request("thread", tokens=40))
    assert asyncio.run(stay()) == tokens(list(on_thread)) == solo(long_request("x", tokens=40)).tokens
    deadline = time.monotonic() + 10
    while len(ended) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(ended) == [FinishReason.CANCELLED] * 3 + [FinishReason.LENGTH] * 2


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


class Panic(BaseException):
    """What is no Exception: a panic of a library in Rust, SystemExit."""


def watched(engine: Engine) -> tuple[list[StepStats], list[FinishReason]]:
    """(counters of the steps, reasons of the ends) of an engine, as they are reported."""
    steps: list[StepStats] = []
    ends: list[FinishReason] = []

    def see(stats: StepStats) -> None:
        steps.append(stats)
        ends.extend(finish.reason for finish in stats.finished)

    engine.subscribe(see)
    return steps, ends


def test_a_failed_step_leaves_no_gauge_standing(worker: Worker, monkeypatch: Any) -> None:
    engine = worker.engines["one"]
    steps, ends = watched(engine)
    streams = [worker.submit("one", endless(f"s{i}")) for i in range(3)]
    for stream in streams:
        next(iter(stream))
    assert steps[-1].running
    assert steps[-1].pages_used
    monkeypatch.setattr(engine.scheduler, "schedule", lambda step: 1 / 0)
    for stream in streams:
        with pytest.raises(GenerationError):
            list(stream)
    assert (steps[-1].running, steps[-1].waiting, steps[-1].pages_used) == (0, 0, 0)
    assert ends == [FinishReason.ERROR] * 3


def test_a_step_that_fails_after_a_request_ended_still_ends_its_stream(worker: Worker, monkeypatch: Any) -> None:
    """The engine has let go of it by then, so `abandon` does not know it."""
    engine = worker.engines["one"]
    monkeypatch.setattr(engine.drafting, "observe", lambda *_: 1 / 0)
    with pytest.raises(GenerationError):
        list(worker.submit("one", long_request("f", tokens=1)))
    assert not worker._streams
    assert not worker._owners


def test_a_subscriber_that_fails_costs_nobody_an_event(worker: Worker) -> None:
    worker.engines["one"].subscribe(lambda stats: 1 / 0)  # type: ignore[arg-type,return-value]
    assert tokens(list(worker.submit("one", long_request("g")))) == solo(long_request("g")).tokens


@pytest.mark.parametrize("where", ["the forward", "a command"])
def test_when_the_thread_dies_all_end_at_once(where: str, monkeypatch: Any) -> None:
    failures: list[BaseException] = []
    told = threading.Event()

    def died(failure: BaseException) -> None:
        failures.append(failure)
        told.set()

    engines = {name: Engine(FakeModel(), config=EngineConfig(), choose=either) for name in ("one", "two")}
    worker = Worker(engines, died).start()
    counted = {name: watched(engine) for name, engine in engines.items()}
    streams = [worker.submit(name, endless(f"{name}{i}")) for name in engines for i in range(2)]
    for stream in streams:
        next(iter(stream))

    def panic(*_: object) -> None:
        raise Panic("at the worst moment")

    if where == "the forward":
        monkeypatch.setattr(engines["one"].runner, "run", panic)
    else:
        monkeypatch.setattr(engines["one"], "add", panic)
        streams.append(worker.submit("one", endless("late")))
    for stream in streams:
        with pytest.raises(GenerationError):
            list(stream)
    assert told.wait(10)
    assert [type(failure) for failure in failures] == [Panic]
    assert not worker.is_alive
    with pytest.raises(NotReadyError, match="has failed"):
        worker.submit("two", long_request("later"))
    for steps, ends in counted.values():
        assert (steps[-1].running, steps[-1].waiting) == (0, 0)
        assert ends == [FinishReason.ERROR] * 2
    worker.stop()
    assert len(failures) == 1


def test_stopping_is_no_death() -> None:
    failures: list[BaseException] = []
    with Worker({"one": Engine(FakeModel(), config=EngineConfig(), choose=either)}, failures.append) as worker:
        list(worker.submit("one", long_request("a")))
    assert failures == []
    assert worker.failure is None


def test_nothing_is_kept_of_requests_that_ended(worker: Worker) -> None:
    """By themselves, cancelled, refused, failed: a name kept of each would be kept for ever."""
    list(worker.submit("one", long_request("a")))
    stream = worker.submit("one", endless("b"))
    next(iter(stream))
    with pytest.raises(ValidationError):
        list(worker.submit("one", endless("b")))
    stream.cancel()
    with pytest.raises(CancelledError):
        list(stream)
    with pytest.raises(TimeoutError):
        list(worker.submit("two", endless("c", timeout=0.05)))
    assert not worker._streams
    assert not worker._owners
    worker.cancel("a")  # what has ended cannot be cancelled, and that is no command that stays
    list(worker.submit("one", long_request("d")))
    assert not worker._owners


def test_a_request_that_comes_after_the_last_round_is_refused(monkeypatch: Any) -> None:
    """The thread has read its inbox for the last time while a caller was between its look at the thread and its post:
    the caller is told, or its stream ends."""
    worker = Worker({"one": Engine(FakeModel(), config=EngineConfig(), choose=either)}).start()
    admit = worker.engines["one"].admit

    def late(request: Request) -> Any:
        worker.stop()
        return admit(request)

    monkeypatch.setattr(worker.engines["one"], "admit", late)
    with pytest.raises(NotReadyError):
        worker.submit("one", long_request("a"))
    assert not worker._inbox


def test_a_request_posted_between_the_last_two_rounds_ends() -> None:
    """Posted after the loop was left and before the inbox was closed."""
    worker = Worker({"one": Engine(FakeModel(), config=EngineConfig(), choose=either)})
    worker._thread.start = lambda: None  # type: ignore[method-assign]
    worker._thread.is_alive = lambda: True  # type: ignore[method-assign]
    stream = worker.start().submit("one", long_request("a"))
    worker._close()
    with pytest.raises(NotReadyError):
        list(stream)
    assert not worker._owners


@pytest.mark.skipif(native() is None, reason="no native kernels: torch's threads do all the work")
def test_short_operations_of_serving_run_on_one_thread() -> None:
    """A sampled diffusion step beside native kernels: the engine's thread gives torch no team to wait for, and other
    threads keep theirs."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        model = assemble.load(resolve("demo-diffusion")).model
        engine = Engine(model, config=EngineConfig(max_sequences=1))
        seen: set[int] = set()
        engine.subscribe(lambda stats: seen.add(torch.get_num_threads()))
        sampling = SamplingParams(temperature=0.8, seed=1, max_tokens=16)
        with Worker({"demo": engine}) as worker:
            answer = list(worker.submit("demo", Request("r", (5, 6, 7), sampling, DecodeParams(block_length=8))))
        assert answer[-1].finish is not None
        assert seen == {1}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
