"""`value`: a frozen dataclass to the type checker, a plain slotted one when it runs.

For the values made by the hundred in every step. A frozen dataclass sets each field through `object.__setattr__`, about
0.2 microseconds apiece; the dozens a sequence makes in a step cost more than its decision. mypy still refuses every
assignment; equality and hash are those of a frozen dataclass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["value"]

if TYPE_CHECKING:
    from dataclasses import dataclass as value
else:
    from dataclasses import dataclass

    def value(*, frozen, slots):
        """Decorate a class as `dataclass(frozen=True, slots=True)` would, but for the run-time check."""
        assert frozen
        return dataclass(slots=slots, unsafe_hash=True)
