"""Rewriting and formatting: the words are the user's, the form is asked for."""

from __future__ import annotations

import random
from collections.abc import Callable

from dfastllm.tasks import words
from dfastllm.tasks.sample import Draft

__all__ = ["make"]


FORMS: tuple[tuple[tuple[str, ...], Callable[[list[str]], str]], ...] = (
    (("Make a bullet list: {}", "Write as bullets: {}"), lambda w: "\n".join(f"- {x}" for x in w)),
    (
        ("Make a numbered list: {}", "Number these: {}"),
        lambda w: "\n".join(f"{i}. {x}" for i, x in enumerate(w, 1)),
    ),
    (("Join with plus signs: {}", "Put plus signs between: {}"), lambda w: " + ".join(w)),
    (("Reverse the order: {}", "Write backwards, last word first: {}"), lambda w: ", ".join(w[::-1])),
    (("Turn into a JSON list: {}", "As a JSON array: {}"), lambda w: "[" + ", ".join(f'"{x}"' for x in w) + "]"),
    (("Join with underscores: {}", "Write in snake case: {}"), "_".join),
)


def _list(rng: random.Random) -> Draft:
    picked = words.nouns(rng, rng.randint(3, 4))
    at = rng.randrange(len(FORMS))
    asks, form = FORMS[at]
    prompt = rng.choice(asks).format(rng.choice([", ", " "]).join(picked))
    answer = form(picked)
    return Draft(("list", at, *picked), prompt, answer, answer, "text")


def _date(rng: random.Random) -> Draft:
    year, month, day = rng.randint(1950, 2029), rng.randint(1, 12), rng.randint(1, 28)
    iso, long = f"{year}-{month:02}-{day:02}", f"{day} {words.MONTHS[month - 1]} {year}"
    if rng.random() < 0.5:
        return Draft(("date", iso), f"Write the date {iso} in words.", long, long, "text")
    return Draft(("iso", iso), f"Write {long} as YYYY-MM-DD.", iso, iso, "text")


def _name(rng: random.Random) -> Draft:
    a, b = words.first(rng), words.last(rng)
    prompt, answer = rng.choice(
        [
            (f"Write last name first: {a} {b}", f"{b}, {a}"),
            (f"Give the initials of {a} {b}.", f"{a[0]}. {b[0]}."),
            (f"Write an email address at mail.com for {a} {b}.", f"{a}.{b}@mail.com"),
        ]
    )
    return Draft(("name", prompt), prompt, answer, answer, "text")


def make(rng: random.Random) -> Draft:
    return rng.choices([_list, _date, _name], weights=[4, 2, 2])[0](rng)
