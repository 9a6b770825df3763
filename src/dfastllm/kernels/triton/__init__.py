"""Kernels for GPUs, in Triton: one file a family. Importing this room imports no Triton; importing a family does, and
`require` says in a named error why there is none.

Everything that differs from step to step reaches a kernel as a device tensor, so that a captured graph replays any mix
of spans: R below is the rows of a bucket, of which the last may be padding (slot -1, limits 0, in no item of the
attention). Python numbers in the signatures are facts of a model or of a bucket. Grids follow from tensor shapes; what
a step does not use is left at once. `out` is written where given, otherwise allocated (graphs keep their memory).

    attention.Items            the work of an attention, laid out on the host by `attention.items(step, ...)`: int32
                               arrays work [W, 6], parts [R, 2], count [1], to be uploaded with the step
    attention.attend(q, kv, tables, items, scale, window, softcap, out, ...)
                               q [R, heads, dim] -> out [R, heads * dim]; see there for the paging
    rows.add_norm(x, y, weight, eps, factor, post, kind, out)
                               x += factor * y (normed before by `post`), out = norm(x) * weight, floats or int8 codes
    rows.angles(positions, frequencies, factor)
                               cos, sin float32 [R, rotary / 2], once a step and table
    rows.rope_store(qkv, cos, sin, slot, own_slot, kv, own_base, norms ..., q_out)
                               head norms, rotation, K,V written; q to q_out
    rows.gate(both, activation, width, kind, out)
                               activation(gate) * up, floats or int8 codes
    linear.upload(weight, device) -> linear.DeviceWeight
                               of a QTensor, a Packed or a float matrix, in the layout the products read
    linear.product(x, weight, bias, out, ...)
                               x a float tensor [R, k] or `RowCodes` -> [R, n]
    head.stats(x, weight, want, ...) -> head.DeviceStats
                               statistics of logits that are never written
    experts.plan(chosen, experts), experts.product(x, weights, plan, ...)
                               rows sorted by expert, one launch for all experts
    low_rank.shrink, low_rank.expand
                               adapters, each row its own

K,V of a layer: k, v [slots, kv_heads, dim] of float32, float16, bfloat16, float8_e4m3fn or int8; int8 has k_scales and
v_scales float32 [slots, kv_heads]. Slot s is position s % block_size of block s // block_size. The keys of one pass
only lie in the same tensor: own slot s is slot own_base + s. A runner that lays all layers end to end in one tensor
puts one scratch behind them: own_base is then (layers - layer) * slots, as seen from the layer's first slot.
"""

from __future__ import annotations

import importlib.util
import os

from dfastllm.errors import UnsupportedError

__all__ = ["interpreted", "require"]


def require() -> None:
    """Raises UnsupportedError where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        raise UnsupportedError(
            "the GPU kernels need Triton, which is not installed here.",
            param="backend",
            hint="Install torch's CUDA build, which brings it, or serve with --backend torch.",
        )


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: for tests, slow."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
