"""A request in flight, as a policy sees it. The engine alone writes it; policies read it and return Commits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dfastllm.core.ends import Ends
from dfastllm.core.model import ModelInfo
from dfastllm.core.request import DecodeParams, Request, SamplingParams
from dfastllm.core.speculative import Draft

__all__ = ["SequenceState"]

UNSAID = Ends(frozenset(), (), 0, 0)


@dataclass(slots=True)
class SequenceState:
    """Explicit state of one sequence; everything needed to go on after a preemption that dropped its K,V.

    tokens    prompt + canvas (mask ids where undecided) + suffix for diffusion; prompt + generated for AR.
    kv_len    positions [0, kv_len) whose K,V are held. Preemption sets it to 0: `plan` must then rebuild what it needs
              before anything else, from `tokens` and `policy`, so that later tokens come out the same.
    seed      the request's seed, or the one drawn at admission.
    forwards  forward passes so far, prefill and rebuilding included (nfe). Randomness is keyed by (seed, decode
              step, position), the decode step being the policy's own count, never this one: rebuilding changes no draw.
    policy    the policy's own state, last returned by `begin` or in a Commit.
    company   sequences that run when this one is planned, itself included. Only how much is tried may follow from it
              (guesses, see `decode.canvas.lookahead`), never what comes out.
    ends      what ends the text.
    draft     what a drafter proposes to follow `tokens`, if one was asked; good for one deciding forward.
    """

    request: Request
    model: ModelInfo
    tokens: list[int]
    seed: int
    kv_len: int = 0
    forwards: int = 0
    policy: Any = None
    stable: int = 0
    company: int = 1
    draft: Draft | None = None
    ends: Ends = UNSAID
    canvas_start: int = field(init=False)
    sampling: SamplingParams = field(init=False)

    def __post_init__(self) -> None:
        self.canvas_start = len(self.request.prompt)
        self.sampling = self.request.sampling
        if self.ends is UNSAID:
            self.ends = Ends.of(self.request, self.model)

    @property
    def decode(self) -> DecodeParams:
        return self.request.decode or DecodeParams()

    @property
    def canvas_stop(self) -> int:
        """End of what is generated: the suffix begins here."""
        return len(self.tokens) - len(self.request.suffix)
