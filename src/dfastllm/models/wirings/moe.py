"""Mixture-of-experts wirings: LLaDA-MoE (softmax router), LLaDA2.x (sigmoid, group-limited router) and Qwen3-MoE.

The mixture itself is `mixture.Mixture`; here is how each family's files describe it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from dfastllm.errors import ModelLoadError, ValidationError
from dfastllm.models.config import DecoderConfig, MoEConfig
from dfastllm.models.family import Fields, Gguf, Ids, NameTable, variant
from dfastllm.models.program import standard
from dfastllm.models.wirings.llama import LLAMA, NAMES, read_llama, read_qwen3, write_llama

__all__ = [
    "LLADA2_MOE",
    "LLADA2_NAMES",
    "LLADA_MOE",
    "QWEN3_MOE",
    "QWEN3_MOE_NAMES",
    "read_llada2_moe",
    "read_llada_moe",
    "read_qwen3_moe",
    "write_llada2_moe",
    "write_llada_moe",
    "write_qwen3_moe",
]

_MLP = "model.layers.{i}.mlp"
QWEN3_MOE_NAMES = {
    **NAMES,
    "layers.{i}.mlp.router": f"{_MLP}.gate",
    "layers.{i}.mlp.experts.{j}.gate_proj": f"{_MLP}.experts.{{j}}.gate_proj",
    "layers.{i}.mlp.experts.{j}.up_proj": f"{_MLP}.experts.{{j}}.up_proj",
    "layers.{i}.mlp.experts.{j}.down_proj": f"{_MLP}.experts.{{j}}.down_proj",
}
_ATTENTION = "model.layers.{i}.attention"
LLADA2_NAMES = {
    **{own: name for own, name in QWEN3_MOE_NAMES.items() if ".attn." not in own},
    "embed": "model.word_embeddings",
    "layers.{i}.attn.qkv_proj": f"{_ATTENTION}.query_key_value",
    "layers.{i}.attn.o_proj": f"{_ATTENTION}.dense",
    "layers.{i}.attn.q_norm": f"{_ATTENTION}.query_layernorm",
    "layers.{i}.attn.k_norm": f"{_ATTENTION}.key_layernorm",
    "layers.{i}.mlp.router.bias": f"{_MLP}.gate.expert_bias",
    "layers.{i}.mlp.shared.gate_proj": f"{_MLP}.shared_experts.gate_proj",
    "layers.{i}.mlp.shared.up_proj": f"{_MLP}.shared_experts.up_proj",
    "layers.{i}.mlp.shared.down_proj": f"{_MLP}.shared_experts.down_proj",
}


def _pattern(mixtures: Sequence[bool]) -> tuple[bool, ...]:
    """`MoEConfig.layers` for this choice of layers: empty where all of them are mixtures."""
    return () if all(mixtures) else tuple(mixtures)


def _moe(config: DecoderConfig) -> MoEConfig:
    if config.moe is None:
        raise ValidationError("this family is a mixture of experts, got a config with moe=None.", param="moe")
    return config.moe


def read_qwen3_moe(fields: Fields) -> DecoderConfig:
    """Qwen3's body, in which a silent file has no head_dim of its own; the softmax router's chosen weights are rescaled
    to sum to 1 where `norm_topk_prob` says so."""
    step = fields.get("decoder_sparse_step", int, 1)
    dense = fields.get("mlp_only_layers", list, [])
    silent = {"head_dim": fields.get("hidden_size", int) // max(fields.get("num_attention_heads", int), 1)}
    body = read_qwen3(Fields({**silent, **fields.raw}, fields.where))
    return replace(
        body,
        moe=MoEConfig(
            experts=fields.get("num_experts|num_local_experts", int),
            top_k=fields.get("num_experts_per_tok", int),
            intermediate_size=fields.get("moe_intermediate_size", int),
            normalise=fields.get("norm_topk_prob", bool, False),
            layers=_pattern([i not in dense and (i + 1) % step == 0 for i in range(body.layers)]),
        ),
    )


def write_qwen3_moe(config: DecoderConfig) -> dict[str, Any]:
    moe = _moe(config)
    return {
        **write_llama(config),
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.intermediate_size,
        "norm_topk_prob": moe.normalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(config.layers) if not config.is_mixture(i)],
    }


def read_llada_moe(fields: Fields) -> DecoderConfig:
    """LLaDA-MoE: softmax over all experts, the chosen weights used as they are, whatever `norm_topk_prob` says (the
    published model hard-codes it). `moe_layer_freq` marks the layers that are mixtures (1) or dense (0)."""
    fields.only(
        moe_router_score_function="softmax",
        moe_router_enable_expert_bias=False,
        routed_scaling_factor=1.0,
        shared_expert_intermediate_size=0,
    )
    expert_size = fields.get("expert_intermediate_size", int)
    dense_size = fields.get("dense_intermediate_size|intermediate_size", int, expert_size)
    body = read_llama(Fields({**fields.raw, "intermediate_size": dense_size}, fields.where))
    freq = fields.raw.get("moe_layer_freq", 1)
    marks = [int(i % freq == 0) for i in range(body.layers)] if isinstance(freq, int) and freq > 0 else freq
    if not isinstance(marks, list) or len(marks) != body.layers or any(mark not in (0, 1) for mark in marks):
        raise ModelLoadError(
            f"{fields.where}: moe_layer_freq must be a period or a list of {body.layers} zeros and ones, got {freq!r}.",
            param="moe_layer_freq",
        )
    return replace(
        body,
        qk_norm=fields.get("qk_layernorm", bool, False),
        moe=MoEConfig(
            experts=fields.get("num_experts", int),
            top_k=fields.get("num_experts_per_tok", int),
            intermediate_size=expert_size,
            layers=_pattern([bool(mark) for mark in marks]),
        ),
    )


def write_llada_moe(config: DecoderConfig) -> dict[str, Any]:
    moe = _moe(config)
    return {
        **write_llama(config, "intermediate_size"),
        "dense_intermediate_size": config.intermediate_size,
        "qk_layernorm": config.qk_norm,
        "expert_intermediate_size": moe.intermediate_size,
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": False,
        "moe_router_score_function": "softmax",
        "moe_layer_freq": [int(config.is_mixture(i)) for i in range(config.layers)],
    }


def read_llada2_moe(fields: Fields) -> DecoderConfig:
    """LLaDA2.0/2.1: the first `first_k_dense_replace` layers dense, one fused q,k,v matrix, half a head rotates."""
    fields.only(score_function="sigmoid", norm_topk_prob=True, norm_head=False, use_qk_norm=True)
    first = fields.get("first_k_dense_replace", int, 0)
    expert_size = fields.get("moe_intermediate_size", int)
    body = read_llama(
        Fields({"partial_rotary_factor": 0.5, **fields.raw, "sliding_window": None, "attention_bias": None})
    )
    return replace(
        body,
        qk_norm=True,
        qkv_bias=fields.get("use_qkv_bias", bool, False),
        out_bias=fields.get("use_bias", bool, False),
        moe=MoEConfig(
            experts=fields.get("num_experts", int),
            top_k=fields.get("num_experts_per_tok", int),
            intermediate_size=expert_size,
            router="sigmoid",
            normalise=True,
            scale=fields.get("routed_scaling_factor", float, 2.5),
            groups=fields.get("n_group", int, 8),
            groups_kept=fields.get("topk_group", int, 4),
            shared_size=expert_size * fields.get("num_shared_experts", int, 0),
            layers=_pattern([i >= first for i in range(body.layers)]),
        ),
    )


def write_llada2_moe(config: DecoderConfig) -> dict[str, Any]:
    moe = _moe(config)
    return {
        **write_llama(config, "attention_bias", "mlp_bias"),
        "use_qkv_bias": config.qkv_bias,
        "use_bias": config.out_bias,
        "use_qk_norm": True,
        "score_function": "sigmoid",
        "norm_topk_prob": True,
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.intermediate_size,
        "num_shared_experts": moe.shared_size // moe.intermediate_size,
        "n_group": moe.groups,
        "topk_group": moe.groups_kept,
        "routed_scaling_factor": moe.scale,
        "first_k_dense_replace": sum(not config.is_mixture(i) for i in range(config.layers)),
    }


def _gguf(arch: str, fields: set[str], *, normalise: bool) -> Gguf:
    """Softmax router; every layer is a mixture. normalise: llama.cpp knows it by the architecture."""

    def read(metadata: Fields, config: DecoderConfig) -> DecoderConfig:
        moe = MoEConfig(
            experts=metadata.get("expert_count", int),
            top_k=metadata.get("expert_used_count", int),
            intermediate_size=metadata.get("expert_feed_forward_length", int),
            normalise=normalise,
        )
        return replace(config, moe=moe)

    def write(config: DecoderConfig) -> dict[str, Any]:
        moe = _moe(config)
        if (moe.layers, moe.normalise, moe.router, moe.shared_size) != ((), normalise, "softmax", 0):
            raise ValidationError(f"GGUF architecture {arch} has no such mixture of experts: {moe}.", param="moe")
        return {
            "expert_count": moe.experts,
            "expert_used_count": moe.top_k,
            "expert_feed_forward_length": moe.intermediate_size,
        }

    return Gguf(arch, fields=frozenset({*fields, "moe"}), read=read, write=write)


QWEN3_MOE = variant(
    LLAMA,
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    names=NameTable(QWEN3_MOE_NAMES),
    read=read_qwen3_moe,
    write=write_qwen3_moe,
    gguf=_gguf("qwen3moe", {"qk_norm", "window"}, normalise=True),
    shape={"qk_norm": True, "moe": MoEConfig(experts=8, top_k=2, intermediate_size=24, normalise=True)},
)
LLADA_MOE = variant(
    LLAMA,
    "llada_moe",
    "LLaDAMoEModelLM",
    "LLaDAMoEModel",
    model_types=("lladamoe",),
    names=NameTable(QWEN3_MOE_NAMES),
    read=read_llada_moe,
    write=write_llada_moe,
    gguf=_gguf("llada-moe", {"qk_norm"}, normalise=False),
    kind="diffusion",
    ids=Ids(eos=(156892,), mask=156895, pad=156892),
    mask_tokens=("<|mask|>",),
    shape={"norm_eps": 1e-5, "qk_norm": True, "moe": MoEConfig(experts=8, top_k=2, intermediate_size=24)},
)
LLADA2_MOE = variant(
    LLAMA,
    "llada2_moe",
    "LLaDA2MoeModelLM",
    gguf=None,
    names=NameTable(LLADA2_NAMES),
    read=read_llada2_moe,
    write=write_llada2_moe,
    program=partial(standard, fused_qkv=True),
    kind="block",
    confidence="drawn",
    block=("block_size", 32),
    ids=Ids(eos=(156892,), mask=156895, pad=156892),
    mask_tokens=("<|mask|>",),
    shape={
        "qk_norm": True,
        "rope_dim": 4,
        "moe": MoEConfig(
            experts=8,
            top_k=2,
            intermediate_size=24,
            router="sigmoid",
            normalise=True,
            scale=2.5,
            groups=4,
            groups_kept=2,
            shared_size=24,
            layers=(False, True),
        ),
    },
)
