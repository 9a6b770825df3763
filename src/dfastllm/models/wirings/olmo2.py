"""OLMo 2 and OLMo 3: no norms before the parts but after them, and norms over the whole of q and of k. OLMo 3 has
windows in three layers of four, whose rotary positions are never scaled.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from dfastllm.errors import ValidationError
from dfastllm.models.config import DecoderConfig
from dfastllm.models.family import Fields, Gguf, Ids, NameTable, variant
from dfastllm.models.program import standard
from dfastllm.models.wirings.llama import LLAMA, NAMES, read_llama, read_window, write_llama, write_window

__all__ = ["OLMO2", "read_olmo2", "write_olmo2"]

OLMO2_NAMES = {
    **{own: name for own, name in NAMES.items() if own not in ("layers.{i}.attn_norm", "layers.{i}.mlp_norm")},
    "layers.{i}.attn_post_norm": "model.layers.{i}.post_attention_layernorm",
    "layers.{i}.mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm",
}
THIRD = {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3"}
PERIOD = 4  # every fourth layer of OLMo 3 sees everything


def _has_window(layer: int) -> bool:
    return (layer + 1) % PERIOD != 0


def read_olmo2(fields: Fields) -> DecoderConfig:
    """OLMo 3: `rope_parameters` by type of layer (transformers 5), or `rope_theta` of all layers and `rope_scaling` of
    those without a window."""
    fields.only(mlp_bias=False, partial_rotary_factor=1.0)
    raw = {"rms_norm_eps": 1e-5, **fields.raw, "sliding_window": None}
    if not any(fields.raw.get(name) == value for name, value in THIRD.items()):
        return replace(read_llama(Fields(raw, fields.where)), qk_norm=True)
    by_type = fields.get("rope_parameters", dict, {})
    whole, local = (by_type.get(kind) or {} for kind in ("full_attention", "sliding_attention"))
    body = read_llama(Fields({"rope_theta": 500000.0, **raw, "rope_parameters": whole or None}, fields.where))
    of_local = Fields(local, f"{fields.where}: rope_parameters.sliding_attention")
    of_local.only(rope_type="default")
    said = Fields({"sliding_window": 4096, **fields.raw}, fields.where)
    window, windowed = read_window(said, body.layers, _has_window)
    theta = of_local.get("rope_theta", float, body.rope_theta) if window else 0.0
    return replace(body, qk_norm=True, window=window, windowed=windowed, local_theta=theta)


def write_olmo2(config: DecoderConfig) -> dict[str, Any]:
    raw = write_llama(replace(config, window=0, windowed=()), "mlp_bias", "partial_rotary_factor")
    if not config.window:
        return raw
    whole = {"rope_type": "default", **(raw.pop("rope_scaling") or {}), "rope_theta": raw.pop("rope_theta")}
    local = {"rope_type": "default", "rope_theta": config.local_theta or config.rope_theta}
    rope = {"rope_parameters": {"full_attention": whole, "sliding_attention": local}}
    return {**raw, **THIRD, **write_window(config), **rope}


def _from_gguf(metadata: Fields, config: DecoderConfig) -> DecoderConfig:
    """Which layers have a window: a mark of each, or every which has none."""
    if not config.window:
        return config
    said = metadata.raw.get("attention.sliding_window_pattern", PERIOD)
    if isinstance(said, bool):  # one mark that all layers share
        marks = (said,) * config.layers
    elif isinstance(said, list):
        marks = tuple(map(bool, said))
    else:
        every = metadata.get("attention.sliding_window_pattern", int, PERIOD)
        marks = tuple(every == 0 or i % every < every - 1 for i in range(config.layers))
    return replace(
        config,
        window=config.window if any(marks) else 0,
        windowed=() if all(marks) or not any(marks) else marks,
        local_theta=metadata.get("rope.freq_base_swa", float, config.rope_theta) if any(marks) else 0.0,
    )


def _to_gguf(config: DecoderConfig) -> dict[str, Any]:
    if config.tied:
        raise ValidationError("GGUF architecture olmo2 has no tied head.", param="tied")
    if not config.window:
        return {}
    marks = np.array([config.is_windowed(i) for i in range(config.layers)])
    return {"attention.sliding_window_pattern": marks, "rope.freq_base_swa": config.local_theta or config.rope_theta}


OLMO2 = variant(
    LLAMA,
    "olmo2",
    "Olmo2ForCausalLM",
    "Olmo3ForCausalLM",
    model_types=("olmo2", "olmo3"),
    names=NameTable(OLMO2_NAMES),
    read=read_olmo2,
    write=write_olmo2,
    program=partial(standard, pre_norms=False, post_norms=True, whole_qk_norm=True),
    gguf=Gguf(
        "olmo2",
        fields=frozenset({"qk_norm", "window", "windowed", "local_theta"}),
        free_dim=False,
        read=_from_gguf,
        write=_to_gguf,
    ),
    ids=Ids(eos=(100257,), pad=100277),
    end_tokens=("<|endoftext|>", "<|im_end|>"),
    shape={"qk_norm": True},
)
