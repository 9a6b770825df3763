"""From a block's candidates to commits: the rule's choice, the records, the canvas after it.

The rules run in numpy, grouped by name, over [sequences, block]. What the rows say is `candidates`' to find out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dfastllm.core import Commit, TokenLogprob, value
from dfastllm.decode.candidates import Active, Candidates, by_logits, by_stats, route
from dfastllm.decode.canvas import CanvasState, ending, fill_id
from dfastllm.decode.evidence import Scorer
from dfastllm.decode.rows import DenseRows, Rows, int64s, token_logprob
from dfastllm.decode.sampling import row_keys
from dfastllm.decode.unmask import RULES, Field, Revision, Rule, decide

__all__ = ["Decision", "denoise", "settle", "span_rows"]

Ints = NDArray[np.int64]


@value(frozen=True, slots=True)
class Decision:
    """fixed: position -> token; remask: positions masked again; provisional: tokens of the other candidates; records:
    logprobs of `fixed` when asked; closed: the rule's own word on whether the block is final, None: it has none."""

    fixed: Mapping[int, int]
    remask: tuple[int, ...] = ()
    provisional: Mapping[int, int] = field(default_factory=dict)
    records: Mapping[int, TokenLogprob] = field(default_factory=dict)
    memory: Any = None
    closed: bool | None = None


def denoise(group: Sequence[Active], rows: Rows, scorer: Scorer | None = None) -> list[Decision]:
    """One Decision per block, of sequences of one model. rows: those of the blocks, in order. The mask is never a
    candidate, nor part of any distribution."""
    ways: dict[tuple[bool, ...], list[int]] = {}
    for i, a in enumerate(group):
        ways.setdefault(route(a), []).append(i)
    spots = _spots(group)
    out: dict[int, Decision] = {}
    for way, members in ways.items():
        some, part = group, rows
        if len(ways) > 1:
            some, part = [group[i] for i in members], rows.select([r for i in members for r in spots[i]])
        found = by_logits(some, part, scorer) if way[0] else by_stats(some, part)
        out.update(zip(members, _by_rule(some, found), strict=True))
    return [out[i] for i in range(len(group))]


def _spots(group: Sequence[Active]) -> list[range]:
    """The rows of each."""
    ends = accumulate([len(a.positions) for a in group])
    return [range(end - len(a.positions), end) for a, end in zip(group, ends, strict=True)]


def _by_rule(group: Sequence[Active], found: Candidates) -> list[Decision]:
    """Decisions of sequences whose rows were looked at together, rule by rule."""
    rules: dict[str, list[int]] = {}
    for i, a in enumerate(group):
        rules.setdefault(a.state.choice.rule, []).append(i)
    if len(rules) == 1:
        return _decide(group[0].rule, group, found, None)
    spots = _spots(group)
    out: dict[int, Decision] = {}
    for name, members in rules.items():
        at = np.asarray([r for i in members for r in spots[i]], dtype=np.int64)
        some = Candidates(
            found.token[at],
            found.confidence[at],
            {plane: values[at] for plane, values in found.planes.items()},
            [found.memory[i] for i in members],
            found.stats,
            found.logits,
        )
        out.update(zip(members, _decide(RULES[name], [group[i] for i in members], some, at), strict=True))
    return [out[i] for i in range(len(group))]


def _decide(rule: Rule, group: Sequence[Active], found: Candidates, at: Ints | None) -> list[Decision]:
    """Decisions of the sequences that share a rule. at: their rows in `found.stats` or `logits`; None: all."""
    counts = [len(a.positions) for a in group]
    width = max([a.stop - a.start for a in group])
    position = int64s([a.positions for a in group])
    cells = position + np.repeat([i * width - a.start for i, a in enumerate(group)], counts)  # in [sequences, block]
    f = _field(group, found, position, cells, width)
    accept = decide(rule, f)
    revision = rule.revise(f, accept) if rule.revise else None
    write = accept if revision is None else accept | revision.rewrite
    picked = np.flatnonzero(write.ravel()[cells])
    owners = (cells[picked] // width).tolist()
    fixed: list[dict[int, int]] = [{} for _ in group]
    for i, p, t in zip(owners, position[picked].tolist(), found.token[picked].tolist(), strict=True):
        fixed[i][p] = t
    more = any(a.state.choice.provisional or a.seq.sampling.logprobs is not None for a in group)
    if revision is None and not more:
        return [Decision(chosen, memory=memory) for chosen, memory in zip(fixed, found.memory, strict=True)]
    return [
        _decision(a, i, fixed[i], spot, found, at, revision)
        for i, (a, spot) in enumerate(zip(group, _spots(group), strict=True))
    ]


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
        return Decision(fixed, (), guesses, records, found.memory[number])
    again = tuple((np.flatnonzero(revision.remask[number]) + a.start).tolist())
    closed = None if revision.closed is None else bool(revision.closed[number])
    return Decision(fixed, again, guesses, records, revision.memory[number], closed)


def _field(group: Sequence[Active], found: Candidates, position: Ints, cells: Ints, width: int) -> Field:
    """Rows scattered to their block columns (`cells`), padded to the longest block."""
    shape = (len(group), width)
    zeros, no = np.zeros(shape), np.zeros(shape, dtype=np.bool_)

    def plane(values: Any, dtype: Any) -> Any:
        out = np.zeros(shape[0] * width, dtype=dtype)
        out[cells] = values
        return out.reshape(shape)

    def given(name: str, absent: NDArray[Any]) -> Any:
        return plane(found.planes[name], absent.dtype) if name in found.planes else absent

    numbers = [(a.stop - a.start, a.state.block_step, _steps(a)) for a in group]
    size, step, steps = np.array(numbers, dtype=np.int64).T
    free: Any = True
    if any(a.masked is not None for a in group):
        free = np.asarray([m for a in group for m in a.masked or (True,) * len(a.positions)], dtype=np.bool_)
    keys = None
    if any(a.state.choice.noisy for a in group):
        seeds = [a.seq.seed for a in group for _ in a.positions]
        rounds = [a.state.step for a in group for _ in a.positions]
        keys = plane(row_keys(seeds, rounds, position.tolist(), salt=1), np.uint64)
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
        options=[a.state.choice.options for a in group],
        memory=found.memory,
    )


def _steps(a: Active) -> int:
    """Denoise steps the block may take."""
    return a.stop - a.start if a.state.layout.steps is None else a.state.layout.share(a.state.block)


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
    a: Active, d: Decision, *, kv_len: int | None, snapshot: tuple[int, ...] | None = None, counts: bool = True
) -> Commit:
    """The commit of a decision: canvas updated, block closed or not, text ended or not. snapshot: the block's ids under
    new outside K,V, None: those stay. counts False: the step saw one position only and is none of the block's own."""
    seq, state = a.seq, a.state
    mask = seq.model.mask_id
    assert mask is not None
    changed = {**d.fixed, **dict.fromkeys(d.remask, mask)} if d.remask else d.fixed
    left = _first_open(seq.tokens, mask, a, d)
    done = left == a.stop if d.closed is None else d.closed
    firm = left if a.rule.revise is None else a.stop if done else a.start
    end = ending(seq, state, changed, firm)
    after = CanvasState(
        state.choice,
        state.layout,
        block=state.block + done,
        step=state.step + 1,
        block_step=0 if done else state.block_step + counts,
        snapshot=state.snapshot if snapshot is None else snapshot,
        end=end.end,
        memory=None if done else d.memory if counts else state.memory,
    )
    return Commit(
        fixed={**d.fixed, **dict.fromkeys(end.fill, fill_id(seq.model))} if end.fill else d.fixed,
        masked=d.remask,
        kv_len=kv_len,
        state=after,
        stable=end.stable,
        finish=end.finish,
        logprobs=d.records,
        provisional={} if end.finish else d.provisional,
        block_done=done,
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
        return tuple([p - first for p in a.positions]), ()
    mask = a.seq.model.mask_id
    assert mask is not None
    free = tuple(p - low for p, masked in zip(a.positions, a.masked, strict=True) if masked)
    held = tuple(p for p, masked in zip(a.positions, a.masked, strict=True) if not masked)
    return free + tuple(range(count, count + len(held))), tuple((p, mask) for p in held)
