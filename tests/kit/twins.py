"""The unmasking rules again: slow, float64, loops over plain lists, written from their published descriptions.

A twin sees one block of one sequence. `block[j]` is a token or None (masked); `rows[j]` the raw logits of the row that
predicts position j (for a held position of `wino`: those of its shadow). It answers (accepted columns, columns best
first, columns to mask again, column -> new token, memory, closed or None). `step` is the step within the block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

Rows = Sequence[Sequence[float]]
Block = Sequence[int | None]


class Answer(NamedTuple):
    accept: set[int]
    ranking: list[int]
    remask: frozenset[int] = frozenset()
    rewrite: Mapping[int, int] = MappingProxyType({})
    memory: Any = None
    closed: bool | None = None


class Ask(NamedTuple):
    block: Block
    rows: Rows
    mask: int
    options: dict[str, Any]
    step: int
    steps: int
    size: int
    memory: Any
    noise: Sequence[float]
    score: Callable[[Sequence[int], int], Rows] | None = None
    before: Sequence[int] = ()


def softmax(row: Sequence[float], mask: int) -> list[float]:
    top = max(x for t, x in enumerate(row) if t != mask)
    e = [0.0 if t == mask else math.exp(x - top) for t, x in enumerate(row)]
    total = math.fsum(e)
    return [x / total for x in e]


def best(p: Sequence[float]) -> int:
    return max(range(len(p)), key=lambda t: (p[t], -t))


def entropy(p: Sequence[float]) -> float:
    return -math.fsum(x * math.log(x) for x in p if x > 0)


def margin(p: Sequence[float]) -> float:
    first, second = sorted(p, reverse=True)[:2]
    return first - second


def masked(a: Ask) -> list[int]:
    return [j for j, t in enumerate(a.block) if t is None]


def probabilities(a: Ask) -> dict[int, list[float]]:
    return {j: softmax(a.rows[j], a.mask) for j in range(len(a.block))}


def by(score: dict[int, float], columns: Sequence[int]) -> list[int]:
    return sorted(columns, key=lambda j: (-score[j], j))


def schedule(a: Ask) -> Answer:
    p = probabilities(a)
    how = {
        "low_confidence": lambda j: max(p[j]),
        "random": lambda j: a.noise[j],
        "entropy": lambda j: -entropy(p[j]),
        "margin": lambda j: margin(p[j]),
    }[a.options["remasking"]]
    count = a.size // a.steps + (1 if a.step < a.size % a.steps else 0)
    ranking = by({j: how(j) for j in masked(a)}, masked(a))
    return Answer(set(ranking[:count]), ranking)


def grid_counts(size: int, steps: int, eps: float) -> list[int]:
    """What Dream's `_sample` commits at each of its steps, in its float32 numbers."""
    timesteps, left, out = torch.linspace(1, eps, steps + 1), size, []
    for i in range(steps):
        t, s = timesteps[i], timesteps[i + 1]
        masks = torch.tensor(left) / 1
        count = int(masks * (1 - s / t)) if i < steps - 1 else int(masks)
        out.append(count)
        left -= count
    return out


def dream(a: Ask) -> Answer:
    """The steps at which the published loop commits nothing are none here: they change nothing at temperature 0."""
    p, m = probabilities(a), masked(a)
    eps = a.options["eps"]
    if a.options["ordering"] == "origin":
        grid = [1 + (eps - 1) * i / a.steps for i in range(a.steps + 1)]
        times = {j: next((i for i in range(a.steps) if a.noise[j] >= grid[i + 1]), a.steps - 1) for j in m}
        return Answer({j for j in m if times[j] == min(times.values())}, by({j: a.noise[j] for j in m}, m))
    how = {
        "maskgit_plus": lambda j: max(p[j]),
        "topk_margin": lambda j: margin(p[j]),
        "entropy": lambda j: -entropy(p[j]),
    }[a.options["ordering"]]
    count = [n for n in grid_counts(a.size, a.steps, eps) if n][a.step]
    heat = a.options["alg_temp"]
    score = {j: how(j) / heat - math.log(-math.log(a.noise[j])) if heat else how(j) for j in m}
    ranking = by(score, m)
    return Answer(set(ranking[:count]), ranking)


def threshold(a: Ask) -> Answer:
    p, m = probabilities(a), masked(a)
    ranking = by({j: max(p[j]) for j in m}, m)
    chosen = set(ranking)
    for j in ranking[1:]:
        if max(p[j]) < a.options["threshold"]:
            chosen.discard(j)
    return Answer(chosen, ranking)


def factor(a: Ask) -> Answer:
    p, m = probabilities(a), masked(a)
    ranking = by({j: max(p[j]) for j in m}, m)
    bars = [-1.0] + [1 - a.options["factor"] / (n + 1) for n in range(2, len(ranking) + 1)]
    fails = [n for n, j in enumerate(ranking) if max(p[j]) < bars[n]]
    count = fails[0] if fails else len(ranking)
    if a.options["last_rank"] and count == len(ranking) - 1:
        count += 1
    return Answer(set(ranking[:count]), ranking)


def entropy_bound(a: Ask) -> Answer:
    p, m = probabilities(a), masked(a)
    error = {"entropy": lambda q: entropy(q), "confidence": lambda q: -max(q), "margin": lambda q: -margin(q)}
    ranking = by({j: -error[a.options["order"]](p[j]) for j in m}, m)
    taken: list[float] = []
    for n, j in enumerate(ranking):
        trial = [*taken, entropy(p[j])]
        if n > 0 and math.fsum(trial) - max(trial) > a.options["gamma"]:
            break
        taken = trial
    return Answer(set(ranking[: len(taken)]), ranking)


def credit(a: Ask) -> Answer:
    """Dense credit matrix over all positions and tokens."""
    o, vocab = a.options, len(a.rows[0])
    table = a.memory or [[0.0] * vocab for _ in a.block]
    table = [[c * o["decay_beta"] for c in row] for row in table]
    p = probabilities(a)
    for j in masked(a):
        table[j][best(p[j])] += max(p[j]) ** o["boost_gamma"]
    fused = [
        [x + o["credit_alpha"] * math.log(1 + c) for x, c in zip(row, add, strict=True)]
        for row, add in zip(a.rows, table, strict=True)
    ]
    fusion = {j: softmax(fused[j], a.mask) for j in masked(a)}
    top = max(max(q) for q in fusion.values())
    bar = min(o["threshold"], top - 1e-5)
    ranking = by({j: max(q) for j, q in fusion.items()}, list(fusion))
    chosen = {j for j in ranking if max(fusion[j]) >= bar}
    return Answer(chosen, ranking, memory=table, rewrite={j: best(fusion[j]) for j in ranking})


def hierarchy(a: Ask) -> Answer:
    p, m = probabilities(a), masked(a)
    c = {j: max(p[j]) for j in m}
    runs: list[list[int]] = []
    for j in m:
        if runs and runs[-1][-1] == j - 1:
            runs[-1].append(j)
        else:
            runs.append([j])
    chosen = {j for j in (by(c, run)[0] for run in runs) if c[j] > a.options["low_threshold"]}
    chosen |= {j for j in m if c[j] > a.options["threshold"]}
    return Answer(chosen | {by(c, m)[0]}, by(c, m))


def hierarchy_remask(a: Ask) -> Answer:
    p, o = probabilities(a), a.options
    c = {j: max(p[j]) for j in p}
    doubted = {j for j, t in enumerate(a.block) if t is not None and c[j] < o["remask_threshold"]}
    pool = sorted({*masked(a), *doubted})
    runs: list[list[int]] = []
    for j in pool:
        if runs and runs[-1][-1] == j - 1:
            runs[-1].append(j)
        else:
            runs.append([j])
    chosen = {j for j in (by(c, run)[0] for run in runs) if c[j] > o["low_threshold"]}
    chosen |= {j for j in pool if c[j] > o["threshold"]}
    chosen |= set([j for j in by(c, pool) if j not in chosen][: max(0, len(doubted) + 1 - len(chosen))])
    fresh = {j for j in chosen if a.block[j] is None}
    changed = {j: best(p[j]) for j in chosen & doubted if best(p[j]) != a.block[j]}
    held = len(a.block) - len(masked(a))
    shares = [a.size // a.steps + (1 if i < a.size % a.steps else 0) for i in range(a.steps)]
    # The rate of `steps` holds fresh commits, the last step takes all; then fewer go back.
    due = len(masked(a)) if a.step >= a.steps - 1 else 0
    fresh |= set(by(c, masked(a))[:due])
    again = sorted(doubted - chosen, key=lambda j: (c[j], j))
    spare = held + len(fresh) - sum(shares[: a.step + 1])
    again = again[: max(0, min(len(fresh) - 1, spare))]
    return Answer(fresh, by(c, masked(a)), remask=frozenset(again), rewrite=changed)


def klass(a: Ask) -> Answer:
    """Full previous distributions (zeros before the first step) and the divergences of the last steps per position; a
    step that is too early in its block for a full history trusts none. Ready positions are all that is committed; where
    there are none, the quota; at the last step of the block all that is left, where the published loop leaves masks."""
    p, m, o = probabilities(a), masked(a), a.options
    n, eps = o["kl_history_length"], 1e-12
    old, history = a.memory or ({j: [0.0] * len(a.rows[0]) for j in m}, {j: [0.0] * n for j in m})
    history = {j: list(history[j]) for j in m}
    for j in m:
        terms = (x * (math.log(x + eps) - math.log(y + eps)) for x, y in zip(p[j], old[j], strict=True))
        history[j] = [*history[j][1:], math.fsum(terms)]
    ready = {j for j in m if all(d < o["kl_threshold"] for d in history[j]) and max(p[j]) > o["threshold"]}
    ranking = by({j: max(p[j]) for j in m}, m)
    due = max(1, a.size // a.steps + (1 if a.step < a.size % a.steps else 0))
    chosen = ready if a.step >= n - 1 and ready else set(ranking[:due])
    return Answer(set(ranking) if a.step >= a.steps - 1 else chosen, ranking, memory=(p, history))


def local_leap(a: Ask) -> Answer:
    p, m, o = probabilities(a), masked(a), a.options
    anchors = [j for j in m if max(p[j]) >= o["threshold"]]
    chosen = set(anchors)
    for j in m:
        for anchor in anchors:
            if abs(anchor - j) <= o["radius"] and max(p[j]) >= o["relaxed_threshold"]:
                chosen.add(j)
    return Answer(chosen, by({j: max(p[j]) for j in m}, m))


def wino(a: Ask) -> Answer:
    p, m, o = probabilities(a), masked(a), a.options
    most = min(max(int(len(m) * 0.7), o["min_accept"]), o["max_accept"])
    ranking = by({j: max(p[j]) for j in m}, m)
    sure = [j for j in ranking if max(p[j]) > o["threshold"]]
    due = max(1, a.size // a.steps + (1 if a.step < a.size % a.steps else 0))
    chosen = set(sure[:most]) | set(ranking[:due])
    again: frozenset[int] = frozenset()
    if len(chosen) > 1:
        kept = {j: p[j][t] for j, t in enumerate(a.block) if t is not None}
        doubted = sorted((j for j in kept if kept[j] < o["threshold_back"]), key=lambda j: (kept[j], j))
        quota = sum(a.size // a.steps + (1 if i < a.size % a.steps else 0) for i in range(min(a.step + 1, a.steps)))
        fewer = min((a.memory or 1) - 1, len(kept) + len(chosen) - quota)
        again = frozenset(doubted[: max(0, fewer)])
    return Answer(chosen, ranking, remask=again, memory=len(chosen))


def edit(a: Ask) -> Answer:
    p, m, o = probabilities(a), masked(a), a.options
    ranking = by({j: max(p[j]) for j in m}, m)
    chosen = {j for j in m if max(p[j]) > o["threshold"]}
    changed = {
        j: best(p[j])
        for j, t in enumerate(a.block)
        if t is not None and best(p[j]) != t and max(p[j]) > o["edit_threshold"]
    }
    after = (a.memory or 0) + (0 if m else 1)
    closed = not m and (not changed or after >= o["max_post_steps"])
    return Answer(chosen, ranking, rewrite=changed, memory=after, closed=closed)


def apd(a: Ask) -> Answer:
    p, m, o = probabilities(a), masked(a), a.options
    drafts = [best(p[j]) for j in m[: o["max_lookahead"]]]
    assert a.score is not None
    opinion = a.score([*a.before, *drafts], len(drafts))
    count = 0
    for n, (j, draft) in enumerate(zip(m, drafts, strict=False)):
        w = o["apd_mixture_weight"]
        product = [
            -math.inf if x == 0 else w * math.log(x) + (1 - w) * y for x, y in zip(p[j], opinion[n], strict=True)
        ]
        if n > 0 and best(product) != draft:
            break
        count = n + 1
    return Answer(set(m[:count]), m)


TWINS: dict[str, Callable[[Ask], Answer]] = {
    f.__name__: f
    for f in (
        schedule,
        dream,
        threshold,
        factor,
        entropy_bound,
        credit,
        hierarchy,
        hierarchy_remask,
        klass,
        local_leap,
        wino,
        edit,
        apd,
    )
}
TWINS["free_dave"] = schedule  # which it reproduces in fewer forwards
