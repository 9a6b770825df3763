"""The bound from characters to tokens is never too high: no text has fewer tokens than it says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece

from dfastllm.text import Tokenizer
from dfastllm.text.reach import reach
from tests.kit.served import byte_tokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPACE = "Ġ"
MERGES = [(SPACE, SPACE), (SPACE * 2, SPACE * 2), ("a", "b"), ("ab", "ab"), ("Ã", "©")]


def spelled(*, normalizer: Any = None, pre: Any = None, added: AddedToken | None = None) -> Backend:
    """Byte-level BPE whose longest token is four spaces or "abab"."""
    words = [*ALPHABET, *(left + right for left, right in MERGES)]
    backend = Backend(BPE(vocab={word: i for i, word in enumerate(words)}, merges=MERGES))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if added is not None:
        backend.add_special_tokens([added])
    return backend


def sentencepiece(model: type, **options: Any) -> Backend:
    words = [*BYTES, "<unk>", "▁", "a", "b", "ab", "▁ab"]
    if model is BPE:
        merges = [("a", "b"), ("▁", "ab")]
        made: Any = BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges, unk_token="<unk>", **options)
    else:
        made = Unigram([(word, -float(i)) for i, word in enumerate(words)], unk_id=256, **options)
    backend = Backend(made)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return backend


def split(behavior: str) -> Any:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(",", behavior), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


BOUNDED = {
    "byte-level": (spelled(), 4, True),
    "NFC": (spelled(normalizer=normalizers.NFC()), 16, True),
    "NFKC and lower case": (
        spelled(normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
        16,
        True,
    ),
    "a replacement that shrinks": (spelled(normalizer=normalizers.Replace("aaa", "bb")), 8, True),
    "a long added token": (spelled(added=AddedToken("<|longer|>")), 10, True),
    "an added token that takes spaces": (spelled(added=AddedToken("<|s|>", rstrip=True)), 5, False),
    "cut at commas": (spelled(pre=split("isolated")), 4, True),
    "BPE with bytes": (sentencepiece(BPE, byte_fallback=True), 6, True),
    "BPE, each unknown one by itself": (sentencepiece(BPE), 6, True),
    "unigram with bytes": (sentencepiece(Unigram, byte_fallback=True), 6, True),
}
TEXTS = st.text(st.sampled_from("ab, \té,\u0301e漢😀가\u1100\u1161ᾄᾂ"), max_size=60) | st.lists(
    st.sampled_from(["    ", "abab", "<|longer|>", "<|s|>", "aaa", ",", "e\u0301", "\u03b1\u0313\u0300\u0345"]),
    max_size=20,
).map("".join)


@pytest.mark.parametrize("name", BOUNDED)
def test_no_text_has_fewer_tokens(name: str) -> None:
    backend, characters, spaces = BOUNDED[name]
    tokenizer = Tokenizer(backend)
    assert tokenizer.reach is not None
    assert (tokenizer.reach.characters, tokenizer.reach.spaces) == (characters, spaces)

    @settings(max_examples=150, deadline=None)
    @given(text=TEXTS)
    def hold(text: str) -> None:
        assert tokenizer.fewest(text) <= len(tokenizer.encode(text))

    hold()


def test_the_bound_is_reached() -> None:
    tokenizer = Tokenizer(spelled())
    assert tokenizer.fewest("abab" * 25) == 25 == len(tokenizer.encode("abab" * 25))


UNBOUNDED = {
    "removes what it finds": spelled(pre=split("removed")),
    "strips": spelled(normalizer=normalizers.Strip()),
    "strips accents": spelled(normalizer=normalizers.StripAccents()),
    "replaces by nothing": spelled(normalizer=normalizers.Replace("a", "")),
    "an expression": spelled(normalizer=normalizers.Sequence([normalizers.Replace(Regex("a+"), "a")])),
    "drops what it does not know": Backend(BPE(vocab={"a": 0}, merges=[])),
    "fuses the unknown": sentencepiece(BPE, fuse_unk=True),
    "unigram without bytes": sentencepiece(Unigram),
    "words": Backend(WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")),
    "pieces of words": Backend(WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")),
}


@pytest.mark.parametrize("name", UNBOUNDED)
def test_no_bound_where_characters_vanish(name: str) -> None:
    assert reach(json.loads(UNBOUNDED[name].to_str())) is None
    assert Tokenizer(UNBOUNDED[name]).fewest("x" * 1000) == 0


def test_a_long_text_has_the_same_ids() -> None:
    """A long text is encoded by another function of the library."""
    tokenizer = byte_tokenizer()
    text = "a brown fox, <|mask|> é漢😀 " * 1000
    for special in (False, True):
        assert (
            tokenizer.encode(text, add_special=special)
            == tokenizer.backend.encode(text, add_special_tokens=special).ids
        )
