"""Dream wiring: masked diffusion on a Qwen2.5 body; the row of position i - 1 predicts position i (Ye et al. 2025,
arXiv 2508.15487). Dream-7B and DiffuCoder-7B."""

from __future__ import annotations

from dfastllm.models.family import Gguf, Ids, variant
from dfastllm.models.wirings.llama import LLAMA, read_qwen2

__all__ = ["DREAM"]

DREAM = variant(
    LLAMA,
    "dream",
    "DreamModel",
    model_types=("Dream",),
    read=read_qwen2,
    gguf=Gguf("dream", fields=frozenset({"qkv_bias"}), free_dim=False),
    kind="diffusion",
    shift=1,
    confidence="filtered",
    ids=Ids(eos=(151643, 151645), mask=151666, pad=151643),
    end_tokens=("<|im_end|>",),
    mask_tokens=("<|mask|>",),
    shape={"qkv_bias": True},
)
