"""The text part of Mistral Small 3.1 and 3.2: Mistral's wiring inside a model that also sees pictures. Its vision tower
and projector are passed over in files, and not written.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dfastllm.models.config import DecoderConfig
from dfastllm.models.family import Fields, Gguf, Ids, NameTable, variant
from dfastllm.models.wirings.llama import LLAMA, MISTRAL, NAMES, read_llama, write_llama

__all__ = ["MISTRAL3", "read_mistral3", "write_mistral3"]


def read_mistral3(fields: Fields) -> DecoderConfig:
    """From `text_config`. Ministral 3, whose queries are scaled by position, has another model_type there and is
    refused."""
    inner = {"model_type": "mistral", **fields.get("text_config", dict)}
    text = Fields(inner, f"{fields.where}: text_config")
    text.only(model_type="mistral")
    tied = text.get("tie_word_embeddings", bool, fields.get("tie_word_embeddings", bool, False))
    return replace(read_llama(text), tied=tied)


def write_mistral3(config: DecoderConfig) -> dict[str, Any]:
    return {"text_config": {"model_type": "mistral", **write_llama(config)}, "tie_word_embeddings": config.tied}


def _read_gguf(metadata: Fields, config: DecoderConfig) -> DecoderConfig:
    metadata.only(**{"attention.temperature_scale": 0.0})
    return config


assert LLAMA.gguf is not None
MISTRAL3 = variant(
    MISTRAL,
    "mistral3",
    "Mistral3ForConditionalGeneration",
    names=NameTable({own: f"language_model.{published}" for own, published in NAMES.items()}),
    read=read_mistral3,
    write=write_mistral3,
    gguf=Gguf(
        "mistral3",
        interleaved=True,
        fields=LLAMA.gguf.fields - {"window"},
        scalings=LLAMA.gguf.scalings,
        read=_read_gguf,
    ),
    ids=Ids(eos=(2,), bos=1, pad=11),
    harmless=(*MISTRAL.harmless, r"vision_tower\..*", r"multi_modal_projector\..*"),
)
