"""config.json as published by families whose wiring is nearly Llama's: what is read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dfastllm.errors import ModelLoadError
from dfastllm.models import DecoderConfig, RopeScaling, find_family
from dfastllm.models.checkpoint import read_model
from dfastllm.models.family import Fields, family_of

SMOLLM3: dict[str, Any] = {
    "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 128012,
    "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 11008, "max_position_embeddings": 65536,
    "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3", "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4,
    "pad_token_id": 128004, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 5000000.0,
    "sliding_window": None, "use_sliding_window": False, "vocab_size": 128256,
}  # fmt: skip
SEED_OSS: dict[str, Any] = {
    "architectures": ["SeedOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.1,
    "attention_out_bias": False, "bos_token_id": 0, "eos_token_id": 2, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 5120, "intermediate_size": 27648, "max_position_embeddings": 524288, "mlp_bias": False,
    "model_type": "seed_oss", "num_attention_heads": 80, "num_hidden_layers": 64, "num_key_value_heads": 8,
    "pad_token_id": 1, "residual_dropout": 0.1, "rms_norm_eps": 1e-06, "rope_scaling": {"rope_type": "default"},
    "rope_theta": 10000000.0, "tie_word_embeddings": False, "vocab_size": 155136,
}  # fmt: skip
EXAONE: dict[str, Any] = {
    "activation_function": "silu", "architectures": ["ExaoneForCausalLM"], "attention_dropout": 0.0,
    "bos_token_id": 1, "embed_dropout": 0.0, "eos_token_id": 361, "head_dim": 128, "hidden_size": 4096,
    "intermediate_size": 14336, "layer_norm_epsilon": 1e-05, "max_position_embeddings": 32768,
    "model_type": "exaone", "num_attention_heads": 32, "num_key_value_heads": 8, "num_layers": 32, "pad_token_id": 0,
    "rope_scaling": {
        "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 1000000, "tie_word_embeddings": False, "vocab_size": 102400,
}  # fmt: skip
EXAONE4: dict[str, Any] = {
    "architectures": ["Exaone4ForCausalLM"], "bos_token_id": 1, "eos_token_id": 361, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 27392, "max_position_embeddings": 131072,
    "model_type": "exaone4", "num_attention_heads": 40, "num_hidden_layers": 64, "num_key_value_heads": 8,
    "pad_token_id": 0, "rms_norm_eps": 1e-05, "rope_scaling": {**EXAONE["rope_scaling"], "factor": 16.0},
    "rope_theta": 1000000, "sliding_window": 4096, "sliding_window_pattern": "LLLG", "tie_word_embeddings": False,
    "vocab_size": 102400,
}  # fmt: skip
MISTRAL_SMALL: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 32768,
    "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 40,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 100000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "vocab_size": 131072,
}  # fmt: skip
MISTRAL3: dict[str, Any] = {
    "architectures": ["Mistral3ForConditionalGeneration"], "image_token_index": 10, "model_type": "mistral3",
    "text_config": {
        **{name: value for name, value in MISTRAL_SMALL.items() if name not in ("architectures", "eos_token_id")},
        "max_position_embeddings": 131072, "rope_theta": 1000000000.0,
    },
    "vision_config": {"model_type": "pixtral", "hidden_size": 1024},
}  # fmt: skip
DEEPSEEK_CODER: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 32013, "eos_token_id": 32014, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 16384, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1,
    "rms_norm_eps": 1e-06, "rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 100000,
    "tie_word_embeddings": False, "vocab_size": 32256,
}  # fmt: skip
FOURTH = tuple(i % 4 == 3 for i in range(64))
PUBLISHED: dict[str, tuple[dict[str, Any], DecoderConfig, tuple[int, ...]]] = {
    "smollm3": (
        SMOLLM3,
        DecoderConfig(128256, 2048, 11008, 36, 16, 4, 128, 65536, 5e6, tied=True, ropeless=FOURTH[:36]),
        (128012,),
    ),
    "seed_oss": (SEED_OSS, DecoderConfig(155136, 5120, 27648, 64, 80, 8, 128, 524288, 1e7, qkv_bias=True), (2,)),
    "exaone": (
        EXAONE,
        DecoderConfig(
            102400, 4096, 14336, 32, 32, 8, 128, 32768, 1e6, norm_eps=1e-5,
            rope_scaling=RopeScaling("llama3", 8.0, 8192),
        ),
        (361,),
    ),
    "exaone4": (
        EXAONE4,
        DecoderConfig(
            102400, 5120, 27392, 64, 40, 8, 128, 131072, 1e6, norm_eps=1e-5, qk_norm=True, window=4096,
            rope_scaling=RopeScaling("llama3", 16.0, 8192), windowed=tuple(not m for m in FOURTH), ropeless=FOURTH,
        ),
        (361,),
    ),
    "mistral": (MISTRAL_SMALL, DecoderConfig(131072, 5120, 32768, 40, 32, 8, 128, 32768, 1e8, norm_eps=1e-5), (2,)),
    "mistral3": (MISTRAL3, DecoderConfig(131072, 5120, 32768, 40, 32, 8, 128, 131072, 1e9, norm_eps=1e-5), (2,)),
    "llama": (
        DEEPSEEK_CODER,
        DecoderConfig(
            32256, 4096, 11008, 32, 32, 32, 128, 16384, 1e5, rope_scaling=RopeScaling("linear", 4.0)
        ),
        (32014,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", PUBLISHED)
def test_what_is_read(family: str, tmp_path: Path) -> None:
    raw, config, ends = PUBLISHED[family]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    found, read, info = read_model(tmp_path)
    assert (found.name, read, info.eos_ids, info.kind) == (family, config, ends, "ar")
    assert found.read(Fields(found.write(read))) == config


def test_silent_files_have_the_defaults_of_their_classes() -> None:
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    for family, layers, wanted in (
        ("smollm3", "num_hidden_layers", {"tied": True, "rope_theta": 2e6, "kv_heads": 4, "ropeless": FOURTH[:8]}),
        ("seed_oss", "num_hidden_layers", {"qkv_bias": True, "out_bias": False, "head_dim": 128, "max_len": 524288}),
        ("exaone", "num_layers", {"tied": True, "norm_eps": 1e-5, "kv_heads": 4, "max_len": 2048}),
        ("exaone4", "num_hidden_layers", {"window": 4096, "norm_eps": 1e-5, "ropeless": FOURTH[:8]}),
    ):
        raw = {**sizes, layers: 8, **({"num_key_value_heads": 4} if family in ("seed_oss", "exaone4") else {})}
        config = find_family(family).read(Fields(raw))
        assert {name: getattr(config, name) for name in wanted} == wanted


def test_letters_of_windows() -> None:
    """The last layer has none, whatever the letters say."""
    for pattern, marks in (("LG", "LGLGLG"), ("L", "LLLLLG"), (2, "LGLGLG"), (None, "LLLGLL")):
        raw = {**EXAONE4, "num_hidden_layers": 6, "sliding_window_pattern": pattern}
        config = find_family("exaone4").read(Fields(raw))
        assert "".join("LG"[not config.is_windowed(i)] for i in range(6)) == marks
        assert [config.rotates(i) for i in range(6)] == [mark == "L" for mark in marks]


@pytest.mark.parametrize(
    ("raw", "changes", "said"),
    [
        (SMOLLM3, {"no_rope_layers": [1, 0]}, r"no_rope_layers must be 36 times 0 or 1, got \[1, 0\]"),
        (SMOLLM3, {"no_rope_layers": [2] * 36}, "no_rope_layers must be 36 times 0 or 1"),
        (SMOLLM3, {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval must be at least 1"),
        (SMOLLM3, {"use_sliding_window": True, "sliding_window": 0}, "sliding_window must be at least 1"),
        (SMOLLM3, {"hidden_act": "relu"}, "hidden_act='relu' is not supported"),
        (SEED_OSS, {"sliding_window": 64}, "sliding_window=64 is not supported"),
        (SEED_OSS, {"attention_out_bias": "yes"}, "attention_out_bias' must be bool"),
        (EXAONE, {"head_dim": 64}, "head_dim=64 is not supported; supported: 128"),
        (EXAONE, {"activation_function": "gelu"}, "activation_function='gelu' is not supported"),
        (EXAONE, {"num_layers": None}, "num_layers or num_hidden_layers' is missing"),
        (EXAONE, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not supported"),
        (EXAONE4, {"sliding_window_pattern": "LXG"}, "sliding_window_pattern must be a number above 0 or letters"),
        (EXAONE4, {"sliding_window_pattern": 0}, "sliding_window_pattern must be a number above 0 or letters"),
        (EXAONE4, {"attention_bias": True}, "attention_bias=True is not supported"),
        (MISTRAL3, {"text_config": None}, "text_config' is missing"),
        (MISTRAL3, {"text_config": {"model_type": "ministral3"}}, "text_config: model_type='ministral3' is not sup"),
        (MISTRAL3, {"text_config": {**MISTRAL3["text_config"], "sliding_window": -1}}, "text_config: sliding_window"),
    ],
)  # fmt: skip
def test_what_is_refused(raw: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    fields = Fields({**raw, **changes})
    with pytest.raises(ModelLoadError, match=said):
        family_of(fields).read(fields)


def test_ends_where_the_files_name_none(tmp_path: Path) -> None:
    for raw, ends in ((SMOLLM3, (128001,)), (SEED_OSS, (2,)), (EXAONE, (361,)), (EXAONE4, (361,)), (MISTRAL3, (2,))):
        (tmp_path / "config.json").write_text(json.dumps({**raw, "eos_token_id": None}))
        assert read_model(tmp_path)[2].eos_ids == ends
