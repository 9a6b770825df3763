"""/v1/chat/completions over a socket with the official client: templates, tools, logprobs, canvas events."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from tests.kit.live import Live
from tests.kit.served import VOCAB, Parrot, byte_tokenizer

HELLO: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
WEATHER: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.fixture(scope="module")
def client(live: Live) -> OpenAI:
    return live.client()


def teach(live: Live, parrot: Parrot, text: str, **prompt: Any) -> None:
    """Let the parrot answer this conversation with `text`."""
    rendered = byte_tokenizer().apply_chat_template(**prompt)
    parrot.teach(len(byte_tokenizer().encode(rendered)), text)


def test_an_answer(client: OpenAI, live: Live, parrot: Parrot) -> None:
    teach(live, parrot, "Hi. ö ✓", messages=HELLO)
    answer = client.chat.completions.create(model="parrot", messages=HELLO)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "Hi. ö ✓"
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len("Hi. ö ✓".encode())  # EOS is not counted
    streamed = list(client.chat.completions.create(model="parrot", messages=HELLO, stream=True))
    assert streamed[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == "Hi. ö ✓"
    assert not any("\ufffd" in (chunk.choices[0].delta.content or "") for chunk in streamed)
    assert streamed[-1].choices[0].finish_reason == "stop"


def test_the_prompt_is_the_chat_template(client: OpenAI, live: Live) -> None:
    answer = client.chat.completions.create(
        model="causal", messages=HELLO, max_tokens=1, extra_body={"return_token_ids": True}
    )
    rendered = "[system]Be brief.[user]Hello?[assistant]"
    assert answer.model_extra["prompt_token_ids"] == byte_tokenizer().encode(rendered)
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        HELLO[1],
    ]
    same = client.chat.completions.create(
        model="causal", messages=parts, max_tokens=1, extra_body={"return_token_ids": True}
    )
    assert same.model_extra["prompt_token_ids"] == answer.model_extra["prompt_token_ids"]
    assert live.post("/tokenize", {"model": "causal", "messages": HELLO}).json()["tokens"] == byte_tokenizer().encode(
        rendered
    )


def test_without_a_limit_an_autoregressive_answer_may_fill_the_context(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="causal", messages=HELLO, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.model_extra["dfastllm"]["nfe"] == 512 - answer.usage.prompt_tokens
    assert answer.choices[0].finish_reason == "length"


def test_diffusion_defaults_and_both_names_of_the_limit(client: OpenAI) -> None:
    extra = {"ignore_eos": True}
    answer = client.chat.completions.create(model="canvas", messages=HELLO, extra_body=extra)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 128
    short = client.chat.completions.create(
        model="canvas", messages=HELLO, max_completion_tokens=16, extra_body={**extra, "block_length": 8}
    )
    assert short.usage is not None
    assert short.usage.completion_tokens == 16
    with pytest.raises(BadRequestError) as refused:
        client.chat.completions.create(model="canvas", messages=HELLO, max_completion_tokens=16, max_tokens=8)
    assert refused.value.param == "max_completion_tokens"


def test_tool_calls(client: OpenAI, live: Live, parrot: Parrot) -> None:
    teach(live, parrot, f"Let me look. {CALL}", messages=HELLO, tools=WEATHER)
    answer = client.chat.completions.create(model="parrot", messages=HELLO, tools=WEATHER)
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    assert message.content == "Let me look."
    assert message.tool_calls is not None
    assert [call.function.name for call in message.tool_calls] == ["weather"]
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Oslo"}
    assert message.tool_calls[0].id.startswith("call_")

    content, calls, reasons = "", [], []
    for chunk in client.chat.completions.create(model="parrot", messages=HELLO, tools=WEATHER, stream=True):
        delta = chunk.choices[0].delta
        content += delta.content or ""
        calls += delta.tool_calls or []
        reasons.append(chunk.choices[0].finish_reason)
    assert content == "Let me look."
    begin, *more = calls
    assert (begin.index, begin.type, begin.function.name, begin.function.arguments) == (0, "function", "weather", "")
    assert begin.id.startswith("call_")
    assert {(call.index, call.id, call.type, call.function.name) for call in more} == {(0, None, None, None)}
    assert len(more) > 1
    assert "".join(call.function.arguments for call in more) == message.tool_calls[0].function.arguments
    assert reasons[-1] == "tool_calls"


def test_text_stays_text_without_tools(client: OpenAI, live: Live, parrot: Parrot) -> None:
    teach(live, parrot, CALL, messages=HELLO)
    for options in ({}, {"tools": WEATHER, "tool_choice": "none"}):
        message = client.chat.completions.create(model="parrot", messages=HELLO, **options).choices[0].message
        assert message.content == CALL
        assert message.tool_calls is None


def test_a_conversation_goes_on_after_a_tool_call(client: OpenAI, live: Live, parrot: Parrot) -> None:
    teach(live, parrot, CALL, messages=HELLO, tools=WEATHER)
    said = client.chat.completions.create(model="parrot", messages=HELLO, tools=WEATHER).choices[0].message
    assert said.tool_calls is not None
    history = [*HELLO, said, {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "12 degrees"}]
    answer = client.chat.completions.create(
        model="causal", messages=history, tools=WEATHER, max_tokens=1, extra_body={"return_token_ids": True}
    )
    prompt = byte_tokenizer().decode(answer.model_extra["prompt_token_ids"], skip_special=False)
    called = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
    assert prompt.endswith(f"[assistant]{called}[tool]12 degrees[assistant]")
    assert '"name": "weather"' in prompt


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": WEATHER, "tool_choice": "required"}, "tool_choice"),
        ({"tools": WEATHER, "tool_choice": {"type": "function", "function": {"name": "weather"}}}, "tool_choice"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
            "response_format.type",
        ),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"store": True}, "store"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 600}], "stream": True}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.",
        ),
    ],
)
def test_what_cannot_be_guaranteed_is_refused_by_name(client: OpenAI, options: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.chat.completions.create(**{"model": "causal", "messages": HELLO, "max_tokens": 2, **options})
    assert (refused.value.param or "").startswith(param)
    assert refused.value.type == "invalid_request_error"


def test_fields_that_ask_for_nothing_are_taken(client: OpenAI) -> None:
    client.chat.completions.create(
        model="causal",
        messages=HELLO,
        max_tokens=2,
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        response_format={"type": "text"},
        modalities=["text"],
        temperature=None,
        stop=None,
        logit_bias=None,
    )


def test_logprobs(client: OpenAI) -> None:
    options: dict[str, Any] = {"model": "causal", "messages": HELLO, "max_tokens": 5, "temperature": 0}
    answer = client.chat.completions.create(**options, logprobs=True, top_logprobs=4)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 5
    text = b""
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 4
        best = entry.top_logprobs[0]
        assert (best.token, best.logprob, best.bytes) == (entry.token, entry.logprob, entry.bytes)
        assert entry.bytes is not None
        text += bytes(entry.bytes)
    assert text.decode(errors="replace") == answer.choices[0].message.content
    bare = client.chat.completions.create(**options, logprobs=True).choices[0].logprobs
    assert bare is not None
    assert bare.content is not None
    assert [entry.logprob for entry in bare.content] == [entry.logprob for entry in logprobs.content]
    assert all(entry.top_logprobs == [] for entry in bare.content)
    chunks = client.chat.completions.create(**options, logprobs=True, top_logprobs=4, stream=True)
    pieces = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
    assert [entry for piece in pieces for entry in piece.content or []] == logprobs.content


def test_canvas_events_replay_the_denoising(client: OpenAI) -> None:
    """The events rebuild the canvas; what is committed is the answer; plain deltas carry settled text only."""
    options: dict[str, Any] = {"model": "canvas", "messages": HELLO, "max_tokens": 24, "temperature": 0}
    extra = {"block_length": 8, "ignore_eos": True, "return_token_ids": True}
    whole = client.chat.completions.create(**options, extra_body=extra)
    cells: dict[int, int] = {}
    types: set[str] = set()
    text, ids, steps = "", [], 0
    stream = client.chat.completions.create(
        **options, stream=True, stream_options={"canvas_events": True}, extra_body=extra
    )
    for chunk in stream:
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
            ids += chunk.choices[0].model_extra.get("token_ids", [])
            assert [cells.get(i) for i in range(len(ids))] == ids  # never ahead of what is committed
            continue
        canvas = chunk.model_extra["canvas"]
        assert canvas["index"] == 0
        steps += 1
        for event in canvas["events"]:
            types.add(event["type"])
            if event["type"] == "commit":
                cells.update({cell["position"]: cell["token_id"] for cell in event["tokens"]})
            elif event["type"] == "provisional":
                assert not {cell["position"] for cell in event["tokens"]} & cells.keys()
            elif event["type"] == "stats":
                assert event["step"] == steps
                assert event["masked"] == event["length"] - len(cells)
    assert types == {"commit", "provisional", "block_done", "stats"}
    assert [cells[i] for i in range(24)] == whole.choices[0].model_extra["token_ids"] == ids
    assert text == whole.choices[0].message.content
    assert max(cells.values()) < VOCAB
    with pytest.raises(BadRequestError) as refused:
        client.chat.completions.create(
            model="causal", messages=HELLO, stream=True, stream_options={"canvas_events": True}
        )
    assert refused.value.param == "stream_options.canvas_events"
