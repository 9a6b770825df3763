"""Suffix decoding (Oliaro et al. 2024; vLLM's and Arctic's `suffix`): what most often followed the longest endings of
the text that occurred before, in the text itself and in past outputs.

A suffix tree with counts is one way to hold this; here the occurrences are held instead: texts end to end and, per
token, where it stands. The node of a pattern is then the set of places where it ends, found by filtering, and its
counts are those of the tokens that follow. Memory is a few words a token whatever the depth, a text that is dropped
takes its counts with it, and a request asks for its own depth.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dfastllm.core import Draft, ModelInfo, Request, SequenceState, SpeculativeParams
from dfastllm.decode.draft.verify import rejects
from dfastllm.errors import ValidationError

__all__ = ["Corpus", "Suffix", "propose"]

Ints = NDArray[np.int64]
BREAK = -1  # between texts; no token


class Corpus:
    """Texts end to end, indexed by token. The last one may grow; the oldest ones can be dropped."""

    def __init__(self) -> None:
        self._text = np.full(256, BREAK, dtype=np.int64)
        self._size = 0
        self._where: dict[int, array[int]] = {}  # token -> its places, ascending
        self._starts: deque[int] = deque()

    def __len__(self) -> int:
        """Texts held."""
        return len(self._starts)

    @property
    def size(self) -> int:
        """Tokens of the last text."""
        return self._size - self._starts[-1] if self._starts else 0

    def begin(self) -> None:
        """Start a new text."""
        if self._size:
            self._append([BREAK])
        self._starts.append(self._size)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append to the last text."""
        at = self._size
        self._append(tokens)
        for place, token in enumerate(tokens, at):
            if token not in self._where:
                self._where[token] = array("q")
            self._where[token].append(place)

    def _append(self, tokens: Sequence[int]) -> None:
        stop = self._size + len(tokens)
        if stop >= len(self._text):  # one BREAK is always left at the end
            more = np.full(2 * stop, BREAK, dtype=np.int64)
            more[: self._size] = self._text[: self._size]
            self._text = more
        self._text[self._size : stop] = tokens
        self._size = stop

    def drop(self) -> None:
        """Forget the oldest text."""
        self._starts.popleft()
        dead = self._starts[0] if self._starts else self._size
        if 2 * dead > self._size:
            self._compact(dead)

    def _compact(self, dead: int) -> None:
        starts, text = [s - dead for s in self._starts], self._text[dead : self._size].copy()
        self._text[:] = BREAK
        self._size, self._where, self._starts = 0, {}, deque()
        stops = [*[s - 1 for s in starts[1:]], len(text)]
        for start, stop in zip(starts, stops, strict=False):  # without a text there is none to keep
            self.begin()
            self.extend(text[start:stop].tolist())

    def endings(self, pattern: Sequence[int], latest: int | None = None) -> list[tuple[int, Ints]]:
        """For each length of the pattern's end at which fewer places are left than for the shorter one: the longest
        length with those places, and the places of what follows (int64, ascending). latest: in so many texts only."""
        places = self._where.get(pattern[-1])
        if places is None or latest == 0:
            return []
        low = self._starts[0 if latest is None else max(0, len(self._starts) - latest)]
        text, after = self._text, np.frombuffer(places, dtype=np.int64) + 1
        after = after[np.searchsorted(after, low, side="right") :]
        after = after[text[after] != BREAK]
        found: list[tuple[int, Ints]] = []
        for n in range(2, len(pattern) + 2):
            more = after[:0]
            if n <= len(pattern):
                more = after[after >= low + n]
                more = more[text[more - n] == pattern[-n]]
            if len(more) < len(after):
                found.append((n - 1, after))
            if not len(more):
                break
            after = more
        return found

    def follow(self, after: Ints, most: int, least: float) -> tuple[list[int], float]:
        """The most frequent continuation from these places on, and how many of its tokens stand, as expected: token by
        token while the estimated probability of the whole is at least `least`. Of equally frequent ones the latest."""
        tokens: list[int] = []
        chance, expected = 1.0, 0.0
        while len(tokens) < most and len(after):
            following = self._text[after]
            after, following = after[following != BREAK], following[following != BREAK]
            if not len(after):
                break
            values, last, counts = np.unique(following[::-1], return_index=True, return_counts=True)
            best = min(range(len(values)), key=lambda i: (-counts[i], last[i]))
            chance *= int(counts[best]) / len(after)
            if chance < least:
                break
            tokens.append(int(values[best]))
            expected += chance
            after = after[following == values[best]] + 1
        return tokens, expected


def propose(
    pattern: Sequence[int], places: Iterable[tuple[Corpus, int | None]], most: int, factor: float, least: float
) -> list[int]:
    """The continuation of `pattern` that is expected to be right the longest, of all its endings in all the places
    (corpus, how many of its latest texts). At most `most` tokens and `factor` per matched one. Of equally good ones the
    first place's and the longest ending's."""
    best: tuple[list[int], float] = [], 0.0
    for corpus, latest in places:
        for length, after in reversed(corpus.endings(pattern, latest)):
            found = corpus.follow(after, min(most, int(factor * length)), least)
            if found[1] > best[1]:
                best = found
    return best[0]


@dataclass
class Suffix:
    """The `suffix` drafter. cached_requests: past outputs held in all; the oldest goes first.

    Past outputs serve requests of the same `cache_salt` only. Judged by rejection a draft decides which tokens come, so
    there it is made from the request's own text alone: nobody's past changes a result.
    """

    cached_requests: int = SpeculativeParams.suffix_decoding_max_cached_requests
    _own: dict[str, Corpus] = field(default_factory=dict)
    _past: dict[str, Corpus] = field(default_factory=dict)
    _order: deque[str] = field(default_factory=deque)  # salt of each past output

    def check(self, request: Request, model: ModelInfo) -> None:
        """Raises ValidationError when more past outputs are asked for than are kept."""
        asked = (request.speculative or SpeculativeParams()).suffix_decoding_max_cached_requests
        if asked > self.cached_requests and asked != SpeculativeParams.suffix_decoding_max_cached_requests:
            raise ValidationError(
                f"suffix_decoding_max_cached_requests must be at most {self.cached_requests}, which this server keeps,"
                f" got {asked}.",
                param="suffix_decoding_max_cached_requests",
            )

    def passes(self, most: int) -> int:
        return 0

    def propose(self, wanted: Sequence[tuple[SequenceState, int]]) -> list[Draft]:
        drafts = []
        for seq, most in wanted:
            asked = seq.request.speculative or SpeculativeParams()
            places: list[tuple[Corpus, int | None]] = [(self._text(seq), None)]
            past = self._past.get(seq.request.cache_salt)
            if past is not None and not rejects(seq):
                places.append((past, asked.suffix_decoding_max_cached_requests))
            found = propose(
                seq.tokens[-asked.suffix_decoding_max_tree_depth :],
                places,
                most,
                asked.suffix_decoding_max_spec_factor,
                asked.suffix_decoding_min_token_prob,
            )
            drafts.append(Draft(tuple(found), len(seq.tokens)))
        return drafts

    def _text(self, seq: SequenceState) -> Corpus:
        """The sequence's own text, brought up to date."""
        own = self._own.get(seq.request.request_id)
        if own is None:
            own = self._own[seq.request.request_id] = Corpus()
            own.begin()
        own.extend(seq.tokens[own.size :])
        return own

    def release(self, seq: SequenceState) -> None:
        """Its output becomes one of the past ones."""
        self._own.pop(seq.request.request_id, None)
        output, salt = seq.tokens[seq.canvas_start :], seq.request.cache_salt
        if not output or not self.cached_requests:
            return
        past = self._past.setdefault(salt, Corpus())
        past.begin()
        past.extend(output)
        self._order.append(salt)
        if len(self._order) > self.cached_requests:
            oldest = self._order.popleft()
            self._past[oldest].drop()
            if not len(self._past[oldest]):
                del self._past[oldest]
