"""Token ids that a GGUF file names, by role, in one place for models and tokenizers alike. Does not tokenise.

Roles are the tokenizer.ggml.*_token_id keys. Texts that end a generation are those llama.cpp recognises; here they
count only where the vocabulary marks them as control or user-defined, never as plain text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dfastllm.errors import TokenizerError

__all__ = [
    "BYTE",
    "CONTROL",
    "NORMAL",
    "UNKNOWN",
    "UNUSED",
    "USER_DEFINED",
    "SpecialIds",
    "special_ids",
    "tokenizer_model",
    "tokens_of",
]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type

_ENDS = (
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <end_of_turn> <|endoftext|> </s> <|eom_id|> <EOT> [EOT] [EOS] "
    "<|end_of_text|> <end_of_utterance> <eos> <｜end▁of▁sentence｜>"
).split()
_NEEDED = ("bos", "eos")  # a text begins or ends with them
_SPM_DEFAULTS = {"bos": 1, "eos": 2, "unknown": 0}  # what a file with tokenizer.ggml.model llama means by silence


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """None: the file has no such token. ends: every id that ends a text, eos first. notes: a sentence for each id that
    is past the vocabulary and passed over, as llama.cpp does."""

    bos: int | None
    eos: int | None
    unknown: int | None
    pad: int | None
    mask: int | None
    ends: tuple[int, ...]
    notes: tuple[str, ...] = ()


def tokenizer_model(metadata: Mapping[str, Any]) -> str | None:
    """The kind of tokenizer, None where the file names none. Raises TokenizerError for what is no text."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind is not None and not isinstance(kind, str):
        raise TokenizerError(
            f"tokenizer.ggml.model of this GGUF file is {type(kind).__name__} {str(kind)!r:.40}, wanted text such as "
            "gpt2 or llama.",
            hint="The file is damaged: download it again.",
            param="tokenizer.ggml.model",
        )
    return kind


def tokens_of(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Tokens and their types. Raises TokenizerError where the lists are absent, empty, of the wrong kind or unequal."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise TokenizerError(
            "tokenizer.ggml.tokens of this GGUF file is no list of tokens.",
            hint="The file was written without a tokenizer; give one as a directory with a tokenizer.json.",
        )
    kinds = metadata.get("tokenizer.ggml.token_type")
    if kinds is None:
        return tokens, [NORMAL] * len(tokens)
    if not isinstance(kinds, np.ndarray) or kinds.dtype.kind not in "iu" or len(kinds) < len(tokens):
        raise TokenizerError(f"tokenizer.ggml.token_type of this GGUF file is no list of {len(tokens)} integers.")
    return tokens, [int(kind) for kind in kinds[: len(tokens)]]


def special_ids(metadata: Mapping[str, Any], vocab_size: int) -> SpecialIds:
    """Ids by role; a file without tokens may name them all the same. vocab_size: rows of the embedding. An id past the
    vocabulary is passed over where a text can do without the token. Raises TokenizerError for an id that is no integer,
    a beginning or end of text outside the vocabulary, and as `tokens_of` does."""
    notes: list[str] = []
    bare = metadata.get("tokenizer.ggml.tokens") is None
    tokens, kinds = ([], []) if bare else tokens_of(metadata)
    defaults = _SPM_DEFAULTS if tokenizer_model(metadata) == "llama" else {}

    def one(role: str) -> int | None:
        name = f"tokenizer.ggml.{role}_token_id"
        found = metadata.get(name)
        if found is None:
            default = defaults.get(role)
            return default if default is not None and default < min(len(tokens), vocab_size) else None
        whole = isinstance(found, int) and not isinstance(found, bool)
        if whole and found >= vocab_size and role not in _NEEDED:
            notes.append(f"{name} is {found}, past the vocabulary of {vocab_size}: passed over.")
            return None
        if not whole or not 0 <= found < vocab_size:
            raise TokenizerError(f"{name} is {found!r:.40}, wanted an id below {vocab_size}.", param=name)
        return int(found)

    eos = one("eos")
    marked = [i for i, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED) and tokens[i] in _ENDS]
    named = [found for found in (eos, one("eot"), one("eom")) if found is not None]
    ends = tuple(i for i in dict.fromkeys([*named, *marked]) if i < vocab_size)
    rest = (one("unknown"), one("padding"), one("mask"))
    return SpecialIds(one("bos"), eos, *rest, ends, tuple(notes))
