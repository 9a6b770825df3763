"""Interim decoders for evaluation during training, without cache. To be replaced by the engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dfastllm.models.decoder import Decoder
from dfastllm.train.objectives import Rows, short_attention

__all__ = ["generate"]


def _logits(model: Decoder, ids: Tensor, lengths: Tensor, block: int, wanted: Tensor, bf16: bool) -> Tensor:
    """ids [batch, length]; block 0 full, 1 causal, n block-causal. wanted [batch, length] bool -> [rows, vocab]"""
    batch, length = ids.shape
    row = torch.arange(length)
    stop = torch.full((length,), length) if block == 0 else (row // block + 1) * block
    mask = (row[None, :] < stop[:, None])[None] & (row[None, None, :] < lengths[:, None, None])
    mask = (mask | torch.eye(length, dtype=torch.bool))[:, None]
    empty = torch.zeros(0)
    rows = Rows(batch, length, ids.flatten(), row.repeat(batch), mask, empty, empty, empty)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = model(rows.ids, rows.positions, short_attention(rows))
        return model.head(hidden[wanted.flatten().nonzero()[:, 0]]).float()


@torch.no_grad()
def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    canvas: int = 64,
    block: int = 32,
    per_step: int = 1,
    bf16: bool = True,
    chunk: int = 48,
) -> list[list[int]]:
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    out: list[list[int]] = [[] for _ in prompts]
    for at in range(0, len(order), chunk):
        picked = order[at : at + chunk]
        group = [list(prompts[i]) for i in picked]
        run = _ar if model.info.kind == "ar" else _canvas
        for i, ids in zip(picked, run(model, group, canvas, block, per_step, bf16), strict=True):
            eos = model.info.eos_ids[0]
            out[i] = ids[: ids.index(eos)] if eos in ids else ids
    return out


def _ar(
    model: Decoder, prompts: list[list[int]], canvas: int, block: int, per_step: int, bf16: bool
) -> list[list[int]]:
    eos = model.info.eos_ids[0]
    seqs = [list(p) for p in prompts]
    live = set(range(len(seqs)))
    for _ in range(canvas):
        which = sorted(live)
        if not which:
            break
        lengths = torch.tensor([len(seqs[i]) for i in which])
        ids = torch.zeros(len(which), int(lengths.max()), dtype=torch.long)
        wanted = torch.zeros_like(ids, dtype=torch.bool)
        for r, i in enumerate(which):
            ids[r, : len(seqs[i])] = torch.tensor(seqs[i])
            wanted[r, len(seqs[i]) - 1] = True
        best = _logits(model, ids, lengths, 1, wanted, bf16).argmax(-1).tolist()
        for i, token in zip(which, best, strict=True):
            seqs[i].append(token)
            if token == eos:
                live.discard(i)
    return [s[len(p) :] for s, p in zip(seqs, prompts, strict=True)]


def _canvas(
    model: Decoder, prompts: list[list[int]], canvas: int, block: int, per_step: int, bf16: bool
) -> list[list[int]]:
    """Fixed schedule, low confidence: the most confident `per_step` masks of the current block, each step."""
    info = model.info
    eos, mask_id = info.eos_ids[0], info.mask_id
    assert mask_id is not None
    native = info.kind == "block"
    seqs = [[*p, *[mask_id] * canvas] for p in prompts]
    starts = []
    for p in prompts:
        if native:
            cut = (len(p) + canvas) // info.block * info.block
            seqs[len(starts)] = seqs[len(starts)][:cut]
        starts.append(len(p))
    live = set(range(len(seqs)))
    while live:
        which = sorted(live)
        ends = []
        for i in which:
            first = seqs[i].index(mask_id)
            if native:
                ends.append((first // info.block + 1) * info.block)
            else:
                ends.append(starts[i] + ((first - starts[i]) // block + 1) * block)
        shown = [seqs[i][: ends[r]] if native else seqs[i] for r, i in enumerate(which)]
        lengths = torch.tensor([len(s) for s in shown])
        ids = torch.zeros(len(which), int(lengths.max()), dtype=torch.long)
        wanted = torch.zeros_like(ids, dtype=torch.bool)
        for r, s in enumerate(shown):
            ids[r, : len(s)] = torch.tensor(s)
            wanted[r, : ends[r]] = ids[r, : ends[r]] == mask_id
        logits = _logits(model, ids, lengths, info.block if native else 0, wanted, bf16)
        logits[:, mask_id] = -torch.inf
        confidence, token = logits.softmax(-1).max(-1)
        at = 0
        for r, i in enumerate(which):
            positions = wanted[r].nonzero()[:, 0].tolist()
            own = list(
                zip(
                    confidence[at : at + len(positions)].tolist(),
                    positions,
                    token[at : at + len(positions)].tolist(),
                    strict=True,
                )
            )
            at += len(positions)
            for _, position, t in sorted(own, key=lambda c: -c[0])[:per_step]:
                seqs[i][position] = t
            rest = seqs[i][starts[i] :]
            if mask_id not in rest or (eos in rest and mask_id not in rest[: rest.index(eos)]):
                live.discard(i)
    return [s[st:] for s, st in zip(seqs, starts, strict=True)]
