"""From a block's rows to candidates: which positions a step looks at, the token each row puts forward, its statistics.

Greedy rows without edits, under a rule that needs row statistics only, never become logits, whatever ids are barred;
the others do (by the request alone: `Choice.way`). What to do with the candidates is `denoise`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfastllm.core import SequenceState, value
from dfastllm.decode.canvas.evidence import Scorer, add_credit, agreement, drift
from dfastllm.decode.canvas.field import Rule
from dfastllm.decode.canvas.layout import CanvasState
from dfastllm.decode.canvas.rules import RULES
from dfastllm.decode.sampling import Draw, barred, draw, penalised, tempered
from dfastllm.kernels.rows import Rows, RowStats, probabilities
from dfastllm.kernels.statistics import log_normaliser, spread
from dfastllm.kernels.token_set import TokenSet

__all__ = ["Active", "Candidates", "active_rows", "by_logits", "by_stats", "watching"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@value(frozen=True, slots=True)
class Active:
    """The active block of one sequence in this step, and what its rows are.

    start, stop  its canvas positions. columns: what each row decides, in row order, as the distance from `start`;
    masked: whether that is still undecided (a held row looks again at a committed token); None: the columns are all the
    undecided ones of the block, ascending. watched: further rows, after those, of the positions of the next block: a
    rule that compares rows from step to step remembers them.
    """

    seq: SequenceState
    state: CanvasState
    start: int
    stop: int
    columns: tuple[int, ...]
    masked: tuple[bool, ...] | None = None
    watched: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        return len(self.columns) + len(self.watched)

    @property
    def positions(self) -> tuple[int, ...]:
        """What each row decides."""
        return tuple([self.start + c for c in self.columns])

    @property
    def rule(self) -> Rule:
        return RULES[self.state.choice.rule]


def active_rows(seq: SequenceState, start: int, stop: int) -> Active:
    """The rows a step on the block [start, stop) has: its masked positions; for a rule that edits, the committed ones
    among them in order; for one that verifies, a shadow of each committed one after them."""
    state: CanvasState = seq.policy
    if state.open is not None:
        return Active(seq, state, start, stop, state.open)
    mask, needs = seq.model.mask_id, state.choice.needs
    block = seq.tokens[start:stop]
    if "held" in needs:
        return Active(seq, state, start, stop, tuple(range(stop - start)), tuple([t == mask for t in block]))
    undecided = tuple([c for c, t in enumerate(block) if t == mask])
    if "shadow" not in needs:
        return Active(seq, state, start, stop, undecided)
    held = tuple([c for c, t in enumerate(block) if t != mask])
    return Active(seq, state, start, stop, undecided + held, (True,) * len(undecided) + (False,) * len(held))


def watching(active: Active, high: int) -> Active:
    """With the rows of the next block beside, where the rule's memory outlives a block and the forward, which runs to
    position `high`, has them."""
    state = active.state
    if not active.rule.lasting or state.block + 1 >= state.layout.count:
        return active
    begin, end = state.layout.bounds[state.block + 1]
    if end - active.seq.model.shift > high:
        return active
    return replace(active, watched=tuple(range(begin - active.start, end - active.start)))


@dataclass(slots=True)
class Candidates:
    """What the rows of some sequences say, on the host. Planes have a value per row.

    token       int64: the candidate. confidence: float64, its probability.
    planes      where a rule needs them, by the names of Field: entropy, margin, kept, differs, ready.
    memory      per sequence: what its rule's evidence remembers.
    stats, logits  one of them: of the raw distribution, for records.
    """

    token: Ints
    confidence: Floats
    planes: dict[str, NDArray[Any]]
    memory: list[Any]
    stats: RowStats | None = None
    logits: Tensor | None = None


def _banned(group: Sequence[Active]) -> tuple[int, ...]:
    mask = group[0].seq.model.mask_id
    return () if mask is None else (mask,)


def _bars(group: Sequence[Active]) -> list[TokenSet | None] | None:
    """Per row the ids that its sequence's options bar; None where no row has any."""
    asked = [a.seq.sampling for a in group]
    if not [1 for s in asked if s.min_tokens or s.allowed_token_ids is not None]:
        return None
    found = [
        barred(s, a.seq.ends, p, a.seq.model.vocab_size) for a, s in zip(group, asked, strict=True) for p in a.positions
    ]
    return found if any(found) else None


def by_stats(group: Sequence[Active], rows: Rows) -> Candidates:
    """Greedy rows without edits, of one way."""
    spreads = group[0].state.choice.spreads
    records = group[0].state.choice.way[1]
    top = max([a.seq.sampling.logprobs or 0 for a in group]) if records else 0
    stats = rows.stats(ban=_banned(group), barred=_bars(group), norm=True, spread=spreads, top=top)
    planes: dict[str, NDArray[Any]] = {"entropy": stats.entropy, "margin": stats.margin} if spreads else {}
    confidence = probabilities(stats.best, stats.norm)
    return Candidates(stats.token, confidence, planes, [None] * len(group), stats=stats)


def by_logits(group: Sequence[Active], rows: Rows, scorer: Scorer | None) -> Candidates:
    """Rows that are edited, drawn from, or compared with more than themselves."""
    logits = rows.logits()
    logits[:, list(_banned(group))] = float("-inf")
    logits, beside = _own(group, logits)
    ends = accumulate(len(a.columns) for a in group)
    spots = [slice(end - len(a.columns), end) for a, end in zip(group, ends, strict=True)]
    draws = [_draws(a) for a in group]
    memory: list[Any] = [a.state.memory for a in group]
    used = _with_credit(group, spots, logits, memory)
    tokens = draw(used, [d for some in draws for d in some])
    norm = log_normaliser(used)
    told, weight = _told(group, spots, used, norm, draws)
    ready = np.zeros(len(logits), dtype=np.bool_)
    for i, (a, r) in enumerate(zip(group, spots, strict=True)):
        options = a.state.choice.options
        if "drift" in a.rule.needs:
            seen = a.positions, tuple([a.start + c for c in a.watched])
            ready[r], memory[i] = drift(used[r], norm[r], beside[i], seen, a.state.block, a.state.memory, options)
        elif "scorer" in a.rule.needs:
            assert scorer is not None  # refused by check
            before = a.seq.tokens[: a.start + a.columns[0]]
            ready[r] = agreement(scorer, used[r], norm[r], before, draws[i][0], tokens[r], options)
    chosen = told.gather(1, tokens[:, None])[:, 0].cpu().numpy()
    token = tokens.cpu().numpy()
    planes = {
        "ready": ready,
        **_spread_planes(group, spots, told, weight),
        **_held_planes(group, spots, used, norm, token),
    }
    return Candidates(token, probabilities(chosen, weight.cpu().numpy()), planes, memory, logits=logits)


def _own(group: Sequence[Active], logits: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    """The rows of the blocks themselves; and by index the watched rows of those that have some."""
    if not [1 for a in group if a.watched]:
        return logits, dict.fromkeys(range(len(group)), logits[:0])
    ends = list(accumulate(a.rows for a in group))
    firsts = [end - a.rows for end, a in zip(ends, group, strict=True)]
    own = [first + i for first, a in zip(firsts, group, strict=True) for i in range(len(a.columns))]
    beside = {i: logits[end - len(a.watched) : end] for i, (end, a) in enumerate(zip(ends, group, strict=True))}
    return logits[torch.tensor(own, dtype=torch.long, device=logits.device)], beside


def _told(
    group: Sequence[Active], rows: Sequence[slice], used: Tensor, norm: Tensor, draws: Sequence[list[Draw]]
) -> tuple[Tensor, Tensor]:
    """The logits that confidence, entropy and margin are of, and their normalisers: those of the distribution a token
    is drawn from, for the sequences that say so (`Choice.drawn`), and without the ids they doubt."""
    choices = [a.state.choice for a in group]
    if not [1 for c in choices if c.drawn or c.doubted]:
        return used, norm
    told, weight = used.clone(), norm.clone()
    for i, (c, r) in enumerate(zip(choices, rows, strict=True)):
        if c.drawn:
            told[r] = tempered(used[r], draws[i], cut_greedy=c.cut)
        if c.doubted:
            told[r, list(c.doubted)] = float("-inf")
        if c.drawn or c.doubted:
            norms = log_normaliser(told[r])
            weight[r] = torch.where(torch.isneginf(told[r].amax(dim=-1)), 0.0, norms)  # nothing but what is doubted
    return told, weight


def _draws(a: Active) -> list[Draw]:
    """How the rows are drawn, in row order: masked rows by the request's options; held rows too where a step may
    overwrite their tokens, else greedily."""
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
        enders=seq.ends.barred,
    )
    if a.masked is None or "held" in a.state.choice.needs or all(a.masked):
        return [base]
    greedy = replace(s, temperature=0.0)
    return [
        replace(base, positions=(p,), sampling=s if free else greedy)
        for p, free in zip(a.positions, a.masked, strict=True)
    ]


def _with_credit(group: Sequence[Active], rows: Sequence[slice], logits: Tensor, memory: list[Any]) -> Tensor:
    """The logits candidates are drawn from: the raw ones, except where the rule keeps credit (whose memory is set)."""
    used = logits
    for i, (a, r) in enumerate(zip(group, rows, strict=True)):
        if "credit" in a.rule.needs:
            used = logits.clone() if used is logits else used
            used[r], memory[i] = add_credit(logits[r], a.positions, a.state.memory, a.state.choice.options)
    return used


def _spread_planes(
    group: Sequence[Active], rows: Sequence[slice], used: Tensor, norm: Tensor
) -> dict[str, NDArray[Any]]:
    """Entropy and margin, of the rows whose rule looks at them."""
    wanted = [i for a, r in zip(group, rows, strict=True) if a.state.choice.spreads for i in range(r.start, r.stop)]
    if not wanted:
        return {}
    at = torch.tensor(wanted, dtype=torch.long, device=used.device)
    entropy, margin = np.zeros((2, used.shape[0]), dtype=np.float32)
    some = spread(used[at], norm[at])
    entropy[wanted], margin[wanted] = (x.cpu().numpy() for x in some)
    return {"entropy": entropy, "margin": margin}


def _held_planes(
    group: Sequence[Active], rows: Sequence[slice], used: Tensor, norm: Tensor, token: Ints
) -> dict[str, NDArray[Any]]:
    """kept and differs, of the rows that look again at a committed token."""
    held = [
        (r.start + i, a.seq.tokens[p])
        for a, r in zip(group, rows, strict=True)
        if a.masked is not None
        for i, (p, free) in enumerate(zip(a.positions, a.masked, strict=True))
        if not free
    ]
    if not held:
        return {}
    where, stands = (list(x) for x in zip(*held, strict=True))
    kept, differs = np.zeros(used.shape[0]), np.zeros(used.shape[0], dtype=np.bool_)
    logit = used[torch.tensor(where), torch.tensor(stands)]
    kept[where] = probabilities(logit.cpu().numpy(), norm.cpu().numpy()[where])
    differs[where] = token[where] != np.asarray(stands)
    return {"kept": kept, "differs": differs}
