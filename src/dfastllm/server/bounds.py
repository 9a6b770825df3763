"""How much a body may hold, found out before any work is done on it: the reading of JSON, and the lengths of lists.

A few bytes of JSON can cost a thousand times their size: each wrong item of a list is an error with its place and its
value, each object is one to validate. So a body is counted first, in time that grows with its bytes alone and without
making anything of it; what is parsed afterwards is small in every respect. Work on the text itself (templates,
tokenising) has its own bounds: see `prompts`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from dfastllm.errors import PayloadTooLargeError, ValidationError

__all__ = ["DEPTH", "MOST", "TEXTS", "VALUES", "AtMost", "counted", "read_json"]

DEPTH = (
    64  # lists and objects within each other; published tool schemas stay under 10, Python's own reader ends at 1000
)
TEXTS = 1 << 16  # names of fields included: 2,048 messages of eight parts each; also the most lists and objects
VALUES = 1 << 18  # where the settings do not say: 256 prompts of 1,024 token ids

# The most items of each list or object of a body, by its name. What OpenAI's own API documents or enforces is taken
# over (messages, metadata, tools); the others are far above what clients send, and below what a server would feel.
MOST: Mapping[str, int] = {
    "allowed_token_ids": 1 << 18,  # the largest published vocabularies
    "chat_template_kwargs": 256,
    "content": 1024,
    "logit_bias": 1024,
    "messages": 2048,
    "metadata": 16,
    "modalities": 16,
    "modules": 8,
    "options": 64,
    "parameters": 256,
    "rule_options": 64,
    "steps": 32,
    "stop": 64,  # OpenAI takes 4; other servers and their clients more
    "stop_token_ids": 1024,
    "tool_calls": 128,
    "tools": 128,
}

_BRACKETS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")  # 1 and -1
_OTHERS = bytes(byte for byte in range(256) if byte not in b"[{]}")


def read_json(data: bytes, values: int = VALUES, what: str = "body") -> Any:
    """The value that JSON bytes (UTF-8) hold. values: the most numbers, texts, lists and objects it may have. what:
    what the bytes are, for errors.

    Raises PayloadTooLargeError for more values, texts or lists and objects than are taken, and ValidationError for what
    is nested too deep and for what is no JSON."""
    _check(data, values, what)
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValidationError(f"The {what} is not UTF-8: byte {error.start} is {data[error.start]:#04x}.") from None
    except json.JSONDecodeError as error:
        raise ValidationError(f"The {what} is not valid JSON: {error.msg} at character {error.pos}.") from None
    except ValueError:  # Python reads no whole number of more than 4,300 digits
        raise ValidationError(f"The {what} is not valid JSON: a number has too many digits.") from None


def _check(data: bytes, most: int, what: str) -> None:
    """Refuse what holds too much."""
    values, texts, nested, depth = counted(data)
    if texts > TEXTS:
        raise _too_much(what, "texts, names of fields included,", texts, TEXTS)
    if nested > TEXTS:
        raise _too_much(what, "lists and objects", nested, TEXTS)
    if values > most:
        raise _too_much(what, "values", values, most)
    if depth > DEPTH:
        raise ValidationError(f"Lists and objects of the {what} lie {depth} deep; {DEPTH} is the most.")


def counted(data: bytes) -> tuple[int, int, int, int]:
    """(values, texts, lists and objects, how deep those lie within each other) of JSON.

    Names of fields are texts and no values; an empty list or object counts for one value more than it is. Where there
    are more texts, or lists and objects, than are taken, what comes after is 0. Reads every byte a few times with the
    searches of `bytes`, and makes nothing of what it finds.

    A backslash is only right within a text, so pairs of them and escaped quotes can be taken out everywhere; where one
    stands outside, reading ends there with an error, and up to there the count was right."""
    plain = data.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in data else data
    texts = plain.count(b'"') // 2
    if texts > TEXTS:
        return 0, texts, 0, 0
    outside = b"".join(plain.split(b'"')[::2])
    nested = outside.count(b"[") + outside.count(b"{")
    values = outside.count(b",") + nested + 1
    if nested > TEXTS:
        return values, texts, nested, 0
    steps = memoryview(outside.translate(_BRACKETS, _OTHERS)).cast("b")
    return values, texts, nested, max(accumulate(steps), default=0)


def _too_much(what: str, items: str, got: int, most: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"The {what} holds {got:,} {items} and at most {most:,} are taken.")


@dataclass(frozen=True)
class AtMost:
    """Of a field's annotation: its list or object has at most the items of `MOST`, in the schema too. The length is
    looked at before any item is, and the first wrong item of a list ends the reading of it."""

    name: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        if schema["type"] == "list":
            schema = cast("core_schema.ListSchema", schema) | {"fail_fast": True}
        return core_schema.no_info_before_validator_function(self._check, schema)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        described = handler(schema)
        objects = described.get("type") == "object"
        return described | {"maxProperties" if objects else "maxItems": MOST[self.name]}

    def _check(self, value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > MOST[self.name]:
            raise PydanticCustomError("too_many", "too many items", {"got": len(value), "most": MOST[self.name]})
        return value
