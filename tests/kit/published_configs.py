"""Small checkpoints as their authors publish them: config.json fields, tensor names and shapes written out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

VOCAB = 40
EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")


def filled(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Random weights large enough that attention, routing and norms all matter."""
    draw = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=draw)
        is_norm = "norm" in name or "ln_f" in name
        out[name] = 1 + 0.3 * noise if is_norm else noise * (0.3 if len(shape) == 1 else shape[-1] ** -0.5 * 1.5)
    return out


def write(directory: Path, config: dict, tensors: dict[str, Tensor]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


def llada(*, tied: bool = False, kv_heads: int = 4) -> tuple[dict, dict[str, tuple[int, ...]]]:
    """The fields of GSAI-ML/LLaDA-8B-Instruct's config.json, small."""
    config = {
        "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0, "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
        "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": 32,
        "embedding_dropout": 0.0, "embedding_size": VOCAB, "eos_token_id": 37, "flash_attention": False,
        "include_bias": False, "include_qkv_bias": False, "init_cutoff_factor": None, "init_fn": "mitchell",
        "input_emb_norm": False, "layer_norm_type": "rms", "layer_norm_with_affine": True, "mask_token_id": 38,
        "max_sequence_length": 64, "mlp_hidden_size": 48, "mlp_ratio": 4, "model_type": "llada",
        "multi_query_attention": None, "n_heads": 4, "n_kv_heads": kv_heads, "n_layers": 2, "pad_token_id": 37,
        "precision": "amp_bf16", "residual_dropout": 0.0, "rms_norm_eps": 1e-05, "rope": True,
        "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False, "use_cache": False,
        "vocab_size": VOCAB - 2, "weight_tying": tied,
    }  # fmt: skip
    top = "model.transformer"
    shapes: dict[str, tuple[int, ...]] = {f"{top}.wte.weight": (VOCAB, 32), f"{top}.ln_f.weight": (32,)}
    if not tied:
        shapes[f"{top}.ff_out.weight"] = (VOCAB, 32)
    for i in range(2):
        block = f"{top}.blocks.{i}"
        shapes |= {
            f"{block}.attn_norm.weight": (32,),
            f"{block}.q_proj.weight": (32, 32),
            f"{block}.k_proj.weight": (kv_heads * 8, 32),
            f"{block}.v_proj.weight": (kv_heads * 8, 32),
            f"{block}.attn_out.weight": (32, 32),
            f"{block}.ff_norm.weight": (32,),
            f"{block}.ff_proj.weight": (48, 32),
            f"{block}.up_proj.weight": (48, 32),
            f"{block}.ff_out.weight": (32, 48),
        }
    return config, shapes


def _qwen(config: dict, *, bias: bool, head_norm: bool, tied: bool = False) -> tuple[dict, dict[str, tuple[int, ...]]]:
    config = {
        "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02,
        "intermediate_size": 48, "max_position_embeddings": 64, "max_window_layers": 28, "num_attention_heads": 4,
        "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 1000000.0, "sliding_window": 4096, "tie_word_embeddings": tied, "torch_dtype": "bfloat16",
        "use_cache": True, "use_sliding_window": False, "vocab_size": VOCAB, **config,
    }  # fmt: skip
    dim = config.get("head_dim", 8)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, 32), "model.norm.weight": (32,)}
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, 32)
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.input_layernorm.weight": (32,), f"{layer}.post_attention_layernorm.weight": (32,)}
        for part, heads in (("q", 4), ("k", 2), ("v", 2)):
            shapes[f"{layer}.self_attn.{part}_proj.weight"] = (heads * dim, 32)
            if bias:
                shapes[f"{layer}.self_attn.{part}_proj.bias"] = (heads * dim,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (32, 4 * dim)
        if head_norm:
            shapes |= {f"{layer}.self_attn.q_norm.weight": (dim,), f"{layer}.self_attn.k_norm.weight": (dim,)}
        shapes |= {
            f"{layer}.mlp.gate_proj.weight": (48, 32),
            f"{layer}.mlp.up_proj.weight": (48, 32),
            f"{layer}.mlp.down_proj.weight": (32, 48),
        }
    return config, shapes


def dream() -> tuple[dict, dict[str, tuple[int, ...]]]:
    ids = {"mask_token_id": 38, "pad_token_id": 36, "eos_token_id": 36, "bos_token_id": 36}
    return _qwen({"architectures": ["DreamModel"], "model_type": "Dream", **ids}, bias=True, head_norm=False)


def fast_dllm_v2(*, tied: bool = True) -> tuple[dict, dict[str, tuple[int, ...]]]:
    config = {"architectures": ["Fast_dLLM_QwenForCausalLM"], "model_type": "Fast_dLLM_Qwen", "bd_size": 4}
    return _qwen({**config, "eos_token_id": 37, "mask_token_id": 38}, bias=True, head_norm=False, tied=tied)


def sdar() -> tuple[dict, dict[str, tuple[int, ...]]]:
    """head_dim 16 on a hidden size of 32: projections wider than the residual stream, as in Qwen3-0.6B."""
    config = {"architectures": ["SDARForCausalLM"], "model_type": "sdar", "block_size": 4, "head_dim": 16}
    ids = {"eos_token_id": 37, "mask_token_id": 38, "attention_bias": False}
    return _qwen({**config, **ids}, bias=False, head_norm=True)


def _with_experts(
    shapes: dict[str, tuple[int, ...]], layers: list[int], experts: int, size: int
) -> dict[str, tuple[int, ...]]:
    for i in layers:
        mlp = f"model.layers.{i}.mlp"
        for part in EXPERT_PARTS:
            del shapes[f"{mlp}.{part}.weight"]
        shapes[f"{mlp}.gate.weight"] = (experts, 32)
        for j in range(experts):
            for part in EXPERT_PARTS:
                shapes[f"{mlp}.experts.{j}.{part}.weight"] = (32, size) if part == "down_proj" else (size, 32)
    return shapes


def sdar_moe() -> tuple[dict, dict[str, tuple[int, ...]]]:
    config, shapes = sdar()
    moe = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "norm_topk_prob": True}
    config |= {"architectures": ["SDARMoeForCausalLM"], "model_type": "sdar_moe", "decoder_sparse_step": 1, **moe}
    return config, _with_experts(shapes, [0, 1], 8, 12)


def llada_moe(*, freq: list[int] | None = None) -> tuple[dict, dict[str, tuple[int, ...]]]:
    """The fields of LLaDA-MoE-7B-A1B's config.json, small; the second layer is a mixture, the first too unless said."""
    marks = freq or [1, 1]
    config, shapes = _qwen({"architectures": ["LLaDAMoEModelLM"], "model_type": "llada"}, bias=False, head_norm=True)
    del config["intermediate_size"], config["sliding_window"]
    config |= {
        "attention_bias": False, "dense_intermediate_size": 48, "eos_token_id": 37, "expert_intermediate_size": 12,
        "mask_token_id": 38, "moe_layer_freq": marks, "moe_router_enable_expert_bias": False,
        "moe_router_score_function": "softmax", "norm_topk_prob": None, "num_experts": 8, "num_experts_per_tok": 3,
        "pad_token_id": 37, "partial_rotary_factor": 1, "qk_layernorm": True, "rms_norm_eps": 1e-05,
        "rope_theta": 50000, "routed_scaling_factor": 1, "router_aux_loss_coef": 0.01, "router_num_group": None,
        "router_topk_group": None, "shared_expert_intermediate_size": None,
    }  # fmt: skip
    return config, _with_experts(shapes, [i for i, mark in enumerate(marks) if mark], 8, 12)


def llada2() -> tuple[dict, dict[str, tuple[int, ...]]]:
    """The fields of LLaDA2.0-mini's config.json, small: first layer dense, 16 experts in 4 groups, 2 of them kept."""
    config = {
        "architectures": ["LLaDA2MoeModelLM"], "attention_dropout": 0.0, "embedding_dropout": 0.0, "eos_token_id": 37,
        "first_k_dense_replace": 1, "head_dim": 16, "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 48,
        "mask_token_id": 38, "max_position_embeddings": 64, "model_type": "llada2_moe", "moe_intermediate_size": 12,
        "n_group": 4, "norm_head": False, "norm_topk_prob": True, "num_attention_heads": 4, "num_experts": 16,
        "num_experts_per_tok": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "num_shared_experts": 1,
        "output_dropout": 0.0, "pad_token_id": 37, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 600000, "routed_scaling_factor": 2.5, "score_function": "sigmoid",
        "tie_word_embeddings": False, "topk_group": 2, "use_bias": False, "use_qk_norm": True, "use_qkv_bias": False,
        "vocab_size": VOCAB,
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "model.word_embeddings.weight": (VOCAB, 32),
        "model.norm.weight": (32,),
        "lm_head.weight": (VOCAB, 32),
    }
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (32,),
            f"{layer}.post_attention_layernorm.weight": (32,),
            f"{layer}.attention.query_key_value.weight": ((4 + 2 + 2) * 16, 32),
            f"{layer}.attention.query_layernorm.weight": (16,),
            f"{layer}.attention.key_layernorm.weight": (16,),
            f"{layer}.attention.dense.weight": (32, 64),
        }
        shapes |= {f"{layer}.mlp.{part}.weight": (32, 48) if part == "down_proj" else (48, 32) for part in EXPERT_PARTS}
    shapes = _with_experts(shapes, [1], 16, 12)
    shapes["model.layers.1.mlp.gate.expert_bias"] = (16,)
    for part in EXPERT_PARTS:
        shape = (32, 12) if part == "down_proj" else (12, 32)
        shapes[f"model.layers.1.mlp.shared_experts.{part}.weight"] = shape
    return config, shapes
