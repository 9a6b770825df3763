"""Reading a text that is still being written: a cursor, and readers that pause where the text is not there yet.

A reader is a generator. It yields None when it needs more text, anything else is what it found; its return value is its
verdict. So a grammar is written as if the whole text were there, and gives the same for every cutting of the text.
Positions are kept in the cursor only, because the text before them is dropped while a reader pauses.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import TypeVar

__all__ = ["Cursor", "Reader", "literal", "peek", "run", "space", "word"]

T = TypeVar("T")
V = TypeVar("V")
Reader = Generator[T | None, None, V]

_SPACE = re.compile(r"[ \t\r\n]*")


class Cursor:
    """A text in the making and how far it was read. What was read is dropped, or kept aside while it is held, so that
    a push costs what it brings.

    text  what was pushed and is needed still.
    at    the next character to read.
    last  no more text will come.
    """

    __slots__ = ("_held", "_start", "at", "last", "text")

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.last = False
        self._held: list[str] | None = None  # held text that is no longer in `text`, None while nothing is held
        self._start = 0  # where held text begins in `text`

    def push(self, text: str) -> None:
        if self._held is not None:
            self._held.append(self.text[self._start : self.at])
        self.text = self.text[self.at :] + text
        self.at = self._start = 0

    def hold(self) -> None:
        """Keep the text from here on, to give it back with `release` should it turn out to be content."""
        self._held, self._start = [], self.at

    def drop(self) -> None:
        """What was held is part of a call."""
        self._held = None

    def release(self) -> str:
        """What was held, up to here."""
        held, self._held = self._held or [], None
        return "".join((*held, self.text[self._start : self.at]))


def peek(cursor: Cursor) -> Reader[T, str]:
    """The next character, "" at the end of the text."""
    while cursor.at >= len(cursor.text):
        if cursor.last:
            return ""
        yield None
    return cursor.text[cursor.at]


def space(cursor: Cursor, what: re.Pattern[str] = _SPACE) -> Reader[T, None]:
    """Pass over white space, or over all that `what` matches."""
    while True:
        cursor.at = run(cursor, what)
        if cursor.at < len(cursor.text) or cursor.last:
            return
        yield None


def literal(cursor: Cursor, word: str) -> Reader[T, bool]:
    """Whether `word` comes next; it is passed over then."""
    while True:
        have = cursor.text[cursor.at : cursor.at + len(word)]
        if have == word:
            cursor.at += len(word)
            return True
        if cursor.last or not word.startswith(have):
            return False
        yield None


def word(cursor: Cursor, what: re.Pattern[str], most: int) -> Reader[T, str]:
    """All that `what` matches, which is passed over; "" where it is longer than `most`."""
    while (end := run(cursor, what)) == len(cursor.text) and not cursor.last:
        if end - cursor.at > most:
            return ""
        yield None
    found = cursor.text[cursor.at : end]
    if len(found) > most:
        return ""
    cursor.at = end
    return found


def run(cursor: Cursor, what: re.Pattern[str]) -> int:
    """Where the match of `what` at the cursor ends; where the cursor stands when there is none."""
    found = what.match(cursor.text, cursor.at)
    return cursor.at if found is None else found.end()
