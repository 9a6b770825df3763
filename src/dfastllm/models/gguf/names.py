"""What llama.cpp calls the numbers of a wiring, how it orders the rows of q and k, and which tensors in its files are
no parameters.

Rotary pairs: some architectures rotate neighbouring channels (2 i, 2 i + 1) there, so their files hold q and k rows
interleaved within each head; the others rotate (i, i + half), as this decoder does. Undoing it permutes whole rows,
which is exact in any format.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dfastllm.models.config import DecoderConfig
from dfastllm.models.family import Gguf

__all__ = ["HARMLESS", "SAMPLING", "SETTINGS", "interleave", "row_order", "separate"]

HARMLESS = (r"(blk\.\d+\.)?rope_(freqs|factors_long|factors_short)\.weight", r"blk\.\d+\.attn_rot_embd")
# Metadata that changes what is computed -> field of DecoderConfig, which an architecture may have (`Gguf.fields`).
SETTINGS = {
    "attention.scale": "attention_scale",
    "attention.sliding_window": "window",
    "attn_logit_softcapping": "attention_softcap",
    "final_logit_softcapping": "logits_softcap",
    "logit_scale": "logits_factor",
    "embedding_scale": "embed_factor",
    "residual_scale": "residual_factor",
    "expert_count": "moe",
}
# Option of a request -> where a file says the model's own default of it.
SAMPLING = {
    "temperature": "general.sampling.temp",
    "top_p": "general.sampling.top_p",
    "top_k": "general.sampling.top_k",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}


def interleave(heads: int, dim: int) -> Tensor:
    """Row order of the file: file row j is our row interleave[j]. int64 [heads * dim]."""
    return torch.arange(heads * dim).view(heads, 2, dim // 2).transpose(1, 2).reshape(-1)


def separate(heads: int, dim: int) -> Tensor:
    """The inverse of `interleave`: our row j is file row separate[j]."""
    return torch.arange(heads * dim).view(heads, dim // 2, 2).transpose(1, 2).reshape(-1)


def row_order(own: str, config: DecoderConfig, gguf: Gguf, order: Callable[[int, int], Tensor]) -> Tensor | None:
    """`order` (interleave or separate) of this parameter's rows; None where both have one order."""
    for part, heads in ((".attn.q_proj.", config.heads), (".attn.k_proj.", config.kv_heads)):
        if gguf.interleaved and part in own:
            return order(heads, config.head_dim)
    return None
