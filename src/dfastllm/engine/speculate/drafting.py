"""Drafting: the stage of a step that asks drafters what may follow, before the spans are planned.

Which drafter serves a request is the request's choice (or the engine's default). How many tokens it may propose follows
from what the request can still use and, unless it asks for a fixed length, from what pays (`length`) or, where the
length decides which tokens come, from its own history (`decode.draft.history`). Drafts are written into
`SequenceState.draft`; the policy verifies them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from dfastllm.core import Commit, Draft, ModelInfo, Request, Span, SpeculativeParams
from dfastllm.core.speculative import MOST_TOKENS
from dfastllm.decode.ar import draft_room
from dfastllm.decode.draft import Drafter, Ngram, Suffix
from dfastllm.decode.draft.history import allowed
from dfastllm.decode.draft.verify import rejects
from dfastllm.engine.sequence import Live
from dfastllm.engine.speculate.length import Pace
from dfastllm.errors import UnsupportedError

__all__ = ["Drafting"]

log = logging.getLogger("dfastllm.engine")


@dataclass(slots=True)
class _Ask:
    """A sequence whose next forward could use a draft. length: of the draft it gets; paced: that follows from times."""

    live: Live
    method: str
    length: int
    paced: bool


class Drafting:
    """The drafters of one engine, by method. `default` is for requests that name no method themselves.

    suppressed: sequences that could have had a draft in the last step and got none because it would not have paid."""

    def __init__(
        self, model: ModelInfo, drafters: Mapping[str, Drafter], default: SpeculativeParams | None, limit: int
    ) -> None:
        self.model = model
        self.drafters: dict[str, Drafter] = {"ngram": Ngram(), "suffix": Suffix(), **drafters}
        self.limit = limit  # rows of one prefill chunk
        self.default = default
        self.pace = Pace(MOST_TOKENS)
        self.suppressed = 0
        self._watching = False  # whether this step's cost is to be measured
        self._seconds = 0.0  # that drafting took in this step
        self._unpaced = self._paced = 0  # requests here that draft whatever it costs; that draft where it pays

    def settle(self, request: Request, model: ModelInfo) -> SpeculativeParams | None:
        """How a request drafts: as it asks, else as the engine does where it can (a canvas has no drafts). Raises
        UnsupportedError or ValidationError naming the field. model: as the request sees it."""
        asked = request.speculative
        if asked is None:
            asked = self.default if model.kind == "ar" else None
            request = request if asked is None else replace(request, speculative=asked)
        if asked is None or asked.method in ("none", "self"):  # `self` is a policy
            return asked
        if model.kind != "ar":
            raise UnsupportedError(
                f"{model.name} is no autoregressive model: method {asked.method!r} drafts for those only.",
                param="speculative_config",
            )
        drafter = self.drafters.get(asked.method)
        if drafter is None:
            raise UnsupportedError(
                f"no {asked.method!r} drafter is loaded for {self.model.name}; there are: "
                f"{', '.join(sorted(self.drafters))}.",
                param="speculative_config",
                hint="Start with --speculative-config naming its model.",
            )
        drafter.check(request, model)
        return asked

    def admit(self, live: Live) -> None:
        """The request joined the engine."""
        self._count(live, 1)

    def draft(self, running: Sequence[Live]) -> float:
        """Ask for drafts of the sequences whose next forward can use one. Returns the seconds it took."""
        self._watching, self._seconds = False, 0.0
        if not self._unpaced and self.pace.resting():  # not even looked at: that costs time too
            self.suppressed = min(self._paced, len(running))
            self._watching = self.suppressed > 0 and self.pace.curious
            return 0.0
        self.suppressed = 0
        began = time.monotonic()
        asks = [ask for live in running if (ask := self._ask(live)) is not None]
        if not asks:
            return 0.0
        lookups = [a for a in asks if not self.drafters[a.method].passes(1)]
        self._propose(lookups)
        self._pace(running, asks)
        self._propose([a for a in asks if self.drafters[a.method].passes(1) and a.length])
        self._seconds = time.monotonic() - began
        return self._seconds

    def _ask(self, live: Live) -> _Ask | None:
        state = live.state
        asked = state.request.speculative
        if asked is None or asked.method in ("none", "self"):
            return None
        if state.draft is not None and state.draft.length == len(state.tokens):
            return None  # it was not scheduled: the draft is still good
        state.draft = None
        most = min(asked.num_speculative_tokens, draft_room(state, self.limit))
        paced = asked.adaptive and not rejects(state)
        if asked.adaptive and not paced:
            most = allowed(state.policy, most, len(state.tokens))
        return _Ask(live, asked.method, most, paced) if most > 0 else None

    def _propose(self, asks: Iterable[_Ask]) -> None:
        groups: dict[str, list[_Ask]] = {}
        for ask in asks:
            groups.setdefault(ask.method, []).append(ask)
        for method, members in groups.items():
            began = time.monotonic()
            drafts = self._drafts(method, members)
            passes = self.drafters[method].passes(max(a.length for a in members))
            if passes and all(a.live.drafts for a in members):  # a first draft reads the whole prompt
                self.pace.drafted(method, len(members), passes, time.monotonic() - began)
            for ask, draft in zip(members, drafts, strict=True):
                ask.live.state.draft = draft
                ask.length = len(draft.tokens)

    def _drafts(self, method: str, members: Sequence[_Ask]) -> Sequence[Draft]:
        try:
            return self.drafters[method].propose([(a.live.state, a.length) for a in members])
        except Exception:  # a drafter may cost its requests speed, never their answers
            log.exception("drafter %s failed; its requests go on without drafts in this step", method)
            return [Draft((), len(a.live.state.tokens)) for a in members]

    def _pace(self, running: Sequence[Live], asks: Sequence[_Ask]) -> None:
        """Shorten the drafts, made or to be made, to what pays."""
        self._watching = any(a.paced for a in asks)
        paced = [a for a in asks if a.paced and a.length]
        if not paced:
            return
        deciding = sum(len(live.state.tokens) - live.state.kv_len <= 1 for live in running)
        fixed = sum(a.length for a in asks if not a.paced)
        passes = {}
        for method in {a.method for a in paced}:
            drafter = self.drafters[method]
            if drafter.passes(1):
                most = max(a.length for a in paced if a.method == method)
                passes[method] = [drafter.passes(n) if n else 0 for n in range(most + 1)]
        wanted = [(a.live.request.request_id, a.method, a.length) for a in paced]
        lengths = self.pace.lengths(wanted, max(1, deciding + fixed), max(1, deciding), passes)
        for ask, length in zip(paced, lengths, strict=True):
            self.suppressed += length == 0
            state, ask.length = ask.live.state, length
            if state.draft is not None and len(state.draft.tokens) > length:
                state.draft = replace(state.draft, tokens=state.draft.tokens[:length]) if length else None

    def observe(
        self, chosen: Sequence[tuple[Live, Span]], commits: Sequence[Commit | Exception], seconds: float
    ) -> None:
        """What the step cost, drafting not counted, and what became of its drafts."""
        if not self._watching:
            return
        rows, tokens, accepted, clean = 0, 0, 0, bool(chosen)
        for (live, span), commit in zip(chosen, commits, strict=True):
            rows += span.rows
            clean &= span.rows == span.wanted  # a step that reads prompts says nothing about others
            asked = live.state.request.speculative
            if isinstance(commit, Commit):
                tokens, accepted = tokens + len(commit.fixed), accepted + commit.accepted
            if asked is None or not isinstance(commit, Commit) or not commit.drafted or commit.finish is not None:
                continue
            if asked.adaptive and not rejects(live.state):
                self.pace.judged(live.request.request_id, asked.method, commit.drafted, commit.accepted)
        if clean:
            self.pace.took(len(chosen), rows, tokens, seconds, self._seconds)
        elif self._seconds:
            self.pace.mixed(len(chosen), accepted, self._seconds)

    def release(self, live: Live) -> None:
        """The request left the engine."""
        self._count(live, -1)
        asked = live.request.speculative
        if asked is not None and asked.method in self.drafters:
            self.drafters[asked.method].release(live.state)
            self.pace.release(live.request.request_id)

    def _count(self, live: Live, by: int) -> None:
        asked = live.request.speculative
        if asked is None or asked.method in ("none", "self"):
            return
        if asked.adaptive and not rejects(live.state):
            self._paced += by
        else:
            self._unpaced += by
