"""Tenants on one engine: what a flood by one does to another's time to first token, and what their number costs.

Prompts are random ids: what is measured is work, not text. Arms that are compared run in turns on the same engine, and
the answers of the tenant beside the flood are compared with those that it gets alone.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dfastllm.core import Request, SamplingParams
from dfastllm.engine import Engine, EngineConfig, Worker
from dfastllm.engine.runners.torch import Runnable
from dfastllm.metrics.records import Spread, spread
from dfastllm.models import PackedDecoder

__all__ = ["Flood", "measure_flood", "measure_tenants"]

NAME = "m"


@dataclass(frozen=True)
class Flood:
    """What tenant `a` sends all the time, and `b` one by one.

    flood        requests of a in flight; prompt, answer: their tokens.
    prompt_b     tokens of b's prompts; answer_b of its answers. asks: requests of b in a round. pause: most seconds
                 between two of them.
    rounds       of both arms, in turns.
    """

    flood: int = 96
    prompt: int = 128
    answer: int = 64
    prompt_b: int = 128
    answer_b: int = 8
    asks: int = 10
    pause: float = 0.3
    rounds: int = 3


class _Ids:
    """Random prompts of an engine's vocabulary, none with a special token."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        info = engine.info
        reserved = {*info.eos_ids, info.mask_id, info.bos_id, info.pad_id}
        self.known = [i for i in range(min(info.vocab_size, 4096)) if i not in reserved]

    def prompt(self, count: int) -> tuple[int, ...]:
        return tuple(self.rng.choice(self.known, count).tolist())


def _request(name: str, prompt: tuple[int, ...], answer: int, tenant: str) -> Request:
    sampling = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
    return Request(name, prompt, sampling, tenant=tenant, tenant_salt=tenant)


class _Front:
    """One event loop on a thread of its own, where the streams of all requests are read, as in a server. tokens: of
    tenant a that came."""

    def __init__(self, worker: Worker, work: Flood) -> None:
        self.worker = worker
        self.work = work
        self.tokens = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._flooding = False
        self._count = 0

    def __enter__(self) -> _Front:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _send(self, ids: _Ids) -> None:
        while self._flooding:
            self._count += 1
            answer = self.work.answer // 2 + int(ids.rng.integers(self.work.answer))
            stream = self.worker.submit(NAME, _request(f"a{self._count}", ids.prompt(self.work.prompt), answer, "a"))
            async for event in stream:
                self.tokens += len(event.token_ids)
                if not self._flooding and event.finish is None:
                    stream.cancel()
                    break

    @contextmanager
    def flood(self, ids: _Ids) -> Iterator[None]:
        """As many requests of a as the work says are in flight until the block ends."""
        self._flooding = True
        sent = [asyncio.run_coroutine_threadsafe(self._send(ids), self._loop) for _ in range(self.work.flood)]
        try:
            yield
        finally:
            self._flooding = False
            for one in sent:
                one.result()

    def ask(self, request: Request) -> tuple[float, tuple[int, ...]]:
        """Seconds until the first token, and the answer."""
        return asyncio.run_coroutine_threadsafe(self._ask(request), self._loop).result()

    async def _ask(self, request: Request) -> tuple[float, tuple[int, ...]]:
        began, first = time.monotonic(), 0.0
        tokens: list[int] = []
        async for event in self.worker.submit(NAME, replace(request, arrival=began)):
            if event.token_ids and not first:
                first = time.monotonic() - began
            tokens += event.token_ids
        return first, tuple(tokens)

    def speed(self, seconds: float) -> float:
        """Tokens per second of tenant a."""
        began, before = time.monotonic(), self.tokens
        time.sleep(seconds)
        return (self.tokens - before) / (time.monotonic() - began)


def measure_flood(
    model: Runnable | PackedDecoder, work: Flood, dtype: torch.dtype | None = None, **config: Any
) -> dict[str, Any]:
    """One row of the record. first_token_ms of b alone and beside the flood, in percentiles over all its requests;
    ratio: of these, flood / alone; one_tenant_ms: the median where b's requests are a's own, as they were before there
    were tenants. given_up: steps that were given up for b. a_tokens_per_second: with b's requests among them, and
    without. same_answers: whether b's are those that it gets alone."""
    engine = Engine(model, config=EngineConfig(**config), dtype=dtype)
    ids = _Ids(engine, 0)
    times: dict[str, list[float]] = {"alone": [], "flood": []}
    answers: dict[str, list[tuple[int, ...]]] = {"alone": [], "flood": []}
    speeds: dict[bool, list[float]] = {True: [], False: []}
    with Worker({NAME: engine}) as worker, _Front(worker, work) as front:
        front.ask(_request("warm", ids.prompt(work.prompt_b), 2, "b"))
        for number in range(work.rounds):
            prompts = [ids.prompt(work.prompt_b) for _ in range(work.asks)]
            pauses = (work.pause * ids.rng.random(work.asks)).tolist()
            _round(front, work, "alone", number, prompts, pauses, times, answers)
            with front.flood(_Ids(engine, 1000 + number)):
                _filled(engine, work)
                began, before = time.monotonic(), front.tokens
                _round(front, work, "flood", number, prompts, pauses, times, answers)
                seconds = time.monotonic() - began
                speeds[True].append((front.tokens - before) / seconds)
                # Afterwards and as long: the first seconds of a flood are prompts, and hardly a token comes.
                speeds[False].append(front.speed(max(2.0, seconds)))
        with front.flood(_Ids(engine, 2000)):
            _filled(engine, work)
            one = [front.ask(_request(f"one{n}", ids.prompt(work.prompt_b), 2, "a"))[0] for n in range(3)]
    return {
        "model": model.info.name,
        "flood": work.flood,
        "prompt_a": work.prompt,
        "prompt_b": work.prompt_b,
        "asks": len(times["alone"]),
        **{f"{arm}_p{p}_ms": 1e3 * float(np.percentile(times[arm], p)) for arm in times for p in (50, 95)},
        **{f"ratio_p{p}": _ratio(times, p) for p in (50, 95)},
        "one_tenant_ms": 1e3 * float(np.median(one)),
        "given_up": engine.underway.given_up,
        "preempted": engine.scheduler.preempted,
        "a_tokens_per_second": spread(speeds[False]),
        "a_tokens_per_second_with_b": spread(speeds[True]),
        "same_answers": answers["alone"] == answers["flood"],
    }


def _ratio(times: dict[str, list[float]], p: int) -> float:
    return float(np.percentile(times["flood"], p) / np.percentile(times["alone"], p))


def _round(
    front: _Front,
    work: Flood,
    arm: str,
    number: int,
    prompts: Sequence[tuple[int, ...]],
    pauses: Sequence[float],
    times: dict[str, list[float]],
    answers: dict[str, list[tuple[int, ...]]],
) -> None:
    """b's requests one by one. Each arm's shared beginnings are its own, so that none finds the other's."""
    for n, (prompt, pause) in enumerate(zip(prompts, pauses, strict=True)):
        time.sleep(pause)
        request = replace(_request(f"{arm}{number}-{n}", prompt, work.answer_b, "b"), tenant_salt=f"b-{arm}")
        seconds, answer = front.ask(request)
        times[arm].append(seconds)
        answers[arm].append(answer)


def _filled(engine: Engine, work: Flood) -> None:
    """Returns once the flood holds every place that it can, and has had more than a burst."""
    wanted, fairness = min(work.flood, engine.config.max_sequences), engine.scheduler.fairness
    while len(engine.scheduler.running) < wanted or fairness.time("a") - fairness.time("b") < fairness.burst:
        time.sleep(0.05)


def measure_tenants(
    model: Runnable | PackedDecoder,
    counts: Sequence[int] = (1, 2, 4, 8, 16),
    requests: int = 32,
    prompt: int = 64,
    answer: int = 48,
    repeats: int = 5,
    dtype: torch.dtype | None = None,
    **config: Any,
) -> list[dict[str, Any]]:
    """A row for each number of tenants that share the same requests, in turns: tokens per second, of_one: that against
    the first number's in the same turn; of_one_processor: the same of processor time, which other programs of the
    machine do not lengthen; and the process's memory afterwards. The first number, one tenant, has an engine of its own
    that never sees another: an engine that knows several shortens its steps also while one is alone. Every arm is
    warm before the first turn."""
    alone, shared = (Engine(model, config=EngineConfig(**config), dtype=dtype) for _ in range(2))
    engines = dict.fromkeys(counts[1:], shared) | {counts[0]: alone}
    ids = _Ids(alone, 0)
    prompts = [ids.prompt(prompt) for _ in range(requests)]
    bursts: dict[int, list[_Burst]] = {count: [] for count in counts}
    memory: dict[int, float] = {}
    for count in counts:
        _burst(engines[count], prompts, answer, count, -1)
    for repeat in range(repeats):
        for count in counts if repeat % 2 else counts[::-1]:
            bursts[count].append(_burst(engines[count], prompts, answer, count, repeat))
            memory[count] = _resident()
    speeds = {count: [burst.tokens / burst.seconds for burst in bursts[count]] for count in counts}
    cheapness = {count: [burst.tokens / burst.processor for burst in bursts[count]] for count in counts}
    return [
        {
            "model": model.info.name,
            "tenants": count,
            "requests": requests,
            "tokens_per_second": spread(speeds[count]),
            "of_one": _paired(speeds[count], speeds[counts[0]]),
            "of_one_processor": _paired(cheapness[count], cheapness[counts[0]]),
            "resident_mib": memory[count],
        }
        for count in counts
    ]


def _paired(values: Sequence[float], one: Sequence[float]) -> Spread:
    return spread([a / b for a, b in zip(values, one, strict=True)])


@dataclass(frozen=True)
class _Burst:
    """tokens: that came. seconds: of the wall clock; processor: of all threads of this process."""

    tokens: int
    seconds: float
    processor: float


def _burst(engine: Engine, prompts: Sequence[tuple[int, ...]], answer: int, tenants: int, repeat: int) -> _Burst:
    """Requests that arrive together, dealt out to so many tenants. No run shares beginnings."""
    for n, prompt in enumerate(prompts):
        request = _request(f"{tenants}-{repeat}-{n}", prompt, answer, f"t{n % tenants}")
        engine.add(replace(request, tenant_salt=f"{tenants}-{repeat}-{n % tenants}"))
    began, processor, tokens = time.monotonic(), time.process_time(), 0
    while engine.has_work:
        tokens += sum(len(event.token_ids) for event in engine.step())
    return _Burst(tokens, time.monotonic() - began, time.process_time() - processor)


def _resident() -> float:
    """MiB of this process in memory now."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024
