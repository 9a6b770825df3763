"""The kernels: packed weights, linear layers, attention over paged K,V, the fused head; native where a compiler built
them, plain torch twins of the same signatures everywhere. `table` says which one an op uses here and why. Knows tensors
and arrays only: no models, no engine."""

from __future__ import annotations

from dataclasses import dataclass

from dfastllm.kernels.extension import describe, native, set_threads, threads, torch_alone, torch_team

__all__ = ["OpChoice", "describe", "native", "set_threads", "table", "threads", "torch_alone", "torch_team"]

# op -> the torch operations its twin is made of
OPS = {
    "attention": "scaled_dot_product_attention per span, over gathered K,V",
    "attention_i8": "K,V widened to float32, then as attention",
    "forward": "the other ops one by one",
    "head_stats": "logits, then argmax, logsumexp, entropy and top-k",
    "linear_bf16": "torch.nn.functional.linear",
    "linear_f32": "torch.nn.functional.linear",
    "linear_w4g": "weights widened layer by layer, float32 product of int8 activations",
    "linear_w4s": "weights widened layer by layer, float32 product of int8 activations",
    "linear_w6g": "weights widened layer by layer, float32 product of int8 activations",
    "linear_w8": "weights widened layer by layer, float32 product of int8 activations",
    "linear_w8g": "weights widened layer by layer, float32 product of int8 activations",
    "norm_quantise": "RMSNorm, then rounding, in float32",
    "rope_store": "rotation in float32, K and V written by index",
    "swiglu_quantise": "silu(gate) * up, then rounding, in float32",
}


@dataclass(frozen=True, slots=True)
class OpChoice:
    """One row of `dfastllm doctor`: which implementation an op uses on this machine, and why."""

    op: str
    implementation: str
    reason: str


def table() -> list[OpChoice]:
    """Every dispatched op, in order of name. Raises UnsupportedError when the native kernels are there but cannot be
    loaded."""
    module, why = native(), describe()
    return [
        OpChoice(op, f"native {module.isa()}" if module is not None else f"torch: {twin}", why)
        for op, twin in sorted(OPS.items())
    ]
