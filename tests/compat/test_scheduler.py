"""Scheduler: order, batches, ends of every kind, and the async form."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfastllm import (
    LLM,
    AsyncScheduler,
    CancelledError,
    ContextLengthError,
    QueueFullError,
    Request,
    RequestState,
    SamplingParams,
    Scheduler,
    SchedulerConfig,
    SchedulerStats,
    TimeoutError,
    UnsupportedError,
    ValidationError,
    create_scheduler,
)
from dfastllm.core import DecodeParams, StepStats
from dfastllm.text import Tokenizer
from tests.compat.conftest import Writer


def ask(max_tokens: int = 16, **fields: Any) -> Request:
    return Request(prompt_tokens="The dog", max_tokens=max_tokens, **{"temperature": 0.0, **fields})


def wait_until(done: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)


@pytest.mark.parametrize("kind", ["diffusion", "ar", "block"])
def test_a_batch_equals_its_solo_results(kind: str, tokenizer: Tokenizer) -> None:
    model = Writer(kind, mask_id=None if kind == "ar" else 3)
    requests = [
        Request(
            prompt_tokens=list(range(40, 41 + i)), max_tokens=8 + i, temperature=i % 2, sampling=SamplingParams(seed=i)
        )
        for i in range(10)
    ]
    with LLM(engine=create_scheduler(model, tokenizer).engine) as llm:
        alone = [llm.generate([list(r.prompt_tokens)], r.params())[0].outputs[0] for r in requests]
    with create_scheduler(model, tokenizer, max_batch_size=4) as scheduler:
        futures = scheduler.submit_batch(requests)
        results = [future.result(30) for future in futures]
    assert [r.token_ids for r in results] == [r.token_ids for r in alone]
    assert [r.text for r in results] == [r.text for r in alone]
    assert {r.state for r in requests} == {RequestState.COMPLETED}
    stats = scheduler.get_stats()
    assert (stats.total_requests, stats.completed_requests) == (10, 10)
    assert 1 < stats.largest_batch <= 4
    assert stats.total_tokens >= sum(len(r.token_ids) for r in results)
    assert stats.tokens_per_second > 0
    assert scheduler.pending_count == scheduler.running_count == 0
    assert scheduler.engine.pages.used == 0


def test_what_waits_before_start_is_served_then(model: Writer, tokenizer: Tokenizer) -> None:
    scheduler = create_scheduler(model, tokenizer)
    futures = scheduler.submit_batch([ask(), ask()])
    assert scheduler.pending_count == 2
    assert not futures[0].done()
    with scheduler:
        assert len(futures[1].result(10).token_ids) == 16


def finishing_order(config: SchedulerConfig, model: Writer, tokenizer: Tokenizer) -> list[int]:
    """Priorities of four requests in the order in which they end, one at a time in the engine."""
    scheduler = Scheduler(config, model, tokenizer)
    order: list[int] = []
    futures = []
    for priority in (3, 1, 2, 0):
        future = scheduler.submit(ask(priority=priority))
        future.add_done_callback(lambda _, p=priority: order.append(p))
        futures.append(future)
    with scheduler:
        for future in futures:
            future.result(10)
    return order


def test_lower_priority_values_go_first(model: Writer, tokenizer: Tokenizer) -> None:
    assert finishing_order(SchedulerConfig(max_batch_size=1), model, tokenizer) == [0, 1, 2, 3]


def test_fcfs_ignores_priority(model: Writer, tokenizer: Tokenizer) -> None:
    config = SchedulerConfig(max_batch_size=1, scheduling_policy="fcfs")
    assert finishing_order(config, model, tokenizer) == [3, 1, 2, 0]


def test_max_wait_time_gathers_a_batch(model: Writer, tokenizer: Tokenizer) -> None:
    with create_scheduler(model, tokenizer, max_wait_time_ms=60_000, max_batch_size=3) as scheduler:
        futures = [scheduler.submit(ask()) for _ in range(2)]
        time.sleep(0.1)
        assert scheduler.pending_count == 2
        futures.append(scheduler.submit(ask()))  # the batch is full
        for future in futures:
            future.result(10)
    with create_scheduler(model, tokenizer, max_wait_time_ms=50) as scheduler:
        began = time.monotonic()
        scheduler.submit(ask()).result(10)
        assert time.monotonic() - began >= 0.05


def test_max_tokens_per_batch_bounds_a_step(ar_model: Writer, tokenizer: Tokenizer) -> None:
    scheduler = create_scheduler(ar_model, tokenizer, max_tokens_per_batch=6)
    steps: list[StepStats] = []
    scheduler.engine.subscribe(steps.append)
    futures = scheduler.submit_batch([ask(4) for _ in range(12)])
    with scheduler:
        for future in futures:
            future.result(10)
    assert max(step.rows for step in steps) <= 6


def test_batches_are_sized_by_kv_memory(ar_model: Writer, tokenizer: Tokenizer) -> None:
    """32 positions: two requests of one page fit, whatever max_batch_size says."""
    scheduler = create_scheduler(ar_model, tokenizer, max_kv_tokens=32, max_batch_size=8)
    futures = scheduler.submit_batch([ask(8) for _ in range(6)])
    with scheduler:
        results = [future.result(10) for future in futures]
    assert len({r.token_ids for r in results}) == 1
    assert scheduler.get_stats().largest_batch == 2
    with pytest.raises(ContextLengthError, match="engine holds 32"):
        scheduler.submit(ask(40))


def test_the_queue_has_a_limit(model: Writer, tokenizer: Tokenizer) -> None:
    scheduler = create_scheduler(model, tokenizer, max_queue_size=2)
    scheduler.submit_batch([ask(), ask()])
    with pytest.raises(QueueFullError, match="2 requests are pending"):
        scheduler.submit(ask())
    third = ask()
    with pytest.raises(QueueFullError):
        scheduler.submit_batch([third])
    assert scheduler.pending_count == 2
    scheduler.stop()
    assert scheduler.pending_count == 0


def test_a_refused_batch_leaves_nothing(model: Writer, tokenizer: Tokenizer) -> None:
    scheduler = create_scheduler(model, tokenizer)
    good = ask()
    with pytest.raises(ContextLengthError):
        scheduler.submit_batch([good, ask(9999)])
    assert scheduler.pending_count == 0
    assert good.state is RequestState.CANCELLED


def test_abort_before_and_during(model: Writer, tokenizer: Tokenizer) -> None:
    scheduler = create_scheduler(model, tokenizer)
    early, late = ask(), ask(400)
    first = scheduler.submit(early)
    assert scheduler.abort(early.request_id)
    with pytest.raises(CancelledError, match="before it began"):
        first.result(1)
    with scheduler:
        second = scheduler.submit(late)
        wait_until(lambda: late.state is RequestState.RUNNING)
        assert scheduler.running_count == 1
        assert scheduler.abort(late.request_id)
        with pytest.raises(CancelledError):
            second.result(10)
        assert late.state is RequestState.CANCELLED
        assert late.is_finished
        assert not scheduler.abort(late.request_id)
        assert not scheduler.abort("never")
        wait_until(lambda: scheduler.engine.pages.used == 0)
        assert len(scheduler.submit(ask()).result(10).token_ids) == 16
    assert scheduler.get_stats().cancelled_requests == 2


def test_an_abort_between_the_queues_is_not_lost(
    model: Writer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has left the scheduler's queue and is not in the engine's yet."""
    scheduler = create_scheduler(model, tokenizer)
    hand_over = scheduler._hand_over

    def aborted_first(job: Any, loop: Any) -> None:
        assert scheduler.abort(job.request.request_id)
        hand_over(job, loop)

    monkeypatch.setattr(scheduler, "_hand_over", aborted_first)
    with scheduler:
        request = ask(400)
        with pytest.raises(CancelledError):
            scheduler.submit(request).result(10)
        assert request.state is RequestState.CANCELLED
        wait_until(lambda: scheduler.engine.pages.used == 0)
        assert scheduler.get_stats().cancelled_requests == 1


def test_a_requests_own_options_win(model: Writer, tokenizer: Tokenizer) -> None:
    """Over the scheduler's decoder options, and over its depth of drafting."""
    default = DecodeParams(block_length=8, threshold=0.9)
    scheduler = create_scheduler(model, tokenizer, enable_speculative=True, speculative_depth=5)
    scheduler.decode = default
    admitted: dict[str, Any] = {}
    admit = scheduler.engine.admit

    def noted(request: Any) -> Any:
        admitted[request.request_id] = request.decode
        return admit(request)

    scheduler.engine.admit = noted  # type: ignore[method-assign]
    own = DecodeParams(block_length=4, threshold=0.5, options={"draft_steps": 2})
    for name, decode in (("plain", None), ("own", own)):
        scheduler.submit(ask(request_id=name, decode=decode))
    scheduler.stop()
    assert (admitted["plain"].block_length, admitted["plain"].threshold) == (8, 0.9)
    assert admitted["plain"].options == {"draft_steps": 5}
    assert (admitted["own"].block_length, admitted["own"].threshold) == (4, 0.5)
    assert admitted["own"].options == {"draft_steps": 2}


def test_a_cancelled_future_never_runs(model: Writer, tokenizer: Tokenizer) -> None:
    scheduler = create_scheduler(model, tokenizer)
    request = ask()
    assert scheduler.submit(request).cancel()
    with scheduler:
        scheduler.submit(ask()).result(10)
    assert request.state is RequestState.CANCELLED
    assert scheduler.get_stats().cancelled_requests == 1


def test_timeouts(model: Writer, tokenizer: Tokenizer) -> None:
    with create_scheduler(model, tokenizer) as scheduler:
        request = ask(450, timeout=0.02)
        with pytest.raises(TimeoutError):
            scheduler.submit(request).result(10)
        assert request.state is RequestState.FAILED
        assert scheduler.get_stats().failed_requests == 1


def test_stop_and_start_again(model: Writer, tokenizer: Tokenizer) -> None:
    before = threading.active_count()
    scheduler = create_scheduler(model, tokenizer).start()
    assert scheduler.start() is scheduler
    drained = scheduler.submit(ask())
    scheduler.stop(drain=True)
    assert len(drained.result(0).token_ids) == 16
    scheduler.start()
    cut = scheduler.submit(ask(450))
    scheduler.stop()
    with pytest.raises(CancelledError):
        cut.result(0)
    scheduler.stop()
    with scheduler:
        assert len(scheduler.submit(ask()).result(10).token_ids) == 16
    assert threading.active_count() == before


def test_wrong_requests(model: Writer, tokenizer: Tokenizer) -> None:
    scheduler = create_scheduler(model, tokenizer)
    twice = ask(request_id="a")
    scheduler.submit(twice)
    with pytest.raises(ValidationError, match="'a' is already in use"):
        scheduler.submit(ask(request_id="a"))
    scheduler.abort("a")
    with pytest.raises(ValidationError, match="is cancelled; only a pending one"):
        scheduler.submit(twice)
    with pytest.raises(ValidationError, match="prompt_tokens must hold at least one"):
        Request(prompt_tokens=[])
    with pytest.raises(ValidationError, match="temperature"):
        ask(temperature=-1.0)
    with pytest.raises(ValidationError, match="max_tokens"):
        ask(0)
    with pytest.raises(ValidationError, match="holds token id 999"):
        scheduler.submit(Request(prompt_tokens=[999]))
    with pytest.raises(ValidationError, match="still text"):
        _ = ask().total_tokens
    with pytest.raises(ValidationError, match="unknown option 'batch'"):
        create_scheduler(model, tokenizer, batch=3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_batch_size", 0),
        ("max_batch_size", 1.5),
        ("max_tokens_per_batch", 0),
        ("max_wait_time_ms", -1.0),
        ("max_wait_time_ms", float("inf")),
        ("scheduling_policy", "random"),
        ("max_kv_tokens", 0),
        ("max_queue_size", 0),
    ],
)
def test_scheduler_config_is_validated(field: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=field) as caught:
        SchedulerConfig(**{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize("fields", [{"speculative_depth": 4}, {"enable_speculative": True, "speculative_depth": 0}])
def test_a_bad_depth_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        SchedulerConfig(**fields)
    assert caught.value.param == "speculative_depth"


@pytest.mark.parametrize("model", ["demo-ar", "demo-block", "demo-diffusion"])
def test_speculation_changes_no_token_and_saves_forwards(model: str) -> None:
    """On a whole canvas a guessed step costs what a step does, so there it saves nothing and is not tried."""

    def answer(config: SchedulerConfig) -> tuple[tuple[int, ...], int, int]:
        with Scheduler(config, model) as scheduler:
            text = "one two three one two three one two three one two"
            ignoring = SamplingParams(ignore_eos=True)
            request = Request(prompt_tokens=text, max_tokens=32, sampling=ignoring, raw=True)
            done = scheduler.submit(request).result(60)
            return done.token_ids, done.usage.forwards, done.usage.drafts

    plain, fast = answer(SchedulerConfig()), answer(SchedulerConfig(enable_speculative=True, speculative_depth=3))
    assert fast[0] == plain[0]
    assert plain[2] == 0
    if model == "demo-diffusion":
        assert fast[1] == plain[1]
    else:
        assert fast[1] < plain[1]
        assert fast[2] > 0


def test_a_request_that_cannot_draft_is_refused() -> None:
    with (
        Scheduler(SchedulerConfig(enable_speculative=True), "demo-diffusion") as scheduler,
        pytest.raises(UnsupportedError, match="draft_steps"),
    ):
        scheduler.submit(Request(prompt_tokens="one", decode=DecodeParams(cache="dual")))


def test_stats() -> None:
    stats = SchedulerStats()
    assert (stats.average_batch_size, stats.average_batch_time_ms, stats.tokens_per_second) == (0.0, 0.0, 0.0)
    stats.record_batch(4, 40, 10.0)
    stats.record_batch(2, 20, 20.0)
    assert (stats.total_batches, stats.total_tokens, stats.largest_batch) == (2, 60, 4)
    assert (stats.average_batch_size, stats.average_batch_time_ms, stats.tokens_per_second) == (3.0, 15.0, 2000.0)
    with pytest.raises(ValidationError):
        stats.record_batch(0, 1, 1.0)


def test_async_batch(model: Writer, tokenizer: Tokenizer) -> None:
    async def run() -> None:
        async with AsyncScheduler(SchedulerConfig(max_batch_size=4), model, tokenizer) as scheduler:
            one = await scheduler.submit(ask())
            many = await scheduler.submit_batch([ask() for _ in range(6)])
            assert [r.token_ids for r in many] == [one.token_ids] * 6
            assert scheduler.get_stats().completed_requests == 7
            assert scheduler.pending_count == scheduler.running_count == 0

    asyncio.run(run())


def test_async_cancellation_frees_the_engine(model: Writer, tokenizer: Tokenizer) -> None:
    async def run() -> None:
        async with AsyncScheduler(None, model, tokenizer) as scheduler:
            request = ask(450)
            task = asyncio.create_task(scheduler.submit(request))
            while request.state is not RequestState.RUNNING:
                await asyncio.sleep(0.002)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while scheduler.scheduler.engine.has_work:
                await asyncio.sleep(0.002)
            assert scheduler.scheduler.engine.pages.used == 0
            while not request.is_finished:
                await asyncio.sleep(0.002)
            assert request.state is RequestState.CANCELLED
            assert not scheduler.abort(request.request_id)

    asyncio.run(run())


def test_async_batch_with_a_failure_aborts_the_rest(model: Writer, tokenizer: Tokenizer) -> None:
    async def run() -> None:
        async with AsyncScheduler(None, model, tokenizer) as scheduler:
            with pytest.raises(TimeoutError):
                await scheduler.submit_batch([ask(450), ask(450, timeout=0.01)])
            while scheduler.scheduler.engine.has_work:
                await asyncio.sleep(0.002)
            assert scheduler.scheduler.engine.pages.used == 0

    asyncio.run(run())


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_whatever_happens_every_request_ends_once(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Random requests, aborted, cancelled or timed out at random moments, on a scheduler that is stopped at random."""
    scheduler = create_scheduler(Writer(eos_every=9, mask_id=3), tokenizer, max_batch_size=3, max_kv_tokens=128)
    plans = data.draw(
        st.lists(st.tuples(st.integers(1, 60), st.sampled_from(["wait", "abort", "cancel", "timeout"])), max_size=8)
    )
    start_after = data.draw(st.integers(0, 8))
    drain = data.draw(st.booleans())
    ended: list[str] = []
    requests, futures = [], []
    for index, (length, fate) in enumerate(plans):
        if index == start_after:
            scheduler.start()
        request = ask(length, timeout=0.001 if fate == "timeout" else None)
        future = scheduler.submit(request)
        future.add_done_callback(lambda _, name=request.request_id: ended.append(name))
        requests.append(request)
        futures.append(future)
        if fate == "abort":
            assert scheduler.abort(request.request_id) or request.is_finished
        elif fate == "cancel":
            future.cancel()
    scheduler.start()
    scheduler.stop(drain=drain)
    assert sorted(ended) == sorted(r.request_id for r in requests)
    assert all(r.is_finished for r in requests)
    for (_, fate), request in zip(plans, requests, strict=True):
        assert request.state is RequestState.COMPLETED or fate != "wait" or not drain
    assert scheduler.pending_count == scheduler.running_count == scheduler.engine.pages.used == 0
    stats = scheduler.get_stats()
    ends = stats.completed_requests + stats.cancelled_requests + stats.failed_requests
    assert ends == stats.total_requests == len(plans)


def test_the_fields_of_the_configuration_are_keywords_too(llm: LLM) -> None:
    assert Scheduler(model=llm, enable_speculative=True).config == SchedulerConfig(enable_speculative=True)
    assert AsyncScheduler(model=llm, max_batch_size=3).scheduler.config == SchedulerConfig(max_batch_size=3)
    with pytest.raises(ValidationError, match="unknown option 'speed'; there are max_batch_size"):
        Scheduler(model=llm, speed=9)
    with pytest.raises(ValidationError, match="a configuration and enable_speculative beside it"):
        Scheduler(SchedulerConfig(), llm, enable_speculative=True)
