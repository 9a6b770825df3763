"""The policy protocol and its law. A policy (decoder) decides what a sequence runs next and what the answer means.

The law, checked for every registered policy by tests/decode/test_conformance.py:

1. Pure: no I/O, no clock, no global randomness, nothing written to a SequenceState. All state is in `seq.policy`
   (frozen, plain values) and comes back in a Commit.
2. Independent: the Commit of a sequence does not depend on which others are in the group or on their order.
3. Recoverable: with `kv_len` set to 0 between any two steps (preemption), later commits are unchanged: `plan` first
   asks for the forwards that rebuild K,V from the tokens they were made from.
4. Keyed: every random draw is a function of (seed, decode step, position).
5. Ends: at most `bound(compiled)` deciding forwards (those with a `want`); the last Commit has `finish` and leaves no
   mask id: what is still undecided behind the end of the text is filled with padding there.
6. `stable` never decreases and tokens before it never change. It never passes the end of the text (the ending token
   included, at most max_tokens; see `core.Ends`): the answer is tokens[canvas_start : stable of the last Commit].
7. `absorb` may overwrite the mask id's column of the logits (with -inf, so twice is as good as once), nothing else.
8. Whether a row goes through `Rows.stats` or `Rows.logits` depends on its own request alone.
9. Rows that are not finite raise nothing and change no other sequence's Commit; theirs is thrown away by the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from dfastllm.core import Commit, ModelInfo, Request, SequenceState, Span, Tier

if TYPE_CHECKING:
    from dfastllm.kernels.rows import Rows

__all__ = ["Compiled", "Policy"]


@dataclass(frozen=True, slots=True)
class Compiled:
    """The options of one request, checked against its model and complete: made once, at admission.

    tier       how exact the result will be.
    positions  most tokens of the sequence, prompt and suffix included: K,V are held for so many.
    plan       the policy's own.
    """

    tier: Tier
    positions: int
    plan: Any = None


class Policy(Protocol):
    """One decoder. Instances are stateless and shared; sequences with the same policy are absorbed as one group."""

    name: str

    def room(self, request: Request, model: ModelInfo, positions: int) -> int:
        """Most new tokens of a request whose sequence has at most so many positions; below 1: none fit."""
        ...

    def compile(self, request: Request, model: ModelInfo) -> Compiled:
        """Its options, max_tokens among them, made complete. Token ids and the context are the engine's to check.
        Raises ValidationError or UnsupportedError naming the field of an option that cannot be honoured."""
        ...

    def begin(self, request: Request, model: ModelInfo, compiled: Compiled) -> tuple[list[int], Any]:
        """Initial tokens (prompt, canvas of mask ids, suffix) and initial policy state."""
        ...

    def bound(self, compiled: Compiled) -> int:
        """Deciding forwards at most."""
        ...

    def plan(self, seq: SequenceState, limit: int) -> Span:
        """The next forward of this sequence. A divisible span (prefill) has at most `limit` rows (always the same for
        an engine); an indivisible one (canvas) may exceed it. Called again if the span was not scheduled."""
        ...

    def absorb(self, items: Sequence[tuple[SequenceState, Span]], rows: Rows) -> list[Commit]:
        """One Commit per item, all of one model. rows: sum of len(span.want), in the order of items and want.
        Called in inference mode."""
        ...
