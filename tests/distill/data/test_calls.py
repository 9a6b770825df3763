"""Where calls stand in a text: spans read back as the text that they are about, in every form that is read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dfastllm.distill.data.calls import any_call, find_calls, outside, required_present
from dfastllm.text.tools import FORMS, ToolCall, ToolCallParser

HERMES, MISTRAL, LLAMA = FORMS
NAMES = ("get_weather", "f")
CALL = '{"name": "get_weather", "arguments": {"city": "Oslo", "days": [1, 2]}}'
ARGUMENTS = '{"city": "Oslo", "days": [1, 2]}'


@pytest.mark.parametrize(
    ("form", "text", "whole"),
    [
        (HERMES, f"<tool_call>{CALL}</tool_call>", f"<tool_call>{CALL}</tool_call>"),
        (HERMES, f"Let me see, get_weather {ARGUMENTS}: <tool_call>\n{CALL}\n</tool_call> done", None),
        (HERMES, f'<tool_call>{{"arguments": {ARGUMENTS}, "name": "get_weather"}}</tool_call>', None),
        (HERMES, f'<tool_call>{{"name":"get_weather","parameters":{ARGUMENTS}}}', None),
        (MISTRAL, f"[TOOL_CALLS][{CALL}]", None),
        (MISTRAL, f"[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}", None),
        (LLAMA, f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}', None),
        (LLAMA, f'<|python_tag|>{{"name": "get_weather", "parameters": {ARGUMENTS}}}', None),
    ],
)
def test_spans_are_the_text_they_are_about(form: Any, text: str, whole: str | None) -> None:
    [found] = find_calls(text, ToolCallParser((form,), NAMES))
    assert found.name is not None
    assert found.arguments is not None
    assert text[slice(*found.name)] == "get_weather"
    assert text[slice(*found.arguments)] == ARGUMENTS == found.call.arguments
    assert found.whole[0] <= found.name[0] < found.whole[1]
    if whole is not None:
        assert text[slice(*found.whole)] == whole
    if "Let me see" in text:  # the mention before the call is not the call
        assert found.name[0] > text.index("<tool_call>")
        assert [text[slice(*span)] for span in outside(text, [found])] == [
            f"Let me see, get_weather {ARGUMENTS}:",
            "done",
        ]


def test_arguments_that_are_spelled_otherwise_than_they_are_read() -> None:
    quoted = json.dumps(ARGUMENTS)
    text = f'<tool_call>{{"name": "f", "arguments": {quoted}}}</tool_call>'
    [found] = find_calls(text, ToolCallParser((HERMES,)))
    assert found.call.arguments == ARGUMENTS
    assert found.arguments is not None
    assert text[slice(*found.arguments)] == quoted[1:-1]
    text = '<tool_call>{"name": "f", "arguments": {"a": "one\ntwo"}}</tool_call>'
    [found] = find_calls(text, ToolCallParser((HERMES,)))
    assert found.arguments is not None
    assert text[slice(*found.arguments)] == '{"a": "one\ntwo"}'
    [found] = find_calls('<tool_call>{"name": "f", "arguments": null}</tool_call>', ToolCallParser((HERMES,)))
    assert (found.call.arguments, found.arguments) == ("{}", None)


def test_a_key_called_name_in_the_arguments_is_not_the_name() -> None:
    text = '<tool_call>{"arguments": {"name": "f"}, "name": "f"}</tool_call>'
    [found] = find_calls(text, ToolCallParser((HERMES,)))
    assert found.name == (text.rindex('"f"') + 1, text.rindex('"f"') + 2)


def test_several_calls_of_one_text_and_of_one_opening() -> None:
    one, other = '{"name": "f", "arguments": {"x": 1}}', '{"name": "f", "arguments": {"x": 1}}'
    for text in (
        f"<tool_call>{one}</tool_call> and <tool_call>{other}</tool_call>",
        f"<tool_call>{one}\n{other}</tool_call>",
        f"<tool_call>[{one}, {other}]</tool_call>",
    ):
        first, second = find_calls(text, ToolCallParser((HERMES,)))
        assert first.arguments is not None
        assert second.arguments is not None
        assert first.arguments[1] <= second.arguments[0]
        assert first.whole[1] <= second.whole[0]
        assert [text[slice(*found.name or ())] for found in (first, second)] == ["f", "f"]


def test_what_is_no_complete_call_is_none() -> None:
    for text in ("", "get_weather", "<tool_call>no</tool_call>", '<tool_call>{"name": "f", "arguments": {"x": ', "{}"):
        assert find_calls(text, ToolCallParser((HERMES,))) == []
    [found] = find_calls(
        '<tool_call>{"name": "f", "arguments": {"x": }}</tool_call>' + f"<tool_call>{CALL}</tool_call>", any_call()
    )
    assert found.call.name == "get_weather"
    assert find_calls('{"name": "x", "parameters": {"a": 1}}', any_call()) == []  # JSON alone is an answer


NAME = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=6)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=("Cs",)), max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAME, inner, max_size=2),
    max_leaves=5,
)


@settings(max_examples=80, deadline=None)
@example("{}", {}, "", False)  # a name that is spelled like the arguments
@given(NAME, st.dictionaries(NAME, VALUE, max_size=3), st.text('ab {}"<>name', max_size=12), st.booleans())
def test_any_call_is_found_where_it_was_written(
    name: str, arguments: dict[str, Any], before: str, ascii_only: bool
) -> None:
    """The whole text is put together here, so where each part begins is known."""
    written = json.dumps(arguments, ensure_ascii=ascii_only)
    spelled = json.dumps(name, ensure_ascii=ascii_only)
    head = f'{before}<tool_call>{{"name": '
    text = f'{head}{spelled}, "arguments": {written}}}</tool_call>'
    [found] = find_calls(text, ToolCallParser((HERMES,)))
    start = len(head) + len(spelled) + len(', "arguments": ')
    assert found.arguments == (start, start + len(written))
    assert found.whole == (len(before), len(text))
    if spelled[1:-1] == json.dumps(name, ensure_ascii=False)[1:-1]:
        assert found.name == (len(head) + 1, len(head) + len(spelled) - 1)


def tool(name: str, *required: str) -> dict[str, Any]:
    return {"function": {"name": name, "parameters": {"type": "object", "required": list(required)}}}


@pytest.mark.parametrize(
    ("tools", "calls", "wanted"),
    [
        ([], [("f", "{}")], None),
        ([tool("f")], [], None),
        ([tool("f", "a")], [("f", '{"a": null, "b": 1}')], True),
        ([tool("f", "a", "b")], [("f", '{"a": 1}')], False),
        ([tool("f", "a")], [("g", '{"a": 1}')], False),
        ([tool("f", "a"), tool("g")], [("f", '{"a": 1}'), ("g", "{}")], True),
        ([tool("f", "a"), tool("g", "b")], [("f", '{"a": 1}'), ("g", "{}")], False),
        ([{"name": "f"}], [("f", "{}")], True),
        ([{"function": {"name": "f", "parameters": {"required": "a"}}}], [("f", "{}")], True),
    ],
)
def test_required_arguments(tools: Any, calls: Any, wanted: bool | None) -> None:
    assert required_present(tools, [ToolCall(*call) for call in calls]) is wanted
