"""Word problems with worked steps. The numbers (and the kind of problem) are the key: a test problem's numbers were
never trained on with that operation."""

from __future__ import annotations

import random

from dfastllm.tasks import words
from dfastllm.tasks.sample import Draft

__all__ = ["make"]


def _steps(lines: list[tuple[int, str, int, int]], numbers: tuple[int, ...], kind: str, prompt: str) -> Draft:
    work = "\n".join(f"{a} {op} {b} = {c}" for a, op, b, c in lines)
    answer = lines[-1][3]
    return Draft((kind, *numbers), prompt, f"{work}\nAnswer: {answer}", str(answer), "answer")


def _add(rng: random.Random) -> Draft:
    a, b = rng.randint(2, 60), rng.randint(2, 39)
    who, item = words.first(rng), rng.choice(words.ITEMS)
    prompt = rng.choice(
        [
            f"{who} has {a} {item} and buys {b} more. How many {item} does {who} have now?",
            f"There are {a} {item} in a box. {who} adds {b}. How many {item} are in the box?",
            f"{who} found {a} {item} in the morning and {b} in the evening. How many is that?",
            f"What is {a} + {b}?",
        ]
    )
    return _steps([(a, "+", b, a + b)], (a, b), "add", prompt)


def _subtract(rng: random.Random) -> Draft:
    a = rng.randint(10, 99)
    b = rng.randint(2, a - 1)
    who, item = words.first(rng), rng.choice(words.ITEMS)
    prompt = rng.choice(
        [
            f"{who} has {a} {item} and gives away {b}. How many {item} are left?",
            f"There were {a} {item} on the shelf. {who} took {b}. How many remain?",
            f"{who} needs {a} {item} and already has {b}. How many are missing?",
            f"What is {a} - {b}?",
        ]
    )
    return _steps([(a, "-", b, a - b)], (a, b), "subtract", prompt)


def _multiply(rng: random.Random) -> Draft:
    a, b = rng.randint(2, 12), rng.randint(2, 9)
    c = rng.randint(1, 20)
    who, item = words.first(rng), rng.choice(words.ITEMS)
    more = rng.random() < 0.5
    start = f"{who} fills {a} bags with {b} {item} each"
    if more:
        prompt = f"{start} and finds {c} more. How many {item} are there?"
        return _steps([(a, "*", b, a * b), (a * b, "+", c, a * b + c)], (a, b, c), "multiply-add", prompt)
    c = rng.randint(1, min(20, a * b - 1))
    prompt = f"{start} and sells {c}. How many {item} are left?"
    return _steps([(a, "*", b, a * b), (a * b, "-", c, a * b - c)], (a, b, c), "multiply-subtract", prompt)


def _chain(rng: random.Random) -> Draft:
    a, b = rng.randint(5, 50), rng.randint(2, 40)
    c = rng.randint(2, min(40, a + b - 1))
    who, item = words.first(rng), rng.choice(words.ITEMS)
    prompt = rng.choice(
        [
            f"{who} had {a} {item}, got {b} more and lost {c}. How many {item} are left?",
            f"A bus carries {a} people. {b} get on and {c} get off. How many people are on the bus?",
            f"What is {a} + {b} - {c}?",
        ]
    )
    return _steps([(a, "+", b, a + b), (a + b, "-", c, a + b - c)], (a, b, c), "chain", prompt)


def make(rng: random.Random) -> Draft:
    return rng.choice([_add, _subtract, _multiply, _chain])(rng)
