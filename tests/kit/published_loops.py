"""The published generation loops, written again from their descriptions: LLaDA, Fast-dLLM's caches, Dream, SDAR,
Fast-dLLM v2. One sequence, dense tensors, float64 decisions. They share nothing with the decoders but the model.

What differs from the published code, on purpose, in every loop: the mask token is never a candidate; a step commits at
least one token; a block that its first, full forward already finished gets no second forward; the row before a block is
part of what a shifted model recomputes (the published cached Dream loop predicts a block's first token from the wrong
row); the quota of a block that the prompt has begun is over its masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.kit.driver import attention

Pick = Callable[
    [int, int, dict[int, float]], list[int]
]  # (step in block, masks at block start, confidences) -> columns


@dataclass
class Cache:
    """K,V by layer of positions [0, n)."""

    k: dict[int, Tensor] = field(default_factory=dict)
    v: dict[int, Tensor] = field(default_factory=dict)

    def cut(self, n: int) -> Cache:
        return Cache({i: x[:n] for i, x in self.k.items()}, {i: x[:n] for i, x in self.v.items()})


def forward(
    model: Any, x: Sequence[int], start: int, stop: int, cache: Cache | None, *, replace: bool = False, block: int = 0
) -> tuple[Tensor, Cache]:
    """Logits float64 [stop - start, vocab] of positions [start, stop) of x, and all keys this forward saw.

    cache None: nothing but these rows. replace: the fresh rows take their place among the cached ones; else they come
    after them. block > 0: block-causal."""
    seen = Cache()

    def attend(layer: int, _: object, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if cache is not None and replace:
            old_k, old_v = cache.k[layer].clone(), cache.v[layer].clone()
            old_k[start:stop], old_v[start:stop] = k, v
            k, v = old_k, old_v
        elif cache is not None and cache.k:
            k, v = torch.cat([cache.k[layer], k]), torch.cat([cache.v[layer], v])
        seen.k[layer], seen.v[layer] = k, v
        mask = torch.ones(len(q), len(k), dtype=torch.bool)
        if block:
            rows, keys = torch.arange(start, stop)[:, None], torch.arange(len(k))[None]
            mask = keys // block <= rows // block
        return attention(q, k, v, mask)

    with torch.no_grad():
        hidden = model(torch.tensor(list(x[start:stop])), torch.arange(start, stop), attend)
        return model.head(hidden).float().double(), seen


def decide(logits: Tensor, mask_id: int) -> tuple[list[int], list[float], list[list[float]]]:
    """Best token and its probability per row, the mask excluded; and the whole distributions."""
    logits = logits.clone()
    logits[:, mask_id] = -math.inf
    p = torch.softmax(logits, dim=-1)
    return p.argmax(dim=-1).tolist(), p.amax(dim=-1).tolist(), p.tolist()


def quota(steps: int) -> Pick:
    """The fixed schedule of LLaDA: m // s + (i < m % s), by confidence."""

    def pick(step: int, size: int, confidence: dict[int, float]) -> list[int]:
        count = max(1, size // steps + (step < size % steps))
        return sorted(confidence, key=lambda j: (-confidence[j], j))[:count]

    return pick


def above(threshold: float) -> Pick:
    """Fast-dLLM: everything at least this confident, always the best."""

    def pick(step: int, size: int, confidence: dict[int, float]) -> list[int]:
        ranked = sorted(confidence, key=lambda j: (-confidence[j], j))
        return [j for n, j in enumerate(ranked) if n == 0 or confidence[j] >= threshold]

    return pick


def dynamic(steps: int, threshold: float) -> Pick:
    """SDAR's low_confidence_dynamic: all above the threshold when those are enough for the quota, else the quota."""

    def pick(step: int, size: int, confidence: dict[int, float]) -> list[int]:
        ranked = sorted(confidence, key=lambda j: (-confidence[j], j))
        count = size // steps + (step < size % steps)
        high = [j for j in ranked if confidence[j] > threshold]
        return high if len(high) >= count else ranked[:count]

    return pick


def canvas(
    model: Any, prompt: Sequence[int], length: int, block: int, cache: str, pick: Pick, suffix: Sequence[int] = ()
) -> tuple[list[int], int]:
    """LLaDA `generate` and Fast-dLLM's prefix and dual caches, with a shift for Dream. Returns (canvas, forwards)."""
    mask, shift = model.info.mask_id, model.info.shift
    x = [*prompt, *[mask] * length, *suffix]
    forwards = 0
    for start in range(len(prompt), len(prompt) + length, block):
        stop = min(start + block, len(prompt) + length)
        held: Cache | None = None
        for step in range(10_000):
            masks = [p for p in range(start, stop) if x[p] == mask]
            if not masks:
                break
            if cache == "none" or step == 0:
                low, high = 0, len(x)
                logits, seen = forward(model, x, 0, len(x), None)
                if cache != "none":
                    held = seen.cut(start - shift) if cache == "prefix" else seen
            elif cache == "prefix":
                low, high = start - shift, len(x)
                logits, _ = forward(model, x, low, high, held)
            else:
                low, high = start - shift, stop
                logits, held = forward(model, x, low, high, held, replace=True)
            forwards += 1
            tokens, confidence, _ = decide(logits, mask)
            for p in pick(step, stop - start, {p: confidence[p - shift - low] for p in masks}):
                x[p] = tokens[p - shift - low]
    return x[len(prompt) : len(prompt) + length], forwards


def dream(model: Any, prompt: Sequence[int], length: int, steps: int, ordering: str, eps: float = 1e-3) -> list[int]:
    """Dream `diffusion_generate`: the whole canvas at once, its own time grid, logits shifted by one."""
    mask = model.info.mask_id
    x = [*prompt, *[mask] * length]
    grid = torch.linspace(1, eps, steps + 1, dtype=torch.float64).tolist()
    for i in range(steps):
        masks = [p for p, t in enumerate(x) if t == mask]
        if not masks:
            break
        logits, _ = forward(model, x, 0, len(x), None)
        tokens, confidence, p = decide(torch.cat([logits[:1], logits[:-1]]), mask)

        def score(j: int, confidence: list[float] = confidence, p: list[list[float]] = p) -> float:
            if ordering == "maskgit_plus":
                return confidence[j]
            if ordering == "topk_margin":
                first, second = sorted(p[j], reverse=True)[:2]
                return first - second
            return sum(v * math.log(v) for v in p[j] if v > 0)

        count = len(masks) if i == steps - 1 else int(len(masks) * (1 - grid[i + 1] / grid[i]) + 1e-9)
        for j in sorted(masks, key=lambda j: (-score(j), j))[: max(1, count)]:
            x[j] = tokens[j]
    return x[len(prompt) :]


def blocks(model: Any, prompt: Sequence[int], length: int, block: int, pick: Pick) -> tuple[list[int], int]:
    """SDAR `block_diffusion_generate`: blocks at absolute multiples, block-causal, K,V of finished blocks stored by one
    more forward each. Returns (everything after the prompt, forwards of denoising alone)."""
    mask = model.info.mask_id
    total = -(-(len(prompt) + length) // block) * block
    x = [*prompt, *[mask] * (total - len(prompt))]
    held, forwards = Cache(), 0
    begin = len(prompt) // block * block
    if begin:
        _, held = forward(model, x, 0, begin, None, block=block)
    for start in range(begin, total, block):
        size = sum(t == mask for t in x[start : start + block])
        for step in range(block + 1):
            masks = [p for p in range(start, start + block) if x[p] == mask]
            if not masks:
                break
            logits, _ = forward(model, x, start, start + block, held, block=block)
            forwards += 1
            tokens, confidence, _ = decide(logits, mask)
            for p in pick(step, size, {p: confidence[p - start] for p in masks}):
                x[p] = tokens[p - start]
        _, held = forward(model, x, start, start + block, held, block=block)
    return x[len(prompt) :], forwards


def shifted_blocks(
    model: Any, prompt: Sequence[int], length: int, block: int, small: int, threshold: float
) -> list[int]:
    """Fast-dLLM v2 `generate`: the first token of a block comes from the forward that stores the one before it; within
    a block row i-1 predicts position i; sub-blocks of `small` are filled left to right, all above the threshold."""
    mask = model.info.mask_id
    total = -(-(len(prompt) + length) // block) * block
    x = [*prompt, *[mask] * (total - len(prompt))]
    held, begin = Cache(), len(prompt) // block * block
    if begin:
        logits, held = forward(model, x, 0, begin, None, block=block)
        if begin == len(prompt):
            x[begin] = decide(logits[-1:], mask)[0][0]
    for start in range(begin, total, block):
        for low in range(start, start + block, small):
            while any(t == mask for t in x[low : low + small]):
                logits, _ = forward(model, x, start, start + block, held, block=block)
                tokens, confidence, _ = decide(torch.cat([logits[:1], logits[:-1]]), mask)
                masks = {p: confidence[p - start] for p in range(low, low + small) if x[p] == mask}
                for p in above(threshold)(0, small, masks):
                    x[p] = tokens[p - start]
        logits, held = forward(model, x, start, start + block, held, block=block)
        if start + block < total:
            x[start + block] = decide(logits[-1:], mask)[0][0]
    return x[len(prompt) :]
