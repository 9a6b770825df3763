"""Tokens as text and bytes, against what is known of both kinds of tokenizer."""

from __future__ import annotations

from typing import Any

import pytest

from dfastllm.core import TokenLogprob
from dfastllm.server.tokens import chat_logprobs, completion_logprobs
from dfastllm.text.token_text import token_bytes, token_text


class Spelled:
    """A tokenizer that only spells: (the vocabulary's spelling, what it decodes to) of each id."""

    def __init__(self, *tokens: tuple[str, str]) -> None:
        self.tokens = tokens

    def decode(self, ids: list[int], *, skip_special: bool) -> str:
        assert not skip_special
        return "".join(self.tokens[i][1] for i in ids)

    def id_to_token(self, token: int) -> str:
        return self.tokens[token][0]


@pytest.mark.parametrize(
    ("spelling", "decoded", "data", "text"),
    [
        ("abc", "abc", b"abc", "abc"),
        ("Ġabc", " abc", b" abc", " abc"),
        ("▁abc", "abc", b" abc", " abc"),  # SentencePiece drops the space at the beginning
        ("▁abc", " abc", b" abc", " abc"),
        ("<0xE2>", "�", b"\xe2", "bytes:\\xe2"),
        ("<0x0a>", "\n", b"\n", "\n"),
        ("âĸ", "�", b"\xe2\x96", "bytes:\\xe2\\x96"),  # byte-level: 0xE2 is printable, 0x96 is the 118th that is not
        ("ł", "�", b"\xa0", "bytes:\\xa0"),
        ("Ń", "�", b"\xad", "bytes:\\xad"),  # the soft hyphen is the last byte that is not shown as itself
        ("�", "�", "�".encode(), "�"),  # the character itself
    ],
)
def test_bytes_and_text_of_a_token(spelling: str, decoded: str, data: bytes, text: str) -> None:
    tokenizer: Any = Spelled((spelling, decoded))
    assert token_bytes(tokenizer, 0) == data
    assert token_text(tokenizer, 0) == text


def test_the_alphabet_of_bytes_is_gpt2s() -> None:
    """Every byte has one character, and transformers' table is the same."""
    gpt2 = pytest.importorskip("transformers.convert_slow_tokenizer").bytes_to_unicode()
    for byte, character in gpt2.items():
        assert token_bytes(Spelled((character, "�")), byte * 0) == bytes([byte])  # type: ignore[arg-type]


def test_of_two_tokens_of_one_text_the_likelier_is_shown() -> None:
    tokenizer: Any = Spelled(("a", "a"), ("▁b", "b"), ("Ġb", " b"), ("c", "c"))
    record = TokenLogprob(2, -0.5, ((2, -0.5), (0, -1.0), (1, -2.0), (3, -3.0)))
    found = completion_logprobs(tokenizer, [record], [7])
    assert found.top_logprobs == [{" b": -0.5, "a": -1.0, "c": -3.0}]
    assert list(found.top_logprobs[0]) == [" b", "a", "c"]  # the best first
    assert (found.tokens, found.token_logprobs, found.text_offset) == ([" b"], [-0.5], [7])


def test_tokens_are_named_by_their_ids_where_that_is_asked_for() -> None:
    """As vLLM's return_tokens_as_token_ids: two tokens of one text stay two, and bytes stay the token's."""
    tokenizer: Any = Spelled(("a", "a"), ("▁b", "b"), ("Ġb", " b"))
    record = TokenLogprob(2, -0.5, ((2, -0.5), (1, -1.0)))
    entry = chat_logprobs(tokenizer, [record], as_ids=True).content[0]
    assert (entry.token, bytes(entry.bytes)) == ("token_id:2", b" b")
    assert [(top.token, top.logprob) for top in entry.top_logprobs] == [("token_id:2", -0.5), ("token_id:1", -1.0)]
    found = completion_logprobs(tokenizer, [record], [0], as_ids=True)
    assert found.tokens == ["token_id:2"]
    assert found.top_logprobs == [{"token_id:2": -0.5, "token_id:1": -1.0}]
