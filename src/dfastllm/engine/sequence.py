"""One request inside the engine: its state, its policy, its pages, and what of it has been shown so far."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from dfastllm.core import (
    CanvasUpdate,
    Commit,
    Finish,
    FinishReason,
    Request,
    SequenceState,
    Span,
    StepEvent,
    Tier,
    TokenLogprob,
    Usage,
)
from dfastllm.decode.policy import Policy
from dfastllm.engine.adapters import Lease
from dfastllm.engine.pages import PageTable
from dfastllm.engine.prefix import Trail
from dfastllm.errors import DFastLLMError
from dfastllm.text import Detokenizer

__all__ = ["Live"]


@dataclass(slots=True, eq=False)
class Live:
    """A request between `add` and its Finish. `held` is true while it has a place among the running sequences.

    shown      absolute position up to which tokens have been emitted.
    masked     positions of the canvas that are masked.
    ended      the end token or stop string already emitted up to; later tokens are not output.
    enqueued   engine step at which it began to wait (for ageing); ran: engine step that last ran it.
    rank       the priority it was admitted with, ageing included; protects it from preemption by what it overtook.
    lease      its hold on the adapter that it was admitted with, until it leaves the engine; None: it has none.
    """

    state: SequenceState
    policy: Policy
    table: PageTable
    detokenizer: Detokenizer | None
    tier: Tier
    enqueued: int
    order: int
    held: bool = False
    rank: int = 0
    ran: int = -1
    shown: int = 0
    completion: int = 0
    masked: int = 0
    ended: int | str | None = None
    first_scheduled: float | None = None
    first_token: float | None = None
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)
    drafts: int = 0
    draft_tokens: int = 0
    accepted: list[int] = field(default_factory=list)  # [i]: drafts of which at least i + 1 tokens stood
    trail: Trail | None = None  # where prefixes are shared
    lease: Lease | None = None

    def __post_init__(self) -> None:
        self.shown = self.state.canvas_start
        self.masked = 0 if self.state.model.mask_id is None else self.state.tokens.count(self.state.model.mask_id)

    @property
    def request(self) -> Request:
        return self.state.request

    def apply(self, span: Span, commit: Commit) -> CanvasUpdate | None:
        """Write a commit into the state. Returns what a live display would show (canvas models only)."""
        state = self.state
        canvas = None
        if state.model.kind == "ar":
            state.tokens += [commit.fixed[position] for position in sorted(commit.fixed)]
        else:
            canvas = self._write(commit)
        if span.store == "keep":
            state.kv_len = span.stop
        if commit.kv_len is not None:
            assert commit.kv_len <= state.kv_len, "a commit can only shorten K,V"
            state.kv_len = commit.kv_len
            self.table.truncate(commit.kv_len)
        state.policy = commit.state
        assert commit.stable >= state.stable, "stable went backwards"
        state.stable = commit.stable
        if commit.logprobs:
            self.logprobs.update(commit.logprobs)
        if commit.drafted:
            self._count(commit)
        return canvas

    def _count(self, commit: Commit) -> None:
        self.drafts += 1
        self.draft_tokens += commit.drafted
        self.accepted += [0] * (commit.accepted - len(self.accepted))
        for i in range(commit.accepted):
            self.accepted[i] += 1

    def _write(self, commit: Commit) -> CanvasUpdate:
        """Write a commit into the canvas; what changed."""
        state = self.state
        tokens, start, mask, fixed = state.tokens, state.canvas_start, state.model.mask_id, commit.fixed
        new: dict[int, int] = {}
        revise: dict[int, int | None] = {}
        for position in sorted(fixed) if len(fixed) > 1 else fixed:
            token = fixed[position]
            if position == len(tokens):
                tokens.append(token)
                new[position - start] = token
                continue
            was, tokens[position] = tokens[position], token
            if was == mask:
                new[position - start] = token
                self.masked -= 1
            elif was != token:
                revise[position - start] = token
        for position in commit.masked:
            assert mask is not None, "only a canvas can be re-masked"
            self.masked += tokens[position] != mask
            tokens[position] = mask
            revise[position - start] = None
        guesses = {p - start: t for p, t in commit.provisional.items()} if commit.provisional else {}
        length = len(tokens) - len(state.request.suffix) - start
        return CanvasUpdate(new, guesses, revise, commit.block_done, length, self.masked)

    def emit(self, now: float, canvas: CanvasUpdate | None, finish: FinishReason | None) -> StepEvent | None:
        """The event of this step, if there is anything to tell. A stop string found in the text finishes the
        request."""
        if canvas is not None and finish is None and self.shown >= self.state.stable and self.ended is None:
            return StepEvent(self.state.request.request_id, (), "", (), canvas)  # most steps of a canvas
        tokens: Mapping[int, int] = {}
        text = ""
        if self.shown < self.state.stable and self.ended is None:
            tokens, text = self._release(now)
        if finish is None and isinstance(self.ended, str):
            finish = FinishReason.STOP
        done = None
        if finish is not None:
            if self.detokenizer is not None and not isinstance(self.ended, str):
                text += self.detokenizer.flush()
                self.ended = self.detokenizer.stopped if self.detokenizer.stopped is not None else self.ended
            done = self._finish(now, finish)
        if not tokens and not text and canvas is None and done is None:
            return None
        logprobs: tuple[TokenLogprob, ...] = ()
        if self.logprobs:
            logprobs = tuple([self.logprobs.pop(p) for p in tokens if p in self.logprobs])
        return StepEvent(self.request.request_id, tuple(tokens.values()), text, logprobs, canvas, done)

    def _release(self, now: float) -> tuple[Mapping[int, int], str]:
        """Newly stable output tokens by position, and their text."""
        state, out, text = self.state, {}, ""
        ends = state.ends
        stop = min(state.stable, ends.last)
        while self.shown < stop and self.ended is None:
            token = state.tokens[self.shown]
            if token in ends.ids and ends.reason(self.shown, token) is FinishReason.STOP:
                self.ended = token
                break
            out[self.shown] = token
            self.shown += 1
            self.completion += 1
            if self.detokenizer is not None:
                text += self.detokenizer.push([token])
                self.ended = self.detokenizer.stopped
        if out and self.first_token is None:
            self.first_token = now
        return out, text

    def _finish(self, now: float, reason: FinishReason, error: DFastLLMError | None = None) -> Finish:
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            reason = FinishReason.LENGTH if self.ended is None else FinishReason.STOP
        arrival = self.request.arrival
        usage = Usage(
            prompt_tokens=len(self.request.prompt) + len(self.request.suffix),
            completion_tokens=self.completion,
            forwards=self.state.forwards,
            exactness=self.tier,
            queue_s=(self.first_scheduled if self.first_scheduled is not None else now) - arrival,
            first_token_s=None if self.first_token is None else self.first_token - arrival,
            total_s=now - arrival,
            cached_tokens=0 if self.trail is None else self.trail.cached,
            drafts=self.drafts,
            draft_tokens=self.draft_tokens,
            accepted_tokens=sum(self.accepted),
            accepted_per_position=tuple(self.accepted),
        )
        return Finish(reason, usage, self.ended, error, self.request.lora)

    def fail(self, reason: FinishReason, error: DFastLLMError | None) -> StepEvent:
        """The last event of a request that did not end by itself. What was shown stays shown; nothing is made up."""
        finish = self._finish(time.monotonic(), reason, error)
        return StepEvent(self.request.request_id, finish=finish)
