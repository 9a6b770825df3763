"""Who runs in this step: admission, token budget, pages, priority with ageing, preemption. Bookkeeping only, no
tensors.

Order: lower priority value first; every `ageing_steps` steps waited count as one level, so nothing starves. Within a
level the sequence that ran longest ago goes first, then the older one. Preemption takes the pages of the lowest-ranked
running sequence; its tokens and policy state stay, and its policy rebuilds the K,V when its turn comes again.

Where several tenants have requests (`fairness`), that is the order among those of one tenant. Among tenants, after the
priorities (which age only by steps in which the tenant had nothing that ran), the one goes first that holds least, or
had least: for places, pages and rows alike. A tenant within its share gets a place although there is none: the tenant
most above its share gives one up. And one that waits for a first token while others had much more has the step to
itself. Nobody stands back for longer than `ageing_steps` steps. A step has at most `prefill_chunk` rows then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from dfastllm.core import Span
from dfastllm.engine.config import EngineConfig
from dfastllm.engine.fairness import Fairness
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
        self.fairness = Fairness(2 * config.max_batch_rows, config.max_sequences, pages.count)
        self._chunk = min(config.prefill_chunk, config.max_batch_rows)

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def add(self, live: Live) -> None:
        self.fairness.join(live.request.tenant, live.request.share)
        self.waiting.append(live)

    def remove(self, live: Live) -> None:
        """Take a sequence out for good; its pages return."""
        (self.running if live.held else self.waiting).remove(live)
        live.held = False
        live.table.free()
        self.fairness.leave(live.request.tenant)

    def full(self, tenant: str, share: float) -> bool:
        """Whether no more requests of this tenant may wait: the queue is at its limit, and the tenant has its share of
        it, so that nobody is turned away because of what others have waiting. Thread-safe."""
        most = self.config.max_waiting
        if len(self.waiting) < most:
            return False
        waiting = [s.request for s in [*self.waiting]]
        weights = {r.tenant: r.share for r in waiting} | {tenant: share}
        return sum(r.tenant == tenant for r in waiting) >= most * share / sum(weights.values())

    def welcome(self, tenant: str) -> bool:
        """Whether one more request of this tenant would get a place at once, as far as that can be said without its
        pages. Thread-safe."""
        return len(self.running) < self.config.max_sequences or self.fairness.may_displace(tenant, 1, 0)

    def level(self, live: Live, step: int) -> int:
        """Effective priority of a waiting or starved sequence: its own less one per `ageing_steps` steps waited."""
        since = live.enqueued if not live.held else max(live.ran, live.enqueued)
        age = (step - since) // self.config.ageing_steps if self.config.ageing_steps else 0
        return (live.rank if live.held else live.request.priority) - age

    def admit(self, step: int) -> None:
        """Give waiting sequences their places, as far as there are places and pages."""
        queue = sorted(self.waiting, key=lambda s: (self.level(s, step), s.order))
        if not self.fairness.alone:
            self._admit_in_turn(queue, step)
            return
        for live in queue:
            if not self._admit(live, step):
                break  # strictly in order: a small request must not overtake a large one for ever

    def _admit_in_turn(self, queue: Iterable[Live], step: int) -> None:
        """As `admit`, tenant by tenant. queue: who waits, in the order that holds within a tenant."""
        queues: dict[str, list[Live]] = {}
        for live in queue:
            queues.setdefault(live.request.tenant, []).append(live)
        for lives in queues.values():
            lives.reverse()

        def key(tenant: str) -> tuple[int, float, float, int]:
            return (self._urgency(queues[tenant][-1], step), *self.fairness.turn(tenant), queues[tenant][-1].order)

        keys: dict[str, tuple[int, float, float, int]] = {}
        while queues:
            if not keys:
                self._count()
                keys = {tenant: key(tenant) for tenant in queues}
            tenant, preempted = min(keys, key=keys.__getitem__), self.preempted
            live = queues[tenant].pop()
            if not self._admit(live, step):
                break
            if not queues[tenant]:
                del queues[tenant], keys[tenant]
            if self.preempted != preempted:
                keys = {}
                continue
            self.fairness.took(tenant, self._known(live))
            if tenant in keys:  # a place more changes the turn of no other
                keys[tenant] = key(tenant)

    def _urgency(self, live: Live, step: int) -> int:
        """The priority that a waiting sequence has against other tenants: steps count as waited since its tenant last
        ran, so that a flood does not age past everyone while it is served."""
        waited = step - max(live.enqueued, self.fairness.ran(live.request.tenant))
        return live.request.priority - (waited // self.config.ageing_steps if self.config.ageing_steps else 0)

    def _count(self) -> None:
        """Tell `fairness` who holds what: places, and the pages of the known lengths, whether yet filled or not."""
        self.fairness.hold([(s.state.request.tenant, self._known(s)) for s in self.running])

    def _known(self, live: Live) -> int:
        """Pages that a sequence holds, or will when its known length is filled."""
        return max(len(live.table.pages), self.pages.pages_for(len(live.state.tokens)))

    def schedule(self, step: int) -> list[tuple[Live, Span]]:
        """The batch of this step: each chosen sequence with its planned span, pages already allocated."""
        chosen: list[tuple[Live, Span]] = []
        if self.prefix is not None:
            self.prefix.begin_step()
        if not self.fairness.alone:
            first, rest = self._by_tenant(step)
            self._fill(first, chosen)
            if not chosen:  # the one that the others stand back for can do nothing now
                self._fill(rest, chosen)
            return chosen
        ageing = self.config.ageing_steps or _NEVER
        queue = [  # by `level`, written out: a call per sequence and step costs more than the rest of this
            (s.rank - (step - (s.ran if s.ran > s.enqueued else s.enqueued)) // ageing, s.ran, s.order, s)
            for s in self.running
        ]
        queue.sort()  # `order` is unique
        self._fill([live for _, _, _, live in queue], chosen)
        return chosen

    def _fill(self, queue: Iterable[Live], chosen: list[tuple[Live, Span]]) -> None:
        """Put sequences into the batch, in this order, as far as the row budget goes."""
        rows = self.config.max_batch_rows
        if self.fairness.several:  # a step that is longer wins little, and who comes meanwhile waits for it
            rows = min(rows, max(self.config.prefill_chunk, len(self.running)))
        for live in queue:
            if live.held and rows > 0:  # an earlier one may have preempted it
                rows -= self._place(live, rows, chosen)

    def _by_tenant(self, step: int) -> tuple[list[Live], list[Live]]:
        """The running sequences of several tenants in their order: those that may run, and those that stand back for a
        tenant that waits for a first token. Done for every sequence and step, so without a call where there need be
        none."""
        fairness, ageing = self.fairness, self.config.ageing_steps or _NEVER
        times: dict[str, float] = {}
        hasty = set()
        queue = []
        for s in self.running:
            request = s.state.request
            tenant = request.tenant
            if tenant not in times:
                times[tenant] = fairness.time(tenant)
            if s.first_token is None:
                hasty.add(tenant)
            starved = (step - (s.ran if s.ran > s.enqueued else s.enqueued)) // ageing
            queue.append((request.priority - starved, times[tenant], s.ran, s.order, starved, s))
        queue.sort()  # `order` is unique
        back = fairness.standing_back(times, hasty)
        if not back:
            return [entry[5] for entry in queue], []
        first = [s for *_, starved, s in queue if starved or s.state.request.tenant not in back]
        return first, [s for *_, starved, s in queue if not starved and s.state.request.tenant in back]

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
        fairness = self.fairness
        part: Callable[[str], float] = (lambda tenant: 0.0) if fairness.alone else fairness.part
        while live.table.missing(positions) > self.pages.free:
            if not fairness.alone:
                self._count()
            busy = {id(s) for s, _ in chosen}
            victims = [s for s in self.running if s is not live and id(s) not in busy and s.table.pages]
            if not victims:
                return False
            key = {id(s): (part(s.request.tenant), s.rank, s.order) for s in (live, *victims)}
            victim = max(victims, key=lambda s: key[id(s)])
            if key[id(victim)] < key[id(live)]:
                return False  # everyone else is ahead of it: it waits. The first of all can always take what it needs.
            self._preempt(victim)
        return True

    def _admit(self, live: Live, step: int) -> bool:
        """Give a waiting sequence a place. Needs a free place, or one of a sequence that gives way (`_giving_way`), and
        pages for its whole known length beside what the running ones still lack of theirs."""
        rank = self.level(live, step)
        shared = self.prefix.match(live) if self.prefix is not None else []
        needed = self.pages.pages_for(len(live.state.tokens)) - len(shared)
        while (
            len(self.running) >= self.config.max_sequences
            or needed + self.pages.unheld(shared) > self.pages.free - self._promised()
        ):
            victims = self._giving_way(live, needed)
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

    def _giving_way(self, live: Live, pages: int) -> list[Live]:
        """The sequences of which the lowest-ranked gives its place and pages to a waiting one that needs so many pages:
        those of strictly lower priority, or, for a tenant within its share, those of the tenant most above its own."""
        lower = [s for s in self.running if s.rank > live.request.priority]
        if lower or self.fairness.alone:
            return lower
        self._count()
        tenant = self.fairness.above({s.request.tenant for s in self.running})
        if tenant is None or not self.fairness.may_displace(live.request.tenant, 1, pages):
            return []
        return [s for s in self.running if s.request.tenant == tenant]

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
