"""Autoregressive wiring: Llama 2/3, Mistral, Qwen2/2.5 and Qwen3 differ only in what their config.json says.

Published names are those of Hugging Face transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dfastllm.errors import ModelLoadError
from dfastllm.models.config import MOST_LAYERS, DecoderConfig, RopeScaling
from dfastllm.models.family import Family, Fields, Gguf, NameTable, register, variant

__all__ = [
    "LLAMA",
    "MISTRAL",
    "NAMES",
    "QWEN2",
    "QWEN3",
    "read_layers",
    "read_llama",
    "read_qwen2",
    "read_qwen3",
    "read_rope",
    "read_window",
    "write_llama",
    "write_rope",
    "write_window",
]

NAMES = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "lm_head": "lm_head",
    "layers.{i}.attn_norm": "model.layers.{i}.input_layernorm",
    "layers.{i}.attn.q_proj": "model.layers.{i}.self_attn.q_proj",
    "layers.{i}.attn.k_proj": "model.layers.{i}.self_attn.k_proj",
    "layers.{i}.attn.v_proj": "model.layers.{i}.self_attn.v_proj",
    "layers.{i}.attn.o_proj": "model.layers.{i}.self_attn.o_proj",
    "layers.{i}.attn.q_norm": "model.layers.{i}.self_attn.q_norm",
    "layers.{i}.attn.k_norm": "model.layers.{i}.self_attn.k_norm",
    "layers.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "layers.{i}.mlp.gate_proj": "model.layers.{i}.mlp.gate_proj",
    "layers.{i}.mlp.up_proj": "model.layers.{i}.mlp.up_proj",
    "layers.{i}.mlp.down_proj": "model.layers.{i}.mlp.down_proj",
}


def read_rope(fields: Fields, default_theta: float = 10000.0) -> tuple[float, RopeScaling | None]:
    """theta and scaling from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    raw = fields.get("rope_parameters|rope_scaling", dict, {})
    rope = Fields(raw, f"{fields.where}: rope_scaling")
    theta = rope.get("rope_theta", float, fields.get("rope_theta", float, default_theta))
    kind = rope.get("rope_type|type", str, "default")
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3", "yarn", "longrope"):
        raise ModelLoadError(
            f"{rope.where}: rope_type {kind!r} is not supported; supported: default, linear, llama3, yarn, longrope.",
            param="rope_scaling",
        )
    if kind == "linear":
        return theta, RopeScaling("linear", rope.get("factor", float))
    longest = fields.get("max_position_embeddings", int)
    original = rope.get("original_max_position_embeddings", int, longest)
    factor = rope.get("factor", float, longest / max(original, 1) if kind == "longrope" else None)
    if kind == "llama3":
        low, high = rope.get("low_freq_factor", float), rope.get("high_freq_factor", float)
        return theta, RopeScaling("llama3", factor, original, low_freq_factor=low, high_freq_factor=high)
    attention_factor = rope.get("attention_factor", float) if rope.has("attention_factor") else None
    if kind == "longrope":
        short, long = (_numbers(rope, f"{name}_factor") for name in ("short", "long"))
        return theta, RopeScaling(
            "longrope", factor, original, attention_factor=attention_factor, short=short, long=long
        )
    if attention_factor is None and rope.has("mscale") and rope.has("mscale_all_dim"):
        # DeepSeek's form: the ratio of two logarithmic factors instead of one.
        one, all_dims = (0.1 * rope.get(key, float) * math.log(factor) + 1.0 for key in ("mscale", "mscale_all_dim"))
        attention_factor = one / all_dims
    return theta, RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=rope.get("beta_fast", float, 32.0),
        beta_slow=rope.get("beta_slow", float, 1.0),
        attention_factor=attention_factor,
        truncate=rope.get("truncate", bool, True),
    )


def _numbers(fields: Fields, name: str) -> tuple[float, ...]:
    values = fields.get(name, list)
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        raise ModelLoadError(f"{fields.where}: {name} must be a list of numbers, got {values!r:.200}.", param=name)
    return tuple(map(float, values))


def write_rope(config: DecoderConfig) -> dict[str, Any]:
    """The fields `read_rope` reads, in the form readers of transformers 4 and 5 share."""
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_theta": config.rope_theta, "rope_scaling": None}
    raw: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        raw["original_max_position_embeddings"] = scaling.original_max_len
    if scaling.kind == "llama3":
        raw |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        raw |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
    if scaling.kind == "longrope":
        raw |= {"short_factor": list(scaling.short), "long_factor": list(scaling.long)}
    if scaling.kind in ("yarn", "longrope") and scaling.attention_factor is not None:
        raw["attention_factor"] = scaling.attention_factor
    return {"rope_theta": config.rope_theta, "rope_scaling": raw}


def read_layers(fields: Fields) -> int:
    """The number of layers, in bounds before anything is made that has one for each. Raises ModelLoadError."""
    layers = fields.get("num_hidden_layers", int)
    if not 1 <= layers <= MOST_LAYERS:
        raise ModelLoadError(
            f"{fields.where}: num_hidden_layers must be in [1, {MOST_LAYERS}], got {layers}.", param="num_hidden_layers"
        )
    return layers


def read_window(
    fields: Fields, layers: int, windowed: Callable[[int], bool] = lambda layer: True
) -> tuple[int, tuple[bool, ...]]:
    """DecoderConfig's `window` and `windowed`, from `sliding_window` and `layer_types`; `windowed`: which layers are,
    where there are no `layer_types`. Raises ModelLoadError for a window below 1 and for other types of layers."""
    if not fields.has("sliding_window"):
        return 0, ()
    window = fields.get("sliding_window", int)
    if window < 1:
        raise ModelLoadError(
            f"{fields.where}: sliding_window must be at least 1, or null for none, got {window}.",
            param="sliding_window",
        )
    types = fields.get("layer_types", list, [_TYPES[windowed(i)] for i in range(layers)])
    if len(types) != layers or any(kind not in _TYPES for kind in types):
        raise ModelLoadError(
            f"{fields.where}: layer_types must be {layers} times one of {', '.join(_TYPES)}, got {types!r:.200}.",
            param="layer_types",
        )
    marks = tuple(kind == _TYPES[True] for kind in types)
    return (window if any(marks) else 0), (() if all(marks) or not any(marks) else marks)


_TYPES = ("full_attention", "sliding_attention")


def write_window(config: DecoderConfig) -> dict[str, Any]:
    """The fields `read_window` reads."""
    if not config.window:
        return {"sliding_window": None}
    types = [_TYPES[config.is_windowed(i)] for i in range(config.layers)]
    return {"sliding_window": config.window, "layer_types": types}


def read_llama(fields: Fields) -> DecoderConfig:
    """Llama and Mistral. Fields absent from old files have the defaults of their transformers classes."""
    fields.only(hidden_act=("silu", "swish"), pretraining_tp=1)  # two names of one function in transformers
    heads, hidden = fields.get("num_attention_heads", int), fields.get("hidden_size", int)
    theta, scaling = read_rope(fields)
    layers = read_layers(fields)
    window, windowed = read_window(fields, layers)
    longest = fields.get("max_position_embeddings", int, 2048)
    bias = fields.get("attention_bias", bool, False)
    head_dim = fields.get("head_dim", int, hidden // max(heads, 1))
    rotating = Fields(fields.get("rope_parameters", dict, {})).get(
        "partial_rotary_factor", float, fields.get("partial_rotary_factor", float, 1.0)
    )
    return DecoderConfig(
        vocab_size=fields.get("vocab_size", int),
        hidden_size=hidden,
        intermediate_size=fields.get("intermediate_size", int),
        layers=layers,
        heads=heads,
        kv_heads=fields.get("num_key_value_heads", int, heads),
        head_dim=head_dim,
        max_len=longest if scaling is None else scaling.stretched(longest),
        rope_theta=theta,
        rope_dim=0 if rotating == 1 else int(head_dim * rotating),
        rope_scaling=scaling,
        norm_eps=fields.get("rms_norm_eps", float, 1e-6),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.get("mlp_bias", bool, False),
        tied=fields.get("tie_word_embeddings", bool, False),
        window=window,
        windowed=windowed,
    )


def _with_used_window(fields: Fields) -> Fields:
    """Qwen files carry a `sliding_window` that `use_sliding_window: false` switches off, as most do; else it is that of
    the layers from `max_window_layers` on."""
    if not fields.get("use_sliding_window", bool, False):
        return Fields({**fields.raw, "sliding_window": None}, fields.where)
    first, layers = fields.get("max_window_layers", int, 28), read_layers(fields)
    return Fields({"layer_types": [_TYPES[i >= first] for i in range(layers)], **fields.raw}, fields.where)


def read_qwen2(fields: Fields) -> DecoderConfig:
    """Qwen2 and 2.5: always a bias on q, k, v and never on the output projection."""
    return replace(read_llama(_with_used_window(fields)), qkv_bias=True, out_bias=False)


def read_qwen3(fields: Fields) -> DecoderConfig:
    """Qwen3: RMS norm of every q and k head before rope; head_dim 128 where the file says nothing."""
    with_dim = Fields({"head_dim": 128, **fields.raw}, fields.where)
    return replace(read_llama(_with_used_window(with_dim)), qk_norm=True)


def write_llama(config: DecoderConfig, *without: str) -> dict[str, Any]:
    """config.json of every wiring that follows Llama's field names, but for these fields."""
    raw = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_len,
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.out_bias,
        "mlp_bias": config.mlp_bias,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied,
        "partial_rotary_factor": config.rotary_dim / config.head_dim,
        **write_rope(config),
        **({"use_sliding_window": True, **write_window(config)} if config.window else {}),
    }
    return {name: value for name, value in raw.items() if name not in without}


LLAMA = register(
    Family(
        name="llama",
        architectures=("LlamaForCausalLM",),
        model_types=("llama",),
        names=NameTable(NAMES),
        read=read_llama,
        write=write_llama,
        gguf=Gguf(
            "llama",
            interleaved=True,
            fields=frozenset({"qkv_bias", "out_bias", "mlp_bias", "window"}),
            scalings=("linear", "yarn", "llama3"),
        ),
    )
)
MISTRAL = variant(LLAMA, "mistral", "MistralForCausalLM")
QWEN2 = variant(
    LLAMA,
    "qwen2",
    "Qwen2ForCausalLM",
    read=read_qwen2,
    gguf=Gguf("qwen2", fields=frozenset({"qkv_bias", "window"}), free_dim=False),
    shape={"qkv_bias": True},
)
QWEN3 = variant(
    LLAMA,
    "qwen3",
    "Qwen3ForCausalLM",
    read=read_qwen3,
    gguf=Gguf("qwen3", fields=frozenset({"qk_norm", "window"})),
    shape={"qk_norm": True},
)
