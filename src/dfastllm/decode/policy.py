"""The policy protocol and its law. A policy (decoder) decides what a sequence runs next and what the answer means.

The law, checked for every registered policy by tests/decode/test_conformance.py:

1. Pure: no I/O, no clock, no global randomness, nothing written to a SequenceState. All state is in `seq.policy`
   (frozen, plain values) and comes back in a Commit.
2. Independent: the Commit of a sequence does not depend on which others are in the group or on their order.
3. Recoverable: with `kv_len` set to 0 between any two steps (preemption), later commits are unchanged: `plan` first
   asks for the forwards that rebuild K,V from the tokens they were made from.
4. Keyed: every random draw is a function of (seed, decode step, position).
5. Ends: at most `bound(request, model)` deciding forwards (those with a `want`; every registered policy has that
   method); the last Commit has `finish` and leaves no mask id: what is still undecided behind the end of the text is
   filled with padding there.
6. `stable` never decreases and tokens before it never change. It never passes the end of the text (the ending token
   included, at most max_tokens): the answer is tokens[canvas_start : stable of the last Commit].
7. `absorb` may overwrite the mask id's column of the logits (with -inf, so twice is as good as once), nothing else.
8. Whether a row goes through `Rows.stats` or `Rows.logits` depends on its own request alone.
9. Rows that are not finite raise nothing and change no other sequence's Commit; theirs is thrown away by the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from dfastllm.core import Commit, ModelInfo, Request, SequenceState, Span

if TYPE_CHECKING:
    from dfastllm.kernels.rows import Rows

__all__ = ["Policy"]


class Policy(Protocol):
    """One decoder. Instances are stateless and shared; sequences with the same policy are absorbed as one group."""

    name: str

    def check(self, request: Request, model: ModelInfo) -> None:
        """Raise ValidationError or UnsupportedError (naming the field) if this request cannot be honoured."""
        ...

    def begin(self, request: Request, model: ModelInfo) -> tuple[list[int], Any]:
        """Initial tokens (prompt, canvas of mask ids, suffix) and initial policy state."""
        ...

    def exactness(self, request: Request) -> str:
        """reference | exact-fast | approximate: how the result relates to the model's plain algorithm."""
        ...

    def plan(self, seq: SequenceState, limit: int) -> Span:
        """The next forward of this sequence. A divisible span (prefill) has at most `limit` rows (always the same for
        an engine); an indivisible one (canvas) may exceed it. Called again if the span was not scheduled."""
        ...

    def absorb(self, items: Sequence[tuple[SequenceState, Span]], rows: Rows) -> list[Commit]:
        """One Commit per item, all of one model. rows: sum of len(span.want), in the order of items and want.
        Called in inference mode."""
        ...
