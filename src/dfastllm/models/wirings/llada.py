"""LLaDA wiring: masked diffusion with full attention, row i predicts position i (Nie et al. 2025, arXiv 2502.09992).

LLaDA-8B Base/Instruct and LLaDA-1.5. The body is Llama's; config fields and tensor names are OLMo's.
"""

from __future__ import annotations

from typing import Any

from dfastllm.models.config import DecoderConfig
from dfastllm.models.family import Fields, Gguf, Ids, NameTable, variant
from dfastllm.models.wirings.llama import LLAMA

__all__ = ["LLADA", "NAMES", "read_llada", "write_llada"]

_BLOCK = "model.transformer.blocks.{i}"
NAMES = {
    "embed": "model.transformer.wte",
    "norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out",
    "layers.{i}.attn_norm": f"{_BLOCK}.attn_norm",
    "layers.{i}.attn.q_proj": f"{_BLOCK}.q_proj",
    "layers.{i}.attn.k_proj": f"{_BLOCK}.k_proj",
    "layers.{i}.attn.v_proj": f"{_BLOCK}.v_proj",
    "layers.{i}.attn.o_proj": f"{_BLOCK}.attn_out",
    "layers.{i}.mlp_norm": f"{_BLOCK}.ff_norm",
    "layers.{i}.mlp.gate_proj": f"{_BLOCK}.ff_proj",
    "layers.{i}.mlp.up_proj": f"{_BLOCK}.up_proj",
    "layers.{i}.mlp.down_proj": f"{_BLOCK}.ff_out",
}


def read_llada(fields: Fields) -> DecoderConfig:
    """OLMo's many switches are refused unless they have LLaDA's values: other values change what is computed."""
    fields.only(
        block_type="llama",
        activation_type="silu",  # with swiglu, which halves its input, the authors' llama block cannot multiply
        layer_norm_type="rms",
        rope=True,
        alibi=False,
        include_bias=False,
        bias_for_layer_norm=False,
        attention_layer_norm=False,
        input_emb_norm=False,
        scale_logits=False,
        multi_query_attention=False,
        block_group_size=1,
    )
    hidden, heads = fields.get("d_model", int), fields.get("n_heads", int)
    return DecoderConfig(
        vocab_size=fields.get("embedding_size|vocab_size", int),
        hidden_size=hidden,
        intermediate_size=fields.get("mlp_hidden_size", int, fields.get("mlp_ratio", int, 4) * hidden),
        layers=fields.get("n_layers", int),
        heads=heads,
        kv_heads=fields.get("n_kv_heads", int, heads),
        head_dim=hidden // max(heads, 1),
        max_len=fields.get("max_sequence_length", int),
        rope_theta=fields.get("rope_theta", float, 10000.0),
        norm_eps=fields.get("rms_norm_eps", float, 1e-5),
        qkv_bias=fields.get("include_qkv_bias", bool, False),
        tied=fields.get("weight_tying", bool, True),
    )


def write_llada(config: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "embedding_size": config.vocab_size,
        "d_model": config.hidden_size,
        "mlp_hidden_size": config.intermediate_size,
        "n_layers": config.layers,
        "n_heads": config.heads,
        "n_kv_heads": config.kv_heads,
        "max_sequence_length": config.max_len,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "include_bias": False,
        "include_qkv_bias": config.qkv_bias,
        "weight_tying": config.tied,
        "block_type": "llama",
        "activation_type": "silu",
        "layer_norm_type": "rms",
    }


LLADA = variant(
    LLAMA,
    "llada",
    "LLaDAModelLM",
    names=NameTable(NAMES),
    read=read_llada,
    write=write_llada,
    gguf=Gguf("llada", interleaved=True),
    kind="diffusion",
    ids=Ids(eos=(126081, 126348), mask=126336, pad=126081),
    end_tokens=("<|eot_id|>",),
    mask_tokens=("<|mdm_mask|>",),
    own_head=False,  # the authors' class has no head of its own then
    shape={"norm_eps": 1e-5},
)
