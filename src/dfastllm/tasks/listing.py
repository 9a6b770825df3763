"""Lists of many words in a form that is asked for: the answer has a line for each word."""

from __future__ import annotations

import random
from collections.abc import Callable

from dfastllm.tasks import words
from dfastllm.tasks.sample import Draft

__all__ = ["make"]

Form = Callable[[list[str]], list[str]]

FORMS: tuple[tuple[tuple[str, str], Form], ...] = (
    (
        ("Number these, one a line: {}", "Make a numbered list, one a line: {}"),
        lambda w: [f"{i}. {x}" for i, x in enumerate(w, 1)],
    ),
    (
        ("Number these from the last to the first: {}", "Make a numbered list, last word first: {}"),
        lambda w: [f"{i}. {x}" for i, x in enumerate(w[::-1], 1)],
    ),
    (
        ("Make a checklist: {}", "Write a to-do list with boxes: {}"),
        lambda w: [f"- [ ] {x}" for x in w],
    ),
    (
        ("Write each word twice, one word a line: {}", "Double every word, each on its own line: {}"),
        lambda w: [f"{x} {x}" for x in w],
    ),
)


def make(rng: random.Random) -> Draft:
    picked = words.nouns(rng, rng.randint(13, 15))
    at = rng.randrange(len(FORMS))
    asks, form = FORMS[at]
    answer = "\n".join(form(picked))
    return Draft((at, *picked), rng.choice(asks).format(", ".join(picked)), answer, answer, "text")
