"""What a card reaches by itself: copies, products, and a plain forward under one CUDA graph. Rulers, no part of the
product: no pages, no packing, a static cache, nothing fused.

usage: python benchmarks/gpu/ceilings.py [SHAPE SEQUENCES ROWS CONTEXT]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from shapes import SHAPES
from torch import Tensor

__all__ = ["copy_rate", "graph_of", "median_ms", "plain_forward", "product_rate"]


def graph_of(work: Callable[[], object]) -> Callable[[], None]:
    """Capture what `work` launches; returns what replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay  # type: ignore[no-any-return]


def median_ms(work: Callable[[], object], repeats: int = 30, warm: int = 5) -> float:
    """Milliseconds on the device, the median of some runs."""
    for _ in range(warm):
        work()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in marks:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return float(sorted(begin.elapsed_time(end) for begin, end in marks)[repeats // 2])


def copy_rate() -> float:
    """Bytes read and written a second by a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * (1 << 30) / median_ms(lambda: target.copy_(source)) * 1e3


def product_rate(dtype: torch.dtype = torch.bfloat16) -> float:
    """Operations a second of a product of 8192 x 8192 matrices."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * 8192**3 / median_ms(lambda: a @ b) * 1e3


def plain_forward(name: str, sequences: int, rows: int, context: int) -> float:
    """Milliseconds of a bfloat16 forward of so many rows of each sequence, as a simple loop under a graph has them."""
    shape = SHAPES[name]
    h, heads, kv, dim = shape.hidden, shape.heads, shape.kv_heads, shape.dim

    def weight(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16) * 0.02

    layers = [
        (
            weight((heads + 2 * kv) * dim, h),
            weight(h, heads * dim),
            weight(2 * shape.inner, h),
            weight(h, shape.inner),
            weight(h),
            weight(sequences, kv, context, dim),
            weight(sequences, kv, context, dim),
        )
        for _ in range(shape.layers)
    ]
    head, embed, count = weight(shape.vocab, h), weight(shape.vocab, h), sequences * rows
    ids = torch.randint(0, shape.vocab, (count,), device="cuda")
    cos, sin = weight(count, 1, dim // 2), weight(count, 1, dim // 2)
    places = torch.arange(context - rows, context, device="cuda")

    def rotated(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def by_sequence(x: Tensor) -> Tensor:
        return x.view(sequences, rows, -1, dim).transpose(1, 2)

    def forward() -> tuple[Tensor, Tensor]:
        x = F.embedding(ids, embed)
        for qkv_w, out_w, up_w, down_w, norm, keys, values in layers:
            qkv = F.linear(F.rms_norm(x, (h,), norm), qkv_w).view(count, heads + 2 * kv, dim)
            q, k, v = qkv.split((heads, kv, kv), 1)
            keys.index_copy_(2, places, by_sequence(rotated(k)))
            values.index_copy_(2, places, by_sequence(v.contiguous()))
            mixed = F.scaled_dot_product_attention(by_sequence(rotated(q)), keys, values, enable_gqa=heads != kv)
            x = x + F.linear(mixed.transpose(1, 2).reshape(count, heads * dim), out_w)
            gate, up = F.linear(F.rms_norm(x, (h,), norm), up_w).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, down_w)
        logits = F.linear(F.rms_norm(x, (h,), layers[0][4]), head)
        return logits.argmax(-1), torch.logsumexp(logits.float(), -1)

    with torch.inference_mode():
        return median_ms(graph_of(forward), 20)


def main() -> None:
    print(json.dumps({"copy_GBps": round(copy_rate() / 1e9), "product_TFLOPps": round(product_rate() / 1e12)}))
    name, *sizes = sys.argv[1:] or ["qwen2-7b", "1", "1", "320"]
    ms = plain_forward(name, *map(int, sizes))
    print(json.dumps({"shape": name, "sizes": sizes, "graph_ms": round(ms, 3)}))


if __name__ == "__main__":
    main()
