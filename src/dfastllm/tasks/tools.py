"""Tool calls against the schemas given, questions no given tool can answer, and answers from a tool's result.

A tool keeps its purpose but not its name or its parameters' names, so that the schema must be read.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dfastllm.tasks import words
from dfastllm.tasks.sample import Draft

__all__ = ["NO_TOOL", "call_text", "make"]

NO_TOOL = "I have no tool for that."
SMALL_TALK = (
    ("Hello!", "Hello! How can I help you?"),
    ("Good morning!", "Good morning! How can I help you?"),
    ("Thank you!", "You are welcome!"),
    ("Thanks, that was all.", "You are welcome!"),
    ("Goodbye!", "Goodbye!"),
)


@dataclass(frozen=True)
class Kind:
    """A purpose: names it may go by, parameters (names each may go by, JSON type, how a value is drawn), questions."""

    names: tuple[str, ...]
    parameters: tuple[tuple[tuple[str, ...], str, Callable[[random.Random], Any]], ...]
    questions: tuple[str, ...]
    description: str


def _int(low: int, high: int) -> Callable[[random.Random], int]:
    return lambda rng: rng.randint(low, high)


def _one(options: list[str] | tuple[str, ...]) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(options)


KINDS = (
    Kind(
        ("get_weather", "weather", "forecast"),
        ((("city", "place", "location"), "string", words.city),),
        ("What is the weather in {0}?", "Will it rain in {0} today?"),
        "Weather of a city.",
    ),
    Kind(
        ("get_time", "local_time", "clock"),
        ((("city", "place", "location"), "string", words.city),),
        ("What time is it in {0}?", "Tell me the local time in {0}."),
        "Local time of a city.",
    ),
    Kind(
        ("set_timer", "start_timer", "timer"),
        ((("minutes", "duration"), "integer", _int(2, 90)),),
        ("Set a timer for {0} minutes.", "Wake me in {0} minutes."),
        "Start a timer.",
    ),
    Kind(
        ("find_flight", "search_flights", "flights"),
        (
            (("origin", "from", "start"), "string", words.city),
            (("destination", "to", "end"), "string", words.city),
        ),
        ("Find a flight from {0} to {1}.", "I want to fly from {0} to {1}."),
        "Search flights.",
    ),
    Kind(
        ("send_message", "message", "text_person"),
        (
            (("person", "to", "name"), "string", words.first),
            (("text", "body"), "string", _one(["I am late", "Call me", "See you soon", "Dinner is ready"])),
        ),
        ('Tell {0}: "{1}".', 'Send {0} the message "{1}".'),
        "Send a message.",
    ),
    Kind(
        ("add_event", "schedule", "create_event"),
        (
            (("title", "event"), "string", words.noun),
            (("day", "date"), "string", _one(words.DAYS)),
        ),
        ("Put {0} in my calendar on {1}.", "Schedule {0} for {1}."),
        "Add to the calendar.",
    ),
    Kind(
        ("set_light", "lamp", "light"),
        (
            (("room", "where"), "string", _one(["kitchen", "bedroom", "hall", "office", "garage"])),
            (("level", "percent"), "integer", _int(1, 99)),
        ),
        ("Set the {0} light to {1} percent.", "Dim the light in the {0} to {1} percent."),
        "Set a light.",
    ),
    Kind(
        ("buy", "order_item", "add_to_cart"),
        (
            (("item", "product"), "string", words.noun),
            (("count", "quantity"), "integer", _int(2, 50)),
        ),
        ("Buy {1} of the {0}.", "Order the {0}, {1} pieces."),
        "Order something.",
    ),
)


def call_text(name: str, arguments: Mapping[str, Any]) -> str:
    """The text form of a call that the chat template and the server's parser share."""
    call = json.dumps({"name": name, "arguments": dict(arguments)}, ensure_ascii=False)
    return f"<tool_call>{call}</tool_call>"


def _schema(rng: random.Random, kind: Kind) -> dict[str, Any]:
    """An OpenAI tool object for this purpose, under names drawn anew."""
    properties = {rng.choice(names): {"type": type_} for names, type_, _ in kind.parameters}
    return {
        "type": "function",
        "function": {
            "name": rng.choice(kind.names),
            "description": kind.description,
            "parameters": {"type": "object", "properties": properties, "required": list(properties)},
        },
    }


def _call(rng: random.Random) -> Draft:
    kinds = rng.sample(KINDS, k=rng.randint(1, 2))
    schemas = [_schema(rng, kind) for kind in kinds]
    at = rng.randrange(len(kinds))
    values = [draw(rng) for _, _, draw in kinds[at].parameters]
    function = schemas[at]["function"]
    arguments = dict(zip(function["parameters"]["properties"], values, strict=True))
    expected = {"name": function["name"], "arguments": arguments}
    key = (kinds[at].names[0], function["name"], *arguments, *map(str, values))
    prompt = rng.choice(kinds[at].questions).format(*values)
    return Draft(key, prompt, call_text(**expected), expected, "tool_call", tools=tuple(schemas))


def _without(rng: random.Random) -> Draft:
    *kinds, other = rng.sample(KINDS, k=rng.randint(2, 3))
    schemas = tuple(_schema(rng, kind) for kind in kinds)
    names = [schema["function"]["name"] for schema in schemas]
    if rng.random() < 0.3:
        said, answer = rng.choice(SMALL_TALK)
        return Draft((said, *names), said, answer, answer, "text", tools=schemas)
    values = [draw(rng) for _, _, draw in other.parameters]
    prompt = rng.choice(other.questions).format(*values)
    return Draft((prompt, *names), prompt, NO_TOOL, NO_TOOL, "text", tools=schemas)


def _result(rng: random.Random) -> Draft:
    kind = KINDS[rng.randrange(2)]  # weather or time
    schema = _schema(rng, kind)
    city = words.city(rng)
    function = schema["function"]
    arguments = {next(iter(function["parameters"]["properties"])): city}
    if kind is KINDS[0]:
        degrees, sky = rng.randint(-9, 35), rng.choice(["sunny", "cloudy", "rainy", "windy", "foggy"])
        result: dict[str, Any] = {"degrees": degrees, "sky": sky}
        answer = f"It is {degrees} degrees and {sky} in {city}."
    else:
        time = f"{rng.randint(0, 23)}:{rng.randint(10, 59)}"
        result, answer = {"time": time}, f"It is {time} in {city}."
    call = {"type": "function", "id": "call_1", "function": {"name": function["name"], "arguments": arguments}}
    before = (
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": json.dumps(result)},
    )
    prompt = rng.choice(kind.questions).format(city)
    return Draft((answer,), prompt, answer, answer, "text", tools=(schema,), before=before)


def make(rng: random.Random) -> Draft:
    return rng.choices([_call, _without, _result], weights=[6, 2, 2])[0](rng)
