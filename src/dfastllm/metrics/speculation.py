"""What speculation did to a list of requests: exact counts of what was drafted and accepted, and tokens a second.

Steps an engine on the caller's thread, so that nothing but the engine is in the seconds. Which drafter serves, and what
is compared with what, is the caller's choice.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dfastllm.core import Request, Usage
from dfastllm.engine import Engine

__all__ = ["Run", "answer", "counts", "usage_counts"]


@dataclass(frozen=True)
class Run:
    """One list of requests, answered.

    tokens      of each answer, by request id.
    usages      by request id.
    seconds     of the whole.
    suppressed  steps of sequences that could have had a draft and got none because it would not have paid.
    ended       request ids whose answer ended by itself, not by a limit.
    """

    tokens: Mapping[str, tuple[int, ...]]
    usages: Mapping[str, Usage]
    seconds: float
    suppressed: int = 0
    ended: frozenset[str] = field(default_factory=frozenset)

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return sum(map(len, self.tokens.values())) / self.seconds


def answer(engine: Engine, requests: Sequence[Request]) -> Run:
    """All of them sent at once. Raises what a request ended with if it did not end by itself."""
    tokens: dict[str, list[int]] = {r.request_id: [] for r in requests}
    usages: dict[str, Usage] = {}
    ended = set()
    suppressed = 0
    began = time.perf_counter()
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for event in engine.step():
            tokens[event.request_id] += event.token_ids
            if event.finish is not None:
                if event.finish.error is not None:
                    raise event.finish.error
                usages[event.request_id] = event.finish.usage
                if event.finish.reason == "stop":
                    ended.add(event.request_id)
        suppressed += engine.drafting.suppressed
    seconds = time.perf_counter() - began
    return Run({k: tuple(v) for k, v in tokens.items()}, usages, seconds, suppressed, frozenset(ended))


def counts(run: Run) -> dict[str, Any]:
    """`usage_counts` of every answer of a run."""
    return usage_counts(run.usages.values(), sum(map(len, run.tokens.values())))


def usage_counts(usages: Iterable[Usage], tokens: int) -> dict[str, Any]:
    """Of answers that have so many tokens together.

    forwards           of the target; tokens: as given.
    drafted_share      forwards that verified a draft, of all.
    accepted           draft tokens that stood, of all that were drafted; None without drafts.
    acceptance_length  tokens that a verifying forward gave, its own one included; None without drafts.
    """
    used = list(usages)
    drafts, drafted = sum(u.drafts for u in used), sum(u.draft_tokens for u in used)
    accepted, forwards = sum(u.accepted_tokens for u in used), sum(u.forwards for u in used)
    return {
        "forwards": forwards,
        "tokens": tokens,
        "drafted_share": drafts / forwards,
        "accepted": accepted / drafted if drafted else None,
        "acceptance_length": 1 + accepted / drafts if drafts else None,
    }
