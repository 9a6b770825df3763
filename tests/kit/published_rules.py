"""The published loops whose rule looks beyond one step's logits, written again from their descriptions and code: KLASS
(arXiv 2511.05664), WINO (arXiv 2507.18578), dInfer's hierarchical remasking, and the sampled loops of SDAR, LLaDA2 and
Dream, whose confidence is that of the tempered and cut distribution. One sequence, dense tensors, float64 decisions;
nothing shared with the decoders but the model, and the noise of the sampled ones.

What differs from the published code, on purpose: the mask token is never a candidate; KLASS leaves masks where its
steps run out, here the last step of a block takes all that is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.kit.driver import attention
from tests.kit.published_loops import Cache, forward

Draw = Callable[[Tensor, Sequence[int], int], list[int]]  # (logits, positions, decode step) -> tokens


def soft(logits: Tensor, mask: int) -> Tensor:
    logits = logits.clone()
    logits[:, mask] = -math.inf
    return torch.softmax(logits, dim=-1)


def ranked(score: dict[int, float]) -> list[int]:
    return sorted(score, key=lambda j: (-score[j], j))


def shares(size: int, steps: int) -> list[int]:
    """get_num_transfer_tokens."""
    return [size // steps + (i < size % steps) for i in range(steps)]


def klass(
    model: Any, prompt: Sequence[int], length: int, block: int, steps: int, conf: float, bound: float, history: int
) -> tuple[list[int], int]:
    """`stable_confident_decode` with alg "klass": p_prev and kl_history over the whole canvas, never reset. steps: of a
    block."""
    mask = model.info.mask_id
    x = [*prompt, *[mask] * length]
    before = torch.zeros(len(x), model.info.vocab_size, dtype=torch.float64)
    kl = torch.zeros(len(x), history, dtype=torch.float64)
    used = 0
    for start in range(len(prompt), len(x), block):
        due = shares(block, steps)
        for step in range(steps):
            masks = [p for p in range(start, start + block) if x[p] == mask]
            if not masks:
                break
            logits, _ = forward(model, x, 0, len(x), None)
            now = soft(logits, mask)
            kl = torch.roll(kl, -1, dims=-1)
            kl[:, -1] = (now * (torch.log(now + 1e-12) - torch.log(before + 1e-12))).sum(dim=-1)
            before = now
            top = now.amax(dim=-1)
            calm = (kl < bound).all(dim=-1) & (step >= history - 1)
            ready = [p for p in masks if bool(calm[p]) and float(top[p]) > conf]
            chosen = ready or ranked({p: float(top[p]) for p in masks})[: due[step]]
            for p in masks if step == steps - 1 else chosen:
                x[p] = int(now[p].argmax())
            used += 1
    return x[len(prompt) :], used


def wino(
    model: Any, prompt: Sequence[int], length: int, block: int, threshold: float, back: float
) -> tuple[list[int], int]:
    """`decoding_wino`: `block` shadow masks at the end of the sequence share the positions of the active block. Nobody
    else sees them; they see each other and everything but the token of their own position."""
    mask = model.info.mask_id
    x = [*prompt, *[mask] * length]
    used = 0
    for start in range(len(prompt), len(x), block):
        last = 30
        while mask in x[start : start + block]:
            p = soft(with_shadows(model, x, start, block), mask)
            masks = [j for j in range(start, start + block) if x[j] == mask]
            held = [j for j in range(start, start + block) if x[j] != mask]
            top = ranked({j: float(p[j].max()) for j in masks})
            most = min(max(int(len(masks) * 0.7), 5), 20)
            accepted = [j for j in top if float(p[j].max()) > threshold][:most] or top[:1]
            doubt = {j: float(p[len(x) + j - start, x[j]]) for j in held}
            again = [j for j in held if doubt[j] < back] if len(accepted) > 1 else []
            if len(again) >= last:
                again = sorted(doubt, key=lambda j: (doubt[j], j))[: last - 1]
            for j in accepted:
                x[j] = int(p[j].argmax())
            for j in again:
                x[j] = mask
            last = len(accepted)
            used += 1
    return x[len(prompt) :], used


def with_shadows(model: Any, x: Sequence[int], start: int, block: int) -> Tensor:
    """Logits float64 [len(x) + block, vocab]."""
    ids = torch.tensor([*x, *[model.info.mask_id] * block])
    places = torch.tensor([*range(len(x)), *range(start, start + block)])
    seen = torch.ones(len(ids), len(ids), dtype=torch.bool)
    seen[: len(x), len(x) :] = False
    seen[len(x) :, start : start + block] = ~torch.eye(block, dtype=torch.bool)
    with torch.no_grad():
        hidden = model(ids, places, lambda layer, op, q, k, v: attention(q, k, v, seen))
        return model.head(hidden).float().double()


@dataclass(frozen=True)
class Sampling:
    """How a published loop draws: its temperature and cuts, and here the noise.

    cut_greedy: Dream's `sample_tokens` cuts at temperature 0 too; LLaDA2's takes the plain softmax there."""

    draw: Draw
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    cut_greedy: bool = False

    def tokens(self, logits: Tensor, mask: int, positions: Sequence[int], step: int) -> tuple[list[int], Tensor]:
        """Tokens, and the distributions [rows, vocab] they come from."""
        logits = logits.clone()
        logits[:, mask] = -math.inf
        tokens = self.draw(logits.float(), positions, step)
        if self.temperature > 0:
            logits = logits / self.temperature
        if self.temperature > 0 or self.cut_greedy:
            if self.top_k > 0:
                least = logits.topk(self.top_k, dim=-1).values[:, -1:]
                logits[logits < least] = -math.inf
            if self.top_p < 1:
                order = logits.sort(dim=-1, descending=True)
                total = torch.softmax(order.values, dim=-1).cumsum(dim=-1)
                out = torch.zeros_like(total, dtype=torch.bool)
                out[:, 1:] = total[:, :-1] > self.top_p
                logits[torch.zeros_like(out).scatter(1, order.indices, out)] = -math.inf
        p = torch.softmax(logits, dim=-1)
        assert all(float(p[r, t]) > 0 for r, t in enumerate(tokens))
        return tokens, p


def score(how: str, tokens: Sequence[int], p: Tensor) -> list[float]:
    """Dream's `sample_tokens`: confidence of the drawn token, margin, or negative entropy."""
    if how == "margin":
        two = p.topk(2, dim=-1).values
        return (two[:, 0] - two[:, 1]).tolist()
    if how == "entropy":
        return torch.special.xlogy(p, p).sum(dim=-1).tolist()
    return [float(p[r, t]) for r, t in enumerate(tokens)]


def sampled_canvas(
    model: Any, prompt: Sequence[int], length: int, block: int, sampling: Sampling, how: str, threshold: float | None
) -> list[int]:
    """Blocks of a whole canvas with Dream's `sample_tokens`: one a step by score `how`, or all at least `threshold`."""
    mask, shift = model.info.mask_id, model.info.shift
    x = [*prompt, *[mask] * length]
    step = 0
    for start in range(len(prompt), len(x), block):
        while mask in x[start : start + block]:
            masks = [p for p in range(start, start + block) if x[p] == mask]
            logits, _ = forward(model, x, 0, len(x), None)
            tokens, p = sampling.tokens(logits[[q - shift for q in masks]], mask, masks, step)
            points = dict(zip(masks, score(how, tokens, p), strict=True))
            order = ranked(points)
            for q in order if threshold is None else order[:1] + [q for q in order[1:] if points[q] >= threshold]:
                x[q] = tokens[masks.index(q)]
                if threshold is None:
                    break
            step += 1
    return x[len(prompt) :]


def sampled_blocks(
    model: Any, prompt: Sequence[int], length: int, block: int, steps: int, sampling: Sampling, threshold: float | None
) -> list[int]:
    """SDAR's `block_diffusion_generate`, LLaDA2's `generate`: low_confidence_dynamic; static where threshold is None.
    steps: of a block, whose quotas are a whole block's even where the prompt has begun it."""
    mask = model.info.mask_id
    total = -(-(len(prompt) + length) // block) * block
    x = [*prompt, *[mask] * (total - len(prompt))]
    held, begin, decided = Cache(), len(prompt) // block * block, 0
    if begin:
        _, held = forward(model, x, 0, begin, None, block=block)
    for start in range(begin, total, block):
        for count in shares(block, steps):
            masks = [p for p in range(start, start + block) if x[p] == mask]
            if not masks:
                break
            logits, _ = forward(model, x, start, start + block, held, block=block)
            tokens, p = sampling.tokens(logits[[q - start for q in masks]], mask, masks, decided)
            points = dict(zip(masks, score("confidence", tokens, p), strict=True))
            high = [q for q in masks if threshold is not None and points[q] > threshold]
            for q in high if threshold is not None and len(high) >= count else ranked(points)[:count]:
                x[q] = tokens[masks.index(q)]
            decided += 1
        _, held = forward(model, x, start, start + block, held, block=block)
    return x[len(prompt) :]
