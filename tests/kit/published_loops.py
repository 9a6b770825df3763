"""The published generation loops, written again from their descriptions: LLaDA, Fast-dLLM's caches, Dream, SDAR,
Fast-dLLM v2, dKV-Cache. One sequence, dense tensors, float64 decisions. They share nothing with the decoders but the
model.

What differs from the published code, on purpose, in every loop: the mask token is never a candidate; a block that its
first, full forward already finished gets no second forward. What is ours alone has a name of its own: `canvas` with
first "by_rule" (a shifted model's full forward commits what the rule says, and every step runs the row before the block
too), and SDAR's entropy bound, which in the published code takes the entropy of one number and then fails.
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


def forward_at(model: Any, x: Sequence[int], rows: Sequence[int], cache: Cache | None) -> tuple[Tensor, Cache]:
    """Logits float64 [len(rows), vocab] of these positions of x, ascending, and K,V of all positions: theirs fresh, the
    others those of `cache`, which all rows see. cache None: rows are all positions."""
    seen = Cache()

    def attend(layer: int, _: object, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if cache is not None:
            old_k, old_v = cache.k[layer].clone(), cache.v[layer].clone()
            old_k[list(rows)], old_v[list(rows)] = k, v
            k, v = old_k, old_v
        seen.k[layer], seen.v[layer] = k, v
        return attention(q, k, v, torch.ones(len(q), len(k), dtype=torch.bool))

    with torch.no_grad():
        hidden = model(torch.tensor([x[p] for p in rows]), torch.tensor(list(rows)), attend)
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


def sequential(steps: int) -> Pick:
    """SDAR's sequential: the first masks from left to right, as many as the quota says."""

    def pick(step: int, size: int, confidence: dict[int, float]) -> list[int]:
        return sorted(confidence)[: size // steps + (step < size % steps)]

    return pick


def entropy_sum(bound: float) -> Callable[[list[int], list[list[float]]], list[int]]:
    """SDAR's entropy_bounded as it is meant: by entropy, as many as have a sum below the bound, one at least. Of
    (positions, their distributions)."""

    def pick(positions: list[int], p: list[list[float]]) -> list[int]:
        entropy = {j: -sum(v * math.log(v) for v in row if v > 0) for j, row in zip(positions, p, strict=True)}
        ranked = sorted(positions, key=lambda j: (entropy[j], j))
        below = [n for n in range(len(ranked)) if sum(entropy[j] for j in ranked[: n + 1]) < bound]
        return ranked[: max(1, len(below))]

    return pick


def guided(
    model: Any, prompt: Sequence[int], length: int, block: int, pick: Pick, scale: float, *, eos: int = -1,
    doubted: Sequence[int] = (),
) -> tuple[list[int], int]:  # fmt: skip
    """LLaDA `generate` with cfg_scale, logits_eos_inf (eos: the id) and confidence_eos_eot_inf (doubted: the ids).
    Returns (canvas, forwards of either kind)."""
    mask, forwards = model.info.mask_id, 0
    x = [*prompt, *[mask] * length]
    for start in range(len(prompt), len(prompt) + length, block):
        for step in range(10_000):
            masks = [p for p in range(start, start + block) if x[p] == mask]
            if not masks:
                break
            logits, _ = forward(model, x, 0, len(x), None)
            forwards += 1
            if scale > 0:
                unguided, _ = forward(model, [*[mask] * len(prompt), *x[len(prompt) :]], 0, len(x), None)
                forwards += 1
                logits = unguided + (scale + 1) * (logits - unguided)
            logits[:, mask] = -math.inf
            if eos >= 0:
                logits[:, eos] = -math.inf
            tokens = logits.argmax(dim=-1)
            logits[:, list(doubted)] = -math.inf
            p = torch.softmax(logits, dim=-1).gather(1, tokens[:, None])[:, 0].tolist()
            for j in pick(step, block, {j: p[j - model.info.shift] for j in masks}):
                x[j] = int(tokens[j - model.info.shift])
    return x[len(prompt) :], forwards


def dream_cached(
    model: Any, prompt: Sequence[int], length: int, block: int, cache: str, *, threshold: float = 0.0, steps: int = 0,
    eps: float = 1e-3,
) -> tuple[list[int], int]:  # fmt: skip
    """Fast-dLLM's cached loop for Dream: the full forward of a block commits its first token alone, from the row before
    the block, whatever its confidence; the steps after it run the block's rows (prefix: all rows from there on) and
    never that row. threshold > 0: all above it, always the best; else Dream's own schedule, by entropy, its points from
    the second on, with so many steps a block (two at least: with one the published loop leaves masks). Returns (canvas,
    forwards)."""
    mask, forwards = model.info.mask_id, 0
    x = [*prompt, *[mask] * length]
    grid = torch.linspace(1, eps, max(steps, 1) + 1)
    for start in range(len(prompt), len(prompt) + length, block):
        stop = start + block
        logits, seen = forward(model, x, 0, len(x), None)
        forwards += 1
        x[start] = decide(logits[start - 1 : start], mask)[0][0]
        held = seen.cut(start) if cache == "prefix" else seen
        for step in range(1, 10_000):
            masks = [p for p in range(start, stop) if x[p] == mask]
            if not masks:
                break
            if cache == "prefix":
                logits, _ = forward(model, x, start, len(x), held)
            else:
                logits, held = forward(model, x, start, stop, held, replace=True)
            forwards += 1
            tokens, confidence, p = decide(torch.cat([logits[:1], logits[:-1]]), mask)
            if threshold:
                picked = above(threshold)(step, block, {j: confidence[j - start] for j in masks})
            else:
                score = {j: sum(v * math.log(v + 1e-10) for v in p[j - start]) for j in masks}
                left = torch.tensor(len(masks)) / 1
                count = int(left * (1 - grid[step + 1] / grid[step])) if step < steps - 1 else len(masks)
                picked = sorted(masks, key=lambda j: (-score[j], j))[:count]
            for j in picked:
                x[j] = tokens[j - start]
    return x[len(prompt) :], forwards


def delayed(
    model: Any, prompt: Sequence[int], length: int, block: int, refresh: int, pick: Pick
) -> tuple[list[int], int]:
    """dKV-Cache-Decode: K,V of a token are cached one step after it was decoded. A step runs what was not decoded
    before the last step; a full forward refreshes everything every so many steps of a block, and at its first (for
    LLaDA, shift 0, the second too). Dream: a row is cached when its own token and the one it predicts are decoded
    ("un_right"). Returns (canvas, rows of all forwards)."""
    mask, shift, ran = model.info.mask_id, model.info.shift, 0
    x = [*prompt, *[mask] * length]

    def decoded() -> set[int]:
        there = [p for p, t in enumerate(x) if t != mask]
        return {p for p in there if not shift or p + 1 == len(x) or x[p + 1] != mask}

    for start in range(len(prompt), len(prompt) + length, block):
        before, now, held = set[int](), decoded(), Cache()
        for step in range(10_000):
            masks = [p for p in range(start, start + block) if x[p] == mask]
            if not masks:
                break
            full = step % refresh == 0 or (step == 1 and not shift)
            rows = [p for p in range(len(x)) if full or p not in before]
            ran += len(rows)
            logits, held = forward_at(model, x, rows, None if full else held)
            at = {p: i for i, p in enumerate(rows)}
            tokens, confidence, _ = decide(logits, mask)
            chosen = pick(step, block, {p: confidence[at[p - shift]] for p in masks})
            for p in chosen:
                x[p] = tokens[at[p - shift]]
            before, now = now, decoded()
    return x[len(prompt) :], ran


def canvas(
    model: Any, prompt: Sequence[int], length: int, block: int, cache: str, pick: Pick, suffix: Sequence[int] = ()
) -> tuple[list[int], int]:
    """LLaDA `generate` and Fast-dLLM's prefix and dual caches; of a shifted model ours, first "by_rule": `dream_cached`
    is the published one. Returns (canvas, forwards)."""
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
    grid = torch.linspace(1, eps, steps + 1)  # float32, as published
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

        left = torch.tensor(len(masks)) / 1
        count = int(left * (1 - grid[i + 1] / grid[i])) if i < steps - 1 else int(left)  # may be 0
        for j in sorted(masks, key=lambda j: (-score(j), j))[:count]:
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
        for step in range(block + 1):
            masks = [p for p in range(start, start + block) if x[p] == mask]
            if not masks:
                break
            logits, _ = forward(model, x, start, start + block, held, block=block)
            forwards += 1
            tokens, confidence, _ = decide(logits, mask)
            for p in pick(step, block, {p: confidence[p - start] for p in masks}):  # a whole block's quota, always
                x[p] = tokens[p - start]
        _, held = forward(model, x, start, start + block, held, block=block)
    return x[len(prompt) :], forwards


def shifted_blocks(
    model: Any, prompt: Sequence[int], length: int, block: int, small: int, threshold: float, *, cached: bool = False
) -> list[int]:
    """Fast-dLLM v2 `generate`: the first token of a block comes from the forward that stores the one before it; within
    a block row i-1 predicts position i; sub-blocks of `small` are filled left to right, all above the threshold.

    cached: use_block_cache. The whole block runs, and its K,V stay, at its first step and while the first token of the
    sub-block is masked; else the sub-block's rows alone run, and their K,V take their place."""
    mask = model.info.mask_id
    total = -(-(len(prompt) + length) // block) * block
    x = [*prompt, *[mask] * (total - len(prompt))]
    held, begin = Cache(), len(prompt) // block * block
    if begin:
        logits, held = forward(model, x, 0, begin, None, block=block)
        if begin == len(prompt):
            x[begin] = decide(logits[-1:], mask)[0][0]
    for start in range(begin, total, block):
        inner: Cache | None = None  # K,V of everything up to the block's end
        for low in range(start, start + block, small):
            while any(t == mask for t in x[low : low + small]):
                if not cached or inner is None or x[low] == mask:
                    logits, inner = forward(model, x, start, start + block, held, block=block)
                    logits = logits[max(0, low - start - 1) : low - start + small]
                    logits = torch.cat([logits[:1], logits[:-1]]) if low == start else logits[:-1]
                else:
                    logits, inner = forward(model, x, low, low + small, inner, replace=True)
                    logits = torch.cat([logits[:1], logits[:-1]])
                tokens, confidence, _ = decide(logits, mask)
                masks = {p: confidence[p - low] for p in range(low, low + small) if x[p] == mask}
                for p in above(threshold)(0, small, masks):
                    x[p] = tokens[p - low]
        logits, held = forward(model, x, start, start + block, held, block=block)
        if start + block < total:
            x[start + block] = decide(logits[-1:], mask)[0][0]
    return x[len(prompt) :]
