"""From engine requests to their results: submit, merge the streams of one call, collect, and cancel.

One call of the API is a `Job`: one engine request per prompt and choice. It ends whole or fails whole: whatever way its
events are left (an error, a disconnected client, a cancelled task), what still runs is cancelled and its compute freed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, TypeVar, cast

from starlette.requests import Request as HttpRequest

from dfastllm import llm
from dfastllm.core import (
    Finish,
    FinishReason,
    Request,
    StepEvent,
    Tier,
    Usage,
)
from dfastllm.errors import CancelledError, DFastLLMError, GenerationError, TimeoutError, ValidationError
from dfastllm.llm import Completion, split_choices
from dfastllm.server.account import Account, Status
from dfastllm.server.options import decode_params, request_options, sampling_params, speculative_params
from dfastllm.server.schemas import GenerationRequest
from dfastllm.server.serving import ServedModel, Serving
from dfastllm.server.timings import RequestTimings
from dfastllm.tenants import Identity
from dfastllm.text import CallReading

if TYPE_CHECKING:
    from dfastllm.engine import Stream
    from dfastllm.engine.admission import Admission

__all__ = [
    "Events",
    "Job",
    "collect",
    "disconnected",
    "engine_requests",
    "first_event",
    "total",
    "while_connected",
]

T = TypeVar("T")
Events = AsyncGenerator[tuple[int, StepEvent]]


class Job:
    """The engine requests of one call, which nothing reaches the engine without. identity: whose they are. `id` names
    the response, `request_id` is its X-Request-ID; calls: how calls in the answers are read, None for a request without
    tools; choices: answers to each prompt."""

    def __init__(
        self,
        serving: Serving,
        identity: Identity,
        model: str,
        requests: Sequence[Request],
        *,
        id: str,
        request_id: str,
        calls: CallReading | None = None,
        choices: int = 1,
    ) -> None:
        self.serving = serving
        self.identity = identity
        self.choices = choices
        self.model = model
        self.requests = requests
        self.id = id
        self.request_id = request_id
        self.streams: list[Stream] = []
        self.failure: DFastLLMError | None = None
        self.timings = [RequestTimings(request, calls) for request in requests]
        self.canvas_length: int | None = None  # of the longest canvas
        self._enough: dict[int, int] = {}  # tokens of each answer that was ended by `enough`

    def cancel(self) -> None:
        for stream in self.streams:
            stream.cancel()

    def fail(self, error: DFastLLMError) -> None:
        """End the job with this error in place of CancelledError."""
        self.failure = error
        self.cancel()

    def enough(self, index: int, tokens: int) -> None:
        """End engine request `index` as if the model had ended it, after `tokens` tokens: what it still does is no part
        of the answer."""
        self._enough[index] = tokens
        self.streams[index].cancel()

    async def events(self, *, whole: bool = False) -> Events:
        """(index of the engine request, event) as they come; each request's last event has `finish`. What an event
        brings is in the tenant's ledger before the event comes; with `whole`, where nothing is sent before the end,
        before the last event comes. Raises what the engine refuses on submission, what the tenant's limits refuse, and
        the error of the first request that fails."""
        self.serving.require_ready()
        with self.serving.tracked(self):
            account, status = await self._open(), "failed"
            try:
                async with aclosing(self._recorded(account, whole)) as recorded:
                    async for index, event in recorded:
                        if index in self._enough and event.finish is not None:
                            event = _ended(event, event.finish, self._enough[index])
                        if event.finish is not None and (error := _failure(event.finish)) is not None:
                            raise error
                        yield index, event
                status = "ok"
            except (asyncio.CancelledError, GeneratorExit):
                status = "cancelled"
                raise
            except CancelledError as error:
                status = "cancelled"
                raise self.failure or error from None
            finally:
                self.cancel()  # harmless for what has ended
                account.close(cast("Status", status))

    async def _open(self) -> Account:
        """Admit, ask the limits, open the account, submit. Whatever raises, nothing is left running."""
        admissions = [await self._admitted(request) for request in self.requests]
        prompt = sum(len(r.prompt) + len(r.suffix) for r in self.requests[:: self.choices])
        answers = sum(admission.request.sampling.max_tokens or 0 for admission in admissions)
        names = {"model": self.model, "adapter": self.requests[0].lora}
        account = Account(self.serving, self.identity, id=self.id, **names, prompt=prompt, most=prompt + answers)
        try:
            for admission in admissions:
                self.streams.append(self.serving.submit(self.identity, self.model, admission))
        except BaseException:
            self.cancel()
            account.close("failed")
            raise
        return account

    async def _admitted(self, request: Request) -> Admission:
        """The request admitted, on a thread where its adapter must be read from disk first. Raises QueueFullError and
        what `Engine.admit` raises."""
        engine = self.serving.require_ready().engines[self.model]
        engine.check_room(request)
        if not request.lora or engine.adapters.in_memory(request.lora):
            return engine.admit(request)
        return await asyncio.to_thread(engine.admit, request)

    async def _recorded(self, account: Account, whole: bool) -> Events:
        """The events of the engine, but those past `enough`, each once it is recorded."""
        merged = _merge(self.streams) if len(self.streams) > 1 else _single(self.streams[0])
        left = len(self.streams)
        async with aclosing(_groups(merged) if account.kept and not whole else _one_by_one(merged)) as groups:
            async for group in groups:
                for index, event in group:
                    left -= event.finish is not None
                    if index not in self._enough:
                        account.saw(event)
                if not whole or not left:
                    await account.record()
                for index, event in group:
                    if index not in self._enough or event.finish is not None:
                        yield index, event

    async def timed_events(self, *, whole: bool = False) -> Events:
        """`events`, with what came when reported to the metrics and kept in `timings`."""
        last: dict[int, float] = {}
        async with aclosing(self.events(whole=whole)) as events:
            async for index, event in events:
                now = time.monotonic()
                self.timings[index].see(event, now)
                if event.canvas is not None:
                    self.canvas_length = max(self.canvas_length or 0, event.canvas.length)
                if event.finish is not None:
                    self.timings[index].report(self.serving.metrics, self.model)
                if event.token_ids:
                    if index in last:
                        self.serving.metrics.tokens(self.model, now - last[index], len(event.token_ids))
                    last[index] = now
                yield index, event


def _ended(event: StepEvent, finish: Finish, tokens: int) -> StepEvent:
    """The last event of a request that was ended because its answer was complete."""
    usage = replace(finish.usage, completion_tokens=tokens)
    return StepEvent(event.request_id, finish=Finish(FinishReason.STOP, usage))


def _failure(finish: Finish) -> DFastLLMError | None:
    """Why a request did not end by itself."""
    if finish.reason in (FinishReason.STOP, FinishReason.LENGTH):
        return None
    if finish.error is not None:
        return finish.error
    if finish.reason is FinishReason.CANCELLED:
        return CancelledError("The request was cancelled.")
    if finish.reason is FinishReason.TIMEOUT:
        return TimeoutError("The request ran past its time limit.")
    return GenerationError("The engine failed on this request; see the server's log.")


async def _until_finish(stream: Stream) -> AsyncGenerator[StepEvent]:
    """Its events to the last one, which says how it ended; a stream would go on to raise that."""
    async for event in stream:
        yield event
        if event.finish is not None:
            return


async def _single(stream: Stream) -> Events:
    async for event in _until_finish(stream):
        yield 0, event


async def _merge(streams: Sequence[Stream]) -> Events:
    """The events of many streams as they come. Ends when all have ended, or raises with the first that does."""
    ready: asyncio.Queue[tuple[int, StepEvent | Exception | None]] = asyncio.Queue()

    async def pump(index: int, stream: Stream) -> None:
        try:
            async for event in _until_finish(stream):
                ready.put_nowait((index, event))
        except Exception as error:
            ready.put_nowait((index, error))
        else:
            ready.put_nowait((index, None))

    pumps = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        running = len(pumps)
        while running:
            index, item = await ready.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield index, item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _one_by_one(events: Events) -> AsyncGenerator[list[tuple[int, StepEvent]]]:
    async with aclosing(events):
        async for item in events:
            yield [item]


async def _groups(events: Events) -> AsyncGenerator[list[tuple[int, StepEvent]]]:
    """The events in groups: all that came while the last group was looked at, one at least. Raises what they raise
    after the last of them."""
    came: asyncio.Queue[tuple[int, StepEvent] | Exception | None] = asyncio.Queue()

    async def pump() -> None:
        try:
            async for item in events:
                came.put_nowait(item)
        except Exception as error:
            came.put_nowait(error)
        else:
            came.put_nowait(None)

    task = asyncio.create_task(pump())
    try:
        last: Any = ()
        while isinstance(last, tuple):
            group, last = [], await came.get()
            while isinstance(last, tuple):
                group.append(last)
                if came.empty():
                    break
                last = came.get_nowait()
            if group:
                yield group
        if last is not None:
            raise last
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await events.aclose()


async def collect(job: Job, watch: Callable[[int, StepEvent], object] = lambda index, event: None) -> list[Completion]:
    """Run a job to its end; one answer per engine request, in order. watch: is shown each event."""
    seen: list[list[StepEvent]] = [[] for _ in job.requests]
    async with aclosing(job.timed_events(whole=True)) as events:
        async for index, event in events:
            seen[index].append(event)
            watch(index, event)
    return [llm.collect(events_of_one, index) for index, events_of_one in enumerate(seen)]


def total(used: Sequence[Usage], choices: int) -> Usage:
    """Usage of a whole call. A prompt is counted once for all its `choices`; times are those of the slowest request."""
    first = [u.first_token_s for u in used if u.first_token_s is not None]
    return Usage(
        prompt_tokens=sum(u.prompt_tokens for u in used[::choices]),
        completion_tokens=sum(u.completion_tokens for u in used),
        forwards=sum(u.forwards for u in used),
        exactness=Tier.least(u.exactness for u in used),
        queue_s=max(u.queue_s for u in used),
        first_token_s=min(first) if first else None,
        total_s=max(u.total_s for u in used),
        cached_tokens=sum(u.cached_tokens for u in used[::choices]),
        drafts=sum(u.drafts for u in used),
        draft_tokens=sum(u.draft_tokens for u in used),
        accepted_tokens=sum(u.accepted_tokens for u in used),
        accepted_per_position=tuple(map(sum, zip_longest(*(u.accepted_per_position for u in used), fillvalue=0))),
    )


def engine_requests(
    serving: Serving,
    identity: Identity,
    model: ServedModel,
    id: str,
    body: GenerationRequest,
    prompts: Sequence[tuple[int, ...]],
    suffix: tuple[int, ...] = (),
    shown: tuple[int, ...] = (),
) -> list[Request]:
    """One engine request per prompt and choice, of the identity's tenant: with its share of the engine, shared
    beginnings of its own, and a priority that it may have. Choice i of a seeded call draws with seed + i, so that
    choice 0 is what the same call gives with n = 1. Raises ValidationError for options that cannot be and for too many
    sequences, and AdapterNotFoundError."""
    sampling, decode, speculative = sampling_params(body), decode_params(body, model), speculative_params(body, model)
    options, tenant = request_options(body, model), identity.tenant
    if options.lora:
        serving.require_adapter(identity, model.name, options.lora)
    limit, most = serving.settings.request_timeout, serving.settings.max_prompts
    if len(prompts) * sampling.n > most:
        raise ValidationError(
            f"One request may ask for {most} sequences (prompts times n), got {len(prompts) * sampling.n}.",
            param="n" if sampling.n > 1 else "prompt",
        )
    timeout = limit if options.timeout is None else min(limit, options.timeout)
    prepared = [(prompt, single) for prompt in prompts for single in split_choices(sampling)]
    return [
        Request(
            request_id=f"{id}-{index}",
            prompt=prompt,
            sampling=single,
            decode=decode,
            suffix=suffix,
            speculative=speculative,
            shown=shown,
            tenant=tenant.id,
            share=tenant.weight,
            tenant_salt=identity.salt,
            **{**vars(options), "timeout": timeout, "priority": max(options.priority, tenant.priority_min)},
        )
        for index, (prompt, single) in enumerate(prepared)
    ]


async def first_event(http: HttpRequest, job: Job) -> Events:
    """The job's events once there is a first one, so that a refusal still gets its own status code."""
    events = job.timed_events()
    first = await while_connected(http, anext(events))

    async def rest() -> Events:
        async with aclosing(events):
            yield first
            async for item in events:
                yield item

    return rest()


async def while_connected(http: HttpRequest, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away. Raises dfastllm's CancelledError then."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected(http.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise CancelledError("The client disconnected.")
    finally:
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def disconnected(receive: Any) -> None:
    """Returns when the client has gone away (the request's body has been read before)."""
    while (await receive())["type"] != "http.disconnect":
        pass
