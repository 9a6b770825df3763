"""What llama.cpp calls the tensors of the five architectures, and how it orders their rows.

Rotary pairs: llama and llada rotate neighbouring channels (2 i, 2 i + 1) there, so their files hold q and k rows
interleaved within each head; qwen2, qwen3 and dream rotate (i, i + half), as this decoder does. Undoing it permutes
whole rows, which is exact in any format.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dfastllm.models.family import NameTable

__all__ = ["FAMILY_OF", "HARMLESS", "INTERLEAVED", "NAMES", "interleave", "separate"]

FAMILY_OF = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "llada": "llada", "dream": "dream"}
INTERLEAVED = ("llama", "llada")

NAMES = NameTable(
    {
        "embed": "token_embd",
        "norm": "output_norm",
        "lm_head": "output",
        "layers.{i}.attn_norm": "blk.{i}.attn_norm",
        "layers.{i}.attn.q_proj": "blk.{i}.attn_q",
        "layers.{i}.attn.k_proj": "blk.{i}.attn_k",
        "layers.{i}.attn.v_proj": "blk.{i}.attn_v",
        "layers.{i}.attn.qkv_proj": "blk.{i}.attn_qkv",
        "layers.{i}.attn.o_proj": "blk.{i}.attn_output",
        "layers.{i}.attn.q_norm": "blk.{i}.attn_q_norm",
        "layers.{i}.attn.k_norm": "blk.{i}.attn_k_norm",
        "layers.{i}.mlp_norm": "blk.{i}.ffn_norm",
        "layers.{i}.mlp.gate_proj": "blk.{i}.ffn_gate",
        "layers.{i}.mlp.up_proj": "blk.{i}.ffn_up",
        "layers.{i}.mlp.down_proj": "blk.{i}.ffn_down",
    }
)
HARMLESS = (r"rope_freqs\.weight", r"blk\.\d+\.attn_rot_embd", r"blk\.\d+\.rope_freqs\.weight")


def interleave(heads: int, dim: int) -> Tensor:
    """Row order of the file: file row j is our row interleave[j]. int64 [heads * dim]."""
    return torch.arange(heads * dim).view(heads, 2, dim // 2).transpose(1, 2).reshape(-1)


def separate(heads: int, dim: int) -> Tensor:
    """The inverse of `interleave`: our row j is file row separate[j]."""
    return torch.arange(heads * dim).view(heads, dim // 2, 2).transpose(1, 2).reshape(-1)
