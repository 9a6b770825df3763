"""Single tokens as bytes, and as the text that APIs write them as."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dfastllm.text.tokenizer import Tokenizer

__all__ = ["token_bytes", "token_text"]

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
