"""Granite 3 (dense): Llama's wiring with factors on the embedding, on scores, on what layers add, and on the logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dfastllm.errors import ModelLoadError
from dfastllm.models.config import DecoderConfig
from dfastllm.models.family import Fields, Gguf, Ids, variant
from dfastllm.models.wirings.llama import LLAMA, read_llama, write_llama

__all__ = ["GRANITE", "read_granite", "write_granite"]


def _inverse(value: float) -> float:
    """1 / value, as the number of few digits that has this inverse where there is one."""
    short = round(1 / value, 9)
    return short if short and 1 / short == value else 1 / value


def read_granite(fields: Fields) -> DecoderConfig:
    """Raises ModelLoadError for a multiplier that is not above 0."""
    fields.only(partial_rotary_factor=1.0)
    names = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
    factors = [fields.get(name, float, 1.0) for name in names]
    for name, factor in zip(names, factors, strict=True):
        if not factor > 0:
            raise ModelLoadError(f"{fields.where}: {name} must be greater than 0, got {factor}.", param=name)
    embedding, attention, residual, logits = factors
    return replace(
        read_llama(Fields({**fields.raw, "sliding_window": None}, fields.where)),
        embed_factor=embedding,
        attention_scale=attention,
        residual_factor=residual,
        logits_factor=_inverse(logits),
    )


def write_granite(config: DecoderConfig) -> dict[str, Any]:
    return {
        **write_llama(replace(config, window=0, windowed=()), "partial_rotary_factor"),
        "embedding_multiplier": config.embed_factor,
        "attention_multiplier": config.attention_scale or config.head_dim**-0.5,
        "residual_multiplier": config.residual_factor,
        "logits_scaling": _inverse(config.logits_factor),
    }


def _from_gguf(metadata: Fields, config: DecoderConfig) -> DecoderConfig:
    """llama.cpp, too, divides by its logit scale; and it has models of this architecture without rotary positions."""
    metadata.only(**{"rope.scaling.finetuned": True})
    return replace(
        config,
        attention_scale=config.attention_scale or config.head_dim**-0.5,
        logits_factor=_inverse(config.logits_factor),
    )


GRANITE = variant(
    LLAMA,
    "granite",
    "GraniteForCausalLM",
    read=read_granite,
    write=write_granite,
    gguf=Gguf(
        "granite",
        interleaved=True,
        fields=frozenset(
            {"out_bias", "mlp_bias", "qkv_bias"}
            | {"embed_factor", "attention_scale", "residual_factor", "logits_factor"}
        ),
        scalings=("linear", "yarn", "llama3", "longrope"),
        read=_from_gguf,
        write=lambda config: {"logit_scale": _inverse(config.logits_factor)},
    ),
    ids=Ids(eos=(0,), bos=0, pad=0),
    end_tokens=("<|end_of_text|>",),
    shape={
        "embed_factor": 12.0,
        "attention_scale": lambda shape: 1.5 / shape["head_dim"],
        "residual_factor": 0.22,
        "logits_factor": 0.125,
    },
)
