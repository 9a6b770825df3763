"""Drafting: the stage of a step that asks drafters what may follow, before the spans are planned.

Which drafter serves a request is the request's choice (or the engine's default); how many tokens it may propose follows
from what the request can still use. Drafts are written into `SequenceState.draft`; the policy verifies them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace

from dfastllm.core import ModelInfo, Request, SpeculativeParams
from dfastllm.decode.ar import draft_room
from dfastllm.decode.draft import Drafter, Ngram
from dfastllm.engine.sequence import Live
from dfastllm.errors import UnsupportedError

__all__ = ["Drafting"]


class Drafting:
    """The drafters of one engine, by method. `default` is for requests that name no method themselves."""

    def __init__(
        self, model: ModelInfo, drafters: Mapping[str, Drafter], default: SpeculativeParams | None, limit: int
    ) -> None:
        self.model = model
        self.drafters: dict[str, Drafter] = {"ngram": Ngram(), **drafters}
        self.limit = limit  # rows of one prefill chunk
        self.default = default

    def resolve(self, request: Request) -> Request:
        """The request with the engine's default where it names no method. A canvas model has none."""
        if request.speculative is None and self.default is not None and self.model.kind == "ar":
            return replace(request, speculative=self.default)
        return request

    def check(self, request: Request) -> None:
        """Raises UnsupportedError or ValidationError naming the field."""
        asked = request.speculative
        if asked is None or asked.method == "none":
            return
        if self.model.kind != "ar":
            raise UnsupportedError(
                f"{self.model.name} is no autoregressive model: method {asked.method!r} drafts for those only.",
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
        drafter.check(request, self.model)

    def draft(self, running: Iterable[Live]) -> float:
        """Ask for drafts of the sequences whose next forward can use one. Returns the seconds it took."""
        began = time.monotonic()
        groups: dict[str, list[tuple[Live, int]]] = {}
        for live in running:
            asked = live.state.request.speculative  # not `live.request`: a call per sequence and step
            if asked is None or asked.method == "none":
                continue
            most = min(asked.num_speculative_tokens, draft_room(live.state, self.limit))
            fresh = live.state.draft is not None and live.state.draft.length == len(live.state.tokens)
            if most > 0 and not fresh:
                groups.setdefault(asked.method, []).append((live, most))
        for method, members in groups.items():
            drafts = self.drafters[method].propose([(live.state, most) for live, most in members])
            for (live, _), draft in zip(members, drafts, strict=True):
                live.state.draft = draft
        return time.monotonic() - began if groups else 0.0

    def release(self, live: Live) -> None:
        """The request left the engine."""
        asked = live.request.speculative
        if asked is not None and asked.method in self.drafters:
            self.drafters[asked.method].release(live.state)
