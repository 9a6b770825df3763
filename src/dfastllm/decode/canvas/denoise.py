"""From a block's candidates to commits: the rule's choice, the records, the canvas after it.

The rules run in numpy, grouped by name, over [sequences, block]. What the rows say is `candidates`' to find out.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import field
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfastllm.core import Commit, TokenLogprob, value
from dfastllm.decode.canvas.candidates import Active, Candidates, by_logits, by_stats
from dfastllm.decode.canvas.evidence import Scorer
from dfastllm.decode.canvas.field import Field, Revision, Rule
from dfastllm.decode.canvas.layout import CanvasState, ending, fill_id
from dfastllm.decode.canvas.rules import decide
from dfastllm.decode.records import token_logprob
from dfastllm.decode.sampling import row_keys
from dfastllm.kernels.rows import DenseRows, Rows, int64s

__all__ = ["Decision", "chosen", "denoise", "settle", "span_rows"]

Ints = NDArray[np.int64]

_NOTHING: Mapping[int, Any] = MappingProxyType({})


def _nothing() -> Mapping[int, Any]:
    return _NOTHING


@value(frozen=True, slots=True)
class Decision:
    """fixed: position -> token; remask: positions masked again; provisional: tokens of the other candidates; records:
    logprobs of `fixed` when asked; closed: the rule's own word on whether the block is final, None: it has none;
    open: the columns still masked, None: not worked out; rest: all candidates, of a request that guesses ahead."""

    fixed: Mapping[int, int]
    remask: tuple[int, ...] = ()
    provisional: Mapping[int, int] = field(default_factory=_nothing)
    records: Mapping[int, TokenLogprob] = field(default_factory=_nothing)
    memory: Any = None
    closed: bool | None = None
    open: tuple[int, ...] | None = None
    rest: Candidates | None = None


def denoise(group: Sequence[Active], rows: Rows, scorer: Scorer | None = None) -> list[Decision]:
    """One Decision per block, of sequences of one model. rows: those of the blocks, in order. The mask is never a
    candidate, nor part of any distribution."""
    if not group:
        return []
    parts = _apart([a.state.choice.way for a in group])
    if len(parts) == 1:
        return _by_rule(group, _look(group, rows, scorer))
    asked = [_asked(a) for a in group]
    spots = [range(end - n, end) for n, end in zip(asked, accumulate(asked), strict=True)]
    out: dict[int, Decision] = {}
    for members in parts:
        some, part = [group[i] for i in members], rows.select([r for i in members for r in spots[i]])
        out.update(zip(members, _by_rule(some, _look(some, part, scorer)), strict=True))
    return [out[i] for i in range(len(group))]


def _look(group: Sequence[Active], rows: Rows, scorer: Scorer | None) -> Candidates:
    """What the rows of sequences of one way say."""
    choices = [a.state.choice for a in group]
    if not choices[0].way[0]:
        return by_stats(group, rows)
    if [1 for c in choices if c.guidance or c.barred]:
        rows = DenseRows(_changed(group, rows.logits()))
    return by_logits(group, rows, scorer)


def _asked(a: Active) -> int:
    """Rows that its forward gives: under guidance each of them twice."""
    return 2 * a.rows if a.state.choice.guidance else a.rows


def _changed(group: Sequence[Active], logits: Tensor) -> Tensor:
    """The logits float32 [rows, vocab] as their requests read them; those that came are left as they are. Under
    guidance the rows of the canvas, then those of the canvas without its prompt, become unguided + (scale + 1) (rows -
    unguided) (Nie et al., LLaDA, 2025, appendix); barred ids become -inf."""
    parts, end = [], 0
    for a in group:
        choice, begin, end = a.state.choice, end, end + _asked(a)
        part = logits[begin : begin + a.rows]
        if choice.guidance:
            unguided = logits[begin + a.rows : end]
            part = unguided + (choice.guidance + 1) * (part - unguided)
        if choice.barred:
            part = part.clone()
            part[:, list(choice.barred)] = float("-inf")
        parts.append(part)
    return torch.cat(parts)


def _apart(kinds: Sequence[Hashable]) -> list[list[int]]:
    """Indices by kind, those of one kind together."""
    if kinds.count(kinds[0]) == len(kinds):  # nearly always
        return [list(range(len(kinds)))]
    parts: dict[Hashable, list[int]] = {}
    for i, kind in enumerate(kinds):
        parts.setdefault(kind, []).append(i)
    return list(parts.values())


def _spots(group: Sequence[Active]) -> list[range]:
    """The rows of each."""
    ends = accumulate([len(a.columns) for a in group])
    return [range(end - len(a.columns), end) for a, end in zip(group, ends, strict=True)]


def _by_rule(group: Sequence[Active], found: Candidates) -> list[Decision]:
    """Decisions of sequences whose rows were looked at together, rule by rule."""
    parts = _apart([a.state.choice.rule for a in group])
    if len(parts) == 1:
        return _decide(group[0].rule, group, found, None)
    spots = _spots(group)
    out: dict[int, Decision] = {}
    for members in parts:
        at = np.asarray([r for i in members for r in spots[i]], dtype=np.int64)
        some = Candidates(
            found.token[at],
            found.confidence[at],
            {plane: values[at] for plane, values in found.planes.items()},
            [found.memory[i] for i in members],
            found.stats,
            found.logits,
        )
        out.update(zip(members, _decide(group[members[0]].rule, [group[i] for i in members], some, at), strict=True))
    return [out[i] for i in range(len(group))]


def _pick(
    rule: Rule, group: Sequence[Active], found: Candidates
) -> tuple[list[dict[int, int]], list[int], Revision | None]:
    """Of sequences that share a rule: what each commits, position -> token; the columns that stay masked, of all end to
    end; what a revising rule changes."""
    columns = [a.columns for a in group]
    sizes = [a.stop - a.start for a in group]
    width = max(sizes)
    column = int64s(columns)
    cells = column + np.repeat(np.arange(0, len(group) * width, width), [len(c) for c in columns])  # [sequences, block]
    f = _field(group, sizes, found, column, cells, width)
    accept = decide(rule, f)
    revision = rule.revise(f, accept) if rule.revise else None
    write = (accept if revision is None else accept | revision.rewrite).ravel()[cells]
    picked = np.flatnonzero(write)
    fixed: list[dict[int, int]] = [{} for _ in group]
    starts = [a.start for a in group]
    for cell, t in zip(cells[picked].tolist(), found.token[picked].tolist(), strict=True):
        i, c = divmod(cell, width)
        fixed[i][starts[i] + c] = t
    return fixed, column[~write].tolist(), revision


def chosen(group: Sequence[Active], found: Candidates) -> list[dict[int, int]]:
    """What sequences of one rule, which decides by the rows of one step alone, would commit: position -> token."""
    return _pick(group[0].rule, group, found)[0]


def _decide(rule: Rule, group: Sequence[Active], found: Candidates, at: Ints | None) -> list[Decision]:
    """Decisions of the sequences that share a rule. at: their rows in `found.stats` or `logits`; None: all."""
    fixed, left, revision = _pick(rule, group, found)
    if revision is not None or [1 for a in group if a.state.choice.reports]:
        return [
            _decision(a, i, fixed[i], spot, found, at, revision)
            for i, (a, spot) in enumerate(zip(group, _spots(group), strict=True))
        ]
    out, end = [], 0
    for a, committed, memory in zip(group, fixed, found.memory, strict=True):
        begin, end = end, end + len(a.columns) - len(committed)
        still = None if a.masked else tuple(left[begin:end])
        out.append(Decision(committed, (), _NOTHING, _NOTHING, memory, None, still))
    return out


def _decision(
    a: Active,
    number: int,
    fixed: dict[int, int],
    spot: range,
    found: Candidates,
    at: Ints | None,
    revision: Revision | None,
) -> Decision:
    """With guesses and records where the request asks for them, and what a revising rule adds. spot: rows in `found`'s
    planes."""
    guesses: dict[int, int] = {}
    if a.state.choice.provisional:
        free = a.masked or (True,) * len(spot)
        tokens = found.token[spot.start : spot.stop].tolist()
        guesses = {p: t for p, t, masked in zip(a.positions, tokens, free, strict=True) if masked and p not in fixed}
    rows = list(spot) if at is None else at[spot.start : spot.stop].tolist()
    records = _records(a, fixed, found, rows)
    if revision is None:
        rest = _part(found, spot, rows) if a.state.choice.drafts else None
        return Decision(fixed, (), guesses, records, found.memory[number], rest=rest)
    again = tuple((np.flatnonzero(revision.remask[number]) + a.start).tolist())
    closed = None if revision.closed is None else bool(revision.closed[number])
    return Decision(fixed, again, guesses, records, revision.memory[number], closed)


def _part(found: Candidates, spot: range, rows: Sequence[int]) -> Candidates:
    """The candidates of one sequence: `spot` of the planes, `rows` of the logits."""
    at = slice(spot.start, spot.stop)
    planes = {name: values[at] for name, values in found.planes.items()}
    logits = found.logits[torch.tensor(rows)] if found.logits is not None else None
    return Candidates(found.token[at], found.confidence[at], planes, [None], logits=logits)


def _field(
    group: Sequence[Active], sizes: list[int], found: Candidates, column: Ints, cells: Ints, width: int
) -> Field:
    """Rows scattered to their block columns (`cells`), padded to the longest block."""
    shape = (len(group), width)
    zeros, no = np.zeros(shape), np.zeros(shape, dtype=np.bool_)

    def plane(values: Any, dtype: Any) -> Any:
        out = np.zeros(shape[0] * width, dtype=dtype)
        out[cells] = values
        return out.reshape(shape)

    def given(name: str, absent: NDArray[Any]) -> Any:
        return plane(found.planes[name], absent.dtype) if name in found.planes else absent

    states = [a.state for a in group]
    paced = group[0].rule.paced
    begun = [int(s.choice.alone and s.block_step > 0) for s in states]  # its first token was a step of its own
    paces = [_pace(s, paced, done) for s, done in zip(states, begun, strict=True)]
    size, steps, step, before = int64s([*zip(*paces, strict=True), begun]).reshape(4, -1)
    free: Any = True
    if any(a.masked is not None for a in group):
        free = np.asarray([m for a in group for m in a.masked or (True,) * len(a.columns)], dtype=np.bool_)
    keys = None
    if any(s.choice.noisy for s in states):
        seeds = [a.seq.seed for a in group for _ in a.columns]
        # the order of `origin` is drawn once a block
        firsts = [a.state.block_step if a.state.choice.options.get("ordering") == "origin" else 0 for a in group]
        rounds = [a.state.step - n for a, n in zip(group, firsts, strict=True) for _ in a.columns]
        positions = [p for a in group for p in a.positions]
        keys = plane(row_keys(seeds, rounds, positions, salt=1), np.uint64)
    return Field(
        masked=plane(free, np.bool_),
        held=no if free is True else plane(~free, np.bool_),
        confidence=plane(found.confidence, np.float64),
        entropy=given("entropy", zeros),
        margin=given("margin", zeros),
        kept=given("kept", zeros),
        differs=given("differs", no),
        ready=given("ready", no),
        keys=np.zeros(shape, dtype=np.uint64) if keys is None else keys,
        size=size,
        step=step,
        steps=steps,
        begun=before,
        options=[s.choice.options for s in states],
        memory=found.memory,
    )


def _pace(state: CanvasState, paced: bool, begun: int) -> tuple[int, int, int]:
    """Of a block: the tokens its quotas are spread over, its steps, and those done. begun: steps, of one token each,
    before the rule's own; a rule that is paced counts them among its steps all the same."""
    size, steps = state.layout.pace(state.block, paced)
    return size - begun, steps if paced else max(1, steps - begun), state.block_step - begun


def _records(a: Active, fixed: Mapping[int, int], found: Candidates, rows: Sequence[int]) -> dict[int, TokenLogprob]:
    """Records of the fixed tokens, of the raw distribution, where the request asks for them. rows: of this sequence in
    `found.stats` or `logits`."""
    top = a.seq.sampling.logprobs
    if top is None or not fixed:
        return {}
    where = dict(zip(a.positions, rows, strict=True))
    at, tokens, stats = [where[p] for p in fixed], list(fixed.values()), found.stats
    if stats is not None:
        chosen = stats.best[at].tolist()
    else:
        assert found.logits is not None
        few = found.logits[torch.tensor(at)]
        chosen = few.gather(1, torch.tensor(tokens, device=few.device)[:, None])[:, 0].tolist()
        stats, at = DenseRows(few).stats(norm=True, top=top), list(range(len(at)))
    records = [token_logprob(stats, r, t, x, top) for r, t, x in zip(at, tokens, chosen, strict=True)]
    return dict(zip(fixed, records, strict=True))


def settle(
    a: Active,
    d: Decision,
    *,
    kv_len: int | None,
    snapshot: tuple[int, ...] | None = None,
    counts: bool = True,
    remembers: bool = True,
) -> Commit:
    """The commit of a decision: canvas updated, block closed or not, text ended or not. snapshot: the block's ids under
    new outside K,V, None: those stay. remembers False: the step saw one position only, and the rule's memory stays;
    counts False: it is none of the block's own steps either."""
    seq, state = a.seq, a.state
    mask = seq.model.mask_id
    assert mask is not None
    changed = {**d.fixed, **dict.fromkeys(d.remask, mask)} if d.remask else d.fixed
    if d.open is None:
        left = _first_open(seq.tokens, mask, a, d)
    else:
        left = a.start + d.open[0] if d.open else a.stop
    done = left == a.stop if d.closed is None else d.closed
    firm = left if not state.choice.revises else a.stop if done else a.start
    end = ending(seq, state, changed, firm)
    # Arguments by position: by name they take half a microsecond more, of each sequence and step.
    after = CanvasState(
        state.choice,
        state.layout,
        state.block + done,
        state.step + 1,
        0 if done else state.block_step + counts,
        state.snapshot if snapshot is None else snapshot,
        state.end if end is None else end.end,
        None if done and not a.rule.lasting else d.memory if counts and remembers else state.memory,
        d.open or None,
    )
    if end is None:
        return Commit(d.fixed, d.remask, kv_len, after, seq.stable, None, d.records, d.provisional, done)
    return Commit(
        {**d.fixed, **dict.fromkeys(end.fill, fill_id(seq.model))} if end.fill else d.fixed,
        d.remask,
        kv_len,
        after,
        end.stable,
        end.finish,
        d.records,
        _NOTHING if end.finish else d.provisional,
        done,
    )


def _first_open(tokens: list[int], mask: int, a: Active, d: Decision) -> int:
    """The first position of the block that is masked after the decision; the block's end when none is."""
    at = a.start
    try:
        while (at := tokens.index(mask, at, a.stop)) in d.fixed:
            at += 1
    except ValueError:
        at = a.stop
    return min(at, *d.remask) if d.remask else at


def span_rows(a: Active, low: int, count: int) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """(want, shadows) of a span over [low, low + count) that serves this block: the row that predicts each position
    (the one before it on shifted models), and the shadow rows after the ordinary ones."""
    if a.masked is None or "shadow" not in a.state.choice.needs:
        first = low + a.seq.model.shift
        columns = a.columns + a.watched if a.watched else a.columns
        return columns if first == a.start else tuple([a.start + c - first for c in columns]), ()
    mask = a.seq.model.mask_id
    assert mask is not None
    free = tuple(p - low for p, masked in zip(a.positions, a.masked, strict=True) if masked)
    held = tuple(count + c for c, masked in zip(a.columns, a.masked, strict=True) if not masked)
    # Shadows see each other, so all positions of the block have one.
    return free + held, tuple((p, mask) for p in range(a.start, a.stop)) if held else ()
