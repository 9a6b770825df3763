"""Tool calls over a socket: in the form of each template, whole and streamed, cut, refused, and sent back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI

from tests.kit.live import Live, serving
from tests.kit.served import Parrot, byte_tokenizer, parrot_engine
from tests.text import test_taught as templates

U: dict[str, Any] = {"role": "user", "content": "hi"}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("f", "g")
]
SPECIAL = ("[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "[INST]")
TEMPLATES = {
    "hermes": templates.HERMES,
    "mistral": templates.MISTRAL,
    "names": templates.MISTRAL_NAMES,
    "llama": templates.LLAMA,
    "alone": "{{ messages[-1].content }}",
    "deaf": templates.NO_TOOLS,
    "coder": templates.QWEN_CODER,
}


@pytest.fixture(scope="module")
def forms() -> Iterator[Live]:
    """One scripted model for each template, with the markup of calls as special tokens."""
    with serving({name: parrot_engine(template, SPECIAL) for name, template in TEMPLATES.items()}) as running:
        yield running


def taught(forms: Live, model: str, text: str, messages: list[Any] | None = None, tools: Any = TOOLS) -> dict[str, Any]:
    """A body that this model answers with `text`."""
    engine = forms.worker.engines[model]
    assert isinstance(engine.model, Parrot)
    body = {"model": model, "messages": messages or [U], "max_tokens": 600, **({"tools": tools} if tools else {})}
    counted = forms.post("/tokenize", {key: body[key] for key in ("model", "messages", "tools") if key in body})
    engine.model.teach(counted.json()["count"], text)
    return body


def whole(forms: Live, body: dict[str, Any]) -> dict[str, Any]:
    answer = forms.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["choices"][0])


def streamed(forms: Live, body: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The answer that a client puts together of a stream, and the deltas of its calls."""
    lines = forms.post("/v1/chat/completions", {**body, "stream": True}).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    calls: list[dict[str, Any]] = []
    deltas = [call for choice in choices for call in choice["delta"].get("tool_calls") or []]
    for delta in deltas:
        if "id" in delta:
            assert delta["index"] == len(calls)
            assert delta["function"]["arguments"] == ""
            calls.append({"id": delta["id"], "type": delta["type"], "function": dict(delta["function"])})
        else:
            assert delta["index"] == len(calls) - 1
            assert delta.keys() == {"index", "function"}
            assert delta["function"].keys() == {"arguments"}
            calls[-1]["function"]["arguments"] += delta["function"]["arguments"]
    content = "".join(choice["delta"].get("content") or "" for choice in choices)
    message: dict[str, Any] = {"role": "assistant", "content": content or None if calls else content}
    if calls:
        message["tool_calls"] = calls
    return {"message": message, "finish_reason": choices[-1]["finish_reason"]}, deltas


def both(forms: Live, body: dict[str, Any]) -> tuple[str | None, list[tuple[str, str]], str]:
    """Content, calls and finish reason, the same whole and streamed."""
    found = []
    for choice in (whole(forms, body), streamed(forms, body)[0]):
        message = choice["message"]
        calls = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls") or []]
        ids = [c["id"] for c in message.get("tool_calls") or []]
        assert len(set(ids)) == len(ids)
        found.append((message["content"], calls, choice["finish_reason"]))
    assert found[0] == found[1]
    return found[0]


F = ("f", '{"k": 1}')


@pytest.mark.parametrize(
    ("model", "text", "content", "calls"),
    [
        ("hermes", 'Ah.\n<tool_call>\n{"name": "f", "arguments": {"k": 1}}\n</tool_call>', "Ah.", [F]),
        ("hermes", '<tool_call>{"name": "f", "parameters": {"k": 1}}', None, [F]),
        (
            "hermes",
            '<tool_call>[{"name": "f", "arguments": {"k": 1}}, {"name": "g"}]</tool_call>',
            None,
            [F, ("g", "{}")],
        ),
        (
            "mistral",
            '[TOOL_CALLS][{"name": "f", "arguments": {"k": 1}}, {"name": "g", "arguments": {}}]',
            None,
            [F, ("g", "{}")],
        ),
        ("names", 'So. [TOOL_CALLS]f[ARGS]{"k": 1}[TOOL_CALLS]g[ARGS]{}', "So.", [F, ("g", "{}")]),
        ("llama", '{"name": "f", "parameters": {"k": 1}}', None, [F]),
        ("llama", '<|python_tag|>{"name": "f", "parameters": {"k": 1}}', None, [F]),
        ("alone", '<tool_call>{"name": "f", "arguments": {"k": 1}}</tool_call>', None, [F]),
        ("alone", '[TOOL_CALLS][{"name": "f", "arguments": {"k": 1}}]', None, [F]),
        ("alone", '{"name": "f", "parameters": {"k": 1}}', None, [F]),
        ("hermes", '<tool_call>{"name": "other", "arguments": {"k": 1}}</tool_call>', None, [("other", '{"k": 1}')]),
    ],
)
def test_calls_in_the_form_of_the_template(
    forms: Live, model: str, text: str, content: str | None, calls: list[tuple[str, str]]
) -> None:
    assert both(forms, taught(forms, model, text)) == (content, calls, "tool_calls")


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("hermes", '{"name": "f", "parameters": {"k": 1}}'),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
        ("llama", '<tool_call>{"name": "f", "arguments": {}}</tool_call>'),
        ("llama", '{"name": "other", "parameters": {}}'),
        ("llama", '{"title": "f", "parameters": {}}'),
        ("alone", '<tool_call>{"name": "other", "arguments": {}}</tool_call>'),
    ],
)
def test_what_is_no_call_of_this_template_is_content(forms: Live, model: str, text: str) -> None:
    assert both(forms, taught(forms, model, text)) == (text, [], "stop")


def test_other_special_tokens_stay_hidden(forms: Live) -> None:
    body = taught(forms, "mistral", '[INST]Ah. [TOOL_CALLS][{"name": "f", "arguments": {"k": 1}}]')
    assert both(forms, body) == ("Ah.", [F], "tool_calls")
    del body["tools"]
    body = taught(forms, "mistral", "[INST]Ah. [TOOL_CALLS]", tools=None)
    assert both(forms, body) == ("Ah. ", [], "stop"), "without tools it is no markup"


@pytest.mark.parametrize(("model", "said"), [("deaf", "does not read tools"), ("coder", "Qwen3-Coder")])
def test_tools_of_a_template_that_cannot_call_are_refused(forms: Live, model: str, said: str) -> None:
    body = {"model": model, "messages": [U], "max_tokens": 4}
    for stream in (False, True):
        answer = forms.post("/v1/chat/completions", {**body, "tools": TOOLS, "stream": stream})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["param"], error["code"]) == ("tools", "unsupported")
        assert said in error["message"]
        assert "tool_choice none" in error["message"]
    unasked: list[dict[str, Any]] = [{}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}]
    for nothing in unasked:
        assert forms.post("/v1/chat/completions", {**body, **nothing}).status_code == 200


def test_tool_choice_none_shows_no_tools_and_finds_no_calls(forms: Live) -> None:
    text = '<tool_call>{"name": "f", "arguments": {"k": 1}}</tool_call>'
    body = {**taught(forms, "hermes", text, tools=None), "tools": TOOLS}
    assert both(forms, {**body, "tool_choice": "none"}) == (text, [], "stop")
    body = taught(forms, "hermes", text)
    assert both(forms, {**body, "tool_choice": "auto"}) == (None, [F], "tool_calls")


LONG = '<tool_call>{"name": "f", "arguments": {"text": "%s"}}</tool_call>' % ("word " * 40)


def test_a_long_call_streams_as_it_is_written(forms: Live) -> None:
    body = taught(forms, "hermes", LONG)
    _, deltas = streamed(forms, body)
    assert deltas[0]["function"] == {"name": "f", "arguments": ""}
    assert len(deltas) > 100, "one token is one byte here"
    assert max(len(delta["function"]["arguments"]) for delta in deltas) < 20


def test_an_answer_cut_in_a_call_has_what_was_written(forms: Live) -> None:
    body = taught(forms, "hermes", LONG)
    begun = LONG.index('{"text"')
    content, calls, reason = both(forms, {**body, "max_tokens": begun + 30})
    assert (content, calls, reason) == (None, [("f", LONG[begun : begun + 30])], "length")
    content, calls, reason = both(forms, {**body, "max_tokens": begun})
    assert (content, calls, reason) == (LONG[:begun], [], "length"), "not yet a call"


def test_the_limit_is_told_before_the_calls(forms: Live) -> None:
    call = '<tool_call>{"name": "f", "arguments": {"k": 1}}</tool_call>'
    body = taught(forms, "hermes", f"{call} and more")
    assert both(forms, body) == ("and more", [F], "tool_calls")
    assert both(forms, {**body, "max_tokens": len(call) + 4}) == ("and", [F], "length")
    assert both(forms, {**body, "max_tokens": len(call)}) == (None, [F], "length")


def test_an_answer_that_ends_in_a_call_stops(forms: Live) -> None:
    body = taught(forms, "hermes", '<tool_call>{"name": "f", "arguments": {"k": "v')
    assert both(forms, body) == (None, [("f", '{"k": "v')], "stop")


def test_stop_strings_end_calls_too(forms: Live) -> None:
    body = taught(forms, "hermes", '<tool_call>{"name": "f", "arguments": {"k": 1}}</tool_call> and more')
    assert both(forms, {**body, "stop": ["</tool_call>"]}) == (None, [F], "tool_calls")
    assert both(forms, {**body, "stop": [": 1"]}) == (None, [("f", '{"k"')], "stop")


def test_calls_of_several_choices(forms: Live) -> None:
    text = '<tool_call>{"name": "f", "arguments": {"k": 1}}</tool_call>' * 2
    answer = forms.post("/v1/chat/completions", {**taught(forms, "hermes", text), "n": 3}).json()
    ids = [call["id"] for choice in answer["choices"] for call in choice["message"]["tool_calls"]]
    assert len(set(ids)) == len(ids) == 6


@pytest.mark.parametrize(("model", "pattern"), [("mistral", "[a-zA-Z0-9]{9}"), ("hermes", "call_[0-9a-f]{24}")])
def test_a_conversation_goes_on_with_the_ids_given(forms: Live, model: str, pattern: str) -> None:
    client: OpenAI = forms.client()
    text = (
        '[TOOL_CALLS][{"name": "f", "arguments": {"k": 1}}]'
        if model == "mistral"
        else '<tool_call>{"name": "f", "arguments": {"k": 1}}</tool_call>'
    )
    body = taught(forms, model, text)
    said = client.chat.completions.create(**body).choices[0].message
    assert said.tool_calls is not None
    assert re.fullmatch(pattern, said.tool_calls[0].id)
    talk = [U, said.model_dump(), {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "ok"}]
    body = taught(forms, model, "Done.", talk)
    assert client.chat.completions.create(**body).choices[0].message.content == "Done."


def test_ids_of_another_server_are_taken(forms: Live) -> None:
    """A client may go on with a conversation that another model began."""
    call = {"id": "call_0123456789abcdef01234567", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    talk = [
        U,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "ok"},
    ]
    assert both(forms, taught(forms, "mistral", "Done.", talk)) == ("Done.", [], "stop")
    tokens = forms.post("/tokenize", {"model": "mistral", "messages": talk}).json()["tokens"]
    written = byte_tokenizer("", SPECIAL).decode(tokens, skip_special=False)
    assert re.search(r'"id": "[a-zA-Z0-9]{9}"', written)
