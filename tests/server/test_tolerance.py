"""What clients repeat is taken, what people choose is honoured or refused by name: the law of bodies on the wire."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import OpenAI

from tests.kit.live import Live
from tests.kit.served import Parrot, byte_tokenizer

U: dict[str, Any] = {"role": "user", "content": "hi"}
CALL: dict[str, Any] = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": 5}'}}
RESULT: dict[str, Any] = {"role": "tool", "tool_call_id": "call_1", "content": "1"}
WRITTEN = '<tool_call>{"name": "f", "arguments": %s}</tool_call>'  # as the template writes a call
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def chat(live: Live, status: int = 200, **body: Any) -> dict[str, Any]:
    answer = live.post("/v1/chat/completions", {"model": "causal", "messages": [U], "max_tokens": 2, **body})
    assert answer.status_code == status, answer.text
    return dict(answer.json())


def prompt(live: Live, messages: list[Any], **body: Any) -> str:
    """What the template made of these messages."""
    answer = live.post("/tokenize", {"model": "causal", "messages": messages, **body})
    assert answer.status_code == 200, answer.text
    return byte_tokenizer().decode(answer.json()["tokens"], skip_special=False)


@pytest.mark.parametrize(
    "extra",
    [
        {"refusal": None, "annotations": None, "audio": None, "function_call": None, "tool_calls": None},
        {"annotations": [], "tool_calls": []},
        {"annotations": [{"type": "url_citation", "url_citation": {"url": "x"}}], "audio": {"id": "a"}},
        {"reasoning": "because", "reasoning_content": "because", "reasoning_details": [1], "thinking_blocks": []},
        {"parsed": {"a": 1}, "provider_specific_fields": {"b": None}, "cache_control": {"type": "ephemeral"}},
        {"id": "msg_1", "status": "completed", "finish_reason": "stop"},
        {"any_name_at_all": None, "name": None},
    ],
)
def test_an_answer_sent_back_is_its_content(live: Live, extra: dict[str, Any]) -> None:
    plain = {"role": "assistant", "content": "42"}
    assert prompt(live, [U, {**plain, **extra}, U]) == prompt(live, [U, plain, U])


@pytest.mark.parametrize(
    "call",
    [
        {**CALL, "index": 0},
        {**CALL, "type": None, "provider_specific_fields": {}},
        {**CALL, "function": {**CALL["function"], "parsed_arguments": {"x": 5}}},
    ],
)
def test_a_call_sent_back_is_the_call(live: Live, call: dict[str, Any]) -> None:
    plain = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert WRITTEN % '{"x": 5}' in prompt(live, [U, plain, RESULT])
    assert prompt(live, [U, {**plain, "tool_calls": [call]}, RESULT]) == prompt(live, [U, plain, RESULT])


def test_calls_without_arguments_and_turns_without_content(live: Live) -> None:
    for empty in ("", "{}", None):
        call = {**CALL, "function": {"name": "f", "arguments": empty}}
        assert WRITTEN % "{}" in prompt(live, [U, {"role": "assistant", "content": None, "tool_calls": [call]}, RESULT])
    silent = [U, {"role": "assistant", "content": None}, U]
    assert prompt(live, silent) == prompt(live, [U, {"role": "assistant", "content": ""}, U])
    refused = [U, {"role": "assistant", "content": None, "refusal": "No."}, U]
    assert prompt(live, refused) == prompt(live, [U, {"role": "assistant", "content": "No."}, U])
    part = {"type": "refusal", "refusal": "No.", "annotations": []}
    in_parts = [U, {"role": "assistant", "content": [part]}, U]
    assert prompt(live, in_parts) == prompt(live, [U, {"role": "assistant", "content": "No."}, U])


def test_the_older_form_of_a_call_is_understood(live: Live) -> None:
    older = [
        {"role": "assistant", "content": None, "function_call": CALL["function"]},
        {"role": "function", "name": "f", "content": "1"},
    ]
    assert prompt(live, [U, *older]).startswith("[user]hi[assistant]" + WRITTEN % '{"x": 5}' + "[tool]1")


def test_parts_of_text(live: Live) -> None:
    part = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}, "annotations": []}
    assert prompt(live, [{"role": "user", "content": [part]}]) == prompt(live, [U])


def test_an_openai_reply_goes_back_as_the_client_dumps_it(live: Live, parrot: Parrot) -> None:
    client: OpenAI = live.client()
    text = '<tool_call>\n{"name": "f", "arguments": {"x": 5}}\n</tool_call>'
    rendered = byte_tokenizer().apply_chat_template([U], [TOOL])
    parrot.teach(len(byte_tokenizer().encode(rendered)), text)
    said = client.chat.completions.create(model="parrot", messages=[U], tools=[TOOL]).choices[0].message  # type: ignore[list-item]
    assert said.tool_calls
    result = {**RESULT, "tool_call_id": said.tool_calls[0].id}
    for sent in (said.model_dump(), said.model_dump(exclude_none=True), said.to_dict()):
        assert WRITTEN % '{"x": 5}' in prompt(live, [U, sent, result])


@pytest.mark.parametrize(
    "fields",
    [
        {name: None}
        for name in (
            *("functions", "function_call", "audio", "prediction", "web_search_options", "reasoning_effort"),
            *("guided_json", "seed", "stop", "tools", "tool_choice", "stream_options", "anything"),
        )
    ]
    + [
        {"function_call": "none"},
        {"echo": False},
        {"add_special_tokens": False},
        {"best_of": 1},
        {"best_of": 2, "n": 2},
        {"use_beam_search": False},
        {"length_penalty": 1},
        {"length_penalty": 1.0},
        {"add_generation_prompt": True},
        {"continue_final_message": False},
        {"prompt_cache_key": "a"},
        {"prompt_cache_retention": "24h"},
        {"verbosity": "low"},
        {"reasoning_effort": "minimal"},
        {"safety_identifier": "x", "user": "y", "metadata": {"a": None, "b": "c"}, "store": False},
        {"service_tier": "auto"},
        {"top_p": 0},
        {"top_logprobs": 0},
        {"stream_options": {}},
        {"stream_options": {"include_usage": False, "include_obfuscation": None}},
        {"parallel_tool_calls": True},
        {"parallel_tool_calls": False},
        {"tools": [{**TOOL, "cache_control": {}, "function": {**TOOL["function"], "strict": True}}]},
        {"tools": []},
        {"response_format": {"type": "text"}, "modalities": ["text"]},
    ],
)
def test_what_asks_for_nothing_changes_nothing(live: Live, fields: dict[str, Any]) -> None:
    def texts(**body: Any) -> list[str]:
        choices = chat(live, **{"max_tokens": 4, "temperature": 0, **body})["choices"]
        return [choice["message"]["content"] for choice in choices]

    tools = {name: fields[name] for name in ("tools", "n") if name in fields}  # these two do ask for something
    assert texts(**fields) == texts(**tools)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"best_of": 3}, "best_of", "best_of=3 is not honoured: n choices are made"),
        ({"use_beam_search": True}, "use_beam_search", "beam search"),
        ({"length_penalty": 0.5}, "length_penalty", "beam search"),
        ({"continue_final_message": True}, "continue_final_message", "new turn"),
        ({"store": True}, "store", "store=True is not honoured: nothing is stored."),
        ({"service_tier": "priority"}, "service_tier", "one tier"),
        ({"functions": [{"name": "f"}]}, "functions", "send tools"),
        ({"function_call": "auto"}, "function_call", "tool_choice"),
        ({"function_call": {"name": "f"}}, "function_call", "tool_choice"),
        ({"echo": True}, "echo", "echo=True is not honoured: an answer of a chat"),
        ({"add_special_tokens": True}, "add_special_tokens", "the template of a chat"),
        (
            {"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}]},
            "messages[0].content",
            "only the assistant",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "refusal", "refusl": "x"}]}]},
            "messages.0.content.0.refusl",
            "Did you mean 'refusal'?",
        ),
        ({"audio": {"voice": "x"}}, "audio", "text only"),
        ({"modalities": ["audio"]}, "modalities.0", "text only"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction", "ngram"),
        ({"web_search_options": {}}, "web_search_options", "search the web"),
        ({"guided_json": {}}, "guided_json", "not constrained"),
        ({"structured_outputs": {}}, "structured_outputs", "not constrained"),
        ({"chat_template": "x"}, "chat_template", "--chat-template"),
        ({"documents": [{}]}, "documents", "chat_template_kwargs"),
        ({"enable_thinking": False}, "enable_thinking", "chat_template_kwargs"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
            "response_format.type",
            "response_format.type='json_schema' is not honoured: output is not constrained",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type", "must be 'text', got 'xml'"),
        ({"tool_choice": "required", "tools": [TOOL]}, "tool_choice", "cannot be guaranteed"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.type",
            "text only",
        ),
        ({"max_token": 3}, "max_token", "Did you mean 'max_tokens'?"),
        ({"temprature": 1}, "temprature", "Did you mean 'temperature'?"),
        ({"stream_options": {"include_usge": True}}, "stream_options.include_usge", "Did you mean 'include_usage'?"),
        ({"messages": [{"role": "user", "contents": "x"}]}, "messages.0.contents", "Did you mean 'content'?"),
        ({"tools": [{"type": "function", "function": {"name": "f", "params": {}}}]}, "tools.0.function.params", ""),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0]", "no content"),
        ({"messages": [{"role": "tool", "tool_call_id": "x"}]}, "messages[0]", "no content"),
        ({"messages": [{**U, "tool_calls": [CALL]}]}, "messages[0].tool_calls", "only the assistant"),
        ({"messages": [{**U, "function_call": CALL["function"]}]}, "messages[0].function_call", "only the assistant"),
        ({"messages": [None]}, "messages.0", ""),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream: true"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs: true"),
    ],
)
def test_what_asks_for_more_is_refused_with_the_reason(
    live: Live, fields: dict[str, Any], param: str, says: str
) -> None:
    error = chat(live, 400, **fields)["error"]
    assert error["param"] == param
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("arguments", ["x", "[1]", "null", '"a"', "{" * 10_000])
def test_arguments_that_are_no_object(live: Live, arguments: str) -> None:
    call = {**CALL, "function": {"name": "f", "arguments": arguments}}
    error = chat(live, 400, messages=[U, {"role": "assistant", "tool_calls": [call]}])["error"]
    assert error["param"] == "messages[1].tool_calls"


def test_a_tools_schema_keeps_its_nulls(live: Live) -> None:
    """null is absence in the objects of the API, not in a schema that passes through to the template."""
    schema = {"type": "object", "properties": {"x": {"default": None, "enum": [None, 1]}}}
    tool = {"type": "function", "function": {"name": "f", "description": None, "parameters": schema}}
    shown = prompt(live, [U], tools=[tool])
    listed = json.loads(shown.removeprefix("[tools]").partition("[user]")[0])
    assert listed == [{"type": "function", "function": {"name": "f", "parameters": schema}}]


def test_the_model_may_be_left_out_only_where_one_is_served(live: Live) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [U]}),
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": [1]}),
    ):
        answer = live.post(path, {**body, "model": None})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == "model"
        assert "blocks, canvas, causal, parrot" in error["message"]
