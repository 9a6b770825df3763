"""The unmasking rules: which masked positions of the active block to commit, from statistics of their rows.

A rule is a pure numpy function over many sequences at once: `Field` in, `Verdict` out. Arrays are [sequences, block],
column j being position block start + j, padded on the right with columns that are not masked. A rule says which
positions it accepts and how it ranks them; `decide` then guarantees progress: the best that `steps` demands are always
accepted (at least one), and never more than `max_parallel_tokens`. Ties go to the lowest position.

What a rule does not do: read logits, choose tokens, or know of caches. Sources are named at each rule; quirks of the
published code that are not copied are said there too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfastllm.decode.sampling import uniform

__all__ = ["RULES", "Field", "Option", "Rule", "Verdict", "decide", "quota"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Option:
    """One documented option of a rule or cache. Numbers lie in [low, high]; strings are one of `choices`."""

    default: Any
    help: str
    low: float = 0.0
    high: float = float("inf")
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Field:
    """Statistics of the active blocks of S sequences, padded to M columns.

    masked      bool [S, M]: undecided, a candidate.
    confidence  probability of the candidate token under the raw softmax; 0 elsewhere.
    entropy     nats, margin p1 - p2: only for rules that need them, else zeros.
    keys        uint64 [S, M]: randomness by (seed, decode step, position).
    size        int [S]: tokens of the block that are decided by this request (its masks at the block's start).
    step        int [S]: denoise steps done in this block before this one.
    steps       int [S]: denoise steps the block may take.
    options     per sequence, complete with defaults.
    """

    masked: Bools
    confidence: Floats
    entropy: Floats
    margin: Floats
    keys: NDArray[np.uint64]
    size: Ints
    step: Ints
    steps: Ints
    options: Sequence[Mapping[str, Any]]

    def option(self, name: str) -> Floats:
        """float64 [S, 1]."""
        return np.asarray([[o[name]] for o in self.options], dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Verdict:
    """accept: what the rule commits, before the floor. score: higher is better, orders the floor and the cap."""

    accept: Bools
    score: Floats


@dataclass(frozen=True, slots=True)
class Rule:
    """A named rule. needs: statistics beyond confidence. revises: it may re-mask or overwrite what it committed."""

    name: str
    decide: Callable[[Field], Verdict]
    help: str
    options: Mapping[str, Option] = field(default_factory=dict)
    needs: frozenset[str] = frozenset()
    revises: bool = False


def quota(size: int, steps: int, step: int) -> int:
    """Commits due at `step` (from 0) when `size` masks are spread over `steps`: the first size % steps get one more."""
    return size // steps + (step < size % steps)


def _due(f: Field) -> Ints:
    """int [S]: commits needed at this step so that `steps` is kept as a minimum rate; at least 1."""
    done = f.size - f.masked.sum(axis=1)
    at = np.minimum(f.step, f.steps - 1) + 1
    due = at * (f.size // f.steps) + np.minimum(at, f.size % f.steps)
    out: Ints = np.maximum(1, due - done)
    return out


def _rank(score: Floats, masked: Bools) -> Ints:
    """int [S, M]: 0 for the best masked position; unmasked ones come last. Equal scores: lowest position first."""
    order = np.argsort(np.where(masked, -score, np.inf), axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(order.shape[1]), order.shape), axis=1)
    return rank


def _prefix(accept: Callable[[Floats], Bools], score: Floats, masked: Bools) -> Bools:
    """Accept the longest prefix of the masked positions sorted by descending score. `accept` maps the sorted scores
    [S, M] to bools; positions after the first False are refused."""
    order = np.argsort(np.where(masked, -score, np.inf), axis=1, kind="stable")
    good = np.logical_and.accumulate(accept(np.take_along_axis(score, order, axis=1)), axis=1)
    out = np.zeros_like(masked)
    np.put_along_axis(out, order, good, axis=1)
    return out & masked


def decide(rule: Rule, f: Field) -> Bools:
    """bool [S, M]: the positions to commit. At least one per sequence that has a mask."""
    verdict = rule.decide(f)
    rank = _rank(verdict.score, f.masked)
    cap = np.asarray([o["max_parallel_tokens"] or f.masked.shape[1] for o in f.options], dtype=np.int64)
    accept = verdict.accept | (rank < _due(f)[:, None]) | _all_sure(f)
    return accept & f.masked & (rank < cap[:, None])


def _all_sure(f: Field) -> Bools:
    """bool [S, 1]: every masked position reaches `early_stop_confidence`, so the block need not be refined further."""
    enough = f.option("early_stop_confidence")
    least = np.where(f.masked, f.confidence, np.inf).min(axis=1, keepdims=True, initial=np.inf)
    out: Bools = (enough > 0) & (least >= enough)
    return out


# ---- rules ----------------------------------------------------------------------------------------------------------


def _none(f: Field) -> Bools:
    return np.zeros_like(f.masked)


def _schedule_score(f: Field) -> Floats:
    names = [o["remasking"] for o in f.options]
    out = f.confidence.copy()
    for i, name in enumerate(names):
        if name == "random":
            out[i] = uniform(f.keys[i])
        elif name == "entropy":
            out[i] = -f.entropy[i]
        elif name == "margin":
            out[i] = f.margin[i]
    return out


def _schedule(f: Field) -> Verdict:
    """Fixed quota m // s + (i < m % s) per step (Nie et al., LLaDA, 2025): the floor alone."""
    return Verdict(_none(f), _schedule_score(f))


def _threshold(f: Field) -> Verdict:
    """Every masked i with c_i >= threshold (Wu et al., Fast-dLLM, 2025)."""
    return Verdict(f.confidence >= f.option("threshold"), f.confidence)


# What every rule knows beside its own options.
_COMMON = {
    "max_parallel_tokens": Option(0, "at most this many commits a step; 0: no limit"),
    "early_stop_confidence": Option(
        0.0, "commit all that is left of a block once every position of it is this confident; 0: never", 0, 1
    ),
}

RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(
            "schedule",
            _schedule,
            "fixed quota per step, the best first",
            {"remasking": Option("low_confidence", "order", choices=("low_confidence", "random", "entropy", "margin"))},
            frozenset({"entropy", "margin"}),
        ),
        Rule(
            "threshold",
            _threshold,
            "every position at least this confident",
            {"threshold": Option(0.9, "confidence to reach", 0, 1)},
        ),
    )
}
for _rule in RULES.values():
    object.__setattr__(_rule, "options", {**_rule.options, **_COMMON})
