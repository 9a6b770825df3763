"""Text that spells a special token, encoded as the text it is.

`tokenizers` finds special tokens in a text before anything else. Here a second tokenizer of the same file finds none
(its `encode_special_tokens`, what Hugging Face calls split_special_tokens), and the special tokens that a template
wrote stand in its text as a mark, which cuts the text where they would. Text without such a spelling never comes here.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Iterable, Sequence

import tokenizers

__all__ = ["PlainText"]


class PlainText:
    """Encodes with a tokenizer's special tokens left unread. Made on first use, since it is a second tokenizer in
    memory; safe to use from many threads. ids: of the tokens that are not to be found in a text."""

    def __init__(self, backend: tokenizers.Tokenizer, ids: Iterable[int]) -> None:
        self._backend = backend
        self.ids = frozenset(ids)
        self._lock = threading.Lock()
        self._made: tokenizers.Tokenizer | None = None
        # Marks that no text has, for nobody can know them.
        self._mark, self._break = (f"\U0010fffd{secrets.token_hex(12)}{kind}\U0010fffd" for kind in "mb")

    def _plain(self) -> tokenizers.Tokenizer:
        with self._lock:
            if self._made is None:
                state = json.loads(self._backend.to_str())
                for token in state["added_tokens"]:
                    token["special"] = token["special"] or token["id"] in self.ids
                made = tokenizers.Tokenizer.from_str(json.dumps(state))
                made.encode_special_tokens = True
                made.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in (self._mark, self._break)])
                self._made = made
            return self._made

    def encode(
        self, text: str, spans: Sequence[tuple[int, int, int]], breaks: Iterable[int] = (), *, add_special: bool = False
    ) -> list[int]:
        """Token ids of `text`. spans: (start, stop, id) of the special tokens that do count, in order. breaks: places
        in the text behind which no token may go on, should the model of the tokenizer itself know one of the special
        tokens (Unigram and WordPiece may). add_special: also what the tokenizer puts around a text."""
        pieces, at = [], 0
        for start, stop, _ in spans:
            pieces += [text[at:start], self._mark]
            at = stop
        pieces.append(text[at:])
        ids = self._finished("".join(pieces), [id for *_, id in spans], add_special)
        around = len(self._finished("", [], add_special)) if add_special else 0
        if sum(id in self.ids for id in ids) > len(spans) + around and breaks:
            broken, at = [], 0
            cuts = sorted(
                [
                    *((start, stop, self._mark) for start, stop, _ in spans),
                    *((b + 1, b + 1, self._break) for b in breaks),
                ]
            )
            for start, stop, mark in cuts:
                broken += [text[at:start], mark]
                at = stop
            ids = self._finished("".join([*broken, text[at:]]), [id for *_, id in spans], add_special)
        return ids

    def _finished(self, text: str, marked: Sequence[int], add_special: bool) -> list[int]:
        plain = self._plain()
        mark, cut = plain.token_to_id(self._mark), plain.token_to_id(self._break)
        rest = iter(marked)
        ids = plain.encode(text, add_special_tokens=add_special).ids
        return [next(rest) if id == mark else id for id in ids if id != cut]
