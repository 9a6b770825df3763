"""Self-speculation: a checkpoint of both modes drafts with its bidirectional rows and judges with its causal ones.

Two phases. Draft: one pass over the text's last token and as many masks as the draft is to have tokens, all seeing each
other and the causal K,V of the text; it stores nothing. Verify: the draft's tokens after the last one, causal, each row
judged as any other draft's (`ar.deciding`, `verify`); what does not stand is cut off. So the text is that of the
checkpoint's own autoregressive decoding, token for token, greedy or with coupled draws; and as both passes see the
text's K,V made by the causal one, a draft never changes what a verifying row sees. (Nemotron-Labs-Diffusion's
self-speculation; here for any checkpoint whose model information says `causal`.)

The first token comes with the prompt's last chunk. A draft costs a pass of its own, so drafting pauses while drafts
give less than one token each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dfastllm.core import Commit, Draft, ModelInfo, Request, SequenceState, Span, SpeculativeParams, value
from dfastllm.decode.ar import Autoregressive, deciding, settled, tokens_left
from dfastllm.decode.draft.verify import Cell, cells_of, choose
from dfastllm.decode.policy import Compiled
from dfastllm.errors import UnsupportedError
from dfastllm.kernels.rows import Rows

__all__ = ["SelfSpeculation", "SelfState"]

PAUSE, LONGEST_PAUSE = 16, 256  # tokens
FIRST_GAIN = 2.0
MEMORY = 0.75  # weight of the past in the mean gain


@value(frozen=True, slots=True)
class SelfState:
    """draft: not judged yet. gain: tokens of a draft that stand, on the mean. resume: no draft before the text has so
    many tokens. pause: how long the next pause will be."""

    draft: Draft | None = None
    gain: float = FIRST_GAIN
    resume: int = 0
    pause: int = PAUSE


class SelfSpeculation:
    """The `self` policy, of a model seen as kind ar that has a mask (`registry.seen_by`)."""

    name = "self"

    def __init__(self) -> None:
        self.plain = Autoregressive()

    def room(self, request: Request, model: ModelInfo, positions: int) -> int:
        return self.plain.room(request, model, positions)

    def compile(self, request: Request, model: ModelInfo) -> Compiled:
        """Raises UnsupportedError naming the field."""
        if not model.causal or model.mask_id is None or _asked(request).method != "self":
            raise UnsupportedError(
                f"self-speculation needs a checkpoint of both modes and method 'self'; {model.name} of kind "
                f"{model.kind!r} was asked for {_asked(request).method!r}.",
                param="speculative_config",
            )
        return self.plain.compile(request, model)

    def begin(self, request: Request, model: ModelInfo, compiled: Compiled) -> tuple[list[int], Any]:
        return list(request.prompt), SelfState()

    def bound(self, compiled: Compiled) -> int:
        """Forwards with wanted rows, at most: a draft and its verification give one token at least."""
        return 2 * self.plain.bound(compiled)

    def plan(self, seq: SequenceState, limit: int) -> Span:
        """What comes next follows from the tokens and the state alone, K,V that are missing first."""
        state: SelfState = seq.policy
        known = len(seq.tokens)
        if state.draft is not None:
            return deciding(seq, limit, state.draft)
        length = _length(seq)
        if not length:
            return deciding(seq, limit, None)
        start = known - 1
        if seq.kv_len < start:
            stop = min(start, seq.kv_len + max(1, limit))
            return Span(seq.kv_len, tuple(seq.tokens[seq.kv_len : stop]), "causal", "keep")
        mask = seq.model.mask_id
        assert mask is not None
        ids = (seq.tokens[-1], *[mask] * length)
        first = 1 - seq.model.shift  # the row that predicts the position after the text
        return Span(start, ids, "full", "scratch", tuple(range(first, first + length)))

    def absorb(self, items: Sequence[tuple[SequenceState, Span]], rows: Rows) -> list[Commit]:
        cells: list[Cell] = []
        for seq, span in items:
            if span.store == "scratch":  # drafted with the draws that will judge
                cells += [Cell(seq, None, ahead) for ahead in range(len(span.want))]
            elif span.want:
                cells += cells_of(seq, span.plan)
        tokens, records = choose(cells, rows)
        at, commits = 0, []
        for seq, span in items:
            part = slice(at, at + len(span.want))
            at = part.stop
            if not span.want:
                commits.append(Commit(state=seq.policy, stable=len(seq.tokens)))
            elif span.store == "scratch":
                commits.append(_drafted(seq, tokens[part]))
            else:
                commits.append(_judged(seq, settled(seq, span.plan, tokens[part], records[part])))
        return commits


def _asked(request: Request) -> SpeculativeParams:
    return request.speculative or SpeculativeParams()


def _length(seq: SequenceState) -> int:
    """Tokens of the next draft; 0: none."""
    state: SelfState = seq.policy
    asked, known = _asked(seq.request), len(seq.tokens)
    if known == seq.canvas_start or known < state.resume:
        return 0
    most = asked.num_speculative_tokens
    if asked.adaptive:
        most = min(most, 1 + math.ceil(2 * state.gain))
    return max(0, min(most, tokens_left(seq) - 1))


def _drafted(seq: SequenceState, tokens: Sequence[int]) -> Commit:
    """The draft up to the first token that may end the text."""
    known = len(seq.tokens)
    end = next((i + 1 for i, token in enumerate(tokens) if token in seq.ends.ids), len(tokens))
    state: SelfState = seq.policy
    draft = Draft(tuple(tokens[:end]), known)
    return Commit(state=SelfState(draft, state.gain, state.resume, state.pause), stable=known)


def _judged(seq: SequenceState, commit: Commit) -> Commit:
    """With what the draft was worth."""
    state: SelfState = seq.policy
    after = state
    if state.draft is not None:
        gain = MEMORY * state.gain + (1 - MEMORY) * commit.accepted
        after = SelfState(None, gain, state.resume, state.pause)
        if _asked(seq.request).adaptive and gain < 1:
            after = SelfState(None, 1.0, commit.stable + state.pause, min(LONGEST_PAUSE, 2 * state.pause))
    return replace(commit, state=after)
