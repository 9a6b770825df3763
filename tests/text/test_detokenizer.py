"""The Detokenizer against one-shot decoding, on every kind of tokenizer."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from dfastllm.errors import TokenizerError
from dfastllm.llm import resolve
from dfastllm.text import Detokenizer, Tokenizer
from dfastllm.text.detokenizer import TextOffsets
from dfastllm.text.token_text import token_bytes

COMMON = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


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
    """Any ids, special tokens shown."""
    ids = ids_of(tokenizer, data)
    full = tokenizer.decode(ids, skip_special=False)
    parts = [full[i : i + n] for i in range(len(full)) for n in (1, 2, 3) if full[i : i + n]] or ["x"]
    stops = tuple(data.draw(st.lists(st.sampled_from([*parts, "dog.", "é你", "ab", "\ufffd"]), max_size=3)))
    include = data.draw(st.booleans())
    detokenizer = Detokenizer(tokenizer, stop=stops, include_stop=include, skip_special=False)
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
        spelt = tokenizer.decode(ids[: detokenizer.consumed], skip_special=False)
        assert expected(spelt, stops, include)[1] is not None


@COMMON
@given(data=st.data())
def test_stops_are_looked_for_in_what_was_generated(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Texts with special tokens between them, which are not shown."""
    words = st.text(st.sampled_from(tokenizer_alphabet(tokenizer)), min_size=1, max_size=8)
    hidden = sorted(tokenizer.special_ids)
    marks = {i: tokenizer.decode([i], skip_special=False) for i in hidden}
    ids: list[int] = []
    for _ in range(data.draw(st.integers(0, 5))):
        ids += tokenizer.encode(data.draw(words)) if data.draw(st.booleans()) else [data.draw(st.sampled_from(hidden))]
    full, shown = tokenizer.decode(ids, skip_special=False), tokenizer.decode(ids)
    visible, at = [True] * len(full), 0  # of each character of the generated text
    for token in ids:
        if token in marks:
            at = full.index(marks[token], at)
            visible[at : at + len(marks[token])] = [False] * len(marks[token])
            at += len(marks[token])
    segments = [(hides, [*part]) for hides, part in itertools.groupby(ids, marks.__contains__)]
    spelt = [
        ("" if hides else " ?") + re.escape(tokenizer.decode(part, skip_special=False)) for hides, part in segments
    ]
    assume(re.fullmatch("".join(spelt), full))  # elsewhere a space stands between tokens, and belongs to neither
    parts = [full[i : i + n] for i in range(len(full)) for n in (1, 2, 3, 13, 15) if full[i : i + n]] or ["x"]
    stops = tuple(data.draw(st.lists(st.sampled_from(parts), min_size=1, max_size=2)))
    include = data.draw(st.booleans())
    before, stop = expected(full, stops, include=False)
    gone = sum(visible[len(before) :])  # shown characters that the stop takes away
    want = shown[: max(0, len(shown) - gone)] + (stop if include and stop is not None else "")
    detokenizer = Detokenizer(tokenizer, stop=stops, include_stop=include)
    released = ""
    for run in pieces(ids, data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))):
        released += detokenizer.push(run)
        assert want.startswith(released)
    assert released + detokenizer.flush() == want
    assert detokenizer.stopped == stop


@COMMON
@given(data=st.data())
def test_whatever_is_hidden_what_is_shown_is_the_beginning_of_the_text(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    """Any ids, halves of characters around hidden tokens among them."""
    ids = ids_of(tokenizer, data)
    full, shown = tokenizer.decode(ids, skip_special=False), tokenizer.decode(ids)
    stops = tuple(full[i : i + n] for i in data.draw(st.lists(st.integers(0, 60), max_size=2)) for n in (2, 5))
    detokenizer = Detokenizer(tokenizer, stop=tuple(s for s in stops if s))
    released = ""
    for run in pieces(ids, data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))):
        released += detokenizer.push(run)
    released += detokenizer.flush()
    assert shown.startswith(released)
    assert detokenizer.stopped == expected(full, [s for s in stops if s], include=False)[1]
    if detokenizer.stopped is None:
        assert released == shown


def test_a_stop_may_hold_a_special_token_that_is_not_shown(byte_tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer.encode("The dog<|im_end|> sleeps.")
    for stop, want in (
        ("<|im_end|>", "The dog"),
        ("dog<|im_end|> s", "The "),
        ("<|im_", "The dog"),
        ("dog sleeps", "The dog sleeps."),  # not what was generated
        ("sleeps", "The dog "),
    ):
        for include in (False, True):
            detokenizer = Detokenizer(byte_tokenizer, stop=(stop,), include_stop=include)
            text = "".join(detokenizer.push([i]) for i in ids) + detokenizer.flush()
            found = detokenizer.stopped is not None
            assert text == (want + stop if include and found else want)
            assert found == (stop != "dog sleeps")
    detokenizer = Detokenizer(byte_tokenizer, stop=("\n\n",))
    assert [detokenizer.push([i]) for i in byte_tokenizer.encode("x<|im_end|>y")] == ["x", "", "y"]  # nothing is held


@pytest.mark.parametrize("stop", [(), ("no such end",)])
def test_forty_characters_of_many_bytes_token_by_token(tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
    """Emoji and Han, of three and four bytes, in tokens of a byte each where the tokenizer has those."""
    draw, ranges = random.Random(7), ((0x1F300, 0x1F64F), (0x4E00, 0x9FA5), (0x20000, 0x2A6DF))
    for _ in range(25):
        text = "".join(chr(draw.randint(*draw.choice(ranges))) for _ in range(40))
        if not _encodes(tokenizer, text):  # no unknown token, no bytes
            return
        ids = tokenizer.encode(text)
        detokenizer = Detokenizer(tokenizer, stop=stop)
        released = "".join(detokenizer.push([token]) for token in ids) + detokenizer.flush()
        assert released == tokenizer.decode(ids)


@COMMON
@given(data=st.data())
def test_offsets_of_whole_texts(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Counted in the bytes of the tokens: a token begins where the character does that its first byte is part of."""
    words = st.text(st.sampled_from(tokenizer_alphabet(tokenizer)), max_size=20)
    ids = tokenizer.encode(data.draw(words))
    spelt = [token_bytes(tokenizer, i) for i in ids]
    text = tokenizer.decode(ids)
    try:
        dropped = len(b"".join(spelt).decode()) - len(text)  # the space that begins a text
    except UnicodeDecodeError:
        dropped = -1
    assume(dropped in (0, 1) and b"".join(spelt).decode().endswith(text))
    want = []
    for n in range(len(ids)):
        whole = b"".join(spelt[:n]).decode(errors="ignore")
        want.append(max(0, len(whole) - dropped))
    offsets = TextOffsets(tokenizer, start=100)
    found = [100 + at for at in want]
    assert [
        at for run in pieces(ids, data.draw(st.lists(st.integers(1, 4), min_size=1))) for at in offsets.push(run)
    ] == found


@COMMON
@given(data=st.data())
def test_offsets_of_any_ids(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """They never go back, and what stands before a token that is not part of a run of bytes is the text before it."""
    ids = ids_of(tokenizer, data)
    offsets = TextOffsets(tokenizer)
    found = offsets.push(ids)
    text = tokenizer.decode(ids)
    byte = [i in tokenizer.byte_ids for i in ids]
    for n, at in enumerate(found):
        assert 0 <= at <= len(text)
        if not any(byte):
            assert at >= found[n - 1] if n else at == 0
            before = tokenizer.decode(ids[:n])
            assert text[:at] == before[:at]
            assert len(before) - at <= 1  # less half a character


def test_offsets_of_halves_and_of_hidden_tokens(byte_tokenizer: Tokenizer, llama2_tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer.encode("x🦊y<|im_end|>z")
    assert TextOffsets(byte_tokenizer).push(ids) == [0, 1, 1, 1, 2, 3, 3]
    assert TextOffsets(byte_tokenizer, skip_special=False).push(ids) == [0, 1, 1, 1, 2, 3, 13]
    fox = [byte_tokenizer.encode("🦊")[0]]
    assert TextOffsets(byte_tokenizer).push([*fox, *byte_tokenizer.encode("ab")]) == [0, 1, 2]  # never a character
    run = [i for b in "🦊🦊".encode() if (i := llama2_tokenizer.token_to_id(f"<0x{b:02X}>")) is not None]
    after = llama2_tokenizer.encode("a")[:1]
    assert TextOffsets(llama2_tokenizer).push([*run, *after]) == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    bad = llama2_tokenizer.token_to_id("<0xFF>")
    assert bad is not None
    assert TextOffsets(llama2_tokenizer).push([bad, *run[:2], *after]) == [0, 1, 2, 3]


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
        assert len(detokenizer._shown._window) <= 24, ids


def test_special_tokens_are_left_out_unless_asked_for() -> None:
    tokenizer = Tokenizer.load(resolve("demo-ar"))
    special, plain = min(tokenizer.special_ids), tokenizer.encode("dog")
    for skip, wanted in ((None, "dog"), (True, "dog"), (False, f"{tokenizer.id_to_token(special)}dog")):
        made = Detokenizer(tokenizer) if skip is None else Detokenizer(tokenizer, skip_special=skip)
        assert made.push([special, *plain]) + made.flush() == wanted
