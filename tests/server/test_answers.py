"""What an answer says of itself: usage so far, padding of chunks, one call then the end, the canvas, empty logprobs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dfastllm.server.canvas import canvas_chunk
from dfastllm.server.replies import CanvasChunk, ChatChunk, dump, padded
from tests.kit.live import Live
from tests.kit.served import Parrot, byte_tokenizer

U: dict[str, Any] = {"role": "user", "content": "hi"}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": %d}}\n</tool_call>'
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": ["hello", "you"]},
    "/v1/chat/completions": {"messages": [U], "n": 2},
}


def post(live: Live, path: str, **body: Any) -> dict[str, Any]:
    answer = live.post(path, {"model": "causal", "max_tokens": 6, "temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def lines(live: Live, path: str, **body: Any) -> list[str]:
    answer = live.post(path, {"model": "causal", "max_tokens": 6, "temperature": 0, "stream": True, **body})
    assert answer.status_code == 200, answer.text
    return [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line and line != "data: [DONE]"]


def teach(parrot: Parrot, text: str, tools: list[Any] | None = None) -> None:
    rendered = byte_tokenizer().apply_chat_template([U], tools)
    parrot.teach(len(byte_tokenizer().encode(rendered)), text)


@pytest.mark.parametrize("model", ["causal", "canvas"])
@pytest.mark.parametrize("path", BODIES)
def test_continuous_usage_counts_each_choice_and_ends_with_the_whole(live: Live, path: str, model: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"model": model, "ignore_eos": True, "return_token_ids": True, "stream_options": options, **BODIES[path]}
    *chunks, last = map(json.loads, lines(live, path, **body))
    seen: dict[int, int] = {}
    prompts: dict[int, int] = {}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        index, usage = choice["index"], chunk["usage"]
        seen[index] = seen.get(index, 0) + len(choice.get("token_ids", []))
        assert usage["completion_tokens"] == seen[index]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        prompts[index] = usage["prompt_tokens"]
    assert seen == {0: 6, 1: 6}
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 12
    per_prompt = sum(prompts.values()) if "prompt" in body else prompts[0]
    assert last["usage"]["prompt_tokens"] == per_prompt


@pytest.mark.parametrize("path", BODIES)
def test_usage_so_far_needs_no_last_chunk(live: Live, path: str) -> None:
    options = {"continuous_usage_stats": True}
    chunks = [json.loads(line) for line in lines(live, path, stream_options=options, **BODIES[path])]
    assert all(chunk["choices"] and chunk["usage"] for chunk in chunks)
    silent = [json.loads(line) for line in lines(live, path, stream_options={"include_usage": False}, **BODIES[path])]
    assert all("usage" not in chunk for chunk in silent)


@pytest.mark.parametrize("path", BODIES)
def test_obfuscation_fills_every_chunk(live: Live, path: str) -> None:
    hidden = lines(live, path, stream_options={"include_obfuscation": True, "include_usage": True}, **BODIES[path])
    assert all(len(line.encode()) % 64 == 0 and "obfuscation" in json.loads(line) for line in hidden)
    plain = lines(live, path, stream_options={"include_obfuscation": False}, **BODIES[path])
    assert all("obfuscation" not in line for line in plain)
    for size in range(200):
        assert len(padded(json.dumps({"a": "é" * size})).encode()) % 64 == 0


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_then_the_end(live: Live, parrot: Parrot, stream: bool) -> None:
    first = f"Look: {CALL % 1}"
    teach(parrot, f"{first} and {CALL % 2} bye", [TOOL])
    body = {"model": "parrot", "messages": [U], "tools": [TOOL], "max_tokens": 400, "return_token_ids": True}
    path = "/v1/chat/completions"

    def ask(**more: Any) -> tuple[str, list[str], str, int]:
        if not stream:
            answer = post(live, path, **body, **more)
            choice, usage = answer["choices"][0], answer["usage"]
            message = choice["message"]
            called = [call["function"]["arguments"] for call in message["tool_calls"]]
            assert len(choice["token_ids"]) == usage["completion_tokens"]
            return message["content"], called, choice["finish_reason"], usage["completion_tokens"]
        *chunks, last = map(json.loads, lines(live, path, stream_options={"include_usage": True}, **body, **more))
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
        assert [call["index"] for call in calls] == sorted(call["index"] for call in calls)
        begun = [call["index"] for call in calls if "id" in call]
        assert begun == list(range(len(begun)))
        called = ["".join(c["function"]["arguments"] for c in calls if c["index"] == index) for index in begun]
        reason = chunks[-1]["choices"][0]["finish_reason"]
        text = "".join(delta.get("content") or "" for delta in deltas)
        return text, called, reason, last["usage"]["completion_tokens"]

    assert ask(parallel_tool_calls=False) == ("Look:", ['{"x": 1}'], "tool_calls", len(first))
    text, called, reason, _ = ask(parallel_tool_calls=True)
    assert (text, called, reason) == ("Look:  and  bye", ['{"x": 1}', '{"x": 2}'], "tool_calls")
    assert live.serving.jobs == {}


def test_one_call_of_each_choice(live: Live, parrot: Parrot) -> None:
    teach(parrot, f"{CALL % 1}{CALL % 2}", [TOOL])
    body = {"model": "parrot", "messages": [U], "tools": [TOOL], "max_tokens": 400, "n": 3}
    answer = post(live, "/v1/chat/completions", **body, parallel_tool_calls=False)
    assert [len(choice["message"]["tool_calls"]) for choice in answer["choices"]] == [1, 1, 1]
    assert answer["usage"]["completion_tokens"] == 3 * len(CALL % 1)
    teach(parrot, "no call", [TOOL])
    answer = post(live, "/v1/chat/completions", **body, parallel_tool_calls=False)
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop"] * 3


def test_kept_end_tokens_are_counted(live: Live, parrot: Parrot) -> None:
    teach(parrot, "ab")
    body = {"model": "parrot", "messages": [U], "max_tokens": 8, "return_token_ids": True}
    kept = post(live, "/v1/chat/completions", **body, ignore_eos=True)
    assert kept["choices"][0]["token_ids"] == [*byte_tokenizer().encode("ab"), *[byte_tokenizer().eos_id] * 6]
    assert kept["usage"]["completion_tokens"] == 8
    ended = post(live, "/v1/chat/completions", **body)
    assert (ended["usage"]["completion_tokens"], ended["choices"][0]["finish_reason"]) == (2, "stop")


def test_the_canvas_length_is_told_and_a_default_is_no_demand(live: Live) -> None:
    """Without max_tokens the canvas is 128 tokens, or the whole blocks that the context of 512 leaves; one that was
    sent must fit."""
    for prompt, sent, length in ((10, {}, 128), (470, {}, 32), (10, {"max_tokens": 20, "block_length": 8}, 24)):
        body = {"model": "canvas", "prompt": "x" * prompt, "ignore_eos": True, **sent}
        answer = live.post("/v1/completions", body).json()
        assert answer["dfastllm"]["canvas_length"] == length
        assert answer["usage"]["completion_tokens"] == sent.get("max_tokens", length)
    refused = live.post("/v1/completions", {"model": "canvas", "prompt": "x" * 470, "max_tokens": 64})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "max_tokens"
    assert "canvas_length" not in post(live, "/v1/completions", prompt="x")["dfastllm"]
    stream = {"stream_options": {"include_usage": True}}
    last = json.loads(lines(live, "/v1/completions", model="canvas", prompt="x", max_tokens=20, **stream)[-1])
    assert last["dfastllm"]["canvas_length"] == 32


def test_logprobs_of_an_empty_answer_are_empty(live: Live, parrot: Parrot) -> None:
    teach(parrot, "")
    chat = post(live, "/v1/chat/completions", model="parrot", messages=[U], logprobs=True, top_logprobs=2)
    assert chat["choices"][0]["message"]["content"] == ""
    assert chat["choices"][0]["logprobs"] == {"content": []}
    parrot.teach(2, "")
    done = post(live, "/v1/completions", model="parrot", prompt="hi", logprobs=2)
    assert done["choices"][0]["logprobs"] == {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    assert post(live, "/v1/completions", model="parrot", prompt="hi")["choices"][0]["logprobs"] is None


def test_canvas_events_of_every_kind_are_of_the_declared_types() -> None:
    """Also revise, which the models of this suite never send."""
    from dfastllm.core import CanvasUpdate

    update = CanvasUpdate({0: 65}, {2: 66, 3: 67}, {1: None, 4: 68}, True, 8, 3)
    shown: CanvasChunk = canvas_chunk(byte_tokenizer(), 0, 5, update)
    assert [event["type"] for event in shown["events"]] == ["commit", "revise", "provisional", "block_done", "stats"]
    chunk = ChatChunk(id="x", created=0, model="m", choices=[], canvas=shown)
    assert json.loads(dump(chunk))["canvas"] == shown
    assert shown["events"][1] == {
        "type": "revise",
        "tokens": [
            {"position": 1, "token_id": None, "text": None},
            {"position": 4, "token_id": 68, "text": byte_tokenizer().decode([68])},
        ],
    }


@pytest.mark.parametrize("model", ["causal", "canvas", "blocks"])
@pytest.mark.parametrize("path", BODIES)
def test_end_tokens_that_are_kept_count_in_every_kind_of_model(live: Live, path: str, model: str) -> None:
    """An answer of nothing but end tokens, none of which is shown; as many as were asked for, in usage and figures."""
    eos = byte_tokenizer().eos_id
    body = {**BODIES[path], "model": model, "allowed_token_ids": [eos], "ignore_eos": True, "return_token_ids": True}
    answer = post(live, path, **body, max_tokens=13)
    for choice in answer["choices"]:
        assert choice["token_ids"] == [eos] * 13
        assert choice["finish_reason"] == "length"
        assert (choice["message"]["content"] if "message" in choice else choice["text"]) == ""
    assert answer["usage"]["completion_tokens"] == 26
    assert answer["dfastllm"]["tokens_per_forward"] == 26 / answer["dfastllm"]["nfe"]
    stream = {"stream_options": {"include_usage": True}}
    *chunks, last = map(json.loads, lines(live, path, **body, **stream, max_tokens=13))
    assert last["usage"] == answer["usage"]
    assert sum(len(choice.get("token_ids", [])) for chunk in chunks for choice in chunk["choices"]) == 26


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("model", ["causal", "canvas", "blocks", "parrot"])
def test_a_stream_begins_with_its_first_token(live: Live, parrot: Parrot, path: str, model: str) -> None:
    """Also with one that shows nothing, and never before it: each choice by itself, and what a canvas did first is told
    without a choice."""
    body = {**BODIES[path], "model": model, "return_token_ids": True}
    teach(parrot, "<|mask|><|mask|>abc")
    if "prompt" in body:
        body["prompt"] = ["one", "two"]
        parrot.begin = 3
    if model != "parrot":
        body |= {"allowed_token_ids": [byte_tokenizer().eos_id], "ignore_eos": True}
    body["stream_options"] = {"canvas_events": model in ("canvas", "blocks")}
    chunks = [json.loads(line) for line in lines(live, path, **body, max_tokens=16)]
    for index in (0, 1):
        own = [c for c in chunks for choice in c["choices"] if choice["index"] == index]
        first = own[0]["choices"][0]
        if "delta" in first:
            assert first["delta"] == {"role": "assistant", "content": ""}
            first = own[1]["choices"][0]  # at once with it
            assert chunks.index(own[1]) == chunks.index(own[0]) + 1
            assert "delta" not in first or "role" not in first["delta"]
        assert first["token_ids"]
    del body["return_token_ids"]
    plain = [json.loads(line) for line in lines(live, path, **body, max_tokens=16)]
    shown = [[c for c in plain if c["choices"] and c["choices"][0]["index"] == index] for index in (0, 1)]
    for own in shown:
        assert len(own) >= 2  # what opens it, and its end
        assert own[0]["choices"][0]["finish_reason"] is None
        text = own[0]["choices"][0].get("text", own[0]["choices"][0].get("delta", {}).get("content"))
        assert text == ""


def test_offsets_are_of_the_text_that_is_shown(live: Live, parrot: Parrot) -> None:
    """Halves of characters and tokens that are not shown; whole, streamed, and after an echo."""
    parrot.teach(2, "x<|mask|>é🦊y")
    body = {"model": "parrot", "prompt": "ab", "max_tokens": 20, "logprobs": 0, "return_token_ids": True}
    (choice,) = post(live, "/v1/completions", **body)["choices"]
    assert choice["text"] == "xé🦊y"
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 1, 2, 2, 2, 2, 3]
    assert choice["logprobs"]["tokens"][:3] == ["x", "<|mask|>", "bytes:\\xc3"]
    chunks = [json.loads(line) for line in lines(live, "/v1/completions", **body)]
    records = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
    assert [at for record in records for at in record["text_offset"]] == choice["logprobs"]["text_offset"]
    (choice,) = post(live, "/v1/completions", **body, skip_special_tokens=False)["choices"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 9, 9, 10, 10, 10, 10, 11]


def test_a_stop_string_is_found_in_what_was_generated(live: Live, parrot: Parrot) -> None:
    teach(parrot, "ab<|mask|>cd")
    body = {"model": "parrot", "messages": [U], "max_tokens": 20}
    for stop, text, reason in (("b<|mask|>c", "a", "stop"), ("bc", "abcd", "stop"), ("<|mask|>", "ab", "stop")):
        (choice,) = post(live, "/v1/chat/completions", **body, stop=stop)["choices"]
        assert choice["message"]["content"] == text
        assert choice["finish_reason"] == reason
        assert choice["stop_reason"] == (byte_tokenizer().eos_id if stop == "bc" else stop)
    (choice,) = post(live, "/v1/chat/completions", **body, stop="<|mask|>", include_stop_str_in_output=True)["choices"]
    assert choice["message"]["content"] == "ab<|mask|>"
