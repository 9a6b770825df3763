"""Single tokens as text and bytes, and log probabilities in the two forms of the OpenAI API."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dfastllm.core import TokenLogprob
from dfastllm.server.replies import ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, TopLogprob

if TYPE_CHECKING:
    from dfastllm.text import Tokenizer

__all__ = ["chat_logprobs", "completion_logprobs", "token_bytes", "token_text"]

_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\ufffd"


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE spells each byte as one printable character: itself where it is printable, else 256 + its rank."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + rank): byte for rank, byte in enumerate(hidden)}


_BYTES = _byte_alphabet()


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes a token stands for, also when they are no whole characters."""
    text = tokenizer.decode([token], skip_special=False)
    spelling = tokenizer.id_to_token(token) or ""
    if _REPLACEMENT in text:
        if match := _FALLBACK.fullmatch(spelling):
            return bytes([int(match[1], 16)])
        if all(character in _BYTES for character in spelling):
            return bytes(_BYTES[character] for character in spelling)
    if spelling.startswith("▁") and not text.startswith(" "):
        text = " " + text  # SentencePiece drops the space at the beginning of a text
    return text.encode()


@functools.lru_cache(maxsize=1 << 14)  # a canvas shows the same hundred tokens step after step
def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The token as OpenAI writes it: its text, or `bytes:\\xe2\\x96` when it is no whole character."""
    data = token_bytes(tokenizer, token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def completion_logprobs(
    tokenizer: Tokenizer, records: Sequence[TokenLogprob], offsets: Sequence[int]
) -> CompletionLogprobs:
    """offsets: where each of these tokens begins in the text of the answer."""
    top = [{token_text(tokenizer, t): p for t, p in reversed(record.top)} for record in records]  # the best wins a tie
    return CompletionLogprobs(
        tokens=[token_text(tokenizer, record.token) for record in records],
        token_logprobs=[record.logprob for record in records],
        top_logprobs=[dict(sorted(row.items(), key=lambda item: -item[1])) for row in top]
        if any(top) or not top
        else None,
        text_offset=list(offsets),
    )


def chat_logprobs(tokenizer: Tokenizer, records: Sequence[TokenLogprob]) -> ChatLogprobs:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = list(token_bytes(tokenizer, token))
        return {"token": token_text(tokenizer, token), "logprob": logprob, "bytes": data}

    content = [
        ChatTokenLogprob(**entry(r.token, r.logprob), top_logprobs=[TopLogprob(**entry(*top)) for top in r.top])
        for r in records
    ]
    return ChatLogprobs(content=content)
