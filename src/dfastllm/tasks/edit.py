"""Copying with changes: a text of several sentences comes back with one word replaced, or line by line."""

from __future__ import annotations

import random
import re

from dfastllm.tasks import words
from dfastllm.tasks.sample import Draft

__all__ = ["make"]

SENTENCES = (
    "{who} took the {noun} to {city} on {day}.",
    "The {noun} in {city} is {colour}.",
    "On {day} {who} found a {colour} {noun}.",
    "{who} gave the {noun} to {other}.",
    "There is no {noun} in {city}.",
    "{other} and {who} want a {noun}.",
    "In {city} every {noun} is {colour}.",
    "{who} is from {city}, not from {noun}.",
)


def _text(rng: random.Random) -> tuple[list[str], str, str]:
    """Sentences that all name one thing, the thing, and the person named most."""
    who, noun = words.first(rng), words.noun(rng)
    lines = [
        form.format(
            who=who,
            noun=noun,
            other=rng.choice(words.FIRST),
            city=rng.choice(words.CITIES),
            day=rng.choice(words.DAYS),
            colour=rng.choice(words.COLOURS),
        )
        for form in rng.sample(SENTENCES, k=6)
    ]
    return lines, noun, who


def make(rng: random.Random) -> Draft:
    lines, noun, who = _text(rng)
    text = " ".join(lines)
    kind = rng.choice(["thing", "person", "lines"])
    if kind == "lines":
        answer = "\n".join(f"- {line}" for line in lines)
        ask = rng.choice(["One sentence a line: {}", "Make each sentence a bullet: {}"]).format(text)
        return Draft((kind, text), ask, answer, answer, "text")
    old = noun if kind == "thing" else who
    new = old
    while new in text:
        new = words.noun(rng) if kind == "thing" else words.first(rng)
    answer = re.sub(rf"\b{old}\b", new, text)
    ask = rng.choice([f"Replace {old} with {new}: {text}", f"Write {new} for {old}: {text}"])
    return Draft((kind, text, new), ask, answer, answer, "text")
