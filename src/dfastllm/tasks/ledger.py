"""Arithmetic of several steps: a chain in which each step needs the one before, or sums that stand on their own.

Results stay between 1 and 99, so that each step alone is as hard as those of the word problems."""

from __future__ import annotations

import random

from dfastllm.tasks import words
from dfastllm.tasks.sample import Draft

__all__ = ["make"]


def _change(rng: random.Random, total: int) -> tuple[str, int, int]:
    """(sign, number, result) of one step from `total`."""
    if total <= 2 or (total < 90 and rng.random() < 0.5):
        number = rng.randint(1, min(30, 99 - total))
        return "+", number, total + number
    number = rng.randint(1, min(30, total - 1))
    return "-", number, total - number


def _chain(rng: random.Random) -> Draft:
    who, item = words.first(rng), rng.choice(words.ITEMS)
    begin = total = rng.randint(10, 60)
    lines, said, key = [], [], [begin]
    for _ in range(rng.randint(6, 7)):
        sign, number, after = _change(rng, total)
        lines.append(f"{total} {sign} {number} = {after}")
        said.append(f"{'gets' if sign == '+' else 'loses'} {number}")
        key.append(number if sign == "+" else -number)
        total = after
    steps = ", ".join(said)
    ask = rng.choice(
        [
            f"{who} has {begin} {item}, {steps}. How many {item} are left?",
            f"{who} starts with {begin} {item}, {steps}. How many is that?",
        ]
    )
    return Draft(("chain", *key), ask, "\n".join([*lines, f"Answer: {total}"]), str(total), "answer")


def _sheet(rng: random.Random) -> Draft:
    asked, lines = [], []
    for _ in range(rng.randint(6, 7)):
        a = rng.randint(3, 90)
        sign, b, result = _change(rng, a)
        asked.append(f"{a} {sign} {b}")
        lines.append(f"{a} {sign} {b} = {result}")
    answer = "\n".join(lines)
    ask = rng.choice(["Work these out: {}", "Solve each, one a line: {}"]).format(", ".join(asked))
    return Draft(("sheet", *asked), ask, answer, answer, "text")


def make(rng: random.Random) -> Draft:
    return rng.choice([_chain, _sheet])(rng)
