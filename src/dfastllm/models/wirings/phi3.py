"""Phi-3, Phi-3.5, Phi-4-mini and Phi-4: Llama's wiring with q, k, v in one matrix and gate, up in another; windows;
rotary positions in a part of the head (Phi-4-mini), stretched by longrope (the 128k models).

longrope has factors for short texts and for long ones. transformers chooses by the length that a text has reached and
so turns keys that it has cached as they were; here, as in vLLM and llama.cpp, the context that the model is loaded for
chooses, once: up to the trained length the short factors, beyond it the long ones for texts of every length.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from dfastllm.errors import ModelLoadError
from dfastllm.models.config import DecoderConfig
from dfastllm.models.family import GGUF_NAMES, Fields, Gguf, Ids, NameTable, variant
from dfastllm.models.program import standard
from dfastllm.models.wirings.llama import LLAMA, NAMES, read_llama, write_llama

__all__ = ["PHI3", "read_phi3", "write_phi3"]

SPLIT = {f"layers.{{i}}.{name}_proj" for name in ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up")}
FUSED = {
    "layers.{i}.attn.qkv_proj": "model.layers.{i}.self_attn.qkv_proj",
    "layers.{i}.mlp.gate_up_proj": "model.layers.{i}.mlp.gate_up_proj",
}
# What transformers' class says where a config.json is silent.
SILENT = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
ORIGINAL = "original_max_position_embeddings"


def read_phi3(fields: Fields) -> DecoderConfig:
    """longrope is called su or yarn in old files; the trained length lies beside it. Raises ModelLoadError for another
    scaling, and for biases."""
    fields.only(attention_bias=False, mlp_bias=False)
    rope = dict(fields.get("rope_parameters|rope_scaling", dict, {}))
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "longrope", "su", "yarn"):
        raise ModelLoadError(
            f"{fields.where}: rope_type {kind!r} is not supported; supported: default, longrope.", param="rope_scaling"
        )
    if kind != "default":
        trained = fields.get(ORIGINAL, int, Fields(rope, fields.where).get(ORIGINAL, int, 4096))
        rope |= {"rope_type": "longrope", ORIGINAL: trained}
    return read_llama(Fields({**SILENT, **fields.raw, "rope_parameters": rope, "layer_types": None}, fields.where))


def write_phi3(config: DecoderConfig) -> dict[str, Any]:
    raw = write_llama(config, "attention_bias", "mlp_bias", "use_sliding_window", "layer_types")
    trained = config.rope_scaling.original_max_len if config.rope_scaling else config.max_len
    return {**raw, "sliding_window": config.window or None, ORIGINAL: trained}


PHI3 = variant(
    LLAMA,
    "phi3",
    "Phi3ForCausalLM",
    names=NameTable({own: name for own, name in NAMES.items() if own not in SPLIT} | FUSED),
    read=read_phi3,
    write=write_phi3,
    program=partial(standard, fused_qkv=True, fused_gate_up=True),
    gguf=Gguf(
        "phi3",
        names=NameTable(
            {own: name for own, name in GGUF_NAMES.items() if own not in SPLIT}
            | {"layers.{i}.mlp.gate_up_proj": "blk.{i}.ffn_up"}
        ),
        fields=frozenset({"rope_dim", "window"}),  # llama.cpp itself has switched the windows off
        scalings=("longrope",),
        free_dim=False,
        write=lambda config: {"attention.sliding_window": config.window},
    ),
    ids=Ids(eos=(32000, 32007), bos=1, pad=32000),
    end_tokens=("<|end|>", "<|endoftext|>", "<|im_end|>"),
)
