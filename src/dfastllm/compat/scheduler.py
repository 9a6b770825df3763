"""Scheduler: many requests at once with priorities, over the one engine. It queues and hands over; the engine batches.

`Scheduler` is the form for threads (submit gives a Future), `AsyncScheduler` the same for an event loop. What the
documents call dynamic batching is the engine's continuous batching: a request joins and leaves between any two steps.
There is no decoding loop here: one thread hands requests to the engine's worker and waits for their events.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfastllm.compat.config import one_config
from dfastllm.compat.generator import build_engine, encode_prompt
from dfastllm.compat.queueing import Request, RequestState, SchedulerConfig, SchedulerStats
from dfastllm.core import DecodeParams, StepStats
from dfastllm.engine import EngineConfig, Stream, Worker
from dfastllm.engine.admission import Admission
from dfastllm.errors import (
    CancelledError,
    DFastLLMError,
    GenerationError,
    QueueFullError,
    TokenizerError,
    ValidationError,
)
from dfastllm.llm import Completion, collect
from dfastllm.text import Tokenizer

__all__ = ["AsyncScheduler", "Scheduler", "create_scheduler"]


@dataclass(eq=False)
class _Job:
    request: Request
    admission: Admission
    future: Future[Completion] = field(default_factory=Future)
    submitted: float = field(default_factory=time.monotonic)
    stream: Stream | None = None
    aborted: bool = False


class Scheduler:
    """Serves requests on one model from `start` to `stop`; use as a context manager. Thread-safe.

    model, tokenizer: a shipped model's name, a directory, a model of dfastllm.models with its tokenizer, or an LLM or
    Engine, whose weights are then shared while K,V and batches are this scheduler's own. config: a SchedulerConfig, or
    its fields as keywords, as in Scheduler(enable_speculative=True). decode: for requests that bring none. Raises what
    loading raises, ValidationError for a field that there is not.
    """

    default_config = SchedulerConfig()

    def __init__(
        self,
        config: SchedulerConfig | None = None,
        model: Any = "demo-diffusion",
        tokenizer: Tokenizer | None = None,
        *,
        decode: DecodeParams | None = None,
        **fields: Any,
    ) -> None:
        default = self.default_config
        kept = {} if config is not None else dataclasses.asdict(default)  # what an old name sets stays
        self.config = one_config(config, type(default), {**kept, **fields})
        self.decode = decode
        sizes = EngineConfig(
            max_sequences=self.config.max_batch_size,
            max_batch_rows=self.config.max_tokens_per_batch,
            kv_tokens=self.config.max_kv_tokens,
            # The limit that callers meet is `submit`'s; preempted requests wait in the engine too.
            max_waiting=self.config.max_queue_size + self.config.max_batch_size + 1,
        )
        self.engine = build_engine(model, tokenizer, sizes)
        self.engine.subscribe(self._record)
        self._stats = SchedulerStats()
        self._lock = threading.RLock()
        self._backlog: list[_Job] = []
        self._live: dict[str, _Job] = {}
        self._worker: Worker | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    # ---- life ----

    def start(self) -> Scheduler:
        """Begin to serve, first what was submitted before. Harmless when running."""
        with self._lock:
            if self._worker is not None:
                return self
            self._worker = Worker({self.engine.info.name: self.engine}).start()
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="dfastllm-scheduler", daemon=True)
            self._thread.start()
            self._loop.call_soon_threadsafe(self._dispatch)
        return self

    def stop(self, *, drain: bool = False, timeout: float | None = None) -> None:
        """End. drain: first wait (at most `timeout` seconds) for what was submitted; the rest is cancelled. A stopped
        scheduler may be started again."""
        with self._lock:
            jobs = list(self._live.values())
        if drain and self._worker is not None:
            wait([job.future for job in jobs], timeout)
        for job in jobs:
            self.abort(job.request.request_id)
        with self._lock:
            worker, loop, thread = self._worker, self._loop, self._thread
            self._worker = self._loop = self._thread = None
        if worker is None or loop is None or thread is None:
            return
        wait([job.future for job in jobs], 10)
        worker.stop()
        self.engine.abandon(GenerationError("the scheduler was stopped."))
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    def __enter__(self) -> Scheduler:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ---- requests ----

    def submit(self, request: Request) -> Future[Completion]:
        """Queue a request; its Future gives the Completion, or raises CancelledError, TimeoutError or GenerationError.
        Raises at once what is wrong with the request itself (ValidationError, ContextLengthError, UnsupportedError),
        and QueueFullError when max_queue_size are pending."""
        if request.state is not RequestState.PENDING:
            raise ValidationError(
                f"request {request.request_id!r} is {request.state}; only a pending one can be submitted.",
                param="state",
            )
        if isinstance(request.prompt_tokens, str):
            request.prompt_tokens = self._encode(request.prompt_tokens, request.raw)
        by_priority = self.config.scheduling_policy == "priority"
        kind = self.engine.info.kind
        decode = self.config.drafting(request.decode or self.decode, kind)
        priority = request.priority if by_priority else 0
        asked = request.for_engine(priority, decode, self.config.speculative(kind))
        job = _Job(request, self.engine.admit(asked))
        request.max_tokens = job.admission.request.sampling.max_tokens
        request.temperature = job.admission.request.sampling.temperature
        with self._lock:
            if request.request_id in self._live:
                raise ValidationError(f"request id {request.request_id!r} is already in use.", param="request_id")
            if self.pending_count >= self.config.max_queue_size:
                raise QueueFullError(
                    f"{self.config.max_queue_size} requests are pending already.", hint="Try again later."
                )
            self._live[request.request_id] = job
            self._backlog.append(job)
            self._stats.total_requests += 1
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._dispatch)
        return job.future

    def submit_batch(self, requests: Iterable[Request]) -> list[Future[Completion]]:
        """Submit all, in order. If one is refused those before it are aborted and its error is raised."""
        done: list[tuple[Request, Future[Completion]]] = []
        try:
            for request in requests:
                done.append((request, self.submit(request)))
        except Exception:
            for request, _ in done:
                self.abort(request.request_id)
            raise
        return [future for _, future in done]

    def abort(self, request_id: str) -> bool:
        """End a request wherever it is; its Future raises CancelledError. False when it is not known or finished."""
        with self._lock:
            job = self._live.get(request_id)
            if job is None:
                return False
            job.aborted = True
            if job in self._backlog:
                self._backlog.remove(job)
                error = CancelledError(f"request {request_id!r} was cancelled before it began.")
                if job.future.set_running_or_notify_cancel():
                    job.future.set_exception(error)
                self._end(job, RequestState.CANCELLED)
            elif job.stream is not None:
                job.stream.cancel()
        return True

    def get_stats(self) -> SchedulerStats:
        """The counters now, as a copy."""
        with self._lock:
            return dataclasses.replace(self._stats)

    @property
    def running_count(self) -> int:
        """Sequences that hold a place in the engine."""
        return len(self.engine.scheduler.running)

    @property
    def pending_count(self) -> int:
        """Submitted requests that have no place yet."""
        return max(0, len(self._live) - self.running_count)

    # ---- the scheduler's own thread ----

    def _dispatch(self) -> None:
        """Hand over what is due: all of the backlog once it is large or old enough, best first."""
        with self._lock:
            loop = self._loop
            if not self._backlog or loop is None:
                return
            due = min(job.submitted for job in self._backlog) + self.config.max_wait_time_ms / 1000
            left = due - time.monotonic()
            if len(self._backlog) < self.config.max_batch_size and left > 0:
                loop.call_later(left, self._dispatch)
                return
            batch = sorted(self._backlog, key=lambda job: (job.admission.request.priority, job.request.arrival_time))
            self._backlog = []
        for job in batch:
            self._hand_over(job, loop)

    def _hand_over(self, job: _Job, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            if not job.future.set_running_or_notify_cancel():  # its Future was cancelled meanwhile
                self._end(job, RequestState.CANCELLED)
                return
            worker = self._worker
            try:
                if worker is None:
                    raise CancelledError(f"request {job.request.request_id!r} was cancelled: the scheduler stopped.")
                job.stream = worker.submit(self.engine.info.name, job.admission)
            except DFastLLMError as error:
                self._fail(job, error)
                return
            if job.aborted:
                job.stream.cancel()
        loop.create_task(self._follow(job, job.stream))

    async def _follow(self, job: _Job, stream: Stream) -> None:
        events = []
        try:
            async for event in stream:
                job.request.state = RequestState.RUNNING
                events.append(event)
            completion = collect(events)
        except DFastLLMError as error:
            self._fail(job, error)
            return
        self._end(job, RequestState.COMPLETED)
        job.future.set_result(completion)

    def _fail(self, job: _Job, error: DFastLLMError) -> None:
        cancelled = job.aborted or isinstance(error, CancelledError)
        self._end(job, RequestState.CANCELLED if cancelled else RequestState.FAILED)
        job.future.set_exception(error)

    def _end(self, job: _Job, state: RequestState) -> None:
        with self._lock:
            job.request.state = state
            self._live.pop(job.request.request_id, None)
            self._stats.completed_requests += state is RequestState.COMPLETED
            self._stats.cancelled_requests += state is RequestState.CANCELLED
            self._stats.failed_requests += state is RequestState.FAILED

    def _record(self, step: StepStats) -> None:
        with self._lock:
            self._stats.preemptions += step.preempted
            if step.sequences:
                self._stats.record_batch(step.sequences, step.committed, step.seconds * 1000)

    def _encode(self, text: str, raw: bool) -> tuple[int, ...]:
        if self.engine.tokenizer is None:
            raise TokenizerError("this model was built without a tokenizer; give token ids.")
        return encode_prompt(self.engine.tokenizer, text, raw=raw)


class AsyncScheduler:
    """The Scheduler for an event loop: `submit` awaits the Completion. Use as an async context manager. Arguments and
    errors as in Scheduler; cancelling the awaiting task aborts the request."""

    def __init__(
        self,
        config: SchedulerConfig | None = None,
        model: str | Path | Any = "demo-diffusion",
        tokenizer: Tokenizer | None = None,
        *,
        decode: DecodeParams | None = None,
        **fields: Any,
    ) -> None:
        self.scheduler = Scheduler(config, model, tokenizer, decode=decode, **fields)

    async def start(self) -> AsyncScheduler:
        self.scheduler.start()
        return self

    async def stop(self, *, drain: bool = False, timeout: float | None = None) -> None:
        await asyncio.to_thread(self.scheduler.stop, drain=drain, timeout=timeout)

    async def __aenter__(self) -> AsyncScheduler:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def submit(self, request: Request) -> Completion:
        future = self.scheduler.submit(request)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            self.scheduler.abort(request.request_id)
            raise

    async def submit_batch(self, requests: Iterable[Request]) -> list[Completion]:
        """All answers, in order. The first error is raised and the others are aborted."""
        batch = list(requests)
        futures = self.scheduler.submit_batch(batch)
        try:
            return list(await asyncio.gather(*map(asyncio.wrap_future, futures)))
        except BaseException:
            for request in batch:
                self.scheduler.abort(request.request_id)
            raise

    def abort(self, request_id: str) -> bool:
        return self.scheduler.abort(request_id)

    def get_stats(self) -> SchedulerStats:
        return self.scheduler.get_stats()

    @property
    def running_count(self) -> int:
        return self.scheduler.running_count

    @property
    def pending_count(self) -> int:
        return self.scheduler.pending_count


def create_scheduler(model: Any = "demo-diffusion", tokenizer: Tokenizer | None = None, **fields: Any) -> Scheduler:
    """A Scheduler with SchedulerConfig(**fields). Raises ValidationError for an unknown field."""
    return Scheduler(None, model, tokenizer, **fields)
