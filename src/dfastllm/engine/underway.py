"""The forward that runs at this moment, as other threads may see it, and for whom it is given up.

A request that comes while a long step of another tenant runs would wait for its end, however short its own first step
is. Where its tenant had so much less that the others would stand back for it anyway (`fairness`), their step is given
up between two layers instead and done again later, which changes no bit of it. The tenant that it was given up for
pays: what was lost counts as its own, so that it cannot do so for ever.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfastllm.core import Request, Span
from dfastllm.engine.scheduler import Scheduler
from dfastllm.engine.sequence import Live

if TYPE_CHECKING:
    from dfastllm.engine.admission import Admission
    from dfastllm.kernels.halt import Halt

__all__ = ["Underway"]

WORTH = 4  # a step is given up where the newcomer's first one has at most so many times its rows


@dataclass(frozen=True, slots=True)
class _Forward:
    """run: its number of the runner's. rows, shares: by tenant. priority: of its most urgent request."""

    run: int
    rows: dict[str, int]
    shares: dict[str, float]
    priority: int

    @property
    def total(self) -> int:
        return sum(self.rows.values())


class Underway:
    """Of one engine. `given_up`: steps so far."""

    def __init__(self, scheduler: Scheduler, halt: Halt) -> None:
        self.scheduler = scheduler
        self.halt = halt
        self.given_up = 0
        self._forward: _Forward | None = None
        self._asked: Request | None = None
        self._newcomer: Admission | None = None  # the last that came and has not joined yet
        self._began = 0.0
        self._rate = 0.0  # rows per second of the last forward that came to its end

    def begins(self, chosen: Iterable[tuple[Live, Span]]) -> None:
        """The runner is about to run these spans."""
        rows: dict[str, int] = {}
        shares: dict[str, float] = {}
        priority: int | None = None
        for live, span in chosen:  # without a call where there need be none: it is done for every sequence and step
            request = live.state.request
            tenant = request.tenant
            if tenant in rows:
                rows[tenant] += span.rows
            else:
                rows[tenant], shares[tenant] = span.rows, request.share
            if priority is None or request.priority < priority:
                priority = request.priority
        self._forward = _Forward(self.halt.runs + 1, rows, shares, priority or 0)
        self._began = time.monotonic()
        if self._newcomer is not None:  # it came while this step was planned
            self._consider(self._newcomer)

    def joined(self, admission: Admission) -> None:
        """The request waits or runs now: the next step is planned with it."""
        if self._newcomer is admission:
            self._newcomer = None

    def charge(self, step: int) -> None:
        """It gave what it was run for: its tenants have had their rows."""
        if self._forward is not None:
            for tenant, rows in self._forward.rows.items():
                self.scheduler.fairness.charge(tenant, self._forward.shares[tenant], rows, step)

    def ended(self) -> None:
        """It came to its end."""
        if self._forward is not None:
            self._rate = self._forward.total / max(1e-9, time.monotonic() - self._began)
        self._forward = self._asked = None

    def interrupted(self) -> None:
        """It was given up: who it was given up for has what was lost on the account, the rows that were computed as
        far as the time tells."""
        forward, asked = self._forward, self._asked
        if forward is not None and asked is not None:
            lost = math.ceil(self._rate * (time.monotonic() - self._began))
            self.scheduler.fairness.charge(asked.tenant, asked.share, max(1, min(lost, forward.total)))
        self.given_up += 1
        self._forward = self._asked = None

    def give_way(self, admission: Admission) -> None:
        """This request is about to join: give up what runs where that is right. Thread-safe; it changes speed only, so
        it may go by what was true a moment ago."""
        self._newcomer = admission
        self._consider(admission)

    def _consider(self, admission: Admission) -> None:
        forward, request, fairness = self._forward, admission.request, self.scheduler.fairness
        if forward is None or request.priority > forward.priority:
            return
        if not request.tenant or [*forward.rows] == [request.tenant]:
            return
        total = forward.total
        behind = sum(rows for tenant, rows in forward.rows.items() if fairness.before(request.tenant, tenant))
        first = min(len(admission.state.tokens), self.scheduler.config.prefill_chunk)
        if 2 * behind > total and WORTH * total >= first and self.scheduler.welcome(request.tenant):
            self._asked = request
            self.halt.ask(forward.run)
