"""Body fields to decoder options: the documents' defaults and the cache strategy that follows from the flags."""

from __future__ import annotations

from typing import Any

import pytest

from dfastllm.core import DecodeParams, ModelInfo
from dfastllm.errors import UnsupportedError, ValidationError
from dfastllm.server.options import decode_params, sampling_params
from dfastllm.server.schemas import ChatRequest, CompletionRequest
from dfastllm.server.serving import ServedModel
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
    return ServedModel(kind, info, byte_tokenizer(), 4096)


def decode(kind: Any = "diffusion", max_tokens: int = 128, **fields: Any) -> DecodeParams | None:
    body = CompletionRequest(model="m", prompt="x", **fields)
    return decode_params(body, served(kind), max_tokens)


@pytest.mark.parametrize(
    ("fields", "cache"),
    [
        ({}, "dual"),
        ({"use_cache": True}, "dual"),
        ({"use_cache": True, "use_dual_cache": True}, "dual"),
        ({"use_dual_cache": True}, "dual"),
        ({"use_cache": True, "use_dual_cache": False}, "prefix"),
        ({"use_dual_cache": False}, "prefix"),
        ({"use_cache": False}, "none"),
        ({"use_cache": False, "use_dual_cache": False}, "none"),
        ({"cache": "windowed"}, "windowed"),
        ({"mode": "standard"}, "none"),
        ({"mode": "standard", "use_cache": True}, "dual"),
        ({"mode": "fast"}, "dual"),
        ({"mode": "turbo", "use_dual_cache": False}, "prefix"),
    ],
)
def test_the_cache_follows_from_the_flags(fields: dict[str, Any], cache: str) -> None:
    params = decode(**fields)
    assert params is not None
    assert params.cache == cache


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"use_cache": False, "use_dual_cache": True}, "use_dual_cache"),
        ({"use_cache": True, "cache": "dual"}, "cache"),
        ({"threshold": 1.5}, "threshold"),
        ({"factor": 0.0}, "factor"),
        ({"remasking": "best"}, "remasking"),
        ({"block_length": 0}, "block_length"),
        ({"steps": 0}, "steps"),
    ],
)
def test_bad_options_are_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ValidationError) as refused:
        decode(**fields)
    assert refused.value.param == param


def test_the_documents_defaults() -> None:
    assert decode() == DecodeParams(cache="dual", steps=128, block_length=32)
    assert decode(max_tokens=128 * 64 + 1) == DecodeParams(cache="dual", steps=257, block_length=32)  # one per block
    assert decode(max_tokens=100, block_length=64, steps=7) == DecodeParams(cache="dual", steps=7, block_length=64)
    sampling = sampling_params(CompletionRequest(model="m", prompt="x"), served("diffusion"), longest=1, logprobs=None)
    assert (sampling.temperature, sampling.max_tokens) == (0.0, 128)
    sampling = sampling_params(CompletionRequest(model="m", prompt="x"), served("ar"), longest=1, logprobs=None)
    assert (sampling.temperature, sampling.max_tokens) == (1.0, 16)
    chat = ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "x"}]})
    assert sampling_params(chat, served("ar"), longest=96, logprobs=None).max_tokens == 4000
    assert sampling_params(chat, served("block"), longest=96, logprobs=None).max_tokens == 128


def test_modes_are_presets_that_fields_override() -> None:
    fast = decode(mode="fast")
    assert fast is not None
    assert (fast.threshold, fast.factor) == (0.9, None)
    turbo = decode(mode="turbo")
    assert turbo is not None
    wide = {"max_parallel_tokens": 64, "early_stop_confidence": 0.9}
    assert (turbo.factor, turbo.options, turbo.block_length) == (1.0, wide, 64)
    streaming = decode(mode="streaming")
    assert streaming is not None
    assert streaming.block_length == 8
    mixed = decode(mode="turbo", threshold=0.7)
    assert mixed is not None
    assert (mixed.threshold, mixed.factor, mixed.options) == (0.7, None, wide)
    narrow = decode(mode="turbo", rule_options={"max_parallel_tokens": 4}, block_length=16)
    assert narrow is not None
    assert (narrow.options, narrow.block_length) == ({**wide, "max_parallel_tokens": 4}, 16)
    ruled = decode(mode="fast", rule="entropy_bound", rule_options={"gamma": 0.1}, early_stop=False)
    assert ruled is not None
    assert (ruled.rule, ruled.options, ruled.threshold, ruled.early_stop) == (
        "entropy_bound",
        {"gamma": 0.1},
        None,
        False,
    )


def test_block_diffusion_keeps_its_exact_cache() -> None:
    assert decode("block") == DecodeParams()
    assert decode("block", use_cache=True, use_dual_cache=False, threshold=0.9) == DecodeParams(threshold=0.9)
    wide = {"max_parallel_tokens": 64, "early_stop_confidence": 0.9}
    assert decode("block", mode="turbo") == DecodeParams(factor=1.0, options=wide)
    for fields in ({"use_cache": False}, {"use_dual_cache": True}, {"cache": "dual"}):
        with pytest.raises(UnsupportedError) as refused:
            decode("block", **fields)
        assert refused.value.param == next(iter(fields))


def test_an_autoregressive_model_refuses_every_diffusion_field() -> None:
    assert decode("ar") is None
    fields: dict[str, Any] = {
        "use_cache": True,
        "use_dual_cache": True,
        "cache": "none",
        "threshold": 0.9,
        "factor": 1.0,
        "steps": 8,
        "block_length": 8,
        "remasking": "random",
        "mode": "fast",
        "rule": "schedule",
        "rule_options": {},
        "early_stop": True,
        "stream_options": {"canvas_events": True},
    }
    for name, value in fields.items():
        with pytest.raises(UnsupportedError) as refused:
            decode("ar", **{name: value})
        assert (refused.value.param or "").startswith(name)
    assert decode("ar", steps=None, stream_options={"canvas_events": False}) is None


def test_provisional_guesses_only_for_who_watches() -> None:
    watched = decode(stream_options={"canvas_events": True})
    assert watched is not None
    assert watched.provisional
    unwatched = decode()
    assert unwatched is not None
    assert not unwatched.provisional
