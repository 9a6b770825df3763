"""What people wrote, kept apart in a rendering from what the template wrote, by marking it letter by letter.

A template may trim, cut and join the texts it is given, so nothing put around them is sure to survive. Here each
character of them that can begin or end a special token's spelling is exchanged for a stand-in: a printed symbol of a
script that nobody writes, which templates move about like any letter. After rendering, a spelling that begins or ends
with a stand-in is a person's text; one that does not was written by the template.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["Marks", "Quoting"]

# Byzantine musical symbols, tiles, counting rods: each printable, of one case, and left alone by JSON and by repr.
_STAND_INS = [
    chr(code) for block in ((0x1D000, 0x1D0F6), (0x1F030, 0x1F094), (0x1D300, 0x1D357)) for code in range(*block)
]
_ANY = re.compile(f"[{''.join(_STAND_INS)}]")


class Marks:
    """Which characters of people's texts are exchanged. Of one tokenizer and one template.

    spellings: of the special tokens. literals: texts that the template's code has; it may look for them in what people
    wrote (</think>), so they are left as they are where no special token can begin or end in them.
    """

    def __init__(self, spellings: Iterable[str], literals: Iterable[str]) -> None:
        spellings = [one for one in spellings if one.strip()]
        edges = set()
        words = []
        for one in spellings:
            ends = [letter for letter in (one[0], one[-1]) if not letter.isalnum() and not letter.isspace()]
            ends = ends or [letter for letter in one if not letter.isalnum() and not letter.isspace()][:1]
            edges.update(ends)
            if not ends:
                words.append(one)
        self.letters = sorted(edges | {word[0] for word in words})
        kept = [one for one in literals if len(one) > 1 and edges & set(one) and not _touches(one, spellings)]
        self._words = frozenset(words)
        choices = [*sorted(kept, key=len, reverse=True), *sorted(words, key=len, reverse=True)]
        pattern = [re.escape(one) for one in choices]
        if edges:
            pattern.append(f"[{re.escape(''.join(sorted(edges)))}]")
        self.pattern = re.compile("|".join(pattern)) if pattern else None

    def exchanged(self, found: str, stand_ins: Mapping[str, str]) -> str:
        """What a match of `pattern` becomes."""
        if len(found) == 1 or found in self._words:
            return stand_ins[found[0]] + found[1:]
        return found


def _touches(literal: str, spellings: Iterable[str]) -> bool:
    """Whether one of the spellings may begin or end in the literal, whatever stands around it."""
    for at in range(len(literal)):
        head, tail = literal[: at + 1], literal[at:]
        for one in spellings:
            if one.startswith(tail) or tail.startswith(one) or one.endswith(head) or head.endswith(one):
                return True
    return False


class Quoting:
    """The stand-ins of one rendering: symbols that `texts`, all that is rendered, do not have. `needed` is False where
    no character of them need be exchanged."""

    def __init__(self, marks: Marks, given: Iterable[Any], source: str) -> None:
        self._marks = marks
        texts = list(_texts(given))
        pattern = marks.pattern
        self.needed = pattern is not None and any(pattern.search(text) for text in texts)
        self._stand_ins: dict[str, str] = {}
        if self.needed:
            taken = {symbol for text in (*texts, source) for symbol in _ANY.findall(text)}
            free = (symbol for symbol in _STAND_INS if symbol not in taken)
            private = (chr(code) for code in range(0xF0000, 0xFFFFE) if not any(chr(code) in text for text in texts))
            self._stand_ins = {letter: next(free, None) or next(private) for letter in marks.letters}
        self._back = str.maketrans({symbol: letter for letter, symbol in self._stand_ins.items()})

    def quoted(self, value: Any) -> Any:
        """`value` with the characters of its texts exchanged, and of what it holds; roles stay, for templates compare
        them."""
        pattern = self._marks.pattern
        if isinstance(value, str):
            if pattern is None:
                return value
            return pattern.sub(lambda found: self._marks.exchanged(found.group(), self._stand_ins), value)
        if isinstance(value, Mapping):
            return {self.quoted(key): one if key == "role" else self.quoted(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [self.quoted(one) for one in value]
        return value

    def restored(self, text: str) -> str:
        """A rendering with its letters back, each in its place."""
        return text.translate(self._back)


def _texts(given: Iterable[Any]) -> Iterable[str]:
    rest = list(given)
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            rest += [*value.keys(), *(one for key, one in value.items() if key != "role")]
        elif isinstance(value, list | tuple):
            rest += value
