"""The nouns of one step: what a sequence asks a model to compute, and what a policy decides from the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from enum import StrEnum
from typing import Any, Literal

from dfastllm.core.value import value

__all__ = ["Attend", "Branch", "Commit", "FinishReason", "Span", "Store", "TokenLogprob"]

Attend = Literal["causal", "full", "block"]
Store = Literal["keep", "replace", "scratch", "none"]


class FinishReason(StrEnum):
    STOP = "stop"  # EOS, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the context is used up
    CANCELLED = "cancelled"
    ERROR = "error"
    TIMEOUT = "timeout"


@value(frozen=True, slots=True)
class Branch:
    """What if the tokens from `start` on were these: alternative contents of positions that a span also covers.

    Run in the same forward as rows of their own, attending as the span does. They see the cached keys of [0, start),
    those that the span stores in this forward included, and each other; of a span with store "none" each other only.
    Nothing of them is stored and no other row sees them. want: rows whose logits are wanted, indices into ids.
    """

    start: int
    ids: tuple[int, ...]
    want: tuple[int, ...]


@value(frozen=True, slots=True)
class Span:
    """Tokens of one sequence at positions [start, stop), run in one forward pass.

    Row r < len(ids) is position start + r, or places[r]. Rows after those are `shadows`: extra query rows at repeated
    positions whose K,V are never stored and which no ordinary row may attend to (wino's verification rows).

    attend  what a row at position p may see among the keys of this forward (the cached ones and the span's own):
            causal: keys at positions <= p;  full: all keys;
            block: keys at positions < (p // block + 1) * block.
            A shadow row at position p sees what an ordinary row at p would, minus the ordinary key at p, and the
            shadows as it would ordinary rows of their positions, itself among them.
    store   keep: write K,V of [start, stop); afterwards `kv_len = stop`, whatever it was. Rows see the cached keys of
                  [0, start) and the span's own.
            replace: overwrite K,V of [start, stop) in place; needs stop <= kv_len, which stays. Rows see all cached
                  keys of [0, kv_len), those of [start, stop) being the fresh ones.
            scratch: write nothing. Rows see the cached keys of [0, start) and the span's own.
            none: write nothing and read nothing: rows see only the span's own keys.
    want    rows (indices into ids + shadows, ascending) whose logits the policy needs; may be empty (prefill, refresh).
    block   block length for attend="block"; blocks are aligned to absolute positions.
    branches  further contents of (some of) the same positions, run beside it; not with store "replace".
    plan    the policy's own: what it worked out when it planned, for its `absorb`. Nobody else looks at it.
    places  the positions of the ids where they do not follow on each other, ascending, the first of them `start`; with
            store "replace" only, whose K,V then are those of these positions. Empty: [start, stop).
    passes  function evaluations that it counts as (nfe): 2 where a branch is no guess of a later step but half of this
            one.
    """

    start: int
    ids: tuple[int, ...]
    attend: Attend
    store: Store
    want: tuple[int, ...] = ()
    block: int = 0
    shadows: tuple[tuple[int, int], ...] = ()  # (position, token id)
    branches: tuple[Branch, ...] = ()
    plan: Any = field(default=None, compare=False, repr=False)
    places: tuple[int, ...] = ()
    passes: int = 1

    @property
    def stop(self) -> int:
        """One past the last position of a span without `places`."""
        return self.start + len(self.ids)

    @property
    def positions(self) -> Sequence[int]:
        """Of the ids."""
        return self.places or range(self.start, self.stop)

    @property
    def rows(self) -> int:
        """Rows of the forward pass: the span's cost against the token budget."""
        own = len(self.ids) + len(self.shadows)
        return own + sum([len(b.ids) for b in self.branches]) if self.branches else own

    @property
    def wanted(self) -> int:
        """Rows of logits that come back: the span's own, then those of each branch."""
        return len(self.want) + sum([len(b.want) for b in self.branches]) if self.branches else len(self.want)

    @property
    def stored(self) -> int:
        """Positions of K,V the sequence must own pages for before this span runs."""
        return self.stop if self.store == "keep" else 0


@value(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of a committed token, from the raw model distribution at the step that committed it."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first


@value(frozen=True, slots=True)
class Commit:
    """What a policy decides after one forward of one sequence. The engine applies it; the policy changes nothing.

    fixed        position -> token id. Positions may extend the sequence by exactly one run (AR appends).
    masked       committed positions that become mask again (revocable rules).
    kv_len       K,V positions that stay valid after this step (the engine truncates to it); None: as the span left it.
    state        the policy's next state for this sequence (frozen, plain values, survives preemption).
    stable       absolute position before which no token can change any more; monotone over a request. What plain
                 streams may show. For AR it is the sequence's length; for a revocable rule the end of the last finished
                 block.
    finish       set on the last commit.
    logprobs     position -> logprob record, for positions in `fixed`, when the request asked for them.
    provisional  position -> best current guess for still-masked positions, for live display. Never part of the result.
    block_done   a block became final with this commit.
    drafted, accepted  draft tokens this forward verified, and how many of them stand.
    """

    fixed: Mapping[int, int] = field(default_factory=dict)
    masked: tuple[int, ...] = ()
    kv_len: int | None = None
    state: Any = None
    stable: int = 0
    finish: FinishReason | None = None
    logprobs: Mapping[int, TokenLogprob] = field(default_factory=dict)
    provisional: Mapping[int, int] = field(default_factory=dict)
    block_done: bool = False
    drafted: int = 0
    accepted: int = 0
