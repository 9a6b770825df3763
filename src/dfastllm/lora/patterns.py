"""Which modules a rank or alpha of its own is for: PEFT's patterns, looked up quickly and within a bound.

A pattern is a module's name, the end of one, or a regular expression for either, and the first that fits decides. A
mixture's config has one for each expert, so plain names are looked up, not tried one after the other. An adapter is a
file from somewhere, and a regular expression can be made to take years, with the interpreter held meanwhile: `weighed`
bounds what one may cost.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Generic, TypeVar

__all__ = ["MOST_COST", "MOST_EXPRESSIONS", "Patterns", "weighed"]

T = TypeVar("T")
MOST_EXPRESSIONS = 64
MOST_COST = 5_000_000  # steps of one match at worst
MOST_CHARACTERS = 256
NAME = 60  # characters of a module's name, about
_PLAIN = re.compile(r"[\w.]+")
_OPENING = re.compile(r"\((\?:|\?<?[=!])?")
_REPEAT = re.compile(r"[*+]|\{\d*,?\d*\}")


class Patterns(Generic[T]):
    """Values by pattern. Raises ValueError, saying what is wrong, for a pattern that cannot be used."""

    def __init__(self, values: Mapping[str, T]) -> None:
        self.values = dict(values)
        self._names: dict[str, int] = {}  # plain ones, by the place they have in the order
        self._expressions: list[tuple[int, re.Pattern[str]]] = []
        for place, pattern in enumerate(values):
            if _PLAIN.fullmatch(pattern):
                self._names[pattern] = place
                continue
            try:
                compiled = re.compile(rf"(.*\.)?({pattern})$")
                re.compile(pattern)  # alone too: "a)|(b" is none
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"{pattern!r:.80} is no regular expression: {error}") from error
            weighed(pattern)
            self._expressions.append((place, compiled))
        if len(self._expressions) > MOST_EXPRESSIONS:
            raise ValueError(f"{len(self._expressions)} regular expressions are more than {MOST_EXPRESSIONS}")
        self._in_order = list(self.values.values())

    def of(self, module: str, default: T) -> T:
        """The value of the first pattern that is the module's name, the end of it, or an expression for either."""
        best = len(self._in_order)
        words = module.split(".")
        for start in range(len(words)):
            best = min(best, self._names.get(".".join(words[start:]), best))
        for place, compiled in self._expressions:
            if place > best:
                break
            if compiled.match(module):
                best = place
        return self._in_order[best] if best < len(self._in_order) else default


def weighed(pattern: str) -> int:
    """Steps that matching a module's name may take at worst, over-estimated: each open repeat may begin and end
    anywhere, each option doubles, each choice multiplies. Raises ValueError where that is more than MOST_COST, and for
    what has no such bound: a repeated group, a back-reference."""
    if len(pattern) > MOST_CHARACTERS:
        raise ValueError(f"{pattern!r:.40}... has {len(pattern)} characters; {MOST_CHARACTERS} are taken")
    cost, at, choices = NAME, 0, [1]  # choices: of the groups that are open
    while at < len(pattern):
        if pattern[at] == "\\":
            if pattern[at + 1 : at + 2].isdigit():
                raise ValueError(f"{pattern!r:.80} refers back to a group")
            at += 2
        elif pattern[at] == "[":
            at = _end_of_set(pattern, at)
        elif pattern[at] == "(":
            opening = _OPENING.match(pattern, at)
            assert opening is not None
            if pattern.startswith("?", opening.end()):
                raise ValueError(f"{pattern!r:.80} has a group of a kind that is not taken")
            choices.append(1)
            at = opening.end()
        elif pattern[at] == ")":
            cost *= choices.pop()
            at += 1
            if _REPEAT.match(pattern, at):
                raise ValueError(f"{pattern!r:.80} repeats a group, which may take for ever")
        elif pattern[at] == "|":
            choices[-1] += 1
            at += 1
        elif repeat := _REPEAT.match(pattern, at):
            cost *= NAME
            at = repeat.end()
        else:
            cost *= 2 if pattern[at] == "?" else 1
            at += 1
    cost *= choices[0]
    if cost > MOST_COST:
        raise ValueError(f"{pattern!r:.80} may take {cost:,} steps a module; {MOST_COST:,} are taken")
    return cost


def _end_of_set(pattern: str, at: int) -> int:
    """Where [...] that begins here ends; a ] that comes first, or after ^, is one of its characters."""
    at += 1
    at += pattern.startswith("^", at)
    at += pattern.startswith("]", at)
    while pattern[at] != "]":
        at += 2 if pattern[at] == "\\" else 1
    return at + 1
