"""A little open prose: readable, not gradable."""

from __future__ import annotations

import random

from dfastllm.tasks import words
from dfastllm.tasks.sample import Draft

__all__ = ["make"]

OPENINGS = (
    "{A} {adj} {animal} lived in a {place}.",
    "Once a {adj} {animal} walked through the {place}.",
    "In the {place} there was a {adj} {animal}.",
)
MIDDLES = (
    "One day it found a {colour} {noun}.",
    "It looked for a {colour} {noun} all day.",
    "It wanted to give a {colour} {noun} to a friend.",
)
ENDINGS = (
    "It took it home and slept well.",
    "Everyone in the {place} was glad.",
    "Then it sang until the evening.",
    "That night the {animal} was not alone.",
)


def make(rng: random.Random) -> Draft:
    adjective = rng.choice(words.ADJECTIVES)
    parts = {
        "A": "An" if adjective[0] in "aeiou" else "A",
        "adj": adjective,
        "animal": rng.choice(words.ANIMALS),
        "place": rng.choice(words.PLACES),
        "colour": rng.choice(words.COLOURS),
        "noun": rng.choice(words.NOUNS),
    }
    choice = [rng.choice(lines) for lines in (OPENINGS, MIDDLES, ENDINGS)]
    story = " ".join(line.format(**parts) for line in choice)
    prompt = rng.choice(
        [
            f"Write a short story about a {parts['animal']} in a {parts['place']}.",
            f"Tell me a story with a {parts['animal']} and a {parts['place']}.",
        ]
    )
    return Draft((story,), prompt, story, story, None)
