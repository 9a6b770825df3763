"""Facts in a sentence to JSON with the fields asked for."""

from __future__ import annotations

import json
import random
from typing import Any

from dfastllm.tasks import words
from dfastllm.tasks.sample import Draft

__all__ = ["make"]


def _person(rng: random.Random) -> tuple[dict[str, Any], str]:
    name, age, city = f"{words.first(rng)} {words.last(rng)}", rng.randint(18, 90), words.city(rng)
    text = rng.choice(
        [
            f"{name} is {age} years old and lives in {city}.",
            f"In {city} lives {name}, aged {age}.",
            f"My friend {name} from {city} just turned {age}.",
        ]
    )
    return {"name": name, "age": age, "city": city}, text


def _order(rng: random.Random) -> tuple[dict[str, Any], str]:
    customer, item = words.first(rng), words.noun(rng)
    count, price = rng.randint(2, 40), rng.randint(1, 99)
    text = rng.choice(
        [
            f"{customer} ordered {count} of the {item} at {price} dollars each.",
            f"Order from {customer}: {item}, quantity {count}, price {price}.",
        ]
    )
    return {"customer": customer, "item": item, "quantity": count, "price": price}, text


def _meeting(rng: random.Random) -> tuple[dict[str, Any], str]:
    who, day, hour, room = words.first(rng), rng.choice(words.DAYS), rng.randint(8, 18), rng.randint(1, 40)
    time = f"{hour}:{rng.choice(['00', '15', '30', '45'])}"
    text = rng.choice(
        [
            f"Meet {who} on {day} at {time} in room {room}.",
            f"On {day} {who} has room {room} from {time}.",
        ]
    )
    return {"who": who, "day": day, "time": time, "room": room}, text


def make(rng: random.Random) -> Draft:
    facts, text = rng.choice([_person, _order, _meeting])(rng)
    fields = rng.sample(list(facts), k=rng.randint(2, len(facts)))
    asked = ", ".join(fields)
    prompt = rng.choice([f"Extract {asked} as JSON: {text}", f"{text}\nGive {asked} as JSON."])
    expected = {field: facts[field] for field in fields}
    return Draft((text, *fields), prompt, json.dumps(expected, ensure_ascii=False), expected, "json")
