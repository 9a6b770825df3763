"""Who runs in this step: admission, token budget, pages, priority with ageing, preemption. Bookkeeping only, no
tensors.

Order: lower priority value first; every `ageing_steps` steps waited count as one level, so nothing starves. Within a
level the sequence that ran longest ago goes first, then the older one. Preemption takes the pages of the lowest-ranked
running sequence; its tokens and policy state stay, and its policy rebuilds the K,V when its turn comes again.
"""

from __future__ import annotations

from collections.abc import Iterable

from dfastllm.core import Span
from dfastllm.engine.config import EngineConfig
from dfastllm.engine.pages import Pages
from dfastllm.engine.prefix import PrefixCache
from dfastllm.engine.sequence import Live

__all__ = ["Scheduler"]

_NEVER = 1 << 62  # steps


class Scheduler:
    """Holds the waiting and the running sequences of one engine."""

    def __init__(self, config: EngineConfig, pages: Pages, prefix: PrefixCache | None = None) -> None:
        self.config = config
        self.pages = pages
        self.prefix = prefix
        self.waiting: list[Live] = []
        self.running: list[Live] = []
        self.preempted = 0  # total
        self._chunk = min(config.prefill_chunk, config.max_batch_rows)

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def add(self, live: Live) -> None:
        self.waiting.append(live)

    def remove(self, live: Live) -> None:
        """Take a sequence out for good; its pages return."""
        (self.running if live.held else self.waiting).remove(live)
        live.held = False
        live.table.free()

    def level(self, live: Live, step: int) -> int:
        """Effective priority of a waiting or starved sequence: its own less one per `ageing_steps` steps waited."""
        since = live.enqueued if not live.held else max(live.ran, live.enqueued)
        age = (step - since) // self.config.ageing_steps if self.config.ageing_steps else 0
        return (live.rank if live.held else live.request.priority) - age

    def admit(self, step: int) -> None:
        """Give waiting sequences their places, as far as there are places and pages."""
        for live in sorted(self.waiting, key=lambda s: (self.level(s, step), s.order)):
            if not self._admit(live, step):
                break  # strictly in order: a small request must not overtake a large one for ever

    def schedule(self, step: int) -> list[tuple[Live, Span]]:
        """The batch of this step: each chosen sequence with its planned span, pages already allocated."""
        chosen: list[tuple[Live, Span]] = []
        rows = self.config.max_batch_rows
        if self.prefix is not None:
            self.prefix.begin_step()
        ageing = self.config.ageing_steps or _NEVER
        queue = [  # by `level`, written out: a call per sequence and step costs more than the rest of this
            (s.rank - (step - (s.ran if s.ran > s.enqueued else s.enqueued)) // ageing, s.ran, s.order, s)
            for s in self.running
        ]
        queue.sort()  # `order` is unique
        for _, _, _, live in queue:
            if live.held and rows > 0:  # an earlier one may have preempted it
                rows -= self._place(live, rows, chosen)
        return chosen

    def _place(self, live: Live, rows: int, chosen: list[tuple[Live, Span]]) -> int:
        """Plan one sequence and put it into the batch if rows and pages allow. Returns the rows it takes."""
        prefix = self.prefix
        if live.trail is None or live.state.kv_len >= live.trail.goal:
            prefix = None  # it is past what it could share
        if prefix is not None and prefix.join(live):
            return 0
        # Chunks are cut the same whatever else runs: how a prompt is cut must not depend on the neighbours.
        live.state.company = len(self.running)
        span = live.policy.plan(live.state, self._chunk)
        size = span.rows
        if size > rows and chosen:
            return 0  # first in line next step, since it ran longest ago
        if span.store == "keep" and span.stop > live.table.capacity:
            if not self._make_room(live, span.stop, chosen):
                return 0
            live.table.grow(span.stop)
        chosen.append((live, span))
        if prefix is not None:
            prefix.announce(live, span)
        return size

    def _make_room(self, live: Live, positions: int, chosen: list[tuple[Live, Span]]) -> bool:
        """Free pages for `live` by preempting running sequences of lower rank that are not in the batch yet."""
        while live.table.missing(positions) > self.pages.free:
            busy = {id(s) for s, _ in chosen}
            victims = [s for s in self.running if s is not live and id(s) not in busy and s.table.pages]
            if not victims:
                return False
            victim = max(victims, key=lambda s: (s.rank, s.order))
            if (victim.rank, victim.order) < (live.rank, live.order):
                return False  # everyone else is ahead of it: it waits. The first of all can always take what it needs.
            self._preempt(victim)
        return True

    def _admit(self, live: Live, step: int) -> bool:
        """Give a waiting sequence a place. Needs a free place, or one held by a sequence of strictly lower priority,
        and pages for its whole known length beside what the running ones still lack of theirs."""
        rank = self.level(live, step)
        shared = self.prefix.match(live) if self.prefix is not None else []
        needed = self.pages.pages_for(len(live.state.tokens)) - len(shared)
        while (
            len(self.running) >= self.config.max_sequences
            or needed + self.pages.unheld(shared) > self.pages.free - self._promised()
        ):
            victims = [s for s in self.running if s.rank > live.request.priority]
            if not victims:
                return False
            self._preempt(max(victims, key=lambda s: (s.rank, s.order)))
        if self.prefix is not None:
            self.prefix.admit(live, shared)
        self.waiting.remove(live)
        self.running.append(live)
        live.held, live.rank = True, rank
        live.ran = step - 1  # level with those that ran last step, so the older of them go first
        return True

    def _promised(self) -> int:
        """Pages the running sequences will still want for the tokens they already have."""
        return sum(s.table.missing(len(s.state.tokens)) for s in self.running)

    def _preempt(self, live: Live) -> None:
        self.running.remove(live)
        self.waiting.append(live)
        live.held = False
        live.table.free()
        live.state.kv_len = 0
        self.preempted += 1

    def find(self, request_id: str) -> Live | None:
        return next((s for s in self.everyone() if s.request.request_id == request_id), None)

    def everyone(self) -> Iterable[Live]:
        yield from self.running
        yield from self.waiting
