"""How many characters of a text one token can stand for at most, so that a text which cannot fit is refused unread.

A bound must never be too low: what is refused by it would not have fitted. So it is read from tokenizer.json only where
every step of the tokenizer is known to keep what it is given, or to shrink it by a known factor; else there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Reach", "reach"]

# Unicode composes at most four code points into one: the longest full canonical decompositions have four (UAX #15; of
# U+1F82, for example). Compatibility decomposition only makes a text longer before that.
_COMPOSED = 4
_WHITE = [chr(code) for code in range(0x3001) if chr(code).isspace()]  # no fewer than Rust's, which tokenizers uses
_KEEPS = {"ByteLevel", "Lowercase", "NFD", "NFKD", "Prepend"}  # normalizers that take no character away
_WHOLE = {"ByteLevel", "Digits", "Metaspace", "UnicodeScripts"}  # pre-tokenizers that only cut
_CUTS = {"Punctuation", "Split"}  # those too, unless what they find is removed
_SPACES = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}  # take spaces away and nothing else


@dataclass(frozen=True, slots=True)
class Reach:
    """characters  most that one token stands for.
    spaces      whether white space counts: some tokenizers take any number of it for nothing.
    """

    characters: int
    spaces: bool = True

    def fewest(self, text: str) -> int:
        """A number of tokens that the text has at least."""
        length = len(text) if self.spaces else len(text) - sum(map(text.count, _WHITE))
        return -(-length // self.characters)


def reach(spec: Mapping[str, Any]) -> Reach | None:
    """The reach of the tokenizer that a tokenizer.json describes; None where it cannot be told."""
    shrinks = _shrinks(spec.get("normalizer"))
    cut = _cut(spec.get("pre_tokenizer"))
    longest = _longest_token(spec)
    if shrinks is None or cut is None or longest is None:
        return None
    added = spec.get("added_tokens") or []
    swallowed = any(token.get("lstrip") or token.get("rstrip") for token in added)  # any white space beside them
    longest = max([longest, *(len(token["content"]) for token in added)])
    return Reach(longest * shrinks, spaces=cut and not swallowed)


def _shrinks(normalizer: Mapping[str, Any] | None) -> int | None:
    """Characters of a text that become one of the normalised text, at most. None: it may take any number away."""
    if normalizer is None:
        return 1
    kind = normalizer["type"]
    if kind == "Sequence":
        factor = 1
        for step in normalizer["normalizers"]:
            own = _shrinks(step)
            if own is None:
                return None
            factor *= own
        return factor
    if kind in ("NFC", "NFKC"):
        return _COMPOSED
    if kind == "Replace":
        pattern, content = normalizer["pattern"].get("String"), normalizer["content"]
        return -(-len(pattern) // len(content)) if pattern and content else None
    return 1 if kind in _KEEPS else None


def _cut(pre: Mapping[str, Any] | None) -> bool | None:
    """True: it keeps every character; False: all but white space; None: not known."""
    if pre is None:
        return True
    kind = pre["type"]
    if kind == "Sequence":
        steps = [_cut(step) for step in pre["pretokenizers"]]
        return None if None in steps else all(steps)
    if kind in _CUTS and pre["behavior"] != "Removed":
        return True
    if kind in _SPACES:
        return False
    return True if kind in _WHOLE else None


def _longest_token(spec: Mapping[str, Any]) -> int | None:
    """Characters of the model's longest token, if every character of a text is part of some token."""
    model = spec["model"]
    kind = model.get("type")
    if kind == "BPE":
        vocabulary = model["vocab"]
    elif kind == "Unigram":
        vocabulary = {piece: None for piece, _ in model["vocab"]}
    else:
        return None  # WordPiece and WordLevel: a word of any length is one unknown token
    bytes_known = model.get("byte_fallback") and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    if not (bytes_known or (kind == "BPE" and (_spelled(spec, vocabulary) or _one_by_one(model)))):
        return None
    return max(map(len, vocabulary), default=None)


def _one_by_one(model: Mapping[str, Any]) -> bool:
    """Whether each unknown character is a token of its own."""
    return model.get("unk_token") is not None and not model.get("fuse_unk")


def _spelled(spec: Mapping[str, Any], vocabulary: Mapping[str, Any]) -> bool:
    """Whether the text is spelled in the 256 letters of byte-level BPE before the model sees it, all of them known."""
    if not any(_has(spec.get(part), "ByteLevel") for part in ("normalizer", "pre_tokenizer")):
        return False
    return sum(len(token) == 1 and (token in _PRINTABLE or 256 <= ord(token) < 324) for token in vocabulary) == 256


_PRINTABLE = {*map(chr, range(0x21, 0x7F)), *map(chr, range(0xA1, 0xAD)), *map(chr, range(0xAE, 0x100))}


def _has(step: Mapping[str, Any] | None, kind: str) -> bool:
    if step is None:
        return False
    inner = step.get("normalizers") or step.get("pretokenizers") or ()
    return step["type"] == kind or any(_has(one, kind) for one in inner)
