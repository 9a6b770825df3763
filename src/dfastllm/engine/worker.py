"""One thread that steps every engine with work, and streams that callers on any thread or event loop can read.

A call into the worker never blocks on a step: commands go into an inbox which the thread empties between two steps.
Whatever way the thread ends, every stream ends with an error: nobody waits for a thread that is no more.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from dfastllm.core import FinishReason, Request, StepEvent
from dfastllm.engine.admission import Admission
from dfastllm.errors import (
    CancelledError,
    DFastLLMError,
    GenerationError,
    ModelNotFoundError,
    NotReadyError,
    TimeoutError,
    ValidationError,
)
from dfastllm.kernels import torch_alone

if TYPE_CHECKING:
    from dfastllm.engine.loop import Engine

__all__ = ["Stream", "Worker"]

log = logging.getLogger("dfastllm.engine")


class Stream:
    """The events of one request, in order, ending with the one that has `finish`.

    Iterate it on any thread, or with `async for` in an event loop; not both. A request that did not end by itself
    raises after its last event: TimeoutError, GenerationError, CancelledError. Leaving it early does not cancel: call
    `cancel`.
    """

    def __init__(self, request: Request, cancel: Callable[[str], None]) -> None:
        self.request = request
        self._cancel = cancel
        self._events: queue.SimpleQueue[StepEvent | Exception] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self.done = False

    def cancel(self) -> None:
        """Ask the engine to end the request; its last event says so. Harmless when it has ended."""
        self._cancel(self.request.request_id)

    def put(self, event: StepEvent | Exception) -> None:
        """Deliver one event (the worker's side)."""
        if (waiter := self.append(event)) is not None:
            _wake_loop(waiter[0], [(self, waiter[1])])

    def append(self, event: StepEvent | Exception) -> tuple[asyncio.AbstractEventLoop, asyncio.Event] | None:
        """One event more for who reads. In an event loop he sleeps until what is returned is set there; who reads on a
        thread wakes by himself."""
        with self._lock:
            self._events.put(event)
            return self._waiter

    def __iter__(self) -> Iterator[StepEvent]:
        while not self.done:
            yield from self._open(self._events.get())

    async def __aiter__(self) -> AsyncIterator[StepEvent]:
        flag = asyncio.Event()
        with self._lock:
            self._waiter = (asyncio.get_running_loop(), flag)
            if not self._events.empty():
                flag.set()
        while not self.done:
            await flag.wait()
            flag.clear()
            while not self.done:
                try:
                    item = self._events.get_nowait()
                except queue.Empty:
                    break
                for event in self._open(item):
                    yield event

    def _open(self, item: StepEvent | Exception) -> Iterator[StepEvent]:
        if isinstance(item, Exception):
            self.done = True
            raise item
        self.done = item.finish is not None
        yield item
        if item.finish is not None:
            if item.finish.error is not None:
                raise item.finish.error
            if item.finish.reason is FinishReason.ERROR:
                raise GenerationError("the engine failed on this request; see the log.")
            if item.finish.reason is FinishReason.CANCELLED:
                raise CancelledError(f"request {self.request.request_id!r} was cancelled.")
            if item.finish.reason is FinishReason.TIMEOUT:
                raise TimeoutError("the request ran past its time limit.")


def _wake_loop(loop: asyncio.AbstractEventLoop, woken: Sequence[tuple[Stream, asyncio.Event]]) -> None:
    """Tell the readers of these streams, all in this loop, that there is something. One call for all of them: each
    would cost a write to the loop's pipe, on the engine's thread, for every sequence and step."""
    try:
        loop.call_soon_threadsafe(_set_all, [flag for _, flag in woken])
    except RuntimeError:  # the loop is gone; nobody reads these streams any more
        for stream, _ in woken:
            stream.cancel()


def _set_all(flags: Sequence[asyncio.Event]) -> None:
    for flag in flags:
        flag.set()


class Worker:
    """Steps engines, in turn, on one thread of its own. Engines share the cores, so they never step side by side.

    died     is called on that thread with what ended it when it was not `stop`: a failure that is no Exception, such as
             a panic of a library, or a fault of the worker itself. What a step raises ends its engine's requests only.
    failure  that, afterwards; else None.
    """

    def __init__(
        self, engines: Mapping[str, Engine], died: Callable[[BaseException], None] = lambda failure: None
    ) -> None:
        self.engines = dict(engines)
        self.died = died
        self.failure: BaseException | None = None
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._closed = False  # the inbox is read no more
        self._lock = threading.Lock()
        self._streams: dict[str, Stream] = {}
        self._owners: dict[str, Engine] = {}
        self._thread = threading.Thread(target=self._run, name="dfastllm-engine", daemon=True)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    def start(self) -> Worker:
        self._thread.start()
        return self

    def stop(self, timeout: float = 10.0) -> None:
        """End the thread after its current step; requests in flight get a NotReadyError. Returns once it has ended."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def __enter__(self) -> Worker:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def submit(self, model: str, asked: Request | Admission) -> Stream:
        """Queue a request, admitted on the caller's thread if it was not before, and return its stream. Raises at once:
        ModelNotFoundError, what `Engine.admit` raises, QueueFullError, NotReadyError when the worker is not running.
        Thread-safe."""
        engine = self.engines.get(model)
        if engine is None:
            known = ", ".join(sorted(self.engines)) or "none"
            raise ModelNotFoundError(f"no model {model!r} is served here; there are: {known}.", param="model")
        if self._stopping or not self.is_alive:
            raise self._gone()
        engine.check_room(asked.request if isinstance(asked, Admission) else asked)
        admission = asked if isinstance(asked, Admission) else engine.admit(asked)
        stream = Stream(admission.request, self._ask_cancel)
        engine.underway.give_way(admission)  # before it is in the inbox: it must not have joined already
        if not self._post(lambda: self._add(engine, admission, stream)):
            raise self._gone()
        return stream

    def _failed(self) -> GenerationError:
        return GenerationError("the engine failed while the request ran; see the log.")

    def _gone(self) -> NotReadyError:
        return NotReadyError("the engine is not running." if self.failure is None else "the engine has failed.")

    def cancel(self, request_id: str) -> bool:
        """Ask for the end of a request by id. False when it is not in flight. Thread-safe."""
        known = request_id in self._streams
        self._ask_cancel(request_id)
        return known

    def _ask_cancel(self, request_id: str) -> None:
        self._post(lambda: self._drop(request_id))

    def _post(self, command: Callable[[], None]) -> bool:
        """Hand a command to the thread; False when it will read none any more."""
        with self._lock:
            if self._closed:
                return False
            self._inbox.append(command)
        self._wake.set()
        return True

    def _add(self, engine: Engine, admission: Admission, stream: Stream) -> None:
        name = admission.request.request_id
        try:
            if name in self._streams:
                raise ValidationError(f"request id {name!r} is already in use.", param="request_id")
            engine.add(admission)
        except Exception as error:
            stream.put(error)
            return
        except BaseException:
            stream.put(self._failed())
            raise
        self._streams[name] = stream
        self._owners[name] = engine

    def _drop(self, request_id: str) -> None:
        engine = self._owners.get(request_id)
        if engine is not None:
            engine.cancel(request_id)

    def _run(self) -> None:
        try:
            if all(engine.own_threads for engine in self.engines.values()):
                torch_alone()
            self._serve()
        except BaseException as failure:  # a panic of a library and SystemExit too
            log.critical("the engine's thread has died", exc_info=failure)
            self.failure = failure
        self._close()
        if self.failure is not None:
            self.died(self.failure)

    def _serve(self) -> None:
        while not self._stopping:
            self._commands()
            busy = [e for e in self.engines.values() if e.has_work]
            if not busy:
                self._wake.wait()
                self._wake.clear()
                continue
            for engine in busy:
                self._turn(engine)
                self._commands()

    def _close(self) -> None:
        """End every stream: those in flight, and those whose command came too late to be read."""
        with self._lock:
            self._closed = True
        if self.failure is None:
            error: DFastLLMError = NotReadyError("the engine was stopped while the request ran.")
        else:
            error = self._failed()
        self._commands(BaseException)
        for engine in {id(e): e for e in self._owners.values()}.values():
            self._fail(engine, error, BaseException)

    def _commands(self, caught: type[BaseException] = Exception) -> None:
        while self._inbox:
            try:
                self._inbox.popleft()()
            except caught:
                log.exception("a command to the engine failed")

    def _turn(self, engine: Engine) -> None:
        try:
            events = engine.step()
        except Exception:
            # A fault of the loop itself: end what this engine holds, so that nobody waits for ever, and go on.
            log.exception("the engine's step failed")
            self._fail(engine, GenerationError("the engine failed on this step; see the server's log."))
        else:
            self._deliver(events)

    def _fail(self, engine: Engine, error: DFastLLMError, caught: type[BaseException] = Exception) -> None:
        """End all that this engine runs with `error`, also what it has lost sight of in the middle of a step."""
        try:
            self._deliver(engine.abandon(error))
        except caught:
            log.exception("the engine could not be cleared")
        for name in [name for name, owner in self._owners.items() if owner is engine]:
            del self._owners[name]
            self._streams.pop(name).put(error)

    def _deliver(self, events: Sequence[StepEvent]) -> None:
        woken: dict[asyncio.AbstractEventLoop, list[tuple[Stream, asyncio.Event]]] = {}
        for event in events:
            stream = self._streams.get(event.request_id)
            if event.finish is not None:
                self._streams.pop(event.request_id, None)
                self._owners.pop(event.request_id, None)
            if stream is not None and (waiter := stream.append(event)) is not None:
                woken.setdefault(waiter[0], []).append((stream, waiter[1]))
        for loop, streams in woken.items():
            _wake_loop(loop, streams)
