"""From the logits of a block's rows to decisions: candidate tokens, their statistics, the rule's choice, the records.

Statistics are computed once, batched over all rows of a group whatever their requests ask for, in float32 with one
logsumexp per row; the rules then run in numpy, grouped by name, over [sequences, block].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfastllm.core import Commit, SequenceState, TokenLogprob
from dfastllm.decode.canvas import CanvasState, ending, fill_id
from dfastllm.decode.evidence import Scorer, add_credit, agreement, drift
from dfastllm.decode.sampling import Draw, draw, log_normaliser, on_capable_device, row_keys, spread, token_logprobs
from dfastllm.decode.unmask import RULES, Field, Rule, decide

__all__ = ["Active", "Decision", "active_rows", "denoise", "settle", "span_rows"]


@dataclass(frozen=True, slots=True)
class Active:
    """The active block of one sequence in this step, and what its rows of logits are.

    start, stop  its canvas positions. positions: what each row decides, in row order; masked: whether that is still
    undecided (a held row looks again at a committed token).
    """

    seq: SequenceState
    state: CanvasState
    start: int
    stop: int
    positions: tuple[int, ...]
    masked: tuple[bool, ...]

    @property
    def rule(self) -> Rule:
        return RULES[self.state.choice.rule]


@dataclass(frozen=True, slots=True)
class Decision:
    """fixed: position -> token; remask: positions masked again; provisional: tokens of the other candidates; records:
    logprobs of `fixed` when asked; closed: the rule's own word on whether the block is final, None: it has none."""

    fixed: Mapping[int, int]
    remask: tuple[int, ...] = ()
    provisional: Mapping[int, int] = field(default_factory=dict)
    records: Mapping[int, TokenLogprob] = field(default_factory=dict)
    memory: Any = None
    closed: bool | None = None


def active_rows(seq: SequenceState, start: int, stop: int) -> Active:
    """The rows a step on the block [start, stop) has: its masked positions; for a rule that edits, the committed ones
    among them in order; for one that verifies, a shadow of each committed one after them."""
    state: CanvasState = seq.policy
    mask, needs = seq.model.mask_id, RULES[state.choice.rule].needs
    block = range(start, stop)
    undecided = tuple(p for p in block if seq.tokens[p] == mask)
    if "held" in needs:
        return Active(seq, state, start, stop, tuple(block), tuple(seq.tokens[p] == mask for p in block))
    held = tuple(p for p in block if seq.tokens[p] != mask) if "shadow" in needs else ()
    return Active(seq, state, start, stop, undecided + held, (True,) * len(undecided) + (False,) * len(held))


def _draws(a: Active) -> list[Draw]:
    """How the rows are drawn, in row order: masked rows by the request's options, held rows greedily."""
    seq, s = a.seq, a.seq.sampling
    counted = bool(s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1.0)
    skip = {seq.model.mask_id, *seq.model.eos_ids}  # undecided positions and padding are not text
    base = Draw(
        sampling=s,
        positions=a.positions,
        seed=seq.seed,
        step=a.state.step,
        first=seq.canvas_start,
        prompt=(*seq.request.prompt, *seq.request.suffix) if counted else (),
        output=[t for t in seq.tokens[seq.canvas_start : seq.canvas_stop] if t not in skip] if counted else (),
        enders=tuple(dict.fromkeys(seq.model.eos_ids + s.stop_token_ids)),
    )
    if all(a.masked):
        return [base]
    greedy = replace(s, temperature=0.0)
    return [
        replace(base, positions=(p,), sampling=s if free else greedy)
        for p, free in zip(a.positions, a.masked, strict=True)
    ]


@torch.inference_mode()
def denoise(group: Sequence[Active], logits: Tensor, scorer: Scorer | None = None) -> list[Decision]:
    """One Decision per block. logits float32 [sum of rows, vocab], rows in order; the mask id's column is overwritten
    with -inf (the mask is never a candidate, nor part of any distribution)."""
    if not group:
        return []
    logits = on_capable_device(logits)
    for mask in {a.seq.model.mask_id for a in group} - {None}:
        logits[:, mask] = float("-inf")
    ends = np.cumsum([len(a.positions) for a in group])
    rows = [slice(int(end) - len(a.positions), int(end)) for a, end in zip(group, ends, strict=True)]
    draws = [_draws(a) for a in group]
    memory = [a.state.memory for a in group]
    used = _with_credit(group, rows, logits, memory)
    tokens = draw(used, [d for some in draws for d in some])
    norm = log_normaliser(used)
    ready = np.zeros(logits.shape[0], dtype=np.bool_)
    for i, (a, r) in enumerate(zip(group, rows, strict=True)):
        options = a.state.choice.options
        if "drift" in a.rule.needs:
            ready[r], memory[i] = drift(used[r], norm[r], a.positions, a.state.memory, options)
        elif "scorer" in a.rule.needs:
            assert scorer is not None  # refused by check
            before = a.seq.tokens[: a.positions[0]]
            ready[r] = agreement(scorer, used[r], norm[r], before, draws[i][0], tokens[r], options)
    planes = _planes(group, rows, used, norm, tokens)
    planes["ready"] = ready
    planes["keys"] = row_keys(
        [a.seq.seed for a in group for _ in a.positions],
        [a.state.step for a in group for _ in a.positions],
        [p for a in group for p in a.positions],
        salt=1,
    )
    decisions: dict[int, Decision] = {}
    for name in dict.fromkeys(a.state.choice.rule for a in group):
        members = [i for i, a in enumerate(group) if a.state.choice.rule == name]
        some = [group[i] for i in members]
        decided = _decide(RULES[name], some, [rows[i] for i in members], planes, [memory[i] for i in members])
        decisions.update(zip(members, decided, strict=True))
    raw = norm if used is logits else log_normaliser(logits)
    return [_with_records(a, decisions[i], rows[i], logits, raw) for i, a in enumerate(group)]


def _with_credit(group: Sequence[Active], rows: Sequence[slice], logits: Tensor, memory: list[Any]) -> Tensor:
    """The logits candidates are drawn from: the raw ones, except where the rule keeps credit (whose memory is set)."""
    used = logits
    for i, (a, r) in enumerate(zip(group, rows, strict=True)):
        if "credit" in a.rule.needs:
            used = logits.clone() if used is logits else used
            used[r], memory[i] = add_credit(logits[r], a.positions, a.state.memory, a.state.choice.options)
    return used


def _planes(
    group: Sequence[Active], rows: Sequence[slice], used: Tensor, norm: Tensor, tokens: Tensor
) -> dict[str, np.ndarray]:
    """Statistics per row on the host: token int64, confidence float64, and where a rule needs them entropy, margin,
    kept (probability of the token that stands there), differs."""
    count = used.shape[0]
    planes: dict[str, np.ndarray] = {
        "token": tokens.cpu().numpy(),
        "confidence": (used.gather(1, tokens[:, None])[:, 0] - norm).exp().cpu().numpy().astype(np.float64),
        "kept": np.zeros(count),
        "differs": np.zeros(count, dtype=np.bool_),
        "entropy": np.zeros(count),
        "margin": np.zeros(count),
    }
    wanted = [i for a, r in zip(group, rows, strict=True) if _spreads(a) for i in range(r.start, r.stop)]
    if wanted:
        at = torch.tensor(wanted, dtype=torch.long, device=used.device)
        entropy, margin = spread(used[at], norm[at])
        planes["entropy"][wanted], planes["margin"][wanted] = entropy.cpu().numpy(), margin.cpu().numpy()
    held = [
        (r.start + i, a.seq.tokens[p])
        for a, r in zip(group, rows, strict=True)
        for i, (p, free) in enumerate(zip(a.positions, a.masked, strict=True))
        if not free
    ]
    if held:
        at, ids = (torch.tensor(x, dtype=torch.long, device=used.device) for x in zip(*held, strict=True))
        where = [row for row, _ in held]
        planes["kept"][where] = (used[at, ids] - norm[at]).exp().cpu().numpy()
        planes["differs"][where] = (tokens[at] != ids).cpu().numpy()
    return planes


def _spreads(a: Active) -> bool:
    """Whether the rule looks at entropy or margin."""
    options = a.state.choice.options
    order = options.get("remasking") or options.get("ordering")
    return "spread" in a.rule.needs or order in ("entropy", "margin", "topk_margin")


def _decide(
    rule: Rule,
    group: Sequence[Active],
    rows: Sequence[slice],
    planes: Mapping[str, np.ndarray],
    memory: Sequence[Any],
) -> list[Decision]:
    """Decisions of the sequences that share a rule."""
    f = _field(group, rows, planes, memory)
    accept = decide(rule, f)
    revision = rule.revise(f, accept) if rule.revise else None
    out = []
    for i, (a, r) in enumerate(zip(group, rows, strict=True)):
        write = accept[i] if revision is None else accept[i] | revision.rewrite[i]
        guesses = dict(zip(a.positions, planes["token"][r].tolist(), strict=True))
        fixed = {p: t for p, t in guesses.items() if write[p - a.start]}
        again = () if revision is None else tuple((np.flatnonzero(revision.remask[i]) + a.start).tolist())
        rest: dict[int, int] = {}
        if a.state.choice.provisional:
            free = zip(guesses.items(), a.masked, strict=True)
            rest = {p: t for (p, t), masked in free if masked and p not in fixed}
        closed = None if revision is None or revision.closed is None else bool(revision.closed[i])
        out.append(Decision(fixed, again, rest, {}, memory[i] if revision is None else revision.memory[i], closed))
    return out


def _field(
    group: Sequence[Active], rows: Sequence[slice], planes: Mapping[str, np.ndarray], memory: Sequence[Any]
) -> Field:
    """Rows scattered to their block columns, padded to the longest block."""
    shape = (len(group), max(a.stop - a.start for a in group))
    flags: dict[str, Any] = {n: np.zeros(shape, dtype=np.bool_) for n in ("masked", "held", "differs", "ready")}
    values: dict[str, Any] = {n: np.zeros(shape) for n in ("confidence", "entropy", "margin", "kept")}
    keys = np.zeros(shape, dtype=np.uint64)
    for i, (a, r) in enumerate(zip(group, rows, strict=True)):
        columns = np.asarray(a.positions, dtype=np.int64) - a.start
        free = np.asarray(a.masked, dtype=np.bool_)
        flags["masked"][i, columns] = free
        flags["held"][i, columns] = ~free
        for name in ("differs", "ready"):
            flags[name][i, columns] = planes[name][r]
        for name, plane in values.items():
            plane[i, columns] = planes[name][r]
        keys[i, columns] = planes["keys"][r]
    return Field(
        **flags,
        **values,
        keys=keys,
        size=np.asarray([a.stop - a.start for a in group], dtype=np.int64),
        step=np.asarray([a.state.block_step for a in group], dtype=np.int64),
        steps=np.asarray([a.state.layout.share(a.state.block) for a in group], dtype=np.int64),
        options=[a.state.choice.options for a in group],
        memory=memory,
    )


def _with_records(a: Active, d: Decision, rows: slice, logits: Tensor, norm: Tensor) -> Decision:
    """The same decision with logprob records, of the raw distribution, where the request asks for them."""
    top = a.seq.sampling.logprobs
    if top is None or not d.fixed:
        return d
    row = {p: rows.start + i for i, p in enumerate(a.positions)}
    at = torch.tensor([row[p] for p in d.fixed], dtype=torch.long, device=logits.device)
    ids = torch.tensor(list(d.fixed.values()), dtype=torch.long, device=logits.device)
    return replace(d, records=dict(zip(d.fixed, token_logprobs(logits[at], norm[at], ids, top), strict=True)))


def settle(
    a: Active, d: Decision, *, kv_len: int | None, snapshot: tuple[int, ...] | None = None, counts: bool = True
) -> Commit:
    """The commit of a decision: canvas updated, block closed or not, text ended or not. snapshot: the block's ids under
    new outside K,V, None: those stay. counts False: the step saw one position only and is none of the block's own."""
    seq, state = a.seq, a.state
    first, mask = state.layout.start, seq.model.mask_id
    assert mask is not None
    canvas = seq.tokens[first : state.layout.stop]
    for p, token in (*d.fixed.items(), *((p, mask) for p in d.remask)):
        canvas[p - first] = token
    left = next((p for p in range(a.start, a.stop) if canvas[p - first] == mask), a.stop)
    done = left == a.stop if d.closed is None else d.closed
    firm = left if a.rule.revise is None else a.stop if done else a.start
    end = ending(seq, state, canvas, firm)
    after = replace(
        state,
        block=state.block + done,
        step=state.step + 1,
        block_step=0 if done else state.block_step + counts,
        snapshot=state.snapshot if snapshot is None else snapshot,
        end=end.end,
        memory=None if done else d.memory if counts else state.memory,
    )
    return Commit(
        fixed={**d.fixed, **dict.fromkeys(end.fill, fill_id(seq.model))},
        masked=d.remask,
        kv_len=kv_len,
        state=after,
        stable=end.stable,
        finish=end.finish,
        logprobs=d.records,
        provisional={} if end.finish else d.provisional,
        block_done=done,
    )


def span_rows(a: Active, low: int, count: int) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """(want, shadows) of a span over [low, low + count) that serves this block: the row that predicts each position
    (the one before it on shifted models), and the shadow rows after the ordinary ones."""
    mask = a.seq.model.mask_id
    assert mask is not None
    if "shadow" not in a.rule.needs:
        return tuple(p - a.seq.model.shift - low for p in a.positions), ()
    free = tuple(p - low for p, masked in zip(a.positions, a.masked, strict=True) if masked)
    held = tuple(p for p, masked in zip(a.positions, a.masked, strict=True) if not masked)
    return free + tuple(range(count, count + len(held))), tuple((p, mask) for p in held)
