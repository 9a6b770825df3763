"""Load: so many requests in flight (closed loop), so many arriving per second (open loop), and ramps of either.

A closed loop waits for the server and so hides queueing; an open loop sends when it is time, whatever the server is
doing, as users do. Questions are other ones than the sweep's and differ from point to point, so no answer is cached.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dfastllm.bench.suite.client import Client
from dfastllm.bench.suite.counting import TokenCounter
from dfastllm.bench.suite.figures import Measured, figures
from dfastllm.bench.suite.record import Recorder
from dfastllm.bench.suite.schema import LoadPoint
from dfastllm.bench.suite.sweep import GONE, Progress, ServerLost, Settings, Trial, require_alive
from dfastllm.bench.suite.watch import Watch
from dfastllm.bench.suite.workloads import Prompt, PromptSource
from dfastllm.errors import ValidationError

__all__ = ["Driver", "Point", "arrivals", "parse_ramp", "parse_slo", "points"]

Kind = Literal["closed", "fixed", "poisson", "ramp"]
IN_A_ROW = 5  # connection failures after which a point asks whether the server is still there
FIRST_PROMPT = 100_000  # index of the load's first question: none of the sweep's


@dataclass(frozen=True)
class Point:
    """What to do. requests: of a closed or open point. steps: of a ramp, `seconds` each: requests in flight, or with
    `of_rate` arrivals per second."""

    kind: Kind
    concurrency: int | None = None
    rate: float | None = None
    requests: int = 32
    steps: tuple[float, ...] = ()
    seconds: float = 5.0
    of_rate: bool = False

    @property
    def name(self) -> str:
        if self.kind == "closed":
            return f"{self.concurrency} in flight"
        if self.kind == "ramp":
            shown = " > ".join(f"{step:g}" for step in self.steps)
            return f"ramp {shown} {'requests/s' if self.of_rate else 'in flight'}"
        return f"{self.rate:g} requests/s, {self.kind}"


def points(
    concurrencies: Sequence[int],
    rates: Sequence[float],
    arrivals: str,
    ramps: Sequence[Point],
    requests: int,
    seconds: float,
) -> list[Point]:
    """Closed points of `requests` or four a worker, if that is more; open points of `requests` or as many as arrive in
    `seconds`, if that is more. Raises ValidationError for numbers that cannot be."""
    for concurrency in concurrencies:
        if concurrency < 1:
            raise ValidationError(f"concurrency must be at least 1, got {concurrency}.", param="load")
    for rate in rates:
        _positive(rate, "rate")
    if arrivals not in ("poisson", "fixed"):
        raise ValidationError(f"arrivals are poisson or fixed, got {arrivals!r}.", param="arrivals")
    if requests < 1:
        raise ValidationError(f"a load point needs at least 1 request, got {requests}.", param="load_requests")
    _positive(seconds, "load_seconds")
    found = [Point("closed", concurrency=c, requests=max(requests, 4 * c)) for c in concurrencies]
    found += [
        Point("fixed" if arrivals == "fixed" else "poisson", rate=r, requests=max(requests, math.ceil(r * seconds)))
        for r in rates
    ]
    return [*found, *ramps]


def _positive(value: float, name: str) -> None:
    if not 0 < value < math.inf:
        raise ValidationError(f"{name} must be a number above 0, got {value:g}.", param=name)


def parse_ramp(text: str, seconds: float) -> Point:
    """FROM:TO:STEPS, requests in flight; with /s at the end, arrivals per second. Raises ValidationError."""
    body = text.removesuffix("/s")
    try:
        first, last, count = body.split(":")
        low, high, steps = float(first), float(last), int(count)
    except ValueError:
        raise ValidationError(
            f"{text!r} is no ramp.", param="ramp", hint="Give FROM:TO:STEPS, like 1:16:4, or 1:16:4/s for arrivals."
        ) from None
    of_rate = body != text
    if not (0 < low < math.inf and 0 < high < math.inf) or steps < 2 or (not of_rate and min(low, high) < 1):
        raise ValidationError(f"{text!r}: a ramp goes between numbers of at least 1 in 2 or more steps.", param="ramp")
    _positive(seconds, "load_seconds")
    values = [low + (high - low) * i / (steps - 1) for i in range(steps)]
    return Point(
        "ramp", steps=tuple(v if of_rate else float(round(v)) for v in values), seconds=seconds, of_rate=of_rate
    )


def parse_slo(texts: Sequence[str]) -> dict[str, float]:
    """ttft=MS, tpot=MS, e2el=MS. Raises ValidationError."""
    found: dict[str, float] = {}
    for text in texts:
        name, _, raw = text.partition("=")
        try:
            limit = float(raw)
        except ValueError:
            limit = math.nan
        if name not in ("ttft", "tpot", "e2el") or not 0 < limit < math.inf:
            raise ValidationError(
                f"{text!r} is no SLO.", param="slo", hint="Give ttft=MS, tpot=MS or e2el=MS, milliseconds above 0."
            )
        found[name] = limit
    return found


def arrivals(kind: str, rate: float, seed: int) -> Iterator[float]:
    """Seconds from the start at which requests arrive, without end: every 1/rate, or with exponential gaps of that mean
    (a Poisson process)."""
    draw, at = random.Random(seed), 0.0
    while True:
        yield at
        at += draw.expovariate(rate) if kind == "poisson" else 1 / rate


@dataclass
class _State:
    """One point while it runs."""

    began: float = field(default_factory=time.perf_counter)
    measured: list[Measured] = field(default_factory=list)
    in_flight: int = 0
    most: int = 0
    failures: int = 0  # in a row, of the connection
    levels: list[tuple[float, int]] = field(default_factory=list)  # (second, in flight), at each change
    lost: str | None = None


class Driver:
    """Runs points one after the other. `lost`: why the server is gone, after which nothing more is asked."""

    def __init__(
        self,
        client: Client,
        trial: Trial,
        sources: Mapping[str, PromptSource],
        settings: Settings,
        *,
        slo: Mapping[str, float] | None = None,
        record: Recorder | None = None,
        progress: Progress = lambda *_: None,
        watch: Watch | None = None,
    ) -> None:
        self.client = client
        self.trial = trial
        self.settings = settings
        self.slo = dict(slo or {})
        self.record = record
        self.progress = progress
        self.watch = Watch() if watch is None else watch
        self.lost: str | None = None
        self.results: list[LoadPoint] = []
        self._prompts = _mixed(list(sources.values()))
        self._index = itertools.count(FIRST_PROMPT)
        self._counter = TokenCounter(client)

    async def run(self, wanted: Sequence[Point]) -> None:
        """Every point; stops after one in which the server was lost."""
        for number, point in enumerate(wanted):
            self.progress("load", number, len(wanted), point.name)
            if not self.results:
                for _ in range(2):  # connections and caches
                    await self.client.ask(self.settings.call(next(self._prompts), self.trial.options, 0))
            self.results.append(await self._point(point))
            if self.lost is not None:
                return
        self.progress("load", len(wanted), len(wanted), "done")

    async def _point(self, point: Point) -> LoadPoint:
        state = _State()
        async with self.watch.on(self.client):
            if point.kind == "closed":
                await self._closed(state, point)
            elif point.kind == "ramp" and not point.of_rate:
                await self._ramp(state, point)
            else:
                await self._open(state, point)
        self.lost = state.lost
        duration = max((m.answer.sent + (m.answer.end or 0) for m in state.measured), default=state.began) - state.began
        await self._counter.fill([m.answer for m in state.measured])
        if self.record is not None:
            self.record.write("load", point.name, state.measured)
        sends = sorted(m.answer.sent for m in state.measured)
        over = (sends[-1] - sends[0]) if len(sends) > 1 else 0.0
        return LoadPoint(
            name=point.name,
            kind=point.kind,
            configuration=self.trial.name,
            concurrency=point.concurrency,
            request_rate=point.rate,
            steps=point.steps,
            slo=self.slo,
            achieved_rate=(len(sends) - 1) / over if over > 0 else 0.0,
            max_in_flight=state.most,
            timeouts=sum(m.answer.error == "timeout" for m in state.measured),
            timeline=_timeline(state, duration) if point.kind == "ramp" else (),
            figures=figures(state.measured, duration, slo=self.slo, block=self.trial.block),
            partial=state.lost is not None,
            partial_reason=state.lost,
        )

    async def _closed(self, state: _State, point: Point) -> None:
        left = iter(range(point.requests))

        async def worker() -> None:
            for _ in left:
                if state.lost is not None:
                    return
                await self._one(state)

        async with asyncio.TaskGroup() as group:
            for _ in range(point.concurrency or 1):
                group.create_task(worker())

    async def _ramp(self, state: _State, point: Point) -> None:
        """Worker i works while the step of the moment has more than i in flight."""
        end = state.began + point.seconds * len(point.steps)

        def allowed() -> float:
            step = int((time.perf_counter() - state.began) / point.seconds)
            return point.steps[min(step, len(point.steps) - 1)]

        async def worker(number: int) -> None:
            while state.lost is None and time.perf_counter() < end:
                if number < allowed():
                    await self._one(state)
                else:
                    await asyncio.sleep(0.02)

        async with asyncio.TaskGroup() as group:
            for number in range(int(max(point.steps))):
                group.create_task(worker(number))

    async def _open(self, state: _State, point: Point) -> None:
        async with asyncio.TaskGroup() as group:
            async for _ in self._due(state, point):
                group.create_task(self._one(state))

    async def _due(self, state: _State, point: Point) -> AsyncIterator[None]:
        """Yields when a request is to be sent."""
        for at in _schedule(point, self.settings.seed):
            wait = state.began + at - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            if state.lost is not None:
                return
            yield

    async def _one(self, state: _State) -> None:
        index = next(self._index)
        prompt = next(self._prompts)
        state.in_flight += 1
        state.most = max(state.most, state.in_flight)
        state.levels.append((time.perf_counter() - state.began, state.in_flight))
        try:
            answer = await self.client.ask(self.settings.call(prompt, self.trial.options, index))
        finally:
            state.in_flight -= 1
            state.levels.append((time.perf_counter() - state.began, state.in_flight))
        state.measured.append(Measured(prompt, answer))
        state.failures = state.failures + 1 if answer.error in GONE else 0
        if state.failures >= IN_A_ROW and state.lost is None:
            try:
                await require_alive(self.client, [m.answer for m in state.measured[-IN_A_ROW:]])
            except ServerLost as lost:
                state.lost = str(lost)
            state.failures = 0


def _mixed(sources: Sequence[PromptSource]) -> Iterator[Prompt]:
    """The types in turn, each question once."""
    for index in itertools.count(FIRST_PROMPT):
        for source in sources:
            yield source(index)


def _schedule(point: Point, seed: int) -> Iterator[float]:
    if point.kind != "ramp":
        yield from itertools.islice(arrivals(point.kind, point.rate or 1.0, seed), point.requests)
        return
    for number, rate in enumerate(point.steps):
        inside = itertools.takewhile(lambda at: at < point.seconds, arrivals("poisson", rate, seed + number))
        yield from (number * point.seconds + at for at in inside)


def _timeline(state: _State, duration: float) -> tuple[tuple[float, int, float, int], ...]:
    """(second, requests in flight at its end, tokens that came in it, errors in it)."""
    seconds = max(1, math.ceil(duration))
    tokens, errors, level = [0.0] * seconds, [0] * seconds, [0] * seconds
    for m in state.measured:
        answer, start = m.answer, m.answer.sent - state.began
        if not answer.ok:
            errors[min(seconds - 1, int(start + (answer.end or 0)))] += 1
            continue
        share = (answer.completion_tokens or 0) / max(1, len(answer.chunks))
        for chunk in answer.chunks:
            tokens[min(seconds - 1, int(start + chunk.at))] += share if chunk.tokens is None else chunk.tokens
    for i in range(seconds):
        level[i] = next((count for at, count in reversed(state.levels) if at <= i + 1), 0)
    return tuple((float(i), level[i], tokens[i], errors[i]) for i in range(seconds))
