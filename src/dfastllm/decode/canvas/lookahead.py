"""Free draft-and-verify: several steps of a rule in one forward, their outcome exactly that of one step a forward.

From the logits of a step one can guess what the rule will commit in the next ones: what it would commit if the logits
stayed as they are. The canvases after those guesses run beside the next step (`Span.branches`). The step itself decides
as ever; if that is what was guessed, the first branch was the true next canvas and its rows decide the step after, and
so on while the guesses hold. What a row decides never depends on a guess, only which rows there are to look at. (Wu and
Zhang, Free Draft-and-Verification, 2025, arXiv 2510.00294, for the fixed schedule; here for every rule that decides by
the rows of one step.) Draws at T > 0 are keyed by (seed, step, position), so guesses repeat them.

How many branches run follows from the share of guesses that held and from what rows cost. Here: guesses, the walk along
those that held, their number. Not here: where spans lie (the policies) and what a step decides (`denoise`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from dfastllm.core import Branch, Commit, SequenceState, Span, TokenLogprob
from dfastllm.decode.canvas.candidates import Active, Candidates, by_logits
from dfastllm.decode.canvas.denoise import Decision, chosen, denoise, settle
from dfastllm.decode.canvas.evidence import Scorer
from dfastllm.decode.canvas.layout import Ahead, CanvasState
from dfastllm.kernels.rows import DenseRows, Rows

__all__ = ["absorb", "branches_worth", "chain", "within"]

FIRST_RATE = 0.6  # believed before anything was measured: enough to try where rows are cheap
MEMORY = 0.85  # weight of the past in the mean of what held
PROBE = 4  # steps between guesses that are only compared

RowsOf = Callable[[SequenceState, int, int], Active]


def chain(active: Active, rows_of: RowsOf, rows: int) -> tuple[Active, ...]:
    """The step itself, then the steps on the canvases it is guessed to lead to, fewer where many sequences share the
    fixed cost of a forward. rows_of: the rows of a step on a block of a sequence, as the policy would plan them; rows:
    of the span of a step."""
    ahead = active.state.ahead
    out = [active]
    if ahead is not None:
        share = active.state.choice.options["forward_rows"] / active.seq.company
        for step in ahead.steps[: branches_worth(ahead.rate, ahead.branches, rows, share)]:
            seq = _after(out[-1], step)
            out.append(rows_of(seq, *seq.policy.bounds))
    return tuple(out)


def _after(a: Active, step: Sequence[tuple[int, int]]) -> SequenceState:
    """A sequence as it would be after a step of its active block that commits these (position, token) pairs."""
    tokens, mask = a.seq.tokens.copy(), a.seq.model.mask_id
    for position, token in step:
        tokens[position] = token
    done = mask not in tokens[a.start : a.stop]
    state = CanvasState(
        a.state.choice,
        a.state.layout,
        block=a.state.block + done,
        step=a.state.step + 1,
        block_step=0 if done else a.state.block_step + 1,
    )
    seq = a.seq
    return SequenceState(seq.request, seq.model, tokens, seq.seed, policy=state, stable=seq.stable, ends=seq.ends)


def within(branches: Sequence[Branch], rows: int) -> tuple[Branch, ...]:
    """As many of the first branches as have at most so many rows."""
    out = []
    for branch in branches:
        rows -= len(branch.ids)
        if rows < 0:
            break
        out.append(branch)
    return tuple(out)


def absorb(
    items: Sequence[tuple[SequenceState, Span]],
    rows: Rows,
    scorer: Scorer | None,
    first: Callable[[SequenceState, Span, Active, Decision], Commit],
    waiting: Callable[[SequenceState, Span], Commit],
    reach: Callable[[Active], tuple[int, bool]],
) -> list[Commit]:
    """`Policy.absorb` of a canvas, where the plan of a span is a `chain`. first: the commit of a chain's first step;
    waiting: of a span without wanted rows; reach: see `_look_ahead`."""
    decisions = denoise([a for _, span in items if span.want for a in span.plan], rows, scorer)
    commits: list[Commit] = []
    walks: dict[int, Walk] = {}
    at = 0
    for seq, span in items:
        if not span.want:
            commits.append(waiting(seq, span))
            continue
        steps: tuple[Active, ...] = span.plan
        begin, at = at, at + len(steps)
        commit = first(seq, span, steps[0], decisions[begin])
        if steps[0].state.choice.drafts:
            walks[len(commits)] = _walk(steps, decisions[begin:at], commit)
        commits.append(commit)
    if walks:
        for i, commit in zip(walks, _look_ahead(list(walks.values()), reach), strict=True):
            commits[i] = commit
    return commits


@dataclass(frozen=True, slots=True)
class Walk:
    """One forward of one sequence: the commit of all its steps that count, and the last of them.

    rate  share of guesses that came true, this forward's included. company: see SequenceState.
    """

    commit: Commit
    last: Active
    decision: Decision
    rate: float
    company: int


def _walk(steps: Sequence[Active], decisions: Sequence[Decision], first: Commit) -> Walk:
    """Along the guesses that came true. first: the commit of steps[0]."""
    ahead = steps[0].state.ahead
    guesses, rate = (ahead.steps, ahead.rate) if ahead is not None else ((), FIRST_RATE)
    commits, last = [first], steps[0]
    for held, (guess, decision) in enumerate(zip(guesses, decisions, strict=False), 1):
        same = decision.fixed == dict(guess)
        rate = MEMORY * rate + (1 - MEMORY) * same
        before = commits[-1]
        if not same or before.finish is not None or held == len(steps):
            break
        a = steps[held]
        seq = SequenceState(
            a.seq.request,
            a.seq.model,
            a.seq.tokens,
            a.seq.seed,
            policy=before.state,
            stable=before.stable,
            ends=a.seq.ends,
        )
        last = Active(seq, before.state, a.start, a.stop, a.columns, a.masked)
        own = a.masked is None  # not the first token of a block from the row before it
        commits.append(settle(last, decisions[held], kv_len=None, counts=own))
    ran = [len(guess) for guess in guesses[: len(steps) - 1]]
    commit = _together(commits, drafted=sum(ran), accepted=sum(ran[: len(commits) - 1]))
    return Walk(commit, last, decisions[len(commits) - 1], rate, steps[0].seq.company)


def _together(commits: Sequence[Commit], drafted: int, accepted: int) -> Commit:
    """The commits of consecutive steps as one."""
    first, last = commits[0], commits[-1]
    if len(commits) == 1 and not drafted:
        return first
    fixed: dict[int, int] = {}
    records: dict[int, TokenLogprob] = {}
    for c in commits:
        fixed.update(c.fixed)
        records.update(c.logprobs)
    return replace(
        last,
        fixed=fixed,
        kv_len=first.kv_len,
        logprobs=records,
        block_done=any(c.block_done for c in commits),
        drafted=drafted,
        accepted=accepted,
    )


def _look_ahead(walks: Sequence[Walk], reach: Callable[[Active], tuple[int, bool]]) -> list[Commit]:
    """The commits of these walks with new guesses in their states. reach: after a step, the rows of the next one (a
    branch has as many), and whether the one that begins the next block could run as a branch too."""
    depths, crossing = [], []
    for w in walks:
        rows, crosses = reach(w.last)
        options = w.last.state.choice.options
        depths.append(branches_worth(w.rate, options["draft_steps"], rows, options["forward_rows"] / w.company))
        crossing.append(crosses and w.commit.state.block + 1 < w.last.state.layout.count)
    # now and then a guess to learn from, even where no branch is worth its rows
    wanted = [d or int(w.commit.state.step % PROBE == 0) for w, d in zip(walks, depths, strict=True)]
    guessed = _guesses(walks, [0 if w.commit.finish else n for w, n in zip(walks, wanted, strict=True)])
    out = []
    for w, steps, depth, crosses in zip(walks, guessed, depths, crossing, strict=True):
        run = min(depth, len(steps))
        fills = sum(map(len, steps[:run])) == len(w.last.columns) - len(w.decision.fixed)
        if run and fills and not crosses:
            run -= 1  # nothing is left to decide on the last of them
        out.append(replace(w.commit, state=replace(w.commit.state, ahead=Ahead(steps, run, w.rate))))
    return out


def branches_worth(rate: float, most: int, rows: int, forward_rows: float) -> int:
    """How many branches to run: the number k <= most with the most steps per time, 1 + rate + ... + rate^k steps in a
    forward of (1 + k) rows. Its time goes as hypot(forward_rows, rows): weights are read whatever the rows, arithmetic
    grows with them, and the one hides behind the other (within 10 % on CPUs, benchmarks/lossless.json). rate: share of
    guesses that hold, each given those before it."""
    best, speed, steps = 0, 0.0, 0.0
    for k in range(most + 1):
        steps += rate**k
        now = steps / math.hypot(forward_rows, (1 + k) * rows)
        if now > speed:
            best, speed = k, now
    return best


def _guesses(walks: Sequence[Walk], depths: Sequence[int]) -> list[tuple[tuple[tuple[int, int], ...], ...]]:
    """Per walk at most so many steps after its last: what each would commit if the logits stayed those of the last.
    Ends with the block."""
    out: list[list[tuple[tuple[int, int], ...]]] = [[] for _ in walks]
    seqs = [_after(w.last, tuple(w.decision.fixed.items())) for w in walks]
    lefts = [_still(w.last.columns, w.last.start, w.decision.fixed) for w in walks]
    for depth in range(max(depths, default=0)):
        alive = [i for i in range(len(walks)) if depth < depths[i] and lefts[i]]
        for part in _alike([walks[i] for i in alive]):
            members = [alive[j] for j in part]
            group = [_active(seqs[i], walks[i].last, lefts[i]) for i in members]
            rests = [_rows(walks[i].decision.rest, walks[i].last.columns, lefts[i]) for i in members]
            for i, a, fixed in zip(members, group, _decided(group, rests), strict=True):
                out[i].append(tuple(sorted(fixed.items())))
                seqs[i], lefts[i] = _after(a, out[i][-1]), _still(lefts[i], a.start, fixed)
    return [tuple(steps) for steps in out]


def _alike(walks: Sequence[Walk]) -> list[list[int]]:
    """Indices of those that are looked at together: one rule, and logits or statistics."""
    parts: dict[tuple[str, bool], list[int]] = {}
    for i, w in enumerate(walks):
        choice = w.last.state.choice
        parts.setdefault((choice.rule, choice.way[0]), []).append(i)
    return list(parts.values())


def _still(columns: Sequence[int], start: int, fixed: Mapping[int, int]) -> tuple[int, ...]:
    return tuple([c for c in columns if start + c not in fixed])


def _active(seq: SequenceState, last: Active, left: tuple[int, ...]) -> Active:
    return Active(seq, seq.policy, last.start, last.stop, left)


def _rows(rest: Candidates | None, columns: Sequence[int], left: Sequence[int]) -> Candidates:
    """Of the candidates of a block's last step those of the columns still left. They ascend both."""
    assert rest is not None  # kept by every step of a request that drafts
    at = np.searchsorted(columns, left)
    logits = rest.logits[torch.from_numpy(at)] if rest.logits is not None else None
    planes = {name: values[at] for name, values in rest.planes.items()}
    return Candidates(rest.token[at], rest.confidence[at], planes, [None], logits=logits)


def _decided(group: Sequence[Active], rests: Sequence[Candidates]) -> list[dict[int, int]]:
    """What the steps commit, given last step's rows."""
    if group[0].state.choice.way[0]:
        logits = torch.cat([r.logits for r in rests if r.logits is not None])
        found = by_logits(group, DenseRows(logits), None)
    else:
        names = rests[0].planes
        found = Candidates(
            np.concatenate([r.token for r in rests]),
            np.concatenate([r.confidence for r in rests]),
            {name: np.concatenate([r.planes[name] for r in rests]) for name in names},
            [None] * len(group),
        )
    return chosen(group, found)
