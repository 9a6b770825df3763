"""Python functions of several lines (branches, a loop, steps), graded by what they compute."""

from __future__ import annotations

import random

from dfastllm.tasks import words
from dfastllm.tasks.sample import Draft

__all__ = ["make"]

Spec = tuple[str, str, str, list[str], list[list[object]]]  # what it does, parameter, return type, body, test inputs


def _branches(rng: random.Random) -> Spec:
    low, middle, upper, high = words.nouns(rng, 4)
    a, b, c = sorted(rng.sample(range(10, 99), k=3))
    x = rng.choice(["x", "n", "value"])
    body = [
        f"    if {x} < {a}:",
        f"        return '{low}'",
        f"    if {x} < {b}:",
        f"        return '{middle}'",
        f"    if {x} < {c}:",
        f"        return '{upper}'",
        f"    return '{high}'",
    ]
    what = f"'{low}' below {a}, '{middle}' below {b}, '{upper}' below {c}, else '{high}'"
    return what, f"{x}: int", "str", body, [[a - 1], [a], [b], [c - 1], [c]]


def _loop(rng: random.Random) -> Spec:
    begin, k, times, less = rng.randint(1, 50), rng.randint(2, 60), rng.randint(2, 9), rng.randint(2, 40)
    xs = rng.choice(["xs", "items", "numbers"])
    word, sign = rng.choice([("above", ">"), ("below", "<")])
    what, term = rng.choice([(f"add x times {times}", f"x * {times}"), (f"add x and {times}", f"x + {times}")])
    body = [
        f"    total = {begin}",
        f"    for x in {xs}:",
        f"        if x {sign} {k}:",
        f"            total += {term}",
        f"    return total - {less}",
    ]
    what = f"start at {begin}, for each x of {xs} {word} {k} {what}, return the total less {less}"
    return what, f"{xs}: list[int]", "int", body, [[[]], [[k]], [[k - 1, k + 1]], [[1, 70, k + 2]], [[-3, 99, 5]]]


def _steps(rng: random.Random) -> Spec:
    a, b, c, d = (rng.randint(2, 40) for _ in range(4))
    x = rng.choice(["x", "n", "value"])
    body = [
        f"    first = {x} + {a}",
        f"    second = first * {b}",
        f"    third = second - {c}",
        f"    last = third + {x}",
        f"    return last - {d}",
    ]
    what = f"add {a} to {x}, multiply by {b}, subtract {c}, add {x}, subtract {d}"
    return what, f"{x}: int", "int", body, [[0], [1], [7], [a], [50]]


def make(rng: random.Random) -> Draft:
    what, parameter, returns, body, inputs = rng.choice([_branches, _loop, _steps])(rng)
    name = words.noun(rng)
    signature = f"{name}({parameter}) -> {returns}"
    ask = rng.choice(["Write a function {} with several lines: {}.", "Python function {}, line by line: {}."])
    source = "\n".join([f"def {signature}:", *body])
    expected = {"name": name, "source": source, "inputs": inputs}
    return Draft((what,), ask.format(signature, what), source, expected, "function")
