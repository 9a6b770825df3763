"""From a block's rows to decisions: candidate tokens, their statistics, the rule's choice, the records.

Greedy rows without edits, under a rule that needs row statistics only, never become logits; the others do (`_route`, by
the request alone). The rules then run in numpy, grouped by name, over [sequences, block].
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
from dfastllm.decode.rows import DenseRows, Rows, RowStats, probabilities, token_logprob
from dfastllm.decode.sampling import Draw, draw, edits, log_normaliser, penalised, row_keys, spread
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
    counted = penalised(s)
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


@dataclass(slots=True)
class _Seen:
    """What the rows of some sequences say, on the host, per row: token int64; chosen float32, its logit; confidence
    float64, its probability; and where a rule needs them entropy, margin, kept (probability of the token that stands
    there), differs, ready, else zeros. memory: per sequence. stats, or else logits: of the raw distribution."""

    token: np.ndarray
    confidence: np.ndarray
    entropy: np.ndarray
    margin: np.ndarray
    kept: np.ndarray
    differs: np.ndarray
    ready: np.ndarray
    memory: list[Any]
    stats: RowStats | None = None
    logits: Tensor | None = None


@torch.inference_mode()
def denoise(group: Sequence[Active], rows: Rows, scorer: Scorer | None = None) -> list[Decision]:
    """One Decision per block, of sequences of one model. rows: those of the blocks, in order. The mask is never a
    candidate, nor part of any distribution."""
    if not group:
        return []
    ends = np.cumsum([len(a.positions) for a in group]).tolist()
    spots = [slice(end - len(a.positions), end) for a, end in zip(group, ends, strict=True)]
    parts: dict[tuple[bool, ...], list[int]] = {}
    for i, a in enumerate(group):
        parts.setdefault(_route(a), []).append(i)
    decisions: dict[int, Decision] = {}
    for route, members in parts.items():
        part = rows
        if len(members) < len(group):
            part = rows.select([r for i in members for r in range(spots[i].start, spots[i].stop)])
        some = [group[i] for i in members]
        seen = _by_logits(some, part, scorer) if route[0] else _by_stats(some, part)
        decisions.update(zip(members, _decide_all(some, seen), strict=True))
    return [decisions[i] for i in range(len(group))]


def _route(a: Active) -> tuple[bool, ...]:
    """(whether the rows need logits; if not: whether they need records, entropy and margin). Sequences of one route
    are looked at together."""
    s, state = a.seq.sampling, a.state
    early = s.min_tokens and min(a.positions, default=0) < a.seq.canvas_start + s.min_tokens
    if s.temperature > 0 or early or edits(s) or not a.rule.needs <= {"spread"}:
        return (True,)
    return False, s.logprobs is not None, _spreads(state)


def _banned(group: Sequence[Active]) -> tuple[int, ...]:
    mask = group[0].seq.model.mask_id
    return () if mask is None else (mask,)


def _by_stats(group: Sequence[Active], rows: Rows) -> _Seen:
    """Greedy rows without edits."""
    spreads = _spreads(group[0].state)
    top = max(a.seq.sampling.logprobs or 0 for a in group)
    stats = rows.stats(ban=_banned(group), norm=True, spread=spreads, top=top)
    zeros, no = np.zeros(rows.count), np.zeros(rows.count, dtype=np.bool_)
    entropy, margin = (stats.entropy.astype(np.float64), stats.margin.astype(np.float64)) if spreads else (zeros, zeros)
    confidence = probabilities(stats.best, stats.norm)
    return _Seen(stats.token, confidence, entropy, margin, zeros, no, no, [None] * len(group), stats=stats)


def _by_logits(group: Sequence[Active], rows: Rows, scorer: Scorer | None) -> _Seen:
    """Rows that are edited, drawn from, or compared with more than themselves."""
    logits = rows.logits()
    logits[:, list(_banned(group))] = float("-inf")
    ends = np.cumsum([len(a.positions) for a in group]).tolist()
    spots = [slice(end - len(a.positions), end) for a, end in zip(group, ends, strict=True)]
    draws = [_draws(a) for a in group]
    memory = [a.state.memory for a in group]
    used = _with_credit(group, spots, logits, memory)
    tokens = draw(used, [d for some in draws for d in some])
    norm = log_normaliser(used)
    ready = np.zeros(rows.count, dtype=np.bool_)
    for i, (a, r) in enumerate(zip(group, spots, strict=True)):
        options = a.state.choice.options
        if "drift" in a.rule.needs:
            ready[r], memory[i] = drift(used[r], norm[r], a.positions, a.state.memory, options)
        elif "scorer" in a.rule.needs:
            assert scorer is not None  # refused by check
            before = a.seq.tokens[: a.positions[0]]
            ready[r] = agreement(scorer, used[r], norm[r], before, draws[i][0], tokens[r], options)
    chosen = used.gather(1, tokens[:, None])[:, 0]
    confidence = probabilities(chosen.cpu().numpy(), norm.cpu().numpy())
    entropy, margin, kept = np.zeros((3, rows.count))
    differs = np.zeros(rows.count, dtype=np.bool_)
    seen = _Seen(tokens.cpu().numpy(), confidence, entropy, margin, kept, differs, ready, memory, logits=logits)
    _spread_out(group, spots, used, norm, seen)
    _compare_held(group, spots, used, norm, seen)
    return seen


def _with_credit(group: Sequence[Active], rows: Sequence[slice], logits: Tensor, memory: list[Any]) -> Tensor:
    """The logits candidates are drawn from: the raw ones, except where the rule keeps credit (whose memory is set)."""
    used = logits
    for i, (a, r) in enumerate(zip(group, rows, strict=True)):
        if "credit" in a.rule.needs:
            used = logits.clone() if used is logits else used
            used[r], memory[i] = add_credit(logits[r], a.positions, a.state.memory, a.state.choice.options)
    return used


def _spread_out(group: Sequence[Active], rows: Sequence[slice], used: Tensor, norm: Tensor, seen: _Seen) -> None:
    """Entropy and margin of the rows whose rule looks at them, into `seen`."""
    wanted = [i for a, r in zip(group, rows, strict=True) if _spreads(a.state) for i in range(r.start, r.stop)]
    if wanted:
        at = torch.tensor(wanted, dtype=torch.long, device=used.device)
        entropy, margin = spread(used[at], norm[at])
        seen.entropy[wanted], seen.margin[wanted] = entropy.cpu().numpy(), margin.cpu().numpy()


def _compare_held(group: Sequence[Active], rows: Sequence[slice], used: Tensor, norm: Tensor, seen: _Seen) -> None:
    """kept and differs of the rows that look again at a committed token, into `seen`."""
    held = [
        (r.start + i, a.seq.tokens[p])
        for a, r in zip(group, rows, strict=True)
        for i, (p, free) in enumerate(zip(a.positions, a.masked, strict=True))
        if not free
    ]
    if held:
        where, stands = (list(x) for x in zip(*held, strict=True))
        logit = used[torch.tensor(where), torch.tensor(stands)].cpu().numpy()
        seen.kept[where] = probabilities(logit, norm.cpu().numpy()[where])
        seen.differs[where] = seen.token[where] != np.asarray(stands)


def _spreads(state: CanvasState) -> bool:
    """Whether the rule looks at entropy or margin."""
    options = state.choice.options
    order = options.get("remasking") or options.get("ordering")
    return "spread" in RULES[state.choice.rule].needs or order in ("entropy", "margin", "topk_margin")


def _noisy(state: CanvasState) -> bool:
    """Whether the rule draws positions."""
    options = state.choice.options
    return options.get("remasking") == "random" or options.get("ordering") == "origin" or options.get("alg_temp", 0) > 0


def _decide_all(group: Sequence[Active], seen: _Seen) -> list[Decision]:
    """Decisions of sequences whose rows were looked at together, rule by rule."""
    counts = np.asarray([len(a.positions) for a in group])
    owner = np.repeat(np.arange(len(group)), counts)
    out: dict[int, Decision] = {}
    for name in dict.fromkeys(a.state.choice.rule for a in group):
        members = [i for i, a in enumerate(group) if a.state.choice.rule == name]
        at: Any = slice(None)
        if len(members) < len(group):
            at = np.isin(owner, members)
        out.update(zip(members, _decide(RULES[name], [group[i] for i in members], seen, members, at), strict=True))
    return [out[i] for i in range(len(group))]


def _decide(rule: Rule, group: Sequence[Active], seen: _Seen, members: Sequence[int], at: Any) -> list[Decision]:
    """Decisions of the sequences that share a rule. members: their numbers in `seen`; at: their rows in it."""
    counts = np.asarray([len(a.positions) for a in group])
    owner = np.repeat(np.arange(len(group)), counts)
    position = np.fromiter((p for a in group for p in a.positions), dtype=np.int64, count=len(owner))
    column = position - np.repeat(np.asarray([a.start for a in group]), counts)
    memory = [seen.memory[i] for i in members]
    f = _field(group, seen, at, memory, (owner, column), position)
    accept = decide(rule, f)
    revision = rule.revise(f, accept) if rule.revise else None
    write = accept if revision is None else accept | revision.rewrite
    picked = np.flatnonzero(write[owner, column])
    token = seen.token[at]
    fixed: list[dict[int, int]] = [{} for _ in group]
    for i, p, t in zip(owner[picked].tolist(), position[picked].tolist(), token[picked].tolist(), strict=True):
        fixed[i][p] = t
    ends = np.cumsum(counts)
    out = []
    for i, a in enumerate(group):
        rows = slice(int(ends[i] - counts[i]), int(ends[i]))
        again = () if revision is None else tuple((np.flatnonzero(revision.remask[i]) + a.start).tolist())
        rest: dict[int, int] = {}
        if a.state.choice.provisional:
            guesses = zip(a.positions, token[rows].tolist(), a.masked, strict=True)
            rest = {p: t for p, t, masked in guesses if masked and p not in fixed[i]}
        closed = None if revision is None or revision.closed is None else bool(revision.closed[i])
        kept = memory[i] if revision is None else revision.memory[i]
        records = _records(a, fixed[i], seen, np.arange(len(seen.token))[at][rows])
        out.append(Decision(fixed[i], again, rest, records, kept, closed))
    return out


def _field(
    group: Sequence[Active], seen: _Seen, at: Any, memory: Sequence[Any], cells: tuple[Any, Any], position: np.ndarray
) -> Field:
    """Rows scattered to their block columns (`cells`: sequence and column of each), padded to the longest block."""
    shape = (len(group), max(a.stop - a.start for a in group))

    def plane(values: Any, dtype: Any) -> Any:
        out = np.zeros(shape, dtype=dtype)
        out[cells] = values
        return out

    free = np.fromiter((m for a in group for m in a.masked), dtype=np.bool_, count=len(position))
    keys: Any = 0
    if any(_noisy(a.state) for a in group):
        counts = [len(a.positions) for a in group]
        seeds = [a.seq.seed for a, n in zip(group, counts, strict=True) for _ in range(n)]
        steps = [a.state.step for a, n in zip(group, counts, strict=True) for _ in range(n)]
        keys = row_keys(seeds, steps, position.tolist(), salt=1)
    return Field(
        masked=plane(free, np.bool_),
        held=plane(~free, np.bool_),
        confidence=plane(seen.confidence[at], np.float64),
        entropy=plane(seen.entropy[at], np.float64),
        margin=plane(seen.margin[at], np.float64),
        kept=plane(seen.kept[at], np.float64),
        differs=plane(seen.differs[at], np.bool_),
        ready=plane(seen.ready[at], np.bool_),
        keys=plane(keys, np.uint64),
        size=np.asarray([a.stop - a.start for a in group], dtype=np.int64),
        step=np.asarray([a.state.block_step for a in group], dtype=np.int64),
        steps=np.asarray([a.state.layout.share(a.state.block) for a in group], dtype=np.int64),
        options=[a.state.choice.options for a in group],
        memory=memory,
    )


def _records(a: Active, fixed: Mapping[int, int], seen: _Seen, rows: np.ndarray) -> dict[int, TokenLogprob]:
    """Records of the fixed tokens, of the raw distribution, where the request asks for them. rows: of this sequence in
    `seen`."""
    top = a.seq.sampling.logprobs
    if top is None or not fixed:
        return {}
    where = dict(zip(a.positions, rows.tolist(), strict=True))
    at, tokens = [where[p] for p in fixed], list(fixed.values())
    if seen.stats is not None:
        chosen = seen.stats.best[at].tolist()
        found = [token_logprob(seen.stats, r, t, x, top) for r, t, x in zip(at, tokens, chosen, strict=True)]
    else:
        assert seen.logits is not None
        few = seen.logits[torch.tensor(at)]
        chosen = few.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
        stats = DenseRows(few).stats(norm=True, top=top)
        found = [token_logprob(stats, r, t, x, top) for r, (t, x) in enumerate(zip(tokens, chosen, strict=True))]
    return dict(zip(fixed, found, strict=True))


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
