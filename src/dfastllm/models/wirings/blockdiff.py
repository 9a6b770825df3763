"""Block-diffusion wirings: block-causal attention with exact K,V, on Qwen bodies.

SDAR (arXiv 2510.06303) is Qwen3, or Qwen3's mixture of experts: blocks of 4 to 64, row i predicts position i.
Fast-dLLM v2 (arXiv 2509.26328) is Qwen2.5: blocks of 32, the row of position i - 1 predicts position i, so the first
token of a block comes from the last row of the block before it, as in autoregression.
"""

from __future__ import annotations

from dfastllm.models.config import MoEConfig
from dfastllm.models.family import Ids, NameTable, variant
from dfastllm.models.wirings.llama import LLAMA, read_qwen2, read_qwen3
from dfastllm.models.wirings.moe import QWEN3_MOE_NAMES, read_qwen3_moe, write_qwen3_moe

__all__ = ["FAST_DLLM_V2", "SDAR", "SDAR_MOE"]

SDAR = variant(
    LLAMA,
    "sdar",
    "SDARForCausalLM",
    gguf=None,
    read=read_qwen3,
    kind="block",
    confidence="drawn",
    block=("block_size", 4),
    ids=Ids(eos=(151645, 151643), mask=151669, pad=151643),
    end_tokens=("<|im_end|>",),
    mask_tokens=("<|MASK|>",),
    shape={"qk_norm": True},
)
SDAR_MOE = variant(
    SDAR,
    "sdar_moe",
    "SDARMoeForCausalLM",
    names=NameTable(QWEN3_MOE_NAMES),
    read=read_qwen3_moe,
    write=write_qwen3_moe,
    shape={"qk_norm": True, "moe": MoEConfig(experts=8, top_k=2, intermediate_size=24, normalise=True)},
)
FAST_DLLM_V2 = variant(
    LLAMA,
    "fast_dllm_v2",
    "Fast_dLLM_QwenForCausalLM",
    model_types=("Fast_dLLM_Qwen",),
    gguf=None,
    read=read_qwen2,
    kind="block",
    confidence="drawn",
    shift=1,
    ar_first=True,
    causal=True,
    block=("bd_size", 32),
    ids=Ids(eos=(151645,), mask=151665, pad=151643),
    end_tokens=("<|im_end|>",),
    mask_tokens=("|<MASK>|",),
    shape={"qkv_bias": True},
)
