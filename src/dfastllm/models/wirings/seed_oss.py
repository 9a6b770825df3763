"""Seed-OSS: Llama's wiring with biases on q, k and v, and a separate switch for that of the output projection."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dfastllm.models.config import DecoderConfig
from dfastllm.models.family import GGUF_NAMES, Fields, Gguf, Ids, NameTable, variant
from dfastllm.models.wirings.llama import LLAMA, read_llama, write_llama

__all__ = ["SEED_OSS", "read_seed_oss", "write_seed_oss"]

# What transformers' class says where a config.json is silent.
SILENT = {"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True, "max_position_embeddings": 524288}
# llama.cpp names the norm before the MLP as others name the one after attention.
SEED_GGUF_NAMES = {name: tensor for name, tensor in GGUF_NAMES.items() if name != "layers.{i}.attn_post_norm"}
SEED_GGUF_NAMES["layers.{i}.mlp_norm"] = "blk.{i}.post_attention_norm"


def read_seed_oss(fields: Fields) -> DecoderConfig:
    fields.only(sliding_window=None)
    body = read_llama(Fields({**SILENT, **fields.raw}, fields.where))
    return replace(body, out_bias=fields.get("attention_out_bias", bool, False))


def write_seed_oss(config: DecoderConfig) -> dict[str, Any]:
    return {**write_llama(config), "attention_bias": config.qkv_bias, "attention_out_bias": config.out_bias}


SEED_OSS = variant(
    LLAMA,
    "seed_oss",
    "SeedOssForCausalLM",
    read=read_seed_oss,
    write=write_seed_oss,
    gguf=Gguf("seed_oss", names=NameTable(SEED_GGUF_NAMES), fields=frozenset({"qkv_bias"})),
    ids=Ids(eos=(2,), bos=0, pad=1),
    end_tokens=("<seed:eos>",),
    shape={"qkv_bias": True},
)
