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
SECONDS = 3.0  # of this thread's own work, however busy the machine is
WORTH = 16  # further steps, and characters of one text, that each character of the conversation allows
SLICE = 128  # steps between looks at the clock
_OTHER = 16  # characters that a number or an object is taken for
Item = TypeVar("Item")


class TooMuch(jinja2.TemplateError):
    """The template asks for more than it may spend; the message is a clause that says of what."""


class TooDeep(TooMuch):
    """A value that holds others to a depth that nobody writes."""


class Budget:
    """Of one rendering, used by one thread. given: the values that the template sees, whose size the limits grow with.

    steps     left of the present slice. Compiled templates take from it and call `exhausted` when it is below 0.
    longest   characters that one text may have.
    items     entries that one list may have.
    woven     the template put lists into lists, so that one may be in many places: writing one out may take far more
              than there is. Until then what is written out is what was given.
    """

    __slots__ = ("_begun", "_characters", "_given", "_steps", "_weights", "items", "longest", "steps", "woven")

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given: Mapping[str, Any] | None = given
        self.steps = SLICE
        self._steps = STEPS - SLICE
        self._characters = TOTAL
        self.longest = LONGEST
        self.items = ITEMS
        self.woven = False
        self._begun: float | None = None
        self._weights: dict[int, tuple[Any, int]] = {}

    def tick(self) -> None:
        """One step. Raises TooMuch when there were too many, or they took too long."""
        self.steps -= 1
        if self.steps < 0:
            self.exhausted()

    def exhausted(self) -> None:
        """A slice of steps is used up: take the next. Raises TooMuch when there is none, or the thread worked too
        long."""
        self._steps += self.steps
        if self._steps <= 0 and not (self._grow() and self._steps > 0):
            raise TooMuch(f"it takes more than {STEPS:,} steps")
        self.steps = min(SLICE, self._steps)
        self._steps -= self.steps
        now = time.thread_time()
        self._begun = now if self._begun is None else self._begun
        if now - self._begun > SECONDS:
            raise TooMuch(f"it works for more than {SECONDS:g} seconds")

    def spend(self, steps: int) -> None:
        """Steps for an operation that looks at so many things at once."""
        self.steps -= steps
        if self.steps < 0:
            self.exhausted()

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
        if isinstance(value, str):
            size = len(value)
            if size > self.longest:
                self.room(size)
        elif isinstance(value, list | tuple | dict | set):
            size = 8 * len(value)
            if self.woven:
                self.weight(value)
        elif isinstance(value, int) and value.bit_length() > BITS:
            raise TooMuch(f"it makes a number of more than {BITS:,} bits")
        else:
            return value
        self._characters -= size
        if self._characters < 0 and not (self._grow() and self._characters >= 0):
            raise TooMuch(f"it makes more than {TOTAL:,} characters of text")
        return value

    def built(self, value: Any) -> Any:
        """`value`, a list, a tuple or a dict that the template puts together of others, charged with its texts."""
        parts = value.values() if isinstance(value, dict) else value
        self._characters -= sum(len(part) for part in parts if isinstance(part, str))
        self.woven = self.woven or any(isinstance(part, list | tuple | dict | set | Mapping) for part in parts)
        return self.made(value)

    def written(self, value: Any) -> Any:
        """`value`, which is no text and is about to be written out. Raises TooMuch where that is too long."""
        if self.woven:
            self.weight(value)
        return value

    def metered(self, items: Iterable[Item]) -> Iterator[Item]:
        """`items`, a step each."""
        for item in items:
            self.steps -= 1
            if self.steps < 0:
                self.exhausted()
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
