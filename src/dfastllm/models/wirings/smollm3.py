"""SmolLM3: Llama's wiring in which every fourth layer knows no positions; windows, if any, are in these layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dfastllm.errors import ModelLoadError, ValidationError
from dfastllm.models.config import DecoderConfig
from dfastllm.models.family import Fields, Gguf, Ids, variant
from dfastllm.models.wirings.llama import LLAMA, read_llama, read_window, write_llama, write_window

__all__ = ["SMOLLM3", "read_smollm3", "write_smollm3"]

EVERY = 4  # such a layer has no rotary positions, where the file says nothing; llama.cpp knows no other number
# What transformers' class says where a config.json is silent.
SILENT = {"num_key_value_heads": 4, "tie_word_embeddings": True, "max_position_embeddings": 32768, "rope_theta": 2e6}


def _ropeless(layers: int, every: int) -> tuple[bool, ...]:
    marks = tuple((i + 1) % every == 0 for i in range(layers))
    return marks if any(marks) else ()


def _read_ropeless(fields: Fields, layers: int) -> tuple[bool, ...]:
    """From `no_rope_layers`, in which 0 is a layer without rotary positions, or from the interval."""
    if not fields.has("no_rope_layers"):
        every = fields.get("no_rope_layer_interval", int, EVERY)
        if every < 1:
            raise ModelLoadError(
                f"{fields.where}: no_rope_layer_interval must be at least 1, got {every}.",
                param="no_rope_layer_interval",
            )
        return _ropeless(layers, every)
    rotates = fields.get("no_rope_layers", list)
    if len(rotates) < layers or any(mark not in (0, 1) for mark in rotates):
        raise ModelLoadError(
            f"{fields.where}: no_rope_layers must be {layers} times 0 or 1, got {rotates!r:.200}.",
            param="no_rope_layers",
        )
    marks = tuple(not mark for mark in rotates[:layers])
    return marks if any(marks) else ()


def read_smollm3(fields: Fields) -> DecoderConfig:
    """A window counts only with `use_sliding_window`; without `layer_types` it is in the layers without positions."""
    body = read_llama(Fields({**SILENT, **fields.raw, "sliding_window": None}, fields.where))
    ropeless = _read_ropeless(fields, body.layers)
    window, windowed = 0, tuple[bool, ...]()
    if fields.get("use_sliding_window", bool, False):
        window, windowed = read_window(fields, body.layers, lambda i: bool(ropeless) and ropeless[i])
    return replace(body, ropeless=ropeless, window=window, windowed=windowed)


def write_smollm3(config: DecoderConfig) -> dict[str, Any]:
    rotates = [int(config.rotates(i)) for i in range(config.layers)]
    used = {"use_sliding_window": config.window > 0, **write_window(config)}
    return {**write_llama(config), **used, "no_rope_layers": rotates}


def _read_gguf(metadata: Fields, config: DecoderConfig) -> DecoderConfig:
    return replace(config, ropeless=_ropeless(config.layers, EVERY))


def _write_gguf(config: DecoderConfig) -> dict[str, Any]:
    if config.ropeless != _ropeless(config.layers, EVERY):
        raise ValidationError(
            f"GGUF architecture smollm3 has no rotary positions in every layer of number {EVERY}, got ropeless="
            f"{config.ropeless!r:.200}.",
            param="ropeless",
        )
    return {}


SMOLLM3 = variant(
    LLAMA,
    "smollm3",
    "SmolLM3ForCausalLM",
    read=read_smollm3,
    write=write_smollm3,
    gguf=Gguf("smollm3", interleaved=True, fields=frozenset({"ropeless"}), read=_read_gguf, write=_write_gguf),
    ids=Ids(eos=(128001,), bos=128000, pad=128004),
    end_tokens=("<|im_end|>",),
    shape={"layers": EVERY, "tied": True, "ropeless": lambda shape: _ropeless(shape["layers"], EVERY)},
)
