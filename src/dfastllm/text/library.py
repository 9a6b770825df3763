"""The `tokenizers` library, called so that nothing but named errors gets out of it.

It raises plain Exceptions, and where its own code goes wrong (a damaged tokenizer.json is enough) a PanicException,
which is no Exception at all and would end the thread of whoever called. Every call that depends on a model's files or
on a text is made within `calling`.

A vocabulary is bounded before the library sees it: it keeps tables as long as the largest id.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import tokenizers

from dfastllm.errors import DFastLLMError, TokenizerError

__all__ = ["LARGEST_ID", "calling", "from_json", "require_ids", "unusable"]

LARGEST_ID = 1 << 22  # the largest published vocabularies have 2**18 tokens; the library takes about 50 bytes an id
_PANIC = "PanicException"  # of pyo3; each library that is built with it has a class of its own


def unusable(error: BaseException) -> bool:
    """Whether this is the library's failure, and not a signal or an error of ours that passes through."""
    if isinstance(error, DFastLLMError | MemoryError):
        return False
    return isinstance(error, Exception) or type(error).__name__ == _PANIC


@contextmanager
def calling(what: str, hint: str) -> Iterator[None]:
    """Around a call of the library: its failures become a TokenizerError. what: the sentence up to the reason, as 'The
    tokenizer cannot encode this text'."""
    try:
        yield
    except BaseException as error:
        if not unusable(error):
            raise
        raise TokenizerError(f"{what}: {_reason(error)}.", hint=hint) from error


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300].rstrip(".")
    return text if isinstance(error, Exception) else f"the tokenizers library failed ({text})"


def from_json(text: str, spec: Any, where: str) -> tokenizers.Tokenizer:
    """The tokenizer that a tokenizer.json describes. spec: the same text as an object. where: for messages, as
    'tokenizer.json in /models/x'. Raises TokenizerError."""
    model = spec.get("model") if isinstance(spec, Mapping) else None
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    added = spec.get("added_tokens") if isinstance(spec, Mapping) else None
    ids = list(vocab.values()) if isinstance(vocab, Mapping) else []
    ids += [token.get("id") for token in added if isinstance(token, Mapping)] if isinstance(added, list) else []
    require_ids(ids, where)
    with calling(f"{where} is no tokenizer", "Download it again, or update the `tokenizers` package."):
        return tokenizers.Tokenizer.from_str(text)


def require_ids(ids: Iterable[Any], where: str) -> None:
    """Raise TokenizerError for an id that no model has a row for."""
    largest = max((id for id in ids if isinstance(id, int)), default=0)
    if largest > LARGEST_ID:
        raise TokenizerError(
            f"{where} gives a token the id {largest}; ids up to {LARGEST_ID} are read.",
            hint="The file is damaged, or of no model.",
        )
