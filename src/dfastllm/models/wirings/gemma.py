"""Gemma 2 and Gemma 3 (text): norms before and after each part, whose weights are distances from 1; an embedding times
the square root of its width; a gelu gate; windows in most layers. Gemma 2 caps scores and logits. Gemma 3 has norms of
q and k, and rotary positions of their own in the layers with a window.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from dfastllm.errors import ValidationError
from dfastllm.models.config import DecoderConfig
from dfastllm.models.family import Fields, Gguf, Ids, NameTable, variant
from dfastllm.models.program import standard
from dfastllm.models.wirings.llama import LLAMA, NAMES, read_llama, read_rope, read_window, write_llama, write_window

__all__ = ["GEMMA2", "GEMMA3", "read_gemma2", "read_gemma3", "write_gemma2", "write_gemma3"]

GEMMA_NAMES = {
    **NAMES,
    "layers.{i}.attn_post_norm": "model.layers.{i}.post_attention_layernorm",
    "layers.{i}.mlp_norm": "model.layers.{i}.pre_feedforward_layernorm",
    "layers.{i}.mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm",
}
PERIOD3 = 6  # every sixth layer of Gemma 3 sees everything
GELU = {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh", "attention_bias": False}


def _read(fields: Fields, theta: float, softcaps: tuple[float, float], every: int) -> DecoderConfig:
    """softcaps: of scores and logits where the file is silent; a null switches one off. every: such a layer has no
    window."""
    fields.only(**GELU, use_bidirectional_attention=False)
    # What transformers' classes say where a config.json is silent.
    silent = {"head_dim": 256, "num_key_value_heads": 4, "tie_word_embeddings": True, "max_position_embeddings": 8192}
    raw = {
        **silent,
        **fields.raw,
        "hidden_act": None,
        "rope_parameters": None,
        "rope_scaling": None,
        "rope_theta": theta,
    }
    body = read_llama(Fields({**raw, "sliding_window": None}, fields.where))
    attention, logits = (
        fields.get(name, float, 0.0) if name in fields.raw else default
        for name, default in zip(("attn_logit_softcapping", "final_logit_softcapping"), softcaps, strict=True)
    )
    window, windowed = read_window(
        Fields({"sliding_window": 4096, **fields.raw}, fields.where), body.layers, lambda i: (i + 1) % every != 0
    )
    return replace(
        body,
        embed_factor=body.hidden_size**0.5,
        attention_scale=fields.get("query_pre_attn_scalar", float, 256.0) ** -0.5,
        attention_softcap=attention,
        logits_softcap=logits,
        window=window,
        windowed=windowed,
    )


def read_gemma2(fields: Fields) -> DecoderConfig:
    """Every second layer has a window."""
    theta, scaling = read_rope(fields)
    return replace(_read(fields, theta, (50.0, 30.0), 2), rope_scaling=scaling)


def read_gemma3(fields: Fields) -> DecoderConfig:
    """`rope_parameters` by type of layer (transformers 5), or `rope_theta`, `rope_scaling`, `rope_local_base_freq`."""
    by_type = fields.get("rope_parameters", dict, {})
    whole, local = (by_type.get(kind) or {} for kind in ("full_attention", "sliding_attention"))
    rope = Fields({**fields.raw, "rope_parameters": whole or None}, fields.where)
    theta, scaling = read_rope(rope, 1e6)
    body = _read(fields, theta, (0.0, 0.0), fields.get("sliding_window_pattern", int, PERIOD3))
    Fields(local, fields.where).only(rope_type="default")
    of_local = Fields(local, fields.where).get("rope_theta", float, fields.get("rope_local_base_freq", float, 1e4))
    return replace(body, rope_scaling=scaling, local_theta=of_local if body.window else 0.0, qk_norm=True)


def write_gemma2(config: DecoderConfig) -> dict[str, Any]:
    scale = config.attention_scale or config.head_dim**-0.5
    return {
        **write_llama(config, "hidden_act", "mlp_bias", "partial_rotary_factor", "use_sliding_window"),
        **write_window(config),
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round(scale**-2),
        "attn_logit_softcapping": config.attention_softcap or None,
        "final_logit_softcapping": config.logits_softcap or None,
    }


def write_gemma3(config: DecoderConfig) -> dict[str, Any]:
    raw = write_gemma2(config)
    whole = {"rope_type": "default", **(raw.pop("rope_scaling") or {}), "rope_theta": raw.pop("rope_theta")}
    local = {"rope_type": "default", "rope_theta": config.local_theta or 1e4}
    return {**raw, "rope_parameters": {"full_attention": whole, "sliding_attention": local}}


def _pattern(layers: int, every: int) -> tuple[bool, ...]:
    marks = tuple((i + 1) % every != 0 for i in range(layers))
    return () if all(marks) else marks


def _gguf(arch: str, fields: frozenset[str], every: int, largest: int) -> Gguf:
    """llama.cpp knows by the architecture which layers have a window, and by their number (`largest`) the one model
    whose scores are scaled by hidden / heads instead of the head's size."""

    def scale(config: DecoderConfig) -> float:
        wide = config.hidden_size // config.heads if config.layers == largest else config.head_dim
        return float(wide**-0.5)

    def read(metadata: Fields, config: DecoderConfig) -> DecoderConfig:
        pattern = _pattern(config.layers, metadata.get("attention.sliding_window_pattern", int, every))
        return replace(
            config,
            embed_factor=config.hidden_size**0.5,
            attention_scale=config.attention_scale or scale(config),
            windowed=pattern if config.window else (),
            local_theta=metadata.get("rope.freq_base_swa", float, 1e4) if config.qk_norm and config.window else 0.0,
        )

    def write(config: DecoderConfig) -> dict[str, Any]:
        known = {"windowed": _pattern(config.layers, every), "attention_scale": scale(config)}
        for name, wanted in known.items():
            if getattr(config, name) != wanted and (config.window or name != "windowed"):
                got = getattr(config, name)
                raise ValidationError(f"GGUF architecture {arch} has {name} {wanted}, got {got}.", param=name)
        return {"rope.freq_base_swa": config.local_theta} if config.local_theta else {}

    said = {"window", "windowed", "embed_factor", "attention_scale", "attention_softcap", "logits_softcap"}
    return Gguf(arch, fields=fields | said, read=read, write=write)


SMALL = {  # of `tiny`
    "tied": True,
    "embed_factor": lambda shape: shape["hidden_size"] ** 0.5,
    "attention_scale": lambda shape: shape["head_dim"] ** -0.5,
    "window": 24,
}
GEMMA2 = variant(
    LLAMA,
    "gemma2",
    "Gemma2ForCausalLM",
    names=NameTable(GEMMA_NAMES),
    read=read_gemma2,
    write=write_gemma2,
    program=partial(standard, post_norms=True, norm_offset=1.0, activation="gelu_tanh"),
    gguf=_gguf("gemma2", frozenset(), 2, 46),
    ids=Ids(eos=(1, 107), bos=2, pad=0),
    end_tokens=("<end_of_turn>",),
    shape={
        **SMALL,
        "attention_softcap": 50.0,
        "logits_softcap": 30.0,
        "windowed": lambda shape: _pattern(shape["layers"], 2),
    },
)
GEMMA3 = variant(
    GEMMA2,
    "gemma3",
    "Gemma3ForCausalLM",
    model_types=("gemma3_text",),
    read=read_gemma3,
    write=write_gemma3,
    gguf=_gguf("gemma3", frozenset({"qk_norm", "local_theta"}), PERIOD3, 62),
    ids=Ids(eos=(1, 106), bos=2, pad=0),
    shape={
        **SMALL,
        "qk_norm": True,
        "rope_theta": 1e6,
        "windowed": lambda shape: _pattern(shape["layers"], PERIOD3),
        "local_theta": 1e4,
    },
)
