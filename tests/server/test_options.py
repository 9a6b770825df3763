"""Body fields to parameters: the two switches of the cache, two names of one option, and the way back of an error."""

from __future__ import annotations

from typing import Any

import pytest

from dfastllm.core import DecodeParams, ModelInfo
from dfastllm.errors import ValidationError
from dfastllm.server.options import decode_params, on_the_wire, sampling_params
from dfastllm.server.readers import Readers
from dfastllm.server.schemas import ChatRequest, CompletionRequest
from dfastllm.server.serving import ServedModel
from dfastllm.text import Tokenizer
from tests.kit.live import Live
from tests.kit.served import byte_tokenizer


def served(kind: Any) -> ServedModel:
    info = ModelInfo(
        name=kind,
        family="test",
        kind=kind,
        vocab_size=260,
        max_len=4096,
        layers=1,
        kv_heads=1,
        head_dim=4,
        eos_ids=(257,),
        mask_id=None if kind == "ar" else 258,
        block=4 if kind == "block" else 0,
    )
    return ServedModel(kind, info, byte_tokenizer(), 4096, Readers())


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", "prompt": "x", **fields})


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "x"}], **fields})


def decode(kind: Any = "diffusion", **fields: Any) -> DecodeParams:
    return decode_params(completion(**fields), served(kind)) or DecodeParams()


@pytest.mark.parametrize(
    ("fields", "cache"),
    [
        ({}, None),
        ({"use_cache": None}, None),
        ({"use_cache": True}, "dual"),
        ({"use_cache": True, "use_dual_cache": True}, "dual"),
        ({"use_dual_cache": True}, "dual"),
        ({"use_cache": True, "use_dual_cache": False}, "prefix"),
        ({"use_dual_cache": False}, "prefix"),
        ({"use_cache": False}, "none"),
        ({"use_cache": False, "use_dual_cache": False}, "none"),
        ({"use_cache": False, "use_dual_cache": True}, "none"),  # true is the default: it asks for nothing
        ({"cache": "none", "use_cache": True}, "none"),
        ({"cache": "none", "use_cache": False, "use_dual_cache": True}, "none"),
        ({"cache": "dual", "use_cache": True, "use_dual_cache": True}, "dual"),
        ({"cache": "prefix", "use_dual_cache": False}, "prefix"),
        ({"cache": "windowed"}, "windowed"),
        ({"mode": "standard", "use_cache": True}, "dual"),
        ({"mode": "turbo", "use_dual_cache": False}, "prefix"),
    ],
)
def test_the_cache_follows_from_the_switches(fields: dict[str, Any], cache: str | None) -> None:
    assert decode(**fields).cache == cache


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"use_cache": False, "cache": "dual"}, "cache"),
        ({"use_dual_cache": False, "cache": "dual"}, "cache"),
        ({"threshold": 1.5}, "threshold"),
        ({"factor": 0.0}, "factor"),
        ({"block_length": 0}, "block_length"),
        ({"steps": 0}, "steps"),
    ],
)
def test_bad_options_are_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ValidationError) as refused:
        decode(**fields)
    assert refused.value.param == param


def test_what_is_not_sent_is_not_passed_on() -> None:
    for body in (completion(), chat(), completion(temperature=None, max_tokens=None, steps=None)):
        assert sampling_params(body).given == frozenset()
        assert decode_params(body, served("diffusion")) is None
    assert sampling_params(chat(temperature=1.0)).given == {"temperature"}


def test_two_names_of_one_option() -> None:
    assert sampling_params(chat(max_completion_tokens=5)).max_tokens == 5
    assert sampling_params(chat(max_completion_tokens=5, max_tokens=5)).max_tokens == 5
    with pytest.raises(ValidationError, match="two names of one option") as refused:
        sampling_params(chat(max_completion_tokens=5, max_tokens=6))
    assert refused.value.param == "max_completion_tokens"


def test_log_probabilities() -> None:
    assert sampling_params(completion(logprobs=0)).logprobs == 0
    assert sampling_params(chat(logprobs=True)).logprobs == 0
    assert sampling_params(chat(logprobs=True, top_logprobs=3)).logprobs == 3
    assert sampling_params(chat(logprobs=False)).logprobs is None


def test_logit_bias_has_token_ids_as_text() -> None:
    assert sampling_params(completion(logit_bias={"7": 1.0})).logit_bias == {7: 1.0}
    for key in ("x", "-1", "9" * 30, ""):
        with pytest.raises(ValidationError, match="logit_bias maps token ids"):
            sampling_params(completion(logit_bias={key: 1.0}))


def test_models_that_have_a_cache_of_their_own() -> None:
    for kind in ("ar", "block"):
        assert decode(kind, use_cache=True, use_dual_cache=False).cache is None
        assert decode(kind, use_cache=False).cache == "none", "the decoder refuses it"
        for asked in ({"use_dual_cache": True}, {"use_dual_cache": True, "use_cache": True}):
            assert decode(kind, **asked).given == frozenset(), "the default of README: it asks for nothing"


def test_guesses_only_for_who_watches() -> None:
    assert decode(stream=True, stream_options={"canvas_events": True}, mode="fast").provisional
    quiet = decode(mode="streaming")
    assert not quiet.provisional
    assert "provisional" in quiet.given, "the preset has guesses shown; nobody looks"
    assert decode_params(completion(mode="streaming"), served("ar")) == DecodeParams(mode="streaming")


@pytest.mark.parametrize(
    ("fields", "param", "wanted"),
    [
        ({"rule_options": {"x": 1}}, "options", "rule_options"),
        ({"use_cache": False}, "cache", "use_cache"),
        ({"cache": "dual"}, "cache", "cache"),
        ({"max_tokens": 7}, "max_tokens", "max_tokens"),
        ({}, "model", "model"),
    ],
)
def test_errors_name_the_field_that_was_sent(fields: dict[str, Any], param: str, wanted: str) -> None:
    error = on_the_wire(ValidationError(f"{param} is wrong.", param=param), completion(**fields))
    assert (error.param, str(error)) == (wanted, f"{wanted} is wrong.")
    told = on_the_wire(ValidationError("the prompt is long.", param="prompt"), chat())
    assert told.param == "messages"
    told = on_the_wire(ValidationError("max_tokens is much.", param="max_tokens"), chat(max_completion_tokens=7))
    assert (told.param, str(told)) == ("max_completion_tokens", "max_completion_tokens is much.")


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_special_tokens_are_added_as_asked(live: Live, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    asked: list[bool] = []
    encode = Tokenizer.encode

    def seen(self: Tokenizer, text: str, **options: Any) -> list[int]:
        asked.append(options.get("add_special", False))
        return encode(self, text, **options)

    monkeypatch.setattr(Tokenizer, "encode", seen)
    body = {"model": "causal", "prompt": "x"} | ({"max_tokens": 1} if path != "/tokenize" else {})
    given: dict[str, Any]
    for given in ({}, {"add_special_tokens": True}, {"add_special_tokens": False}):
        assert live.post(path, {**body, **given}).status_code == 200
    assert asked == [True, True, False]
