"""Attention alone: one layer's call of the shapes that serving is made of, beside torch's on K,V it need not gather,
and of long contexts, beside what the processor can do at best."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dfastllm.bench.cpu.ceilings import Ceilings
from dfastllm.kernels import native
from dfastllm.kernels.attention import attention
from dfastllm.kernels.attention_plain import read_keys
from dfastllm.kernels.kv import KV_TYPES, KvCache
from dfastllm.kernels.step import BLOCK, Step
from dfastllm.metrics.records import spread

__all__ = ["CASES", "LONG", "LONG_TYPES", "Case", "calls", "measure_attention", "measure_long"]

STREAMED = 96e6  # bytes of different K,V a measurement goes through: three times the machine's last cache


@dataclass(frozen=True)
class Case:
    """`spans` sequences of `rows` rows each over `keys` cached keys (the rows' own among them)."""

    op: str
    spans: int
    rows: int
    keys: int
    causal: bool
    heads: int = 14
    kv_heads: int = 2
    dim: int = 64

    @property
    def pairs(self) -> int:
        """Visible (row, key) pairs."""
        hidden = self.rows * (self.rows - 1) // 2 if self.causal else 0
        return self.spans * (self.rows * self.keys - hidden)

    @property
    def flops(self) -> float:
        """Of the two products with the visible keys."""
        return 4.0 * self.pairs * self.heads * self.dim

    @property
    def shape(self) -> str:
        return f"{self.spans} x {self.rows} rows, {self.keys} keys, {self.heads}/{self.kv_heads} heads of {self.dim}"

    def step(self) -> Step:
        blocks = -(-self.keys // BLOCK)
        rows = self.spans * self.rows
        limit = np.full(self.rows, self.keys) - (np.arange(self.rows)[::-1] if self.causal else 0)
        first = np.arange(self.spans)
        spans = [
            first * self.rows,
            (first + 1) * self.rows,
            0 * first + self.keys,
            0 * first,
            first * blocks,
            0 * first,
            0 * first,
            0 * first - 1,
        ]
        return Step.of(
            {
                "ids": np.zeros(rows),
                "spans": np.stack(spans, axis=1),
                "blocks": np.arange(self.spans * blocks),
                "cached_limit": np.tile(limit, self.spans),
            }
        )


CASES = (
    Case("decode", spans=1, rows=1, keys=256, causal=True),
    Case("decode", spans=16, rows=1, keys=256, causal=True),
    Case("decode", spans=1, rows=1, keys=8192, causal=True),
    Case("diffusion block", spans=1, rows=32, keys=288, causal=False),
    Case("diffusion block", spans=8, rows=32, keys=288, causal=False),
    Case("prefill", spans=1, rows=512, keys=512, causal=True),
    Case("prefill", spans=1, rows=512, keys=2048, causal=True),
)

HEADS = ((14, 2, 64), (32, 8, 128), (16, 16, 64))  # the 0.5B shape's, an 8B model's, one without groups


def _long() -> Iterator[Case]:
    for (heads, kv_heads, dim), keys in itertools.product(HEADS, (4096, 16384)):
        shape = {"keys": keys, "heads": heads, "kv_heads": kv_heads, "dim": dim}
        yield Case("decode", spans=1, rows=1, causal=True, **shape)
        if keys == 4096:
            yield Case("decode", spans=16, rows=1, causal=True, **shape)
        yield Case("block", spans=1, rows=32, causal=True, **shape)
        yield Case("block", spans=1, rows=32, causal=False, **shape)


LONG = tuple(_long())  # a row alone has no key to hide: causal and full are one
LONG_TYPES = ("bf16", "int8")


def measure_attention(
    seconds: float = 0.25, cases: Sequence[Case] = CASES, types: Sequence[str] = tuple(KV_TYPES)
) -> list[dict[str, Any]]:
    """Every case with every K,V type: ours and torch's in turn for `seconds` each (at least 5 rounds), on whatever
    threads are set. `seconds` of a row is of one layer; gflops and gbps (K,V read once per span) are at the median."""
    return [_measure(case, type, seconds) for case, type in itertools.product(cases, types)]


def _measure(case: Case, type: str, seconds: float) -> dict[str, Any]:
    ours, theirs, size = calls(case, type)
    times: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        ours(0), theirs(0)
        end = time.perf_counter() + seconds
        for i in itertools.count(1):
            if time.perf_counter() > end and i > 5:
                break
            for call, into in zip((ours, theirs), times, strict=True):
                began = time.perf_counter()
                call(i)
                into.append(time.perf_counter() - began)
    mine, other = spread(times[0]), spread(times[1])
    return {
        "op": case.op,
        "kv": type,
        "shape": case.shape,
        "seconds": mine,
        "gflops": case.flops / mine.median / 1e9,
        "gbps": size / mine.median / 1e9,
        "torch_seconds": other,
        "times_torch": other.median / mine.median,
    }


def measure_long(
    ceilings: Ceilings, seconds: float = 0.25, cases: Sequence[Case] = LONG, types: Sequence[str] = LONG_TYPES
) -> list[dict[str, Any]]:
    """Long contexts, ours alone, for `seconds` each (at least 5 calls). Shares of the ceilings are at the median:
    of_stream of the memory's speed, K,V being read once per span, of_bf16 of the processor's bfloat16 products."""
    return [_measure_long(case, type, ceilings, seconds) for case, type in itertools.product(cases, types)]


def _measure_long(case: Case, type: str, ceilings: Ceilings, seconds: float) -> dict[str, Any]:
    call, size = ours_of(case, type)
    call(0)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        began = time.perf_counter()
        call(len(times) + 1)
        times.append(time.perf_counter() - began)
    median = spread(times).median
    gflops, gbps = case.flops / median / 1e9, size / median / 1e9
    return {
        "op": case.op,
        "kv": type,
        "shape": case.shape,
        "sees": "causal" if case.causal else "full",
        "us": spread([t * 1e6 for t in times]),
        "gflops": gflops,
        "gbps": gbps,
        "of_stream": gbps / ceilings.stream,
        "of_bf16": gflops / ceilings.bf16,
    }


def calls(case: Case, type: str) -> tuple[Callable[[int], object], Callable[[int], object], int]:
    """What is measured: ours, torch's (scaled_dot_product_attention per span, float32, K and V side by side) and
    the bytes of one layer's K,V. The argument of the calls picks one of several layers."""
    step, cache, q = _filled(case, type)
    ours, size = _ours(case, step, cache, q), cache.nbytes // cache.layers
    gathered = [list(_gathered(case, cache, i)) for i in range(cache.layers)]
    limits = torch.from_numpy(step.cached_limit[: case.rows])
    mask = torch.arange(case.keys) < limits[:, None] if case.causal and case.rows > 1 else None
    by_span = q.view(case.spans, case.rows, case.heads, case.dim)

    def theirs(i: int) -> object:
        return [_by_span(x, k, v, mask) for x, (k, v) in zip(by_span, gathered[i % len(gathered)], strict=True)]

    return ours, theirs, size


def ours_of(case: Case, type: str) -> tuple[Callable[[int], object], int]:
    """Ours alone, and the bytes of one layer's K,V."""
    step, cache, q = _filled(case, type)
    return _ours(case, step, cache, q), cache.nbytes // cache.layers


def _filled(case: Case, type: str) -> tuple[Step, KvCache, Tensor]:
    """The step, random K,V of as many layers as leave the processor's caches, and q [rows, heads * dim]."""
    step, draw = case.step(), torch.Generator().manual_seed(0)
    blocks = len(step.blocks)
    size = KvCache(1, blocks, case.kv_heads, case.dim, type).nbytes
    layers = min(24, max(1, round(STREAMED / size)))
    cache = KvCache(layers, blocks, case.kv_heads, case.dim, type)
    for layer, tensor in itertools.product(range(layers), (cache.k, cache.v)):
        values = torch.randn(tensor[layer].shape, generator=draw)
        tensor[layer] = (values * 40).clamp(-127, 127) if type == "int8" else values
    for scales in (cache.k_scales, cache.v_scales):
        if scales is not None:
            scales.fill_(1 / 40)
    return step, cache, torch.randn(len(step.ids), case.heads * case.dim, generator=draw)


def _ours(case: Case, step: Step, cache: KvCache, q: Tensor) -> Callable[[int], object]:
    each = [cache.layer(i) for i in range(cache.layers)]
    module, out = native(), torch.empty(len(step), case.heads * case.dim)
    handles = [layer.native() for layer in each] if module is not None else []

    def ours(i: int) -> object:
        if module is None:
            return attention(q, step, each[i % len(each)], heads=case.heads)
        module.attention(q, case.heads, case.dim**-0.5, handles[i % len(each)], None, step.native(), out)
        return out

    return ours


def _by_span(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(dim)) v of one span. q [rows, heads, dim]; k, v [keys, kv_heads, dim]; mask [rows, keys].
    The query heads that share a K,V head are folded into the rows, so K and V are never expanded."""
    rows, heads, dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    folded = q.view(rows, kv_heads, group, dim).permute(1, 2, 0, 3).reshape(1, kv_heads, group * rows, dim)
    seen = mask.repeat(group, 1) if mask is not None and group > 1 else mask
    k, v = k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0)
    out = functional.scaled_dot_product_attention(folded, k, v, attn_mask=seen)
    return out.view(kv_heads, group, rows, dim).permute(2, 0, 1, 3).reshape(rows, heads, dim)


def _gathered(case: Case, cache: KvCache, layer: int) -> Iterator[tuple[Tensor, Tensor]]:
    blocks = -(-case.keys // BLOCK)
    for span in range(case.spans):
        k, v = read_keys(cache.layer(layer), torch.arange(span * blocks, (span + 1) * blocks), case.keys)
        # [keys, kv_heads, dim] of which each head lies in one piece
        yield k.transpose(0, 1).contiguous().transpose(0, 1), v.transpose(0, 1).contiguous().transpose(0, 1)
