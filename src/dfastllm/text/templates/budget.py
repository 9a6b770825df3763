"""What one rendering of a chat template may spend: steps, characters, and processor time as the last resort.

A template comes with a checkpoint, so it is a program of a stranger's. The sandbox charges each step here before it is
done. Steps and characters are counted, not timed: the same template and conversation end the same way on every machine.
The limits grow with the conversation, whose size is measured only when a limit is reached.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jinja2
from jinja2.runtime import Undefined

__all__ = ["Budget", "TooDeep", "TooMuch"]

STEPS = 1_000_000  # rounds of loops and calls; the longest templates in the field take some dozens for each message
LONGEST = 4_000_000  # characters of one text
TOTAL = 256_000_000  # characters of all texts that are made
ITEMS = 1_000_000  # entries of one list
BITS = 1 << 16  # of a whole number
DEPTH = 200  # of lists in lists
SECONDS = 10.0  # of this thread's own work, however busy the machine is
WORTH = 16  # further steps, and characters of one text, that each character of the conversation allows
_CLOCK_EVERY = 64  # steps between looks at the clock
_OTHER = 16  # characters that a number or an object is taken for
Item = TypeVar("Item")


class TooMuch(jinja2.TemplateError):
    """The template asks for more than it may spend; the message is a clause that says of what."""


class TooDeep(TooMuch):
    """A value that holds others to a depth that nobody writes."""


class Budget:
    """Of one rendering, used by one thread. given: the values that the template sees, whose size the limits grow with.

    longest   characters that one text may have.
    items     entries that one list may have.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given: Mapping[str, Any] | None = given
        self._steps = STEPS
        self._characters = TOTAL
        self.longest = LONGEST
        self.items = ITEMS
        self._look = _CLOCK_EVERY
        self._deadline = time.monotonic() + SECONDS
        self._begun = time.thread_time()
        self._weights: dict[int, tuple[Any, int]] = {}

    def tick(self) -> None:
        """One step. Raises TooMuch when there were too many, or they took too long."""
        self._steps -= 1
        if self._steps < 0 and not (self._grow() and self._steps >= 0):
            raise TooMuch(f"it takes more than {STEPS:,} steps")
        self._look -= 1
        if self._look < 0:
            self.look()

    def look(self) -> None:
        """At the clock. Raises TooMuch when the thread has worked too long."""
        self._look = _CLOCK_EVERY
        if time.monotonic() > self._deadline and time.thread_time() - self._begun > SECONDS:
            raise TooMuch(f"it works for more than {SECONDS:g} seconds")

    def room(self, characters: float) -> None:
        """Raises TooMuch for a text of so many characters, before it is made."""
        if characters > self.longest and not (self._grow() and characters <= self.longest):
            raise TooMuch(f"it makes a text of {characters:,.0f} characters, more than {self.longest:,}")

    def entries(self, count: float) -> None:
        """Raises TooMuch for a list of so many entries, before it is made."""
        if count > self.items and not (self._grow() and count <= self.items):
            raise TooMuch(f"it makes a list of {count:,.0f} entries, more than {self.items:,}")

    def made(self, value: Any) -> Any:
        """`value`, which an operation made, charged. Raises TooMuch for one that is too large."""
        kind = type(value)
        if kind is str or isinstance(value, str):
            size = len(value)
            if size > self.longest:
                self.room(size)
        elif kind is bool or value is None:
            return value
        elif kind is int:
            if value.bit_length() > BITS:
                raise TooMuch(f"it makes a number of more than {BITS:,} bits")
            return value
        elif isinstance(value, list | tuple | dict | set):
            size = 8 * len(value)
            self.weight(value)
        else:
            return value
        self._characters -= size
        if self._characters < 0 and not (self._grow() and self._characters >= 0):
            raise TooMuch(f"it makes more than {TOTAL:,} characters of text")
        return value

    def metered(self, items: Iterable[Item]) -> Iterator[Item]:
        """`items`, a step each."""
        for item in items:
            self.tick()
            yield item

    def weight(self, value: Any, depth: int = 0) -> int:
        """About how many characters `value` has when it is written out; a list that holds another twice has it twice.
        Raises TooMuch for more than one text may have, TooDeep for lists in lists in lists."""
        if isinstance(value, str):
            return len(value)
        if not isinstance(value, list | tuple | dict | set | Mapping) or isinstance(value, Undefined):
            return _OTHER
        known = self._weights.get(id(value))
        if known is not None:
            return known[1]
        if depth > DEPTH:
            raise TooDeep(f"a value nests others more than {DEPTH} deep")
        size = 2
        if isinstance(value, Mapping):
            for key, one in value.items():
                size += self.weight(key, depth + 1) + self.weight(one, depth + 1) + 6
        else:
            for one in value:
                size += self.weight(one, depth + 1) + 2
        self.room(size)
        self._weights[id(value)] = (value, size)  # the value is kept, so that its id stays its own
        return size

    def _grow(self) -> bool:
        """Raise the limits by the size of the conversation, once. False when that was done before."""
        if self._given is None:
            return False
        size, self._given = _size(self._given), None
        self._steps += WORTH * size
        self._characters += WORTH * size
        self.longest += WORTH * size
        self.items += size
        return True


def _size(given: Mapping[str, Any]) -> int:
    """Characters of all texts in `given`, each other value as some."""
    size, rest = 0, list(given.values())
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            size += len(value) + 1
        elif isinstance(value, Mapping):
            rest += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            rest += value
        else:
            size += 1
    return size
