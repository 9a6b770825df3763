"""Complete, schema-valid tool calls in growing text."""

from __future__ import annotations

import json

import pytest

from dfastllm.errors import ValidationError
from dfastllm.metrics.tool_schemas import CallFinder, ToolSchemas, argument_writings, is_valid_tool_json
from dfastllm.text import ToolCall

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]


def tagged(name: str, **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.mark.parametrize(
    ("arguments", "fits"),
    [
        ({"city": "Oslo"}, True),
        ({"city": "Oslo", "days": 3}, True),
        ({"city": "Oslo", "days": 0}, False),  # below the minimum
        ({"city": "Oslo", "days": "3"}, False),  # wrong type
        ({"days": 3}, False),  # required is missing
        ({"city": "Oslo", "country": "NO"}, False),  # not a property
    ],
)
def test_arguments_are_validated(arguments: dict[str, object], fits: bool) -> None:
    assert is_valid_tool_json(tagged("weather", **arguments), TOOLS) is fits
    assert is_valid_tool_json(json.dumps({"name": "weather", "arguments": arguments}), TOOLS) is fits


@pytest.mark.parametrize(
    "text", ["Well. " + tagged("weather", city="a</tool_call>b"), ' {"name": "clock", "arguments": {}}']
)
def test_found_with_the_character_that_completes_it(text: str) -> None:
    finder = CallFinder(TOOLS)
    found = [finder.push(character) for character in text]
    assert found[-1] is not None
    assert set(found[:-1]) == {None}
    assert finder.push(" and more") == found[-1]


def test_a_call_that_does_not_fit_is_passed_over() -> None:
    finder = CallFinder(TOOLS)
    assert finder.push(tagged("weather", days=1)) is None
    assert finder.push(tagged("clock")) == ToolCall("clock", "{}")


def test_older_drafts_are_honoured() -> None:
    """exclusiveMinimum is a boolean in draft 4 and a number since draft 6."""
    schema = {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "type": "object",
        "properties": {"n": {"type": "number", "minimum": 0, "exclusiveMinimum": True}},
    }
    schemas = ToolSchemas([{"type": "function", "function": {"name": "f", "parameters": schema}}])
    assert schemas.accepts(ToolCall("f", '{"n": 1}'))
    assert not schemas.accepts(ToolCall("f", '{"n": 0}'))


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ([{"type": "function", "function": {}}], "no function name"),
        ([{"type": "function", "function": {"name": "f", "parameters": {"type": "objekt"}}}], "no JSON Schema"),
    ],
)
def test_bad_tools_are_refused(tools: list[dict[str, object]], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ToolSchemas(tools)


def test_references_are_resolved_inside_and_never_fetched() -> None:
    inside = {"$defs": {"id": {"type": "integer"}}, "properties": {"id": {"$ref": "#/$defs/id"}}}
    schemas = ToolSchemas([{"type": "function", "function": {"name": "f", "parameters": inside}}])
    assert schemas.accepts(ToolCall("f", '{"id": 1}'))
    assert not schemas.accepts(ToolCall("f", '{"id": "1"}'))
    outside = {"properties": {"id": {"$ref": "http://127.0.0.1:9/schema.json"}}}
    schemas = ToolSchemas([{"type": "function", "function": {"name": "f", "parameters": outside}}])
    with pytest.raises(ValidationError, match="not inside"):
        schemas.accepts(ToolCall("f", '{"id": 1}'))


def test_writings_of_a_call() -> None:
    finder = CallFinder(TOOLS)
    assert finder.writings() == ()
    said = 'Well. <tool_call>{"name": "weather", "arguments": {"city":  "Köln"}}</tool_call>'
    for character in said:
        finder.push(character)
    head = '<tool_call>{"name": "weather", "arguments": '
    assert finder.writings() == tuple(
        f"{head}{arguments}}}</tool_call>" for arguments in ('{"city":  "Köln"}', '{"city": "Köln"}', '{"city":"Köln"}')
    )


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ('{"a": [1, 2]}', ('{"a": [1, 2]}', '{"a": [1, 2]}', '{"a":[1,2]}')),
        ('{"a": "\\ud800"}', ('{"a": "\\ud800"}',)),  # half a pair, which no tokenizer takes
        ("{", ("{",)),
    ],
)
def test_writings_of_arguments(arguments: str, wanted: tuple[str, ...]) -> None:
    assert argument_writings(arguments) == wanted


def test_arguments_inside_a_string_are_left_as_they_are() -> None:
    finder = CallFinder([CLOCK])
    said = 'So: <tool_call>{"name": "clock", "arguments": "{\\"zone\\": 1}"}</tool_call>'
    assert finder.push(said) is not None
    assert finder.writings() == (said.removeprefix("So: "),)
