"""Word lists and invented words. Invented names make copying, not recall, the way to answer."""

from __future__ import annotations

import random

__all__ = [
    "ADJECTIVES",
    "ANIMALS",
    "CITIES",
    "COLOURS",
    "DAYS",
    "FIRST",
    "ITEMS",
    "LAST",
    "MONTHS",
    "NOUNS",
    "PLACES",
    "city",
    "first",
    "invented",
    "last",
    "noun",
    "nouns",
]

FIRST = (
    "Anna Ben Carla David Emma Felix Grace Hugo Ida Jonas Kira Leo Maria Noah Olga Paul Rosa Sam Tina Umar Vera Will "
    "Yara Zoe Alice Bruno Clara Dan Elena Frank Gina Henry Iris Jack Kate Liam Mona Nina Oscar Petra Ravi Sara Tom"
).split()
LAST = (
    "Adams Baker Clark Davis Evans Fischer Garcia Hansen Ito Jones Keller Lopez Meyer Novak Olsen Park Quinn Rossi "
    "Silva Tanaka Unger Vogel Weber Young Zhang Brown Costa Dubois Khan Moreau"
).split()
CITIES = (
    "Oslo Paris Rome Berlin Madrid Lisbon Vienna Prague Dublin Athens Cairo Tokyo Delhi Lima Quito Boston Chicago "
    "Denver Seattle Toronto Sydney Zurich Geneva Munich Milan Warsaw Budapest Nairobi Bergen Porto"
).split()
ITEMS = (
    "apples pears plums lemons eggs books pens cups plates coins stamps shells marbles cards balls keys cookies "
    "muffins stickers candles beads nails bricks tickets"
).split()
NOUNS = (
    "apple river stone table cloud garden window bridge candle forest mirror pencil rocket basket button camera dragon "
    "engine feather guitar hammer island jacket kettle ladder magnet needle orange pillow ribbon saddle tunnel violin "
    "wagon anchor bottle carpet desert falcon harbor"
).split()
ANIMALS = "fox owl cat dog bear wolf hare deer crow frog mouse horse".split()
PLACES = "forest garden village valley harbor meadow castle market".split()
ADJECTIVES = "small proud quiet brave clever gentle lonely curious happy tired".split()
COLOURS = "red blue green white black yellow brown grey pink purple".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()

ONSETS = "b d f g h k l m n p r s t v z br dr gr kl pl st tr".split()
VOWELS = "a e i o u".split()
CODAS = ["", "", "n", "r", "s", "l", "m"]
INVENTED = 0.25  # share of names and nouns that are in no list


def invented(rng: random.Random) -> str:
    """A lower-case word of two syllables that is (almost surely) in no list."""
    return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(2))


def _from(rng: random.Random, words: list[str]) -> str:
    return invented(rng).capitalize() if rng.random() < INVENTED else rng.choice(words)


def first(rng: random.Random) -> str:
    return _from(rng, FIRST)


def last(rng: random.Random) -> str:
    return _from(rng, LAST)


def city(rng: random.Random) -> str:
    return _from(rng, CITIES)


def noun(rng: random.Random) -> str:
    return invented(rng) if rng.random() < INVENTED else rng.choice(NOUNS)


def nouns(rng: random.Random, count: int) -> list[str]:
    """`count` different nouns."""
    picked: list[str] = []
    while len(picked) < count:
        word = noun(rng)
        if word not in picked:
            picked.append(word)
    return picked
