"""The metric of time between tokens, told under a clock made by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest

from dfastllm.core import Finish, FinishReason, Request, StepEvent, Tier, Usage
from dfastllm.metrics import Metrics
from dfastllm.server import jobs
from dfastllm.server.jobs import Job
from dfastllm.tenants import ANYONE, Identity
from dfastllm.tenants.limits import Limits

USAGE = Usage(prompt_tokens=1, completion_tokens=7, forwards=4, exactness=Tier.REFERENCE)
# Tokens of each event; the second only changes a canvas, and the last ends the answer with no token.
TOLD = (4, 0, 2, 1, 0)


class Told:
    """A stream that says at once what it is given."""

    async def __aiter__(self) -> AsyncGenerator[StepEvent]:
        for index, tokens in enumerate(TOLD):
            finish = Finish(FinishReason.STOP, USAGE) if index == len(TOLD) - 1 else None
            yield StepEvent("r", tuple(range(tokens)), finish=finish)

    def cancel(self) -> None:
        """Nothing runs."""


class Served:
    """As much of a server as a job asks for."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.limits = Limits()
        self.ledger = None
        self.engines = {"m": self}

    def require_ready(self) -> Served:
        return self

    def check_room(self, request: Request) -> None:
        """There is room."""

    def admit(self, request: Request) -> Any:
        return SimpleNamespace(request=request)

    def submit(self, identity: Identity, model: str, admission: Any) -> Told:
        return Told()

    @contextmanager
    def tracked(self, job: Job) -> Iterator[None]:
        yield


@pytest.mark.parametrize("answers", [1, 2])
def test_gaps_between_tokens_reach_the_metrics(answers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each event comes a second after the one before, of whichever answer. A gap lies between two events of one answer
    that bring tokens, and the tokens of the later one share it; the first tokens of an answer end no gap."""
    seconds = count(100)
    monkeypatch.setattr(jobs, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    served: Any = Served()
    requests = [Request("r", (1,), arrival=99.0) for _ in range(answers)]
    moments: dict[int, list[int]] = {index: [] for index in range(answers)}

    async def run() -> None:
        order = count(100)
        async for index, event in Job(served, ANYONE, "m", requests, id="i", request_id="x").timed_events():
            at = next(order)
            if event.token_ids:
                moments[index].append(at)

    asyncio.run(run())
    assert all(len(of_one) == 3 for of_one in moments.values())
    seen = {s.name: s.value for family in served.metrics.registry.collect() for s in family.samples}
    assert seen["dfastllm_inter_token_latency_seconds_count"] == 3 * answers  # 2 and 1 tokens that share or fill a gap
    assert seen["dfastllm_inter_token_latency_seconds_sum"] == sum(of[-1] - of[0] for of in moments.values())
    if answers == 1:
        assert seen["dfastllm_inter_token_latency_seconds_sum"] == 3.0  # from the first event to the fourth
