"""Small instructions with one right answer."""

from __future__ import annotations

import random

from dfastllm.tasks import words
from dfastllm.tasks.sample import Draft

__all__ = ["make"]

COUNT = ("two", "three", "four", "five")


def _repeat(rng: random.Random) -> Draft:
    word, times = words.noun(rng), rng.randint(2, 5)
    return Draft(
        ("repeat", word, times),
        f"Repeat the word {word} {COUNT[times - 2]} times.",
        " ".join([word] * times),
        " ".join([word] * times),
        "text",
    )


def _which(rng: random.Random) -> Draft:
    picked = words.nouns(rng, rng.randint(3, 5))
    order, at = rng.choice([("first", 0), ("last", -1), ("second", 1)])
    prompt = f"What is the {order} word? {', '.join(picked)}"
    return Draft(("which", order, *picked), prompt, picked[at], picked[at], "text")


def _compare(rng: random.Random) -> Draft:
    a, b = rng.sample(range(1, 100), k=2)
    larger = rng.random() < 0.5
    answer = str(max(a, b) if larger else min(a, b))
    prompt = f"Which number is {'larger' if larger else 'smaller'}, {a} or {b}?"
    return Draft(("compare", larger, a, b), prompt, answer, answer, "text")


def _count(rng: random.Random) -> Draft:
    picked = words.nouns(rng, rng.randint(2, 6))
    answer = str(len(picked))
    return Draft(("count", *picked), f"How many words are here? {', '.join(picked)}", answer, answer, "text")


def _parity(rng: random.Random) -> Draft:
    n = rng.randint(10, 999)
    answer = "even" if n % 2 == 0 else "odd"
    return Draft(("parity", n), f"Is {n} even or odd?", answer, answer, "text")


def _colour(rng: random.Random) -> Draft:
    colours = rng.sample(words.COLOURS, k=3)
    nouns = words.nouns(rng, 3)
    facts = ", ".join(f"the {noun} is {colour}" for noun, colour in zip(nouns, colours, strict=True))
    at = rng.randrange(3)
    prompt = f"{facts[0].upper()}{facts[1:]}. What colour is the {nouns[at]}?"
    return Draft(("colour", *colours, *nouns, at), prompt, colours[at], colours[at], "text")


def _fill(rng: random.Random) -> Draft:
    name, thing, colour = words.first(rng), words.noun(rng), rng.choice(words.COLOURS)
    answer = f"{name} has a {colour} {thing}."
    prompt = f"Write a sentence that says {name} has a {thing} that is {colour}."
    return Draft(("fill", name, thing, colour), prompt, answer, answer, "text")


def make(rng: random.Random) -> Draft:
    return rng.choice([_repeat, _which, _compare, _count, _parity, _colour, _fill])(rng)
