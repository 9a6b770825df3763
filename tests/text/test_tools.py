"""Tool calls in generated text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfastllm.text import ParsedMessage, ToolCall, ToolCallParser, parse_tool_calls

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=8) | st.just("</tool_call>"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
CALLS = st.tuples(st.text(min_size=1, max_size=8), st.dictionaries(st.text(max_size=5), VALUES, max_size=3))
PROSE = st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"]), max_size=10)
NOISE = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        '{"name": "f", "arguments": {}}',
        '{"name": 3}',
        "<tool",
        '"',
        "\\",
        " \n",
        "hi",
        "{",
    ]
)


def write(name: str, arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


@given(prose=PROSE, calls=st.lists(CALLS, max_size=3), tail=PROSE)
@settings(deadline=None)
def test_what_was_written_is_read_back(prose: str, calls: list[tuple[str, dict]], tail: str) -> None:
    parsed = parse_tool_calls(prose + "\n".join(write(*call) for call in calls) + tail)
    assert [(c.name, json.loads(c.arguments)) for c in parsed.tool_calls] == calls
    assert parsed.content == (prose.rstrip() + tail.lstrip() if calls else prose + tail)


@given(parts=st.lists(NOISE, max_size=10), cuts=st.lists(st.integers(1, 9), min_size=1, max_size=6))
@settings(max_examples=400, deadline=None)
def test_any_cutting_gives_the_same(parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    parser, out, at, turn = ToolCallParser(), [], 0, 0
    while at < len(text):
        size = cuts[turn % len(cuts)]
        out += parser.push(text[at : at + size])
        at, turn = at + size, turn + 1
    out += parser.flush()
    content = "".join(piece for piece in out if isinstance(piece, str))
    calls = tuple(piece for piece in out if isinstance(piece, ToolCall))
    assert ParsedMessage(content, calls) == parse_tool_calls(text)
    assert "" not in out
    if not calls:
        assert content == text, "nothing the model wrote is lost"


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "f", "arguments": {</tool_call>',
        '<tool_call>{"name": "f", "arguments": []}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {}}',
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
        "<tool_call>[1]</tool_call> ",
        "  spaces stay  ",
        "<tool_",
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert parse_tool_calls(text) == ParsedMessage(text)


def test_a_good_call_after_a_bad_opening() -> None:
    parsed = parse_tool_calls("<tool_call>oops <tool_call>" + write("f", {"a": 1})[len("<tool_call>") :])
    assert parsed == ParsedMessage("<tool_call>oops", (ToolCall("f", '{"a": 1}'),))


def test_calls_without_arguments_and_lone_surrogates() -> None:
    assert parse_tool_calls('<tool_call>{"name": "now"}</tool_call>').tool_calls == (ToolCall("now", "{}"),)
    (call,) = parse_tool_calls('<tool_call>{"name": "f", "arguments": {"s": "\\ud800é"}}</tool_call>').tool_calls
    assert json.loads(call.arguments.encode().decode()) == {"s": "\ud800é"}


def test_content_streams_before_a_call() -> None:
    parser = ToolCallParser()
    assert parser.push("Let me see. <to") == ["Let me see."]
    assert parser.push("p of the page> <tool_call") == [" <top of the page>"]
    assert parser.push('>{"name": "f", "arguments": {"x": "</tool_call>"}}</tool_') == []
    assert parser.push("call>\n") == [ToolCall("f", '{"x": "</tool_call>"}')]
    assert parser.flush() == []
