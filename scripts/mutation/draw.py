"""Which of all possible mutants are tried: drawn by a seed, room by room, kind by kind."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from scripts.mutation.mutant import room_of

__all__ = ["LEAST", "Place", "draw"]

LEAST = 10  # mutants of each room that has so many places
# How often each kind is asked for. Drawing places alone would draw numbers and comparisons only: they are the most.
WEIGHTS = {"comparison": 6, "boolean": 6, "arithmetic": 4, "number": 4, "flow": 3, "rest": 1}


@dataclass(frozen=True, order=True)
class Place:
    """Where an operator of the library can change a file.

    file: from the root of the tree
    line, column: where
    operator, occurrence: the library's own name of the change
    """

    file: str
    line: int
    column: int
    operator: str
    occurrence: int

    @property
    def kind(self) -> str:
        name = self.operator
        if "Comparison" in name:
            return "comparison"
        if "BinaryOperator" in name or name.endswith(("USub", "Invert", "UAdd")):
            return "arithmetic"
        if name == "NumberReplacer":
            return "number"
        if name in ("ZeroIterationForLoop", "ReplaceBreakWithContinue", "ReplaceContinueWithBreak"):
            return "flow"
        return "rest" if name in ("RemoveDecorator", "ExceptionReplacer") else "boolean"


def draw(places: Iterable[Place], seed: int, count: int, fits: Callable[[Place], bool] = bool) -> list[Place]:
    """About `count` of `places`, at most one on a line: LEAST of each room, the rest shared out by the rooms' size (a
    room that has fewer gives all). The same for the same places and seed; a room's draw does not depend on another's
    places beyond how many it gets. fits: whether a place gives a fault at all; one that does not is drawn anew."""
    rooms: dict[str, list[Place]] = defaultdict(list)
    for place in sorted(places):
        rooms[room_of(place.file)].append(place)
    total = sum(map(len, rooms.values()))
    spare = max(0, count - LEAST * len(rooms))
    drawn: list[Place] = []
    for room, own in sorted(rooms.items()):
        drawn += draw_room(own, random.Random(f"{seed} {room}"), LEAST + round(spare * len(own) / total), fits)
    return drawn


def draw_room(places: list[Place], rng: random.Random, count: int, fits: Callable[[Place], bool]) -> list[Place]:
    kinds: dict[str, list[Place]] = defaultdict(list)
    for place in places:
        kinds[place.kind].append(place)
    drawn: list[Place] = []
    taken: set[tuple[str, int]] = set()
    while kinds and len(drawn) < count:
        kind = rng.choices(sorted(kinds), [WEIGHTS[name] for name in sorted(kinds)])[0]
        place = kinds[kind].pop(rng.randrange(len(kinds[kind])))
        if not kinds[kind]:
            del kinds[kind]
        if (place.file, place.line) not in taken and fits(place):
            taken.add((place.file, place.line))
            drawn.append(place)
    return sorted(drawn)
