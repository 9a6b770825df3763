"""Short typed Python functions, graded by what they compute."""

from __future__ import annotations

import random
from collections.abc import Callable

from dfastllm.tasks import words
from dfastllm.tasks.sample import Draft

__all__ = ["make"]

Spec = tuple[str, str, str, str, list[list[object]]]  # what it does, parameters, return type, expression, test inputs


def _number(rng: random.Random) -> Spec:
    k = rng.randint(2, 99)
    x = rng.choice(["x", "n", "value"])
    verb, expr = rng.choice(
        [
            (f"adds {k} to {x}", f"{x} + {k}"),
            (f"subtracts {k} from {x}", f"{x} - {k}"),
            (f"multiplies {x} by {k}", f"{x} * {k}"),
            (f"returns the remainder of {x} divided by {k}", f"{x} % {k}"),
            (f"returns the larger of {x} and {k}", f"max({x}, {k})"),
            (f"returns the smaller of {x} and {k}", f"min({x}, {k})"),
        ]
    )
    return verb, f"{x}: int", "int", expr, [[0], [7], [k], [-5], [3 * k + 1]]


def _test(rng: random.Random) -> Spec:
    k = rng.randint(2, 99)
    x = rng.choice(["x", "n", "value"])
    verb, expr = rng.choice(
        [
            (f"checks if {x} is greater than {k}", f"{x} > {k}"),
            (f"checks if {x} is less than {k}", f"{x} < {k}"),
            (f"checks if {x} is divisible by {k}", f"{x} % {k} == 0"),
            (f"checks if {x} equals {k}", f"{x} == {k}"),
        ]
    )
    return verb, f"{x}: int", "bool", expr, [[k], [k + 1], [k - 1], [0], [2 * k]]


def _text(rng: random.Random) -> Spec:
    word = words.noun(rng)
    s = rng.choice(["s", "text", "word"])
    verb, returns, expr = rng.choice(
        [
            (f"puts '{word}' before {s}", "str", f"'{word}' + {s}"),
            (f"puts '{word}' after {s}", "str", f"{s} + '{word}'"),
            (f"checks if {s} starts with '{word}'", "bool", f"{s}.startswith('{word}')"),
            (f"checks if {s} ends with '{word}'", "bool", f"{s}.endswith('{word}')"),
            (f"counts '{word}' in {s}", "int", f"{s}.count('{word}')"),
        ]
    )
    return verb, f"{s}: str", returns, expr, [[""], [word], [f"{word} and {word}"], [f"a{word}"], [f"{word}s"]]


def _items(rng: random.Random) -> Spec:
    k = rng.randint(2, 99)
    xs = rng.choice(["xs", "items", "numbers"])
    verb, returns, expr = rng.choice(
        [
            (f"adds {k} to the sum of {xs}", "int", f"sum({xs}) + {k}"),
            (f"counts {k} in {xs}", "int", f"{xs}.count({k})"),
            (f"checks if {k} is in {xs}", "bool", f"{k} in {xs}"),
            (f"keeps the items of {xs} above {k}", "list[int]", f"[x for x in {xs} if x > {k}]"),
            (f"multiplies each item of {xs} by {k}", "list[int]", f"[x * {k} for x in {xs}]"),
        ]
    )
    return verb, f"{xs}: list[int]", returns, expr, [[[]], [[k]], [[1, k, k + 1]], [[k, k, 3]], [[-4, 120]]]


def make(rng: random.Random) -> Draft:
    makers: list[Callable[[random.Random], Spec]] = [_number, _test, _text, _items]
    verb, parameters, returns, expr, inputs = rng.choice(makers)(rng)
    name = words.noun(rng) if rng.random() < 0.7 else rng.choice(["f", "solve", "check", "run"])
    signature = f"{name}({parameters}) -> {returns}"
    prompt = rng.choice([f"Write a function {signature} that {verb}.", f"Python function {signature}: {verb}."])
    source = f"def {signature}:\n    return {expr}"
    expected = {"name": name, "source": source, "inputs": inputs}
    return Draft((verb,), prompt, source, expected, "function")
