"""From the logits of masked rows to decisions: candidate tokens, their statistics, the rule's choice, the records.

Statistics are computed once, batched over all rows of a group whatever their requests ask for, in float32 with a
logsumexp per row; the rules then run in numpy, grouped by name, over [sequences, block].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfastllm.core import SequenceState, TokenLogprob
from dfastllm.decode.canvas import CanvasState
from dfastllm.decode.sampling import Draw, draw, log_normaliser, row_keys, token_logprobs
from dfastllm.decode.unmask import RULES, Field, decide

__all__ = ["Active", "Decision", "denoise"]

_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class Active:
    """The active block of one sequence in this step. [start, stop): its canvas positions; steps: its denoise steps;
    positions: the masked ones, ascending, one row of logits each."""

    seq: SequenceState
    state: CanvasState
    start: int
    stop: int
    steps: int
    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Decision:
    """fixed: position -> token; provisional: the other candidates' tokens; records: logprobs of `fixed` when asked."""

    fixed: Mapping[int, int]
    provisional: Mapping[int, int]
    records: Mapping[int, TokenLogprob] = field(default_factory=dict)
    remask: tuple[int, ...] = ()
    memory: Any = None


def _draw_of(a: Active) -> Draw:
    seq, s = a.seq, a.seq.sampling
    counted = bool(s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1.0)
    skip = {seq.model.mask_id, *seq.model.eos_ids}  # undecided positions and padding are not text
    return Draw(
        sampling=s,
        positions=a.positions,
        seed=seq.seed,
        step=a.state.step,
        first=seq.canvas_start,
        prompt=(*seq.request.prompt, *seq.request.suffix) if counted else (),
        output=[t for t in seq.tokens[seq.canvas_start : seq.canvas_stop] if t not in skip] if counted else (),
        enders=tuple(dict.fromkeys(seq.model.eos_ids + s.stop_token_ids)),
    )


def _entropy_margin(logits: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy in nats and p1 - p2 per row, float32 [rows] each. A chunk of rows at a time."""
    entropy, margin = torch.empty_like(norm), torch.empty_like(norm)
    step = max(1, _CHUNK // max(1, logits.shape[1]))
    for at in range(0, logits.shape[0], step):
        logp = logits[at : at + step] - norm[at : at + step, None]
        best = logp.topk(min(2, logp.shape[1]), dim=-1).values.exp()
        margin[at : at + step] = best[:, 0] - (best[:, 1] if best.shape[1] > 1 else 0)
        p = logp.exp()
        terms = torch.where(p > 0, p * logp, torch.zeros_like(p))
        entropy[at : at + step] = -terms.sum(dim=-1, dtype=torch.float64).float()
    return entropy, margin


@torch.inference_mode()
def denoise(group: Sequence[Active], logits: Tensor) -> list[Decision]:
    """One Decision per block. logits float32 [sum of len(positions), vocab], rows in order; the mask id's column is
    overwritten with -inf (the mask is never a candidate, nor part of any distribution)."""
    row = 0
    for mask in {a.seq.model.mask_id for a in group} - {None}:
        logits[:, mask] = float("-inf")
    tokens = draw(logits, [_draw_of(a) for a in group])
    norm = log_normaliser(logits)
    confidence = (logits.gather(1, tokens[:, None])[:, 0] - norm).exp()
    stats: list[np.ndarray] = [tokens.cpu().numpy(), confidence.cpu().numpy().astype(np.float64)]
    if any(_needs(a) for a in group):
        stats += [x.cpu().numpy().astype(np.float64) for x in _entropy_margin(logits, norm)]
    rows: list[slice] = []
    for a in group:
        rows.append(slice(row, row + len(a.positions)))
        row += len(a.positions)
    out: list[Decision | None] = [None] * len(group)
    for name in sorted({a.state.choice.rule for a in group}):
        members = [i for i, a in enumerate(group) if a.state.choice.rule == name]
        chosen = decide(RULES[name], _field([group[i] for i in members], [rows[i] for i in members], stats))
        for line, i in enumerate(members):
            out[i] = _decision(group[i], chosen[line], stats[0][rows[i]])
    decisions = [d for d in out if d is not None]
    return _with_records(group, decisions, rows, logits, norm, tokens)


def _needs(a: Active) -> bool:
    choice = a.state.choice
    if choice.rule == "schedule":
        return choice.options["remasking"] in ("entropy", "margin")
    return bool(RULES[choice.rule].needs)


def _field(group: Sequence[Active], rows: Sequence[slice], stats: Sequence[np.ndarray]) -> Field:
    """Rows scattered to their block columns, padded to the longest block."""
    shape = (len(group), max(a.stop - a.start for a in group))
    masked = np.zeros(shape, dtype=np.bool_)
    planes = [np.zeros(shape) for _ in range(3)]
    keys = np.zeros(shape, dtype=np.uint64)
    for i, (a, r) in enumerate(zip(group, rows, strict=True)):
        columns = np.asarray(a.positions, dtype=np.int64) - a.start
        masked[i, columns] = True
        for plane, values in zip(planes, stats[1:], strict=False):
            plane[i, columns] = values[r]
        keys[i, columns] = row_keys(a.seq.seed, a.state.step, a.positions, salt=1)
    return Field(
        masked=masked,
        confidence=planes[0],
        entropy=planes[1],
        margin=planes[2],
        keys=keys,
        size=np.asarray([a.stop - a.start for a in group], dtype=np.int64),
        step=np.asarray([a.state.block_step for a in group], dtype=np.int64),
        steps=np.asarray([a.steps for a in group], dtype=np.int64),
        options=[a.state.choice.options for a in group],
    )


def _decision(a: Active, accept: np.ndarray, tokens: np.ndarray) -> Decision:
    guesses = dict(zip(a.positions, tokens.tolist(), strict=True))
    fixed = {p: t for p, t in guesses.items() if accept[p - a.start]}
    rest = {p: t for p, t in guesses.items() if p not in fixed} if a.state.choice.provisional else {}
    return Decision(fixed, rest)


def _with_records(
    group: Sequence[Active],
    decisions: list[Decision],
    rows: Sequence[slice],
    logits: Tensor,
    norm: Tensor,
    tokens: Tensor,
) -> list[Decision]:
    """The same decisions with logprob records where the request asks for them."""
    out = []
    for a, d, r in zip(group, decisions, rows, strict=True):
        top = a.seq.sampling.logprobs
        if top is None or not d.fixed:
            out.append(d)
            continue
        at = torch.tensor([r.start + i for i, p in enumerate(a.positions) if p in d.fixed], device=logits.device)
        records = token_logprobs(logits[at], norm[at], tokens[at], top)
        out.append(Decision(d.fixed, d.provisional, dict(zip(d.fixed, records, strict=True)), d.remask, d.memory))
    return out
