"""EXAONE 3 and 3.5: Llama's wiring under GPT-2's names, as its authors' own code has it. EXAONE 4: norms after each
part instead of before, norms of q and k, and, where it has windows, rotary positions in the layers with one alone.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from dfastllm.errors import ModelLoadError, ValidationError
from dfastllm.models.config import DecoderConfig
from dfastllm.models.family import Fields, Gguf, Ids, NameTable, variant
from dfastllm.models.program import standard
from dfastllm.models.wirings.llama import LLAMA, NAMES, read_llama, read_window, write_llama, write_window

__all__ = ["EXAONE", "EXAONE4", "read_exaone", "read_exaone4", "write_exaone", "write_exaone4"]

_H = "transformer.h.{i}"
EXAONE_NAMES = {
    "embed": "transformer.wte",
    "norm": "transformer.ln_f",
    "lm_head": "lm_head",
    "layers.{i}.attn_norm": f"{_H}.ln_1",
    "layers.{i}.attn.q_proj": f"{_H}.attn.attention.q_proj",
    "layers.{i}.attn.k_proj": f"{_H}.attn.attention.k_proj",
    "layers.{i}.attn.v_proj": f"{_H}.attn.attention.v_proj",
    "layers.{i}.attn.o_proj": f"{_H}.attn.attention.out_proj",
    "layers.{i}.mlp_norm": f"{_H}.ln_2",
    "layers.{i}.mlp.gate_proj": f"{_H}.mlp.c_fc_0",
    "layers.{i}.mlp.up_proj": f"{_H}.mlp.c_fc_1",
    "layers.{i}.mlp.down_proj": f"{_H}.mlp.c_proj",
}
EXAONE4_NAMES = {
    **{name: published for name, published in NAMES.items() if name != "layers.{i}.attn_norm"},
    "layers.{i}.attn_post_norm": "model.layers.{i}.post_attention_layernorm",
    "layers.{i}.mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm",
}
del EXAONE4_NAMES["layers.{i}.mlp_norm"]
RENAMED = {  # our config.json is Llama's but for these
    "num_hidden_layers": "num_layers",
    "rms_norm_eps": "layer_norm_epsilon",
    "hidden_act": "activation_function",
}
EVERY = 4  # such a layer of EXAONE 4 sees everything
WINDOWED_LAYERS = 64  # of the one EXAONE 4 in which llama.cpp computes windows


def read_exaone(fields: Fields) -> DecoderConfig:
    """What the authors' class says stands where a config.json is silent; a head is hidden_size / heads there."""
    fields.only(activation_function="silu", attention_bias=False, mlp_bias=False, sliding_window=None)
    named = {theirs: fields.raw.get(own, fields.raw.get(theirs)) for theirs, own in RENAMED.items()}
    fields.get("num_layers|num_hidden_layers", int)  # an error names the field as these files do
    silent = {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    raw = {**silent, **fields.raw, **{name: value for name, value in named.items() if value is not None}}
    config = read_llama(Fields(raw, fields.where))
    fields.only(head_dim=config.hidden_size // config.heads)
    return config


def write_exaone(config: DecoderConfig) -> dict[str, Any]:
    return {RENAMED.get(name, name): value for name, value in write_llama(config).items()}


def _windowed(pattern: int | str, layers: int) -> tuple[bool, ...]:
    """Which layers have a window: all but every `pattern`th, or by letters, of which L is one, and the last never."""
    if isinstance(pattern, str):
        return tuple(pattern[i % len(pattern)] == "L" and i < layers - 1 for i in range(layers))
    return tuple((i + 1) % pattern != 0 for i in range(layers))


def _read_pattern(fields: Fields) -> int | str:
    pattern = EVERY if not fields.has("sliding_window_pattern") else fields.raw["sliding_window_pattern"]
    letters = isinstance(pattern, str) and pattern != "" and set(pattern) <= set("LG")
    if not letters and (not isinstance(pattern, int) or pattern < 1):
        raise ModelLoadError(
            f"{fields.where}: sliding_window_pattern must be a number above 0 or letters L and G, got {pattern!r:.80}.",
            param="sliding_window_pattern",
        )
    return pattern  # type: ignore[no-any-return]


def _hybrid(config: DecoderConfig, window: int, marks: tuple[bool, ...]) -> DecoderConfig:
    """With a window in the marked layers; the others know no positions."""
    some = any(marks) and not all(marks)
    ropeless = () if all(marks) else tuple(not mark for mark in marks)
    return replace(config, window=window if any(marks) else 0, windowed=marks if some else (), ropeless=ropeless)


def read_exaone4(fields: Fields) -> DecoderConfig:
    fields.only(attention_bias=False, mlp_bias=False)
    silent = {"rms_norm_eps": 1e-5, "num_key_value_heads": 32}
    body = read_llama(Fields({**silent, **fields.raw, "sliding_window": None}, fields.where))
    body = replace(body, qk_norm=True)
    with_window = Fields({"sliding_window": 4096, **fields.raw}, fields.where)
    if not with_window.has("sliding_window"):
        return body
    marks = _windowed(_read_pattern(fields), body.layers)  # where the file has no layer_types
    window, windowed = read_window(with_window, body.layers, lambda i: marks[i])
    return _hybrid(body, window, windowed or (window > 0,) * body.layers)


def write_exaone4(config: DecoderConfig) -> dict[str, Any]:
    raw = write_llama(config, "attention_bias", "mlp_bias", "partial_rotary_factor", "use_sliding_window")
    everywhere = {"layer_types": ["full_attention"] * config.layers}  # without it transformers divides by zero
    return {**raw, **everywhere, **write_window(config)}


def _read_gguf(metadata: Fields, config: DecoderConfig) -> DecoderConfig:
    """The pattern is a number, or a mark for each layer."""
    if not config.window:
        return config
    said = metadata.raw.get("attention.sliding_window_pattern", EVERY)
    if isinstance(said, bool):  # the same mark for all layers
        said = [said] * config.layers
    if said < 1 if isinstance(said, int) else not isinstance(said, list) or len(said) != config.layers:
        raise ModelLoadError(
            f"{metadata.where}: attention.sliding_window_pattern must be a number above 0 or {config.layers} marks, "
            f"got {said!r:.200}.",
            param="attention.sliding_window_pattern",
        )
    marks = tuple(map(bool, said)) if isinstance(said, list) else _windowed(said, config.layers)
    return _hybrid(config, config.window, marks)


def _write_gguf(config: DecoderConfig) -> dict[str, Any]:
    marks = _windowed(EVERY, config.layers)
    wanted = _hybrid(config, config.window, marks) if config.window else replace(config, ropeless=())
    if wanted != config or (config.window and config.layers != WINDOWED_LAYERS):
        raise ValidationError(
            f"GGUF architecture exaone4 has a window in {WINDOWED_LAYERS} layers but every {EVERY}th, or none; got "
            f"window={config.window} in {config.layers} layers, windowed={config.windowed!r:.80}.",
            param="window",
        )
    return {"attention.sliding_window_pattern": np.array(marks)} if config.window else {}


EXAONE = variant(
    LLAMA,
    "exaone",
    "ExaoneForCausalLM",
    names=NameTable(EXAONE_NAMES),
    read=read_exaone,
    write=write_exaone,
    gguf=Gguf("exaone", scalings=("linear", "yarn", "llama3"), free_dim=False),
    ids=Ids(eos=(361,), bos=1, pad=0),
    end_tokens=("[|endofturn|]",),
    harmless=(r".*\.rotary(_emb)?\.inv_freq",),
    shape={"norm_eps": 1e-5},
)
EXAONE4 = variant(
    EXAONE,
    "exaone4",
    "Exaone4ForCausalLM",
    names=NameTable(EXAONE4_NAMES),
    read=read_exaone4,
    write=write_exaone4,
    program=partial(standard, pre_norms=False, post_norms=True),
    gguf=Gguf(
        "exaone4",
        fields=frozenset({"qk_norm", "window", "windowed", "ropeless"}),
        scalings=("linear", "yarn", "llama3"),
        read=_read_gguf,
        write=_write_gguf,
    ),
    shape={"qk_norm": True, "norm_eps": 1e-5},
)
