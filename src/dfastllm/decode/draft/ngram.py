"""Prompt lookup: what followed the last n tokens when they stood in the text before (Saxena 2023; vLLM's `ngram`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dfastllm.core import Draft, ModelInfo, Request, SequenceState, SpeculativeParams

__all__ = ["Ngram", "lookup"]


class Ngram:
    """The `ngram` drafter. Holds nothing."""

    def check(self, request: Request, model: ModelInfo) -> None:
        return None

    def passes(self, most: int) -> int:
        return 0

    def propose(self, wanted: Sequence[tuple[SequenceState, int]]) -> list[Draft]:
        drafts = []
        for seq, most in wanted:
            asked = seq.request.speculative or SpeculativeParams()
            found = lookup(seq.tokens, asked.prompt_lookup_min, asked.prompt_lookup_max, most)
            drafts.append(Draft(tuple(found), len(seq.tokens)))
        return drafts

    def release(self, seq: SequenceState) -> None:
        return None


def lookup(tokens: Sequence[int], least: int, most: int, count: int) -> list[int]:
    """At most `count` tokens that followed an earlier occurrence of the text's end: of the longest n-gram, `least` to
    `most` tokens long, that occurs before; of its occurrences the latest that is followed by `count` tokens, else the
    earliest (it is followed by the most)."""
    text = np.asarray(tokens, dtype=np.int64)
    total = len(text)
    hits = np.flatnonzero(text[:-1] == text[-1]) if total > 1 else np.empty(0, dtype=np.int64)  # ends of occurrences
    best, n = np.empty(0, dtype=np.int64), 1
    while len(hits):
        if n >= least:
            best = hits
        n += 1
        if n > min(most, total - 1):
            break
        hits = hits[hits >= n - 1]
        hits = hits[text[hits - (n - 1)] == text[total - n]]
    if not len(best):
        return []
    full = best[best + count < total]
    at = int(full[-1] if len(full) else best[0]) + 1
    return [int(t) for t in text[at : at + count]]
