"""Prefix sharing: pages of K,V that one sequence made serve every later one that begins with the same tokens.

A full page gets a key: a hash chained over everything its K,V depend on, which is the tokens from position 0 to its
end (block-causal models: to the end of its block), the tenant's salt, the content of the adapter that made them, how
the model attends and how long a page is.
`kv.Pages` keeps content and key of free pages until it needs them; a request that begins with the same tokens holds
those pages too and starts with their positions in place. (Automatic prefix caching of vLLM v1; Kwon et al. 2023.)

Exact by construction, to the last bit: a sequence starts behind shared pages only where it would have come by itself
with the same K,V, and where its first deciding forward is the one it would have run.

- Native kernels: a row's bits do not depend on how its sequence was cut into spans, so any full page will do.
- Other runners: matrix products of other heights sum in another order. Only pages that a prefill in whole chunks made
  get a key, and only whole chunks are shared.

This file decides what may be shared; `kv` counts references, `scheduler` asks at admission and before each chunk.
"""

from __future__ import annotations

import copy
import hashlib
import math
import sys
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dfastllm.core import Kind, ModelInfo, Span
from dfastllm.engine.pages import Pages

if TYPE_CHECKING:
    from dfastllm.engine.sequence import Live

__all__ = ["PrefixCache", "Trail", "refusal"]


def refusal(kind: Kind) -> str | None:
    """Why the K,V of such a model cannot be shared between requests; None when they can."""
    if kind == "diffusion":
        return "its attention is full: the K,V of a prompt depend on the response"
    return None


@dataclass(slots=True)
class Trail:
    """What prefix sharing knows of one sequence.

    root      hash of the salt, the adapter and how K,V are made; parent of the first page's key. tip: the last made.
    keys      of the full pages of its settled tokens, as far as they were asked for.
    goal      positions that it may find in shared pages, at most: a later chunk is not looked up.
    held      positions whose pages others made or may share: never written again.
    due       `kv_len` from which on `record` has something to do.
    straight  positions made by a prefill in whole chunks from position 0 on.
    cached    positions it found when it first ran (preemptions not counted).
    admitted  times it got a place.
    """

    root: bytes
    tip: bytes
    keys: list[bytes] = field(default_factory=list)
    goal: int = 0
    held: int = 0
    due: int = 0
    straight: int = 0
    cached: int = 0
    admitted: int = 0


class PrefixCache:
    """The shared pages of one engine. chunk: most rows of a prefill span. cut_free: whether a row's bits do not depend
    on how its sequence was cut into spans. queries, hits: tokens asked for and found, of requests that got their first
    place."""

    def __init__(self, pages: Pages, info: ModelInfo, chunk: int, *, cut_free: bool) -> None:
        assert refusal(info.kind) is None, refusal(info.kind)
        self.pages = pages
        self.info = info
        self.cut_free = cut_free
        self.block = max(1, info.block)
        self.limit = chunk
        self.chunk = max(self.block, chunk // self.block * self.block)
        # A page's K,V depend on the whole blocks it lies in, so keys are made of whole blocks and whole pages.
        self.unit = math.lcm(pages.page_size, self.block)
        self.queries = 0
        self.hits = 0
        self._coming: set[bytes] = set()
        self._told = (0, 0)

    def trail(self, salt: str, kind: Kind, adapter: bytes = b"") -> Trail:
        """The trail of a new sequence that decodes on the model as one of this kind. Another salt, another kind of
        attention and another adapter (the hash of its content, empty for none) give other keys throughout."""
        about = ("dfastllm", kind, self.block, self.pages.page_size, salt, *((adapter,) if adapter else ()))
        root = hashlib.blake2b(repr(about).encode(), digest_size=32).digest()
        return Trail(root, root)

    def match(self, live: Live) -> list[int]:
        """The pages that a sequence without K,V may start with, in order. Changes nothing but its trail's keys."""
        keys = self._keys(live, self._settled(live))
        if not keys or self.pages.find(keys[0]) is None:
            return []
        found = []
        for key in keys:
            page = self.pages.find(key)
            if page is None:
                break
            found.append(page)
        return found[: self._reach(live, len(found) * self.pages.page_size) // self.pages.page_size]

    def admit(self, live: Live, pages: list[int]) -> None:
        """Start a sequence that got a place behind these pages of `match`."""
        trail = live.trail
        assert trail is not None
        assert not live.table.pages, "only a sequence without K,V can be admitted"
        trail.goal = self._reach(live, len(trail.keys) * self.pages.page_size) if trail.keys else 0
        trail.admitted += 1
        trail.held = trail.straight = live.state.kv_len = 0
        if trail.admitted == 1:
            self.queries += len(live.request.prompt)
        self._adopt(live, pages)

    def begin_step(self) -> None:
        """Nothing is being computed yet."""
        self._coming.clear()

    def join(self, live: Live) -> bool:
        """Before a chunk is planned: take over pages that others finished meanwhile. True: this very step computes the
        better part of the chunk for somebody else, so that waiting one step costs less than doing it twice."""
        trail, at, size = live.trail, live.state.kv_len, self.pages.page_size
        assert trail is not None
        if at >= trail.goal or at % size or len(live.table.pages) * size != at:
            return False
        if self.pages.find(trail.keys[at // size]) is not None:
            more = self.match(live)[at // size :]
            self._adopt(live, more)
            at += len(more) * size
        coming, until = 0, min(at + self.chunk, trail.goal)
        for key in trail.keys[at // size : until // size]:
            if key not in self._coming:
                break
            coming += size
        return 2 * coming >= min(self.chunk, len(live.state.tokens) - at) and coming > 0

    def announce(self, live: Live, span: Span) -> None:
        """This span runs in this step: the pages it completes can be shared in the next."""
        trail, size = live.trail, self.pages.page_size
        assert trail is not None
        if span.store == "keep" and (self.cut_free or self._whole_chunk(trail, span)):
            self._coming.update(trail.keys[-(-span.start // size) : min(span.stop, trail.goal) // size])

    def record(self, chosen: Iterable[tuple[Live, Span]]) -> None:
        """After the commits of a step: give keys to the pages that became full of settled tokens. K,V behind `kv_len`,
        of rejected drafts or of a block that is not finished, never get one."""
        for live, span in chosen:
            trail, kv_len = live.trail, live.state.kv_len
            assert trail is not None
            assert kv_len >= trail.held, "K,V that others may use were taken back"
            if kv_len >= trail.due:
                self._record(live, trail, span, kv_len)

    def _record(self, live: Live, trail: Trail, span: Span, kv_len: int) -> None:
        if not self.cut_free and span.store == "keep":
            if not self._whole_chunk(trail, span):
                trail.due = sys.maxsize  # nothing after this can be shared
            elif kv_len >= span.stop:
                trail.straight = span.stop
            kv_len = min(kv_len, trail.straight)
        until = min(kv_len, self._settled(live)) // self.unit * self.unit
        size = self.pages.page_size
        keys = self._keys(live, until)
        for number in range(trail.held // size, until // size):
            self.pages.label(live.table.pages[number], keys[number])
        trail.held = max(trail.held, until)
        if self.cut_free:
            trail.due = trail.held + self.unit

    def counted(self) -> tuple[int, int]:
        """queries and hits since it was asked last."""
        (queries, hits), self._told = self._told, (self.queries, self.hits)
        return self.queries - queries, self.hits - hits

    def clear(self) -> None:
        """Forget every shared page."""
        self.pages.forget()

    def _adopt(self, live: Live, pages: list[int]) -> None:
        trail = live.trail
        assert trail is not None
        live.table.adopt(pages)
        found = len(pages) * self.pages.page_size
        live.state.kv_len += found
        trail.held = trail.straight = live.state.kv_len
        trail.due = trail.held + self.unit if self.cut_free else 0
        if trail.admitted == 1:
            trail.cached += found
            self.hits += found

    def _whole_chunk(self, trail: Trail, span: Span) -> bool:
        """Whether any sequence that begins with the same tokens runs exactly this span in its prefill."""
        whole = len(span.ids) == span.rows == self.chunk
        return whole and span.start == trail.straight and span.start % self.chunk == 0

    @staticmethod
    def _settled(live: Live) -> int:
        """Positions whose tokens cannot change any more."""
        state = live.state
        return len(state.tokens) if state.model.kind == "ar" else max(state.canvas_start, state.stable)

    def _keys(self, live: Live, until: int) -> list[bytes]:
        """The keys of the pages of [0, until), and perhaps more; whole units only."""
        trail, unit = live.trail, self.unit
        assert trail is not None
        per = unit // self.pages.page_size
        begin, end = len(trail.keys) // per * unit, until // unit * unit
        ids = array("q", live.state.tokens[begin:end]).tobytes()
        step = unit * 8
        for at in range(0, len(ids), step):
            trail.tip = hashlib.blake2b(trail.tip + ids[at : at + step], digest_size=32).digest()
            trail.keys += [trail.tip] if per == 1 else [trail.tip + number.to_bytes(4) for number in range(per)]
        return trail.keys

    def _reach(self, live: Live, found: int) -> int:
        """How much of [0, found) the sequence may start behind so that all it computes is, to the last bit, what it
        would compute from position 0 on; a multiple of the unit. At least the deciding row is left to compute."""
        starts, last = self._walk(live, 0)
        if not self.cut_free:
            return max((s for s in starts if s <= found and s % self.unit == 0), default=0)
        for held in range(found // self.unit * self.unit, 0, -self.unit):
            begins, then = self._walk(live, held)
            # The same forward: as the end of a prefill or as a step of its own, keys are added up in another order.
            if begins[0] >= held and (then.store, then.stop, then.wanted) == (last.store, last.stop, last.wanted):
                return held
        return 0

    def _walk(self, live: Live, held: int) -> tuple[list[int], Span]:
        """The starts of the spans that the sequence would run from `held` positions of K,V on, up to the first one that
        decides something, and that one."""
        seq = copy.copy(live.state)
        seq.kv_len, seq.draft = held, None
        starts: list[int] = []
        while True:
            span = live.policy.plan(seq, self.limit)
            starts.append(span.start)
            if span.want:
                return starts, span
            assert span.stop > seq.kv_len, "a prefill that does not advance"
            seq.kv_len = span.stop
