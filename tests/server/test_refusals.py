"""Bad input: every refusal is an OpenAI error object that names what was wrong, and nothing is lost by it."""

from __future__ import annotations

import json
from typing import Any

import httpx2 as httpx
import pytest
from openai import BadRequestError, NotFoundError

from tests.kit.live import Live
from tests.kit.served import Parrot, byte_tokenizer

GOOD: dict[str, Any] = {"model": "causal", "prompt": "x", "max_tokens": 1}


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return dict(body["error"])


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [""]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [5, "a"]}, "prompt"),
        ({"prompt": [[5], "a"]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [260]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": "x" * 600}, "prompt"),
        ({"max_tokens": 512}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -3}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"max_tokens": "4"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 33}, "n"),
        ({"n": 10**9}, "n"),
        ({"prompt": ["a"] * 33}, "prompt"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_tokens": 2}, "min_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": 1, "echo": True}, "echo"),
        ({"logit_bias": {"300": 1}}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"4": 101}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"stop_token_ids": [999]}, "stop_token_ids"),
        ({"stop": [""]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"seed": 1.5}, "seed"),
        ({"timeout": 0}, "timeout"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usge": True}}, "stream_options.include_usge"),
        ({"best_of": 2}, "best_of"),
        ({"temprature": 1}, "temprature"),
        ({"steps": 4}, "steps"),
        ({"use_dual_cache": True, "use_cache": False}, "use_cache"),
        ({"model": "canvas", "block_length": 0}, "block_length"),
        ({"model": "canvas", "block_length": -8}, "block_length"),
        ({"model": "canvas", "max_tokens": 64, "block_length": 32, "steps": 1}, "steps"),
        ({"model": "canvas", "max_tokens": 64, "block_length": 8, "steps": 7}, "steps"),
        ({"model": "canvas", "threshold": 0}, "threshold"),
        ({"model": "canvas", "remasking": "worst"}, "remasking"),
        ({"model": "canvas", "rule": "magic"}, "rule"),
        ({"model": "canvas", "rule_options": {"magic": 1}}, "magic"),
        ({"model": "canvas", "mode": "warp"}, "mode"),
        ({"model": "canvas", "use_cache": False, "cache": "dual"}, "cache"),
        ({"model": "canvas", "use_dual_cache": False, "cache": "dual"}, "cache"),
        ({"model": "canvas", "prompt": "a <|mask|> b"}, "prompt"),
        ({"model": "canvas", "max_tokens": 490, "block_length": 32}, "max_tokens"),
        ({"model": 5}, "model"),
        ({"prompt": "a", "stop": 5}, "stop"),
    ],
)
def test_a_bad_field_is_named(live: Live, change: dict[str, Any], param: str) -> None:
    error = error_of(live.post("/v1/completions", {**GOOD, **change}), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_messages_say_what_is_wrong(live: Live) -> None:
    def message(change: dict[str, Any]) -> str:
        return str(error_of(live.post("/v1/completions", {**GOOD, **change}), 400)["message"])

    assert message({"temprature": 1}) == "Unknown field 'temprature'. Did you mean 'temperature'?"
    assert "not honour" in message({"best_of": 2})
    assert "600 tokens" in message({"prompt": "x" * 600})
    assert message({"temperature": "hot"}) == "temperature: Input should be a valid number. Got 'hot'."
    assert message({"temperature": [1]}).endswith("Got a list.")
    assert message({"temperature": "x" * 999}).endswith("xxx…'.")
    assert message({"stream": 1}).endswith("Got 1.")
    assert message({"mode": "fsat"}).endswith("Got 'fsat'. Did you mean 'fast'?")
    assert message({"mode": "warp"}).endswith("Got 'warp'.")
    assert message({"max_completion_tokens": 5}).endswith("Did you mean 'max_tokens'?")
    assert message({"top_logprobs": 5}).endswith("Did you mean 'logprobs'?")
    for name in ("thinking", "cache_prompt"):
        assert message({name: 5}) == f"Unknown field {name!r}. Remove it; GET /docs lists the fields."
    assert "special tokens itself" not in message({"add_special_tokens": "x"}), "that is a chat's reason"
    assert message({"speculative_config": {"methd": "ngram"}}).endswith("Did you mean 'method'?")
    assert message({"speculative_config": {"num_speculative_tokens": 0}}).startswith("speculative_config names no")
    long = error_of(live.post("/v1/completions", {**GOOD, "prompt": "x" * 600}), 400)
    assert long["code"] == "context_length_exceeded"


def test_unknown_model(live: Live) -> None:
    with pytest.raises(NotFoundError) as missing:
        live.client().completions.create(model="gpt-9", prompt="x")
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    assert "blocks, canvas, causal, parrot" in str(missing.value)
    error_of(live.get("/v1/models/gpt-9"), 404)
    assert live.get("/v1/models/canvas").json()["id"] == "canvas"


def test_missing_fields(live: Live) -> None:
    assert error_of(live.post("/v1/completions", {"model": "causal"}), 400)["param"] == "prompt"
    assert error_of(live.post("/v1/completions", {"prompt": "x"}), 400)["param"] == "model"
    assert error_of(live.post("/v1/chat/completions", {"model": "causal"}), 400)["param"] == "messages"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b'{"model": "causal"', b"[" * 10_000])
def test_a_body_that_is_no_object(live: Live, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    error_of(_raw(live, body, headers), 400)


def test_a_list_is_told_to_be_one_and_its_type_is_not_blamed(live: Live) -> None:
    for body, got in ((b"[]", "a list"), (b"3", "3"), (b"null", "null"), (b"", "nothing")):
        error = error_of(_raw(live, body, {"content-type": "application/json; charset=utf-8"}), 400)
        assert error["message"] == f"The body must be a JSON object, got {got}."


def _raw(live: Live, body: bytes, headers: dict[str, str]) -> Any:
    return httpx.post(f"{live.url}/v1/completions", content=body, headers=headers, timeout=30)


def test_a_body_of_another_type(live: Live) -> None:
    error = error_of(_raw(live, json.dumps(GOOD).encode(), {"content-type": "text/plain"}), 400)
    assert "application/json" in error["message"]


def test_json_numbers_that_are_none(live: Live) -> None:
    for text in ('{"model":"causal","prompt":"x","temperature":NaN}', '{"model":"causal","prompt":"x","top_p":1e999}'):
        error_of(_raw(live, text.encode(), {"content-type": "application/json"}), 400)


def test_routes_and_methods_that_are_not_there(live: Live) -> None:
    assert error_of(live.get("/v2/nothing"), 404)["code"] == "not_found"
    response = live.get("/v1/completions")
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


def test_a_refusal_loses_nothing(live: Live, parrot: Parrot) -> None:
    """A list of prompts of which one does not fit is refused whole, and nothing of it runs."""
    before = live.metric("engine_steps_total", model_name="causal")
    error_of(live.post("/v1/completions", {**GOOD, "prompt": ["ok", "x" * 600]}), 400)
    assert live.metric("engine_steps_total", model_name="causal") <= before + 1  # the cancelled one's last event
    assert live.serving.jobs == {}
    assert live.post("/v1/completions", GOOD).status_code == 200


def test_a_failing_model_is_a_500_that_ends_only_its_own_request(live: Live, parrot: Parrot) -> None:
    parrot.fail = True
    error = error_of(live.post("/v1/completions", {**GOOD, "model": "parrot"}), 500)
    assert error["code"] == "generation_failed"
    assert live.post("/v1/completions", GOOD).status_code == 200
    parrot.fail = False
    assert live.post("/v1/completions", {**GOOD, "model": "parrot"}).status_code == 200


def test_refused_before_a_stream_begins(live: Live) -> None:
    with pytest.raises(BadRequestError) as refused:
        live.client().completions.create(model="causal", prompt="x" * 600, stream=True)
    assert refused.value.code == "context_length_exceeded"


def test_tokenize_and_back(live: Live) -> None:
    text = "naïve ✓ <|end|>"
    tokens = live.post("/tokenize", {"model": "causal", "prompt": text, "return_token_strs": True}).json()
    assert tokens["tokens"] == byte_tokenizer().encode(text)
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    assert tokens["max_model_len"] == 512
    assert live.post("/detokenize", {"model": "causal", "tokens": tokens["tokens"]}).json() == {"prompt": text}
    assert error_of(live.post("/detokenize", {"model": "causal", "tokens": [260]}), 400)["param"] == "tokens"
    assert error_of(live.post("/tokenize", {"model": "causal"}), 400)["param"] == "prompt"
    assert error_of(live.post("/tokenize", {"prompt": "x"}), 400)["param"] == "model"  # several are served
