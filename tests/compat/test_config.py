"""DiffusionConfig: presets, what each field becomes, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfastllm import DecodeParams, DiffusionConfig, GenerationMode, UnsupportedError, ValidationError
from dfastllm.core import ModelInfo
from dfastllm.decode.presets import EVERY_TOKEN

SHAPE: dict[str, Any] = {"vocab_size": 9, "max_len": 64, "layers": 1, "kv_heads": 1, "head_dim": 1, "eos_ids": (0,)}
DIFFUSION = ModelInfo(name="d", family="llada", kind="diffusion", mask_id=1, **SHAPE)
BLOCK = ModelInfo(name="b", family="sdar", kind="block", mask_id=1, block=4, **SHAPE)
AR = ModelInfo(name="a", family="llama", kind="ar", **SHAPE)


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        ("standard", DecodeParams(rule="schedule", cache="none", block_length=32, steps=EVERY_TOKEN)),
        ("fast", DecodeParams(cache="dual", block_length=32, threshold=0.9)),
        ("streaming", DecodeParams(cache="dual", block_length=8, threshold=0.9, provisional=True)),
        (
            "turbo",
            DecodeParams(
                cache="dual",
                block_length=64,
                factor=1.0,
                options={"max_parallel_tokens": 64, "early_stop_confidence": 0.9},
            ),
        ),
    ],
)
def test_presets(mode: str, wanted: DecodeParams) -> None:
    assert DiffusionConfig(mode=mode).decode_params(128, DIFFUSION) == wanted


def test_what_is_set_wins_over_the_mode() -> None:
    config = DiffusionConfig(
        mode="turbo",
        max_steps=20,
        confidence_threshold=0.7,
        early_stop_confidence=0,
        max_parallel_tokens=5,
        block_length=16,
        cache="prefix",
        provisional=True,
    )
    assert config.decode_params(64, DIFFUSION) == DecodeParams(
        cache="prefix",
        block_length=16,
        steps=20,
        threshold=0.7,
        options={"max_parallel_tokens": 5},
        provisional=True,
    )
    assert DiffusionConfig(mode="fast", factor=2.0).decode_params(64, DIFFUSION).threshold is None


def test_a_block_model_keeps_its_own_blocks_and_cache() -> None:
    decode = DiffusionConfig(mode="turbo").decode_params(128, BLOCK)
    assert (decode.cache, decode.block_length) == (None, None)
    assert DiffusionConfig(mode="fast", cache="dual").decode_params(128, BLOCK).cache == "dual"  # decode refuses it


def test_an_autoregressive_model_has_no_canvas() -> None:
    with pytest.raises(UnsupportedError, match="a is autoregressive"):
        DiffusionConfig().decode_params(8, AR)


@given(tokens=st.integers(1, 300), least=st.integers(1, 300), cap=st.integers(0, 40))
def test_min_steps_is_kept_by_the_cap(tokens: int, least: int, cap: int) -> None:
    config = DiffusionConfig(min_steps=least, max_parallel_tokens=cap)
    if least > tokens:
        with pytest.raises(ValidationError, match="min_steps is"):
            config.decode_params(tokens, DIFFUSION)
        return
    most = config.decode_params(tokens, DIFFUSION).options.get("max_parallel_tokens", tokens)
    assert most >= 1
    assert math.ceil(tokens / most) >= least
    assert not cap or most <= cap
    if not cap and most < tokens:  # and it lowers parallelism no further than it must
        assert math.ceil(tokens / (most + 1)) < least


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mode", "warp"),
        ("min_steps", 0),
        ("max_steps", 0),
        ("confidence_threshold", 0.0),
        ("confidence_threshold", 1.5),
        ("early_stop_confidence", -0.1),
        ("early_stop_confidence", math.nan),
        ("max_parallel_tokens", -1),
        ("stream_interval", 0),
        ("stream_interval", 1.5),
        ("block_length", 0),
        ("cache", "triple"),
        ("factor", -1.0),
        ("temperature", -0.5),
    ],
)
def test_bad_values_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=field) as caught:
        DiffusionConfig(**{field: value})
    assert caught.value.param == field


def test_contradictions_are_named() -> None:
    with pytest.raises(ValidationError, match="max_steps must be at least min_steps=9"):
        DiffusionConfig(min_steps=9, max_steps=8)
    with pytest.raises(ValidationError, match="two rules"):
        DiffusionConfig(confidence_threshold=0.9, factor=1.0)


def test_modes_are_text_too() -> None:
    assert DiffusionConfig(mode="turbo").mode is GenerationMode.TURBO
    assert DiffusionConfig(mode=GenerationMode.FAST) == DiffusionConfig(mode="fast")


def test_early_stop_threshold_is_another_name_of_early_stop_confidence() -> None:
    assert DiffusionConfig(early_stop_threshold=0.95) == DiffusionConfig(early_stop_confidence=0.95)
    assert DiffusionConfig(mode="turbo", early_stop_threshold=0.5).early_stop_confidence == 0.5  # turbo's own: 0.9
    with pytest.raises(ValidationError, match="one thing; got both"):
        DiffusionConfig(early_stop_threshold=0.95, early_stop_confidence=0.95)
    with pytest.raises(ValidationError, match="early_stop_confidence must be in"):
        DiffusionConfig(early_stop_threshold=1.5)
