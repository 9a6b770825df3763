"""The unmasking rules: which masked positions of the active block to commit, from statistics of their rows.

A rule is a pure function of arrays over many sequences at once: `Field` in, `Verdict` out (`field`). It says which
positions it accepts and how it ranks them; `decide` then guarantees progress: the best that `steps` demands are always
accepted (at least one), and never more than `max_parallel_tokens`. Those that revise are in `revising`.

What a rule does not do: read logits, choose tokens, or know of caches (`evidence` does the first for those that need
more than row statistics). Sources are named at each rule; what is not copied from published code is said there too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dfastllm.decode.canvas.field import (
    Bools,
    Field,
    Floats,
    Ints,
    Option,
    Rule,
    Verdict,
    best_of_runs,
    ordered,
    ranked,
)
from dfastllm.decode.canvas.grid import grid_counts, moments
from dfastllm.decode.canvas.revising import edit, edit_tokens, hierarchy_remask, remask_doubted, wino, wino_verify
from dfastllm.decode.sampling import uniform

__all__ = ["RULES", "decide", "quota"]


def quota(size: int, steps: int, step: int) -> int:
    """Commits due at `step` (from 0) when `size` masks are spread over `steps`: the first size % steps get one more."""
    return size // steps + (step < size % steps)


def decide(rule: Rule, f: Field) -> Bools:
    """bool [S, M]: the masked positions to commit; at least one of a sequence that has a mask."""
    verdict = rule.decide(f)
    most = [o["max_parallel_tokens"] for o in f.options]
    hurried = not rule.paced and bool((f.steps < f.size).any())  # else one a step is enough
    if any(most) or hurried or rule.alone:
        floor = _due(f) if hurried else np.ones_like(f.size)
        if rule.alone:
            some = (verdict.accept & f.masked).any(axis=1)
            floor = np.maximum(np.where(some, 0, floor), _last_call(f, most))
        rank = ranked(verdict.score, f.masked)
        accept = verdict.accept | (rank < floor[:, None])
    else:  # the best of each alone: no order needed
        accept = verdict.accept.copy()
        accept[np.arange(len(accept)), np.where(f.masked, verdict.score, -np.inf).argmax(axis=1)] = True
    enough = [o["early_stop_confidence"] for o in f.options]
    if any(enough):
        accept |= _all_sure(f, np.asarray(enough)[:, None])
    if any(most):
        accept &= rank < np.asarray([m or f.masked.shape[1] for m in most], dtype=np.int64)[:, None]
    return accept & f.masked


def _due(f: Field) -> Ints:
    """int [S]: commits due at this step so that `steps` is kept as a minimum rate; at least 1."""
    at = np.minimum(f.step, f.steps - 1)
    out: Ints = np.maximum(1, f.size // f.steps + (at < f.size % f.steps))
    return out


def _last_call(f: Field, most: Sequence[int]) -> Ints:
    """int [S]: the fewest commits at this step with which the steps that are left can still fill the block."""
    after = np.maximum(f.steps - f.step - 1, 0)
    width = f.masked.shape[1]
    out: Ints = np.maximum(0, f.masked.sum(axis=1) - after * np.asarray([m or width for m in most], dtype=np.int64))
    return out


def _all_sure(f: Field, enough: Floats) -> Bools:
    """bool [S, 1]: every masked position reaches `early_stop_confidence` (`enough`, 0: never), so the block need not be
    refined further."""
    least = np.where(f.masked, f.confidence, np.inf).min(axis=1, keepdims=True, initial=np.inf)
    out: Bools = (enough > 0) & (least >= enough)
    return out


def _prefix(score: Floats, masked: Bools, fits: Callable[[Floats], Bools]) -> Bools:
    """The longest prefix, by descending score, whose every member fits. `fits` maps the sorted scores [S, M] to bools;
    columns after the masked ones hold -inf there."""
    columns = ordered(score, masked)
    ranked = np.take_along_axis(np.where(masked, score, -np.inf), columns, axis=1)
    good = np.logical_and.accumulate(fits(ranked), axis=1)
    out = np.zeros_like(masked)
    np.put_along_axis(out, columns, good, axis=1)
    return out & masked


def _gumbel(keys: NDArray[np.uint64]) -> Floats:
    out: Floats = -np.log(-np.log(uniform(keys)))
    return out


# ---- rules that only commit ------------------------------------------------------------------------------------------


def _schedule(f: Field) -> Verdict:
    """Fixed quota m // s + (i < m % s) per step, the best first (Nie et al., LLaDA, 2025): the floor of `decide` alone.
    The order is by confidence, uniform noise, -entropy or margin, or from left to right (SDAR, 2025)."""
    orders = [options["remasking"] for options in f.options]
    none = np.zeros_like(f.masked)
    if orders.count("low_confidence") == len(orders):
        return Verdict(none, f.confidence)
    score = f.confidence.copy()
    for i, order in enumerate(orders):
        match order:
            case "random":
                score[i] = uniform(f.keys[i])
            case "entropy":
                score[i] = -f.entropy[i]
            case "margin":
                score[i] = f.margin[i]
            case "sequential":
                score[i] = -np.arange(score.shape[1])
    return Verdict(none, score)


def _dream(f: Field) -> Verdict:
    """Dream's schedule (Ye et al., 2025): with t from 1 to eps over steps + 1 points, n = m (1 - t[i+1] / t[i]) of the
    m masks left, all of them at the last step. Orderings: origin (each with probability n / m), maskgit_plus
    (confidence), topk_margin, entropy; alg_temp > 0 draws the positions from softmax(score / alg_temp) without
    replacement, here as the best of score / alg_temp + Gumbel noise.

    A point of the grid at which the published loop commits nothing would run the same canvas again; here it is passed
    over, so that every step commits something (see `grid.grid_counts`, and for origin `grid.moments`)."""
    score = f.confidence.copy()
    accept = np.zeros_like(f.masked)
    counts = np.zeros(len(f.options), dtype=np.int64)
    for i, options in enumerate(f.options):
        ordering = options["ordering"]
        steps, eps = int(f.steps[i]), options["eps"]
        if ordering == "origin":
            noise = uniform(f.keys[i])
            score[i] = noise
            moment = np.where(f.masked[i], moments(noise, steps, eps), steps)
            accept[i] = moment == moment.min()
            continue
        if ordering != "maskgit_plus":
            score[i] = f.margin[i] if ordering == "topk_margin" else -f.entropy[i]
        if options["alg_temp"] > 0:
            score[i] = score[i] / options["alg_temp"] + _gumbel(f.keys[i])
        plan = grid_counts(int(f.size[i]), steps, eps, int(f.begun[i]))
        # Behind the plan, as under max_parallel_tokens, the last point commits what is left.
        counts[i] = plan[f.step[i]] if f.step[i] < len(plan) - 1 else f.masked.shape[1]
    return Verdict(accept | (ranked(score, f.masked) < counts[:, None]), score)


def _threshold(f: Field) -> Verdict:
    """Every masked i with c_i >= threshold (Wu et al., Fast-dLLM, 2025); block-diffusion loops ask for more than the
    threshold (`layout.choose` sees to that)."""
    return Verdict(f.confidence >= f.option("threshold"), f.confidence)


def _credit(f: Field) -> Verdict:
    """The threshold over fused logits (`evidence.add_credit`), as dInfer has it: where nothing reaches it, all that
    come within 1e-5 of the best go with the best."""
    best = np.where(f.masked, f.confidence, 0.0).max(axis=1, keepdims=True)
    return Verdict(f.confidence >= np.minimum(f.option("threshold"), best - 1e-5), f.confidence)


def _factor(f: Field) -> Verdict:
    """The longest prefix by confidence with c_(n) >= 1 - factor / (n + 1), n from 1 (Fast-dLLM).

    last_rank: the published loop cannot tell a failure at the last rank from the end of the ranks, and takes the last
    one too when only it fails. That contradicts the bound of its paper, so it is a switch."""
    n = np.arange(1, f.masked.shape[1] + 1)
    accept = _prefix(f.confidence, f.masked, lambda c: (n == 1) | (c >= 1 - f.option("factor") / (n + 1)))
    last = f.masked & (accept.sum(axis=1) == f.masked.sum(axis=1) - 1)[:, None]
    return Verdict(accept | (last & (f.option("last_rank") > 0)), f.confidence)


def _entropy_bound(f: Field) -> Verdict:
    """The longest prefix whose sum of entropies less the largest is at most gamma (Ben-Hamu et al., EB-sampler, 2025):
    that bounds the joint mutual information of the accepted tokens. The prefix is by the error proxy `order`. bound
    "sum": the whole sum must be below gamma (what SDAR's entropy_bounded, 2025, is meant to do: its code takes the
    entropy of one number and then fails)."""
    score = -f.entropy
    for i, options in enumerate(f.options):
        if options["order"] != "entropy":
            score[i] = f.margin[i] if options["order"] == "margin" else f.confidence[i]
    order = ordered(score, f.masked)
    entropy = np.take_along_axis(np.where(f.masked, f.entropy, 0.0), order, axis=1)
    total, gamma = np.cumsum(entropy, axis=1), f.option("gamma")
    whole = np.asarray([[o["bound"] == "sum"] for o in f.options])
    fits = np.where(whole, total < gamma, total - np.maximum.accumulate(entropy, axis=1) <= gamma)
    accept = np.zeros_like(f.masked)
    np.put_along_axis(accept, order, np.logical_and.accumulate(fits, axis=1), axis=1)
    return Verdict(accept & f.masked, score)


def _hierarchy(f: Field) -> Verdict:
    """The best of every contiguous masked run if c > low_threshold, and all with c > threshold (dInfer's hierarchical
    decoding, 2025)."""
    best = best_of_runs(f.confidence, f.masked)
    accept = (best & (f.confidence > f.option("low_threshold"))) | (f.confidence > f.option("threshold"))
    return Verdict(accept, f.confidence)


def _local_leap(f: Field) -> Verdict:
    """Anchors c >= threshold, and their neighbours within `radius` with c >= relaxed_threshold (LocalLeap, 2025)."""
    anchor = f.masked & (f.confidence >= f.option("threshold"))
    radius = f.option("radius").astype(np.int64)
    width = f.masked.shape[1]
    total = np.pad(np.cumsum(anchor, axis=1), ((0, 0), (1, 0)))  # anchors before column j
    column = np.arange(width)[None, :]
    low, high = np.maximum(0, column - radius), np.minimum(width, column + radius + 1)
    near = np.take_along_axis(total, high, axis=1) > np.take_along_axis(total, low, axis=1)
    return Verdict(anchor | (near & (f.confidence >= f.option("relaxed_threshold"))), f.confidence)


def _klass(f: Field) -> Verdict:
    """c > threshold where the last kl_history_length divergences KL(p_t || p_t-1) are below kl_threshold (Kim et al.,
    KLASS, 2025). Where any position is ready, the ready ones are all that a step commits; where none is, the quota by
    confidence. What a row said at the last step of the block before is remembered (`evidence.drift`)."""
    return Verdict(f.ready & (f.confidence > f.option("threshold")), f.confidence)


def _apd(f: Field) -> Verdict:
    """The longest left-to-right prefix on which a draw from p_diffusion^w p_ar^(1-w) agrees with the diffusion draw
    under the same noise (Israel et al., adaptive parallel decoding, 2025). The leftmost is always accepted."""
    left = -np.broadcast_to(np.arange(f.masked.shape[1], dtype=np.float64), f.masked.shape)
    return Verdict(f.ready, left)


# What every rule knows beside its own options.
_COMMON = {
    "confidence": Option(
        "model",
        "what confidence, entropy and margin are read from. raw: the logits; drawn: the distribution a token is drawn "
        "from, after temperature, top_k and top_p; filtered: as drawn, and top_k and top_p count at temperature 0 too; "
        "model: as the model's own code does",
        choices=("model", "raw", "drawn", "filtered"),
    ),
    "max_parallel_tokens": Option(0, "at most this many commits a step; 0: no limit"),
    "early_stop_confidence": Option(
        0.0, "commit all that is left of a block once every position of it is this confident; 0: never", 0, 1
    ),
}


def _drafts(steps: int) -> dict[str, Option]:
    """For rules that decide by the rows of one step alone (`lookahead`)."""
    return {
        "draft_steps": Option(steps, "lossless: run up to so many guessed next steps beside each step; 0: none", 0, 64),
        "forward_rows": Option(
            12.0, "rows that a forward computes nearly for free; weighs how many guesses to run. Hundreds on a GPU", 0
        ),
    }


_ORDERS = ("low_confidence", "random", "entropy", "margin", "sequential")
_ORDERINGS = ("origin", "maskgit_plus", "topk_margin", "entropy")


def _confidence(default: float) -> dict[str, Option]:
    return {"threshold": Option(default, "confidence to reach", 0, 1)}


def _rule(name: str, fn: Callable[[Field], Verdict], text: str, *needs: str, **options: Option) -> Rule:
    common = {key: option for key, option in _COMMON.items() if key not in options}
    return Rule(name, fn, text, {**options, **common}, frozenset(needs))


_ALL = (
    _rule(
        "schedule",
        _schedule,
        "a fixed quota a step, the best first",
        remasking=Option("low_confidence", "what the best is", choices=_ORDERS),
        **_drafts(0),
    ),
    _rule(
        "free_dave",
        _schedule,
        "the fixed schedule, token for token, in fewer forwards: guessed next steps run beside each step",
        remasking=Option("low_confidence", "what the best is", choices=_ORDERS),
        **_drafts(4),
    ),
    replace(
        _rule(
            "dream",
            _dream,
            "Dream's schedule and orderings",
            ordering=Option("maskgit_plus", "what the best is", choices=_ORDERINGS),
            alg_temp=Option(0.0, "temperature of the choice of positions; 0: the best"),
            eps=Option(1e-3, "last point of the time grid", 1e-9, 0.5),
            **_drafts(0),
        ),
        paced=True,
    ),
    _rule("threshold", _threshold, "all that are confident", **_confidence(0.9), **_drafts(0)),
    _rule(
        "factor",
        _factor,
        "confident enough for the crowd",
        factor=Option(1.0, "larger accepts more", 1e-9),
        last_rank=Option(0, "1: the last rank goes too when only it fails, as in the published code", 0, 1),
        **_drafts(0),
    ),
    _rule(
        "entropy_bound",
        _entropy_bound,
        "bounded joint entropy",
        "spread",
        gamma=Option(0.1, "bound in nats"),
        order=Option("entropy", "what ranks the positions", choices=("entropy", "confidence", "margin")),
        bound=Option(
            "joint",
            "joint: the sum of entropies without the largest is at most gamma; sum: all of it is below gamma (SDAR)",
            choices=("joint", "sum"),
        ),
        **_drafts(0),
    ),
    _rule(
        "credit",
        _credit,
        "threshold over logits that remember earlier guesses",
        "credit",
        **_confidence(0.9),
        credit_alpha=Option(0.7, "weight of log(1 + credit) in the logits"),
        boost_gamma=Option(0.2, "a guess of confidence c adds c ** boost_gamma", 0, 10),
        decay_beta=Option(0.8, "credit kept from step to step", 0, 1),
    ),
    _rule(
        "hierarchy",
        _hierarchy,
        "the best of every masked run",
        **_confidence(0.9),
        low_threshold=Option(0.4, "confidence the best of a run must exceed", 0, 1),
        **_drafts(0),
    ),
    replace(
        _rule(
            "klass",
            _klass,
            "confident and stable",
            "drift",
            **_confidence(0.9),
            kl_threshold=Option(0.01, "divergence of a stable row, nats"),
            kl_history_length=Option(2, "divergences in a row that must be below it", 1, 16),
            confidence=Option("raw", _COMMON["confidence"].help, choices=_COMMON["confidence"].choices),
        ),
        alone=True,
        lasting=True,
    ),
    _rule(
        "local_leap",
        _local_leap,
        "anchors and their likely neighbours",
        **_confidence(0.9),
        relaxed_threshold=Option(0.75, "confidence of a neighbour", 0, 1),
        radius=Option(4, "how far a neighbour may be"),
        **_drafts(0),
    ),
    replace(
        _rule(
            "hierarchy_remask",
            hierarchy_remask,
            "the best of every masked run, committed tokens that are doubted among them",
            "held",
            **_confidence(0.9),
            low_threshold=Option(0.4, "confidence the best of a run must exceed", 0, 1),
            remask_threshold=Option(0.4, "confidence below which the row of a committed token makes it doubted", 0, 1),
        ),
        revise=remask_doubted,
        alone=True,
    ),
    replace(
        _rule(
            "wino",
            wino,
            "draft wide, mask again what its shadow row doubts",
            "shadow",
            **_confidence(0.6),
            threshold_back=Option(0.9, "probability below which a committed token is masked again", 0, 1),
            min_accept=Option(5, "the cap on a step's commits is at least this", 1),
            max_accept=Option(20, "and at most this", 1),
        ),
        revise=wino_verify,
    ),
    replace(
        _rule(
            "edit",
            edit,
            "overwrite committed tokens the model now disagrees with",
            "held",
            "edit",
            **_confidence(0.5),
            edit_threshold=Option(0.9, "probability a new token must exceed", 0, 1),
            max_post_steps=Option(16, "editing steps after the last mask", 1),
        ),
        revise=edit_tokens,
    ),
    _rule(
        "apd",
        _apd,
        "the prefix a small autoregressive model agrees with",
        "scorer",
        apd_mixture_weight=Option(0.7, "w of p_diffusion^w p_ar^(1-w)", 0, 1),
        max_lookahead=Option(100, "tokens scored a step", 1),
    ),
)

RULES: dict[str, Rule] = {rule.name: rule for rule in _ALL}
