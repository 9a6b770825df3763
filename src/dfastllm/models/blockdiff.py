"""Block-diffusion wirings: block-causal attention with exact K,V, on Qwen bodies.

SDAR is Qwen3 (block 4 to 64, row i predicts position i).
"""

from __future__ import annotations

from dfastllm.models.family import Family, Ids, NameTable, register
from dfastllm.models.llama import NAMES, read_qwen3, write_llama

__all__ = ["SDAR"]

SDAR = register(
    Family(
        name="sdar",
        architectures=("SDARForCausalLM",),
        model_types=("sdar",),
        names=NameTable(NAMES),
        read=read_qwen3,
        write=write_llama,
        kind="block",
        block=("block_size", 4),
        ids=Ids(eos=(151645, 151643), mask=151669, pad=151643),
        end_tokens=("<|im_end|>",),
        mask_tokens=("<|MASK|>",),
    )
)
