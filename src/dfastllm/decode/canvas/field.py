"""What a rule sees and says: `Field` in, `Verdict` out, arrays over many sequences at once; and what a rule is.

Arrays are [sequences, block], column j being position block start + j, padded on the right with columns that are not
masked. Ties go to the lowest position. The rules themselves: `rules`, and those that revise: `revising`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfastllm.core import value

__all__ = [
    "Bools",
    "Field",
    "Floats",
    "Ints",
    "Option",
    "Revision",
    "Rule",
    "Verdict",
    "best_of_runs",
    "ordered",
    "ranked",
]

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


@value(frozen=True, slots=True)
class Field:
    """Statistics of the active blocks of S sequences, padded to M columns.

    masked      bool [S, M]: undecided, a candidate.
    confidence  probability of the candidate token under the raw softmax; 0 elsewhere.
    entropy     nats, and margin, p1 - p2: only for rules that need them, else zeros.
    keys        uint64 [S, M]: randomness by (seed, decode step, position).
    size        int [S]: tokens that the block's quotas are spread over: its masks at its start; of a block that the
                prompt has begun the whole block, as in the published block-diffusion loops.
    step        int [S]: denoise steps done in this block before this one.
    steps       int [S]: denoise steps the block may take; for a rule that is `paced`, those of its schedule.
    begun       int [S]: points of a paced schedule that are past before the block's first step.
    options     per sequence, complete with defaults.
    memory      per sequence: what the rule returned at the block's last step, None at its first (unless `lasting`).
    held        bool [S, M]: committed in this block and looked at again (revising rules only).
    kept        at held positions: probability of the committed token. differs: the candidate is another token.
    ready       bool [S, M]: what `evidence` found at masked positions (klass: stable; apd: agreed).
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
    memory: Sequence[Any]
    held: Bools
    kept: Floats
    differs: Bools
    ready: Bools
    begun: Ints

    def option(self, name: str) -> Floats:
        """float64 [S, 1]."""
        return np.asarray([[o[name]] for o in self.options], dtype=np.float64)


@value(frozen=True, slots=True)
class Verdict:
    """What a rule would commit. accept: bool [S, M]. score: higher is better, orders the floor and the cap."""

    accept: Bools
    score: Floats


@dataclass(frozen=True, slots=True)
class Revision:
    """What a revising rule changes of the `accept`ed positions' elders.

    remask  bool [S, M]: held positions to mask again; rewrite: held positions to overwrite with their candidate.
    memory  per sequence, for the next step of the same block.
    closed  bool [S] or None: the block is final just when the rule says so; None: when no mask is left.
    """

    remask: Bools
    rewrite: Bools
    memory: Sequence[Any]
    closed: Bools | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """A named rule.

    needs    "spread" (entropy and margin), "held" (rows of committed positions), "shadow" (their shadow rows), "edit"
             (a model trained to edit its tokens), "credit", "drift", "scorer" (see `evidence`).
    revise   given what is accepted: how it changes what it committed before. Then nothing in a block is stable before
             the block is.
    paced    it follows its own schedule over `steps`; others are held to an even rate.
    alone    where it accepts something, that is all a step commits: the even rate holds only where it accepts nothing.
    lasting  its memory outlives the block.
    """

    name: str
    decide: Callable[[Field], Verdict]
    help: str
    options: Mapping[str, Option] = field(default_factory=dict)
    needs: frozenset[str] = frozenset()
    revise: Callable[[Field, Bools], Revision] | None = None
    paced: bool = False
    alone: bool = False
    lasting: bool = False


def ordered(score: Floats, masked: Bools) -> Ints:
    """int [S, M]: columns by descending score, unmasked ones last. Equal scores: lowest position first."""
    return np.argsort(np.where(masked, -score, np.inf), axis=1, kind="stable")


def ranked(score: Floats, masked: Bools) -> Ints:
    """int [S, M]: 0 for the best masked position."""
    columns = ordered(score, masked)
    out = np.empty_like(columns)
    out[np.arange(len(columns))[:, None], columns] = np.arange(columns.shape[1])
    return out


def best_of_runs(confidence: Floats, masked: Bools) -> Bools:
    """The best of every contiguous masked run."""
    starts = masked & ~np.pad(masked, ((0, 0), (1, 0)))[:, :-1]
    run = np.cumsum(starts, axis=1)  # number of the run a masked column belongs to, from 1
    best = np.zeros_like(masked)
    places = ranked(confidence, masked)
    for r in range(1, int(run.max(initial=0)) + 1):
        here = masked & (run == r)
        ranks = np.where(here, places, masked.shape[1])
        best |= here & (ranks == ranks.min(axis=1, keepdims=True))
    return best
