"""JSON with many fields, or a list of objects, from facts in a row."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from dfastllm.tasks import words
from dfastllm.tasks.sample import Draft

__all__ = ["make"]

FIELDS: dict[str, Callable[[random.Random], str | int]] = {
    "name": lambda rng: f"{words.first(rng)} {words.last(rng)}",
    "age": lambda rng: rng.randint(18, 90),
    "city": words.city,
    "item": words.noun,
    "quantity": lambda rng: rng.randint(2, 40),
    "price": lambda rng: rng.randint(1, 99),
    "day": lambda rng: rng.choice(words.DAYS),
    "room": lambda rng: rng.randint(1, 40),
    "colour": lambda rng: rng.choice(words.COLOURS),
    "animal": lambda rng: rng.choice(words.ANIMALS),
    "month": lambda rng: rng.choice(words.MONTHS),
    "friend": words.first,
}


def _facts(record: dict[str, str | int]) -> str:
    return ", ".join(f"{field} {value}" for field, value in record.items())


def make(rng: random.Random) -> Draft:
    expected: Any
    if rng.random() < 0.7:
        expected = {field: FIELDS[field](rng) for field in rng.sample(list(FIELDS), k=rng.randint(8, 9))}
        facts = _facts(expected)
        ask = rng.choice(["As a JSON object: {}", "Give all of this as JSON: {}"]).format(facts)
    else:
        fields = rng.sample(list(FIELDS), k=3)
        expected = [{field: FIELDS[field](rng) for field in fields} for _ in range(3)]
        facts = "; ".join(map(_facts, expected))
        ask = rng.choice(["As a JSON list of objects: {}", "Give these as a list of JSON objects: {}"]).format(facts)
    return Draft((facts,), ask, json.dumps(expected, ensure_ascii=False), expected, "json")
