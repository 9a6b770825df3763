"""Facts to a Markdown table, a row for each of several people or things."""

from __future__ import annotations

import random
from collections.abc import Callable

from dfastllm.tasks import words
from dfastllm.tasks.sample import Draft

__all__ = ["make"]

Row = tuple[str, ...]


def _person(rng: random.Random) -> Row:
    return words.first(rng), str(rng.randint(18, 90)), words.city(rng)


def _order(rng: random.Random) -> Row:
    return words.noun(rng), str(rng.randint(2, 40)), str(rng.randint(1, 99))


def _lamp(rng: random.Random) -> Row:
    return words.noun(rng), rng.choice(words.COLOURS), str(rng.randint(1, 40))


KINDS: tuple[tuple[Row, Callable[[random.Random], Row]], ...] = (
    (("name", "age", "city"), _person),
    (("item", "quantity", "price"), _order),
    (("thing", "colour", "room"), _lamp),
)


def make(rng: random.Random) -> Draft:
    head, one = rng.choice(KINDS)
    rows = [one(rng) for _ in range(rng.randint(4, 5))]
    lines = [head, ("---",) * len(head), *rows]
    answer = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    facts = ", ".join(" ".join(row) for row in rows)
    ask = rng.choice(["Make a table of {}: {}", "Write a table with {}: {}"]).format(", ".join(head), facts)
    return Draft((head[0], *rows), ask, answer, answer, "text")
