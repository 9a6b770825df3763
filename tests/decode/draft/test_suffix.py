"""The suffix drafter against a scan of every substring, and who may learn from whom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfastllm.core import ModelInfo, Request, SamplingParams, SequenceState, SpeculativeParams
from dfastllm.decode.draft.suffix import Corpus, Suffix, propose
from dfastllm.errors import ValidationError
from tests.kit.driver import info

Texts = list[list[int]]
WORDS = st.lists(st.integers(0, 3), min_size=0, max_size=25)


def scan(pattern: Sequence[int], places: list[Texts], most: int, factor: float, least: float) -> list[int]:
    """Every ending of the pattern, every place, counted anew at every token."""
    best: tuple[list[int], float] = ([], 0.0)
    for texts in places:
        for length in range(len(pattern), 0, -1):
            tokens: list[int] = []
            chance, expected = 1.0, 0.0
            while len(tokens) < min(most, int(factor * length)):
                wanted = [*pattern[len(pattern) - length :], *tokens]
                counts: Counter[int] = Counter()
                latest: dict[int, tuple[int, int]] = {}
                for number, text in enumerate(texts):
                    for end in range(len(wanted), len(text)):
                        if text[end - len(wanted) : end] == wanted:
                            counts[text[end]] += 1
                            latest[text[end]] = (number, end)
                if not counts:
                    break
                token = max(counts, key=lambda t: (counts[t], latest[t]))
                chance *= counts[token] / counts.total()
                if chance < least:
                    break
                tokens.append(token)
                expected += chance
            if expected > best[1]:
                best = tokens, expected
    return best[0]


@given(
    own=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    past=st.lists(WORDS, max_size=6),
    dropped=st.integers(0, 4),
    latest=st.sampled_from([None, 0, 1, 3]),
    depth=st.integers(1, 8),
    most=st.integers(1, 6),
    factor=st.sampled_from([0.5, 1.0, 2.0]),
    least=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
@settings(max_examples=400, deadline=None)
def test_it_is_what_a_scan_finds(
    own: list[int], past: Texts, dropped: int, latest: int | None, depth: int, most: int, factor: float, least: float
) -> None:
    mine, others = Corpus(), Corpus()
    mine.begin()
    for token in own:  # as a text grows
        mine.extend([token])
    for text in past:
        others.begin()
        others.extend(text)
    kept = list(past)
    for _ in range(min(dropped, len(past))):
        others.drop()
        kept.pop(0)
    assert len(others) == len(kept)
    seen = kept if latest is None else kept[len(kept) - min(latest, len(kept)) :]
    pattern = own[-depth:]
    got = propose(pattern, [(mine, None), (others, latest)], most, factor, least)
    assert got == scan(pattern, [[own], seen], most, factor, least)


def test_a_dropped_text_leaves_nothing() -> None:
    corpus = Corpus()
    for text in ([1, 2, 3], [4, 5], [1, 2, 9]):
        corpus.begin()
        corpus.extend(text)
    assert propose([1, 2], [(corpus, None)], 3, 2.0, 0.1) == [9]  # of equally frequent ones the latest
    corpus.drop()
    corpus.drop()
    corpus.drop()
    assert len(corpus) == 0
    assert propose([1, 2], [(corpus, None)], 3, 2.0, 0.1) == []
    corpus.begin()
    corpus.extend([1, 2, 7])
    assert propose([1, 2], [(corpus, None)], 3, 2.0, 0.1) == [7]


def sequence(name: str, prompt: Sequence[int], output: Sequence[int] = (), **changes: object) -> SequenceState:
    asked = SpeculativeParams("suffix", **changes.pop("asked", {}))  # type: ignore[arg-type]
    sampling = SamplingParams(temperature=float(changes.pop("temperature", 0.0)))  # type: ignore[arg-type]
    request = Request(name, tuple(prompt), sampling, speculative=asked, **changes)  # type: ignore[arg-type]
    return SequenceState(request, model(), [*prompt, *output], seed=1)


def model() -> ModelInfo:
    return info("ar")


def draft(drafter: Suffix, seq: SequenceState, most: int = 5) -> tuple[int, ...]:
    (made,) = drafter.propose([(seq, most)])
    assert made.length == len(seq.tokens)
    assert made.probs is None
    return made.tokens


def test_past_outputs_are_shared_within_a_salt_and_prompts_never() -> None:
    drafter = Suffix()
    drafter.release(sequence("old", (20, 21, 22), (5, 6, 7, 8), cache_salt="a"))
    assert draft(drafter, sequence("new", (1, 5, 6), cache_salt="a")) == (7, 8)
    assert draft(drafter, sequence("new2", (1, 5, 6), cache_salt="b")) == ()
    assert draft(drafter, sequence("new3", (1, 5, 6))) == ()
    assert draft(drafter, sequence("new4", (1, 20, 21), cache_salt="a")) == ()


def test_by_rejection_only_the_own_text_counts() -> None:
    drafter = Suffix()
    drafter.release(sequence("old", (20, 21, 22), (5, 6, 7, 8)))
    judged = {"acceptance": "rejection"}
    assert draft(drafter, sequence("cold", (1, 5, 6), asked=judged)) == (7, 8)  # greedy, a draft changes nothing
    assert draft(drafter, sequence("hot", (1, 5, 6), asked=judged, temperature=1.0)) == ()
    assert draft(drafter, sequence("own", (5, 6, 9, 1, 5, 6), asked=judged, temperature=1.0)) == (9, 1, 5, 6)


def test_the_oldest_outputs_go_first_over_all_salts() -> None:
    drafter = Suffix(cached_requests=2)
    for number, salt in enumerate("aba"):
        drafter.release(sequence(f"old{number}", (1,), (5, 6, 10 + number), cache_salt=salt))
    assert draft(drafter, sequence("x", (5, 6), cache_salt="a")) == (12,)
    assert draft(drafter, sequence("y", (5, 6), cache_salt="b")) == (11,)
    drafter.release(sequence("old3", (1,), (7, 8), cache_salt="c"))
    assert draft(drafter, sequence("z", (5, 6), cache_salt="b")) == ()
    assert sum(len(c) for c in drafter._past.values()) == 2


def test_a_request_may_ask_for_less_and_not_for_more_than_is_kept() -> None:
    drafter = Suffix(cached_requests=8)
    for number in range(3):
        drafter.release(sequence(f"old{number}", (1,), (5, 6, 10 + number, 3)))
    few = {"suffix_decoding_max_cached_requests": 1}
    assert draft(drafter, sequence("x", (5, 6), asked=few)) == (12, 3)
    assert draft(drafter, sequence("y", (5, 6), asked={"suffix_decoding_max_cached_requests": 0})) == ()
    more = sequence("z", (5, 6), asked={"suffix_decoding_max_cached_requests": 9}).request
    with pytest.raises(ValidationError, match="at most 8") as error:
        drafter.check(more, model())
    assert error.value.param == "suffix_decoding_max_cached_requests"
    drafter.check(sequence("w", (5, 6), asked=few).request, model())


def test_text_grows_and_is_forgotten() -> None:
    drafter = Suffix()
    seq = sequence("r", (1, 2, 3))
    assert draft(drafter, seq) == ()
    seq.tokens += [1, 2]
    assert draft(drafter, seq) == (3, 1, 2)
    seq.tokens += [4, 1, 2]
    assert draft(drafter, seq, 2) == (4, 1)
    drafter.release(seq)
    assert not drafter._own


@given(
    text=st.lists(st.integers(0, 2), min_size=1, max_size=30),
    pattern=st.lists(st.integers(0, 2), min_size=1, max_size=6),
)
@settings(max_examples=200, deadline=None)
def test_endings_are_the_lengths_at_which_places_drop_out(text: list[int], pattern: list[int]) -> None:
    corpus = Corpus()
    corpus.begin()
    corpus.extend(text)
    places = {
        n: [at for at in range(n, len(text)) if text[at - n : at] == pattern[len(pattern) - n :]]
        for n in range(1, len(pattern) + 1)
    }
    wanted = [
        (n, places[n]) for n in range(1, len(pattern) + 1) if places[n] and len(places.get(n + 1, [])) < len(places[n])
    ]
    assert [(n, at.tolist()) for n, at in corpus.endings(pattern)] == wanted
