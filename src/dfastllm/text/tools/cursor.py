"""Reading a text that is still being written: a cursor, and readers that pause where the text is not there yet.

A reader is a generator. It yields None when it needs more text, anything else is what it found; its return value is its
verdict. So a grammar is written as if the whole text were there, and gives the same for every cutting of the text.
Positions are kept in the cursor only, because the text before them is dropped while a reader pauses.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import TypeVar

__all__ = ["Cursor", "Reader", "literal", "peek", "run", "space"]

T = TypeVar("T")
V = TypeVar("V")
Reader = Generator[T | None, None, V]

_SPACE = re.compile(r"[ \t\r\n]*")


class Cursor:
    """A text in the making and how far it was read.

    text  what is still needed of it: pushed text from `start`, or from `at` where nothing is held.
    at    the next character to read.
    last  no more text will come.
    """

    __slots__ = ("_held", "at", "last", "start", "text")

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.last = False
        self.start = 0
        self._held = False

    def push(self, text: str) -> None:
        done = self.start if self._held else self.at
        self.text = self.text[done:] + text
        self.at -= done
        self.start = 0

    def hold(self) -> None:
        """Keep the text from here on, to give it back with `release` should it turn out to be content."""
        self.start, self._held = self.at, True

    def drop(self) -> None:
        """What was held is part of a call."""
        self._held = False

    def release(self) -> str:
        """What was held, up to here."""
        self._held = False
        return self.text[self.start : self.at]


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


def run(cursor: Cursor, what: re.Pattern[str]) -> int:
    """Where the match of `what` at the cursor ends; where the cursor stands when there is none."""
    found = what.match(cursor.text, cursor.at)
    return cursor.at if found is None else found.end()
