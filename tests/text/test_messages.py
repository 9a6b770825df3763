"""Messages as every front takes them: what is dropped, what becomes what, and what is refused by its name."""

from __future__ import annotations

from typing import Any

import pytest

from dfastllm.errors import ValidationError
from dfastllm.text.messages import conversation

U = {"role": "user", "content": "hi"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def assistant(**rest: Any) -> list[dict[str, Any]]:
    return [U, {"role": "assistant", **rest}]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([U], [U]),
        ([{"role": "developer", "content": "x"}], [{"role": "system", "content": "x"}]),
        ([{"role": "function", "content": "x", "name": "f"}], [{"role": "tool", "content": "x", "name": "f"}]),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a", "cache_control": {}}, {"type": "text", "text": "b"}],
                }
            ],
            [{"role": "user", "content": "ab"}],
        ),
        (assistant(content=None), assistant(content="")),
        (assistant(), assistant(content="")),
        (assistant(refusal="no"), assistant(content="no")),
        (assistant(content=[{"type": "refusal", "refusal": "no"}]), assistant(content="no")),
        (
            assistant(
                content="42", annotations=[], audio=None, function_call=None, tool_calls=None, reasoning_content="x"
            ),
            assistant(content="42"),
        ),
        (assistant(content="x", tool_calls=[]), assistant(content="x")),
        (
            assistant(content=None, tool_calls=[{**CALL, "index": 0}]),
            assistant(content="", tool_calls=[{**CALL, "function": {"name": "f", "arguments": {}}}]),
        ),
        (
            assistant(tool_calls=[{"function": {"name": "f", "arguments": {"a": 1}}}]),
            assistant(content="", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]),
        ),
        (
            assistant(tool_calls=[{**CALL, "function": {"name": "f", "arguments": ""}}]),
            assistant(content="", tool_calls=[{**CALL, "function": {"name": "f", "arguments": {}}}]),
        ),
        (
            assistant(function_call={"name": "f", "arguments": '{"a": 1}'}),
            assistant(
                content="",
                tool_calls=[{"id": "f", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
            ),
        ),
        ([U, {"role": "tool", "content": "1", "tool_call_id": "call_1"}],) * 2,
    ],
)
def test_what_is_taken(given: Any, wanted: Any) -> None:
    assert conversation(given) == wanted


@pytest.mark.parametrize(
    ("given", "param", "said"),
    [
        ([], "messages", "non-empty list"),
        ("hi", "messages", "non-empty list"),
        (U, "messages", "non-empty list"),
        (None, "messages", "non-empty list"),
        (["hi"], "messages[0]", "must be an object with a role, got 'hi'"),
        ([{"content": "hi"}], "messages[0].role", "must be one of system, developer, user"),
        ([{"role": "usr", "content": "hi"}], "messages[0].role", "got 'usr'"),
        ([U, {"role": "user", "contnet": "hi"}], "messages[1].contnet", "Did you mean 'content'?"),
        ([{**U, "zzz": 1}], "messages[0].zzz", "no field 'zzz'. There are role, content, name"),
        ([{"role": "user"}], "messages[0]", "has no content"),
        ([{"role": "user", "content": 3}], "messages[0].content", "must be text or a list of text parts, got 3"),
        ([{"role": "user", "content": {"type": "text"}}], "messages[0].content", "must be text or a list"),
        ([{"role": "user", "content": ["hi"]}], "messages[0].content[0]", "must be an object"),
        ([{"role": "user", "content": [{"text": "hi"}]}], "messages[0].content[0].type", "must be text, got None"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content[0].type",
            "read and write text only",
        ),
        ([{"role": "user", "content": [{"type": "text", "txt": "x"}]}], "messages[0].content[0].txt", "mean 'text'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text", "must be text, got None"),
        ([{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}], "messages[0].content", "is a refusal"),
        ([{**U, "name": 3}], "messages[0].name", "must be text, got 3"),
        ([{**U, "tool_calls": [CALL]}], "messages[0].tool_calls", "only the assistant makes"),
        ([{**U, "tool_call_id": "x"}], "messages[0].tool_call_id", "is no tool message"),
        (assistant(tool_calls="f"), "messages[1].tool_calls", "must be a list"),
        (assistant(tool_calls=["f"]), "messages[1].tool_calls[0]", "must be an object with fields id, type, function"),
        (assistant(tool_calls=[{**CALL, "type": "x"}]), "messages[1].tool_calls[0].type", "must be function"),
        (assistant(tool_calls=[{**CALL, "fuction": 1}]), "messages[1].tool_calls[0].fuction", "mean 'function'"),
        (assistant(tool_calls=[{"id": "x"}]), "messages[1].tool_calls[0].function", "must be an object"),
        (assistant(tool_calls=[{"function": {"arguments": {}}}]), "messages[1].tool_calls[0].function.name", "be text"),
        *(
            (
                assistant(tool_calls=[{"function": {"name": "f", "arguments": bad}}]),
                "messages[1].tool_calls",
                "no JSON object",
            )
            for bad in ("x", "[1]", "null", '"a"', [1], 3, "[" * 5000)
        ),
    ],
)
def test_what_is_refused(given: Any, param: str, said: str) -> None:
    with pytest.raises(ValidationError) as refused:
        conversation(given)
    assert refused.value.param == param
    assert said in str(refused.value)
