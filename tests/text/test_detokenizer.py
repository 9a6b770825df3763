"""The Detokenizer against one-shot decoding, on every kind of tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dfastllm.errors import TokenizerError
from dfastllm.text import Detokenizer, Tokenizer

COMMON = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def pieces(ids: Sequence[int], cuts: list[int]) -> list[list[int]]:
    """`ids` cut into runs of the lengths in `cuts`, used over and over."""
    runs, at = [], 0
    for turn in range(len(ids)):
        if at >= len(ids):
            break
        size = cuts[turn % len(cuts)]
        runs.append(list(ids[at : at + size]))
        at += size
    return runs


def expected(full: str, stops: Sequence[str], include: bool) -> tuple[str, str | None]:
    """Brute force: read the text character by character until some stop string has just been completed."""
    for end in range(1, len(full) + 1):
        done = [stop for stop in stops if full[:end].endswith(stop)]
        if done:
            stop = max(done, key=len)
            return full[: end if include else end - len(stop)], stop
    return full, None


def tokenizer_alphabet(tokenizer: Tokenizer) -> str:
    """Characters it can encode: a tokenizer without an unknown token knows only some."""
    return "".join(c for c in "ab the dog.é你好🙂🙃Ω\n" if _encodes(tokenizer, c))


def _encodes(tokenizer: Tokenizer, text: str) -> bool:
    try:
        return bool(tokenizer.encode(text)) or text.isspace()
    except TokenizerError:
        return False


def ids_of(tokenizer: Tokenizer, data: st.DataObject) -> list[int]:
    """Random ids (mostly broken UTF-8), or text that encodes to long runs of bytes, or both, with special tokens."""
    random_ids = st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=12)
    some_text = st.text(st.sampled_from(tokenizer_alphabet(tokenizer)), max_size=12).map(tokenizer.encode)
    special = st.lists(st.sampled_from(sorted(tokenizer.special_ids)), max_size=3)
    parts = data.draw(st.lists(st.one_of(random_ids, some_text, special), max_size=8))
    return [i for part in parts for i in part]


@COMMON
@given(data=st.data())
def test_joined_output_is_the_one_shot_decode(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = ids_of(tokenizer, data)
    skip = data.draw(st.booleans())
    full = tokenizer.decode(ids, skip_special=skip)
    detokenizer = Detokenizer(tokenizer, skip_special=skip)
    released = ""
    for run in pieces(ids, data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))):
        released += detokenizer.push(run)
        assert full.startswith(released), "text was shown that the final text does not have"
    assert released + detokenizer.flush() == full
    assert detokenizer.consumed == len(ids)


@COMMON
@given(data=st.data())
def test_stops_match_brute_force(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = ids_of(tokenizer, data)
    full = tokenizer.decode(ids)
    parts = [full[i : i + n] for i in range(len(full)) for n in (1, 2, 3) if full[i : i + n]] or ["x"]
    stops = tuple(data.draw(st.lists(st.sampled_from([*parts, "dog.", "é你", "ab", "\ufffd"]), max_size=3)))
    include = data.draw(st.booleans())
    detokenizer = Detokenizer(tokenizer, stop=stops, include_stop=include)
    want, stop = expected(full, stops, include)
    released = ""
    for run in pieces(ids, data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))):
        released += detokenizer.push(run)
        assert want.startswith(released)
    released += detokenizer.flush()
    assert released == want
    assert detokenizer.stopped == stop
    # The ids up to the stop, and no fewer, spell it.
    if stop is not None and detokenizer.consumed < len(ids):
        assert expected(tokenizer.decode(ids[: detokenizer.consumed]), stops, include)[1] is not None


@COMMON
@given(data=st.data())
def test_context_joins_on(tokenizer: Tokenizer, data: st.DataObject) -> None:
    context, ids = ids_of(tokenizer, data), ids_of(tokenizer, data)
    # A context that ends inside a character or a byte run has no text of its own to subtract.
    heard = [i for i in context if i not in tokenizer.special_ids and tokenizer.id_to_token(i) is not None]
    if not heard or heard[-1] in tokenizer.byte_ids or tokenizer.decode(context).endswith("\ufffd"):
        context = tokenizer.encode("the dog")
    detokenizer = Detokenizer(tokenizer, context=context)
    released = "".join(detokenizer.push([i]) for i in ids) + detokenizer.flush()
    assert tokenizer.decode(context) + released == tokenizer.decode(context + ids)


def test_a_leading_space_survives_after_a_context(llama2_tokenizer: Tokenizer) -> None:
    ids = llama2_tokenizer.encode("dog")
    alone, joined = Detokenizer(llama2_tokenizer), Detokenizer(llama2_tokenizer, context=llama2_tokenizer.encode("The"))
    assert alone.push(ids) + alone.flush() == "dog"
    assert joined.push(ids) + joined.flush() == " dog"


def test_half_a_character_is_held_back(byte_tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer.encode("x🦊")  # the fox is not in the training text: three tokens of its four bytes
    assert len(ids) == 4
    detokenizer = Detokenizer(byte_tokenizer)
    assert [detokenizer.push([i]) for i in ids] == ["x", "", "", "🦊"]
    assert detokenizer.flush() == ""


def test_a_cut_character_ends_as_a_replacement(byte_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_tokenizer)
    assert detokenizer.push(byte_tokenizer.encode("x🦊")[:3]) == "x"
    assert detokenizer.flush() == "\ufffd"


def test_one_bad_byte_spoils_its_run(llama2_tokenizer: Tokenizer) -> None:
    good = [llama2_tokenizer.token_to_id(f"<0x{b:02X}>") for b in "🦊".encode()]
    bad = [*good, llama2_tokenizer.token_to_id("<0xFF>")]
    assert None not in bad
    detokenizer = Detokenizer(llama2_tokenizer)
    assert detokenizer.push(good) == ""  # complete, yet not certain
    assert detokenizer.push(bad[-1:]) + detokenizer.flush() == "\ufffd" * 5


def test_what_may_become_a_stop_is_held_back(byte_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_tokenizer, stop=("###",))
    assert [detokenizer.push(byte_tokenizer.encode(c)) for c in "a##b#"] == ["a", "", "", "##b", ""]
    assert detokenizer.push(byte_tokenizer.encode("#")) == ""
    assert detokenizer.push(byte_tokenizer.encode("#") + byte_tokenizer.encode("never")) == ""
    assert detokenizer.stopped == "###"
    assert detokenizer.push(byte_tokenizer.encode("more")) == ""
    assert detokenizer.flush() == ""


@pytest.mark.parametrize(
    ("text", "stops", "want", "stop"),
    [
        ("abcd", ("abc", "b"), "a", "b"),  # b is complete first
        ("xabc", ("bc", "abc"), "x", "abc"),  # together: the longest
        ("aab", ("ab",), "a", "ab"),
        ("ababac", ("abac",), "ab", "abac"),
    ],
)
def test_which_stop_wins(byte_tokenizer: Tokenizer, text: str, stops: tuple[str, ...], want: str, stop: str) -> None:
    for whole in (False, True):
        ids = byte_tokenizer.encode(text)
        runs = [ids] if whole else [[i] for i in ids]
        detokenizer = Detokenizer(byte_tokenizer, stop=stops)
        assert "".join(detokenizer.push(run) for run in runs) + detokenizer.flush() == want
        assert detokenizer.stopped == stop


def test_the_window_stays_small(tokenizer: Tokenizer) -> None:
    """A step's cost does not grow with the text, broken bytes and spaces included."""
    worst = [tokenizer.encode("dog."), tokenizer.encode(" "), [tokenizer.vocab_size - 1]]
    if tokenizer.token_to_id("Ģ") is not None:  # byte 0x80 alone: never a character
        worst.append([tokenizer.token_to_id("Ģ")])
    for ids in worst:
        detokenizer = Detokenizer(tokenizer)
        for _ in range(100):
            detokenizer.push(ids)
        assert len(detokenizer._window) <= 24, ids
