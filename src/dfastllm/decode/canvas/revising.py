"""The rules that revise what they committed: mask it again, or write it anew. A block of theirs is stable when it is
done."""

from __future__ import annotations

import numpy as np

from dfastllm.decode.canvas.field import Bools, Field, Ints, Revision, Verdict, best_of_runs, ranked

__all__ = ["edit", "edit_tokens", "hierarchy_remask", "remask_doubted", "wino", "wino_verify"]


def wino(f: Field) -> Verdict:
    """Wide in, narrow out (Hong et al., WINO, 2025). Draft: c > threshold, at most min(max(0.7 m, min_accept),
    max_accept) of the m masks."""
    low, high = f.option("min_accept"), f.option("max_accept")
    most = np.minimum(np.maximum(np.floor(f.masked.sum(axis=1, keepdims=True) * 0.7), low), high)
    accept = f.masked & (f.confidence > f.option("threshold")) & (ranked(f.confidence, f.masked) < most)
    return Verdict(accept, f.confidence)


def _spare(f: Field, accepted: Ints) -> Ints:
    """int [S]: how many held tokens may be masked again at a step that accepts so many, and keep up with `steps`."""
    at = np.minimum(f.step, f.steps - 1) + 1
    out: Ints = f.held.sum(axis=1) + accepted - at * (f.size // f.steps) - np.minimum(at, f.size % f.steps)
    return out


def wino_verify(f: Field, accept: Bools) -> Revision:
    """When more than one was accepted: held positions whose shadow row gives their token less than threshold_back are
    masked again, the least probable first, fewer than were accepted at the step before, and never so many that the
    block would fall behind `steps`. Each position of the block has a shadow, a mask; they see each other, and the
    canvas without the token of their own position (`Span.shadows`)."""
    accepted = accept.sum(axis=1)
    doubtful = f.held & (f.kept < f.option("threshold_back"))
    last = np.asarray([1 if m is None else m for m in f.memory], dtype=np.int64)
    allowed = np.where(accepted > 1, np.minimum(last - 1, _spare(f, accepted)), 0)
    remask = doubtful & (ranked(-f.kept, doubtful) < allowed[:, None])
    return Revision(remask, np.zeros_like(remask), accepted.tolist())


def edit(f: Field) -> Verdict:
    """LLaDA2.1 (2026), mask to token: c > threshold."""
    return Verdict(f.confidence > f.option("threshold"), f.confidence)


def edit_tokens(f: Field, accept: Bools) -> Revision:
    """Token to token: held positions whose best token is another one with p > edit_threshold are overwritten. After the
    last mask at most max_post_steps steps of that; the block is final when a step that began without masks changes
    nothing, or when they are used up."""
    rewrite = f.held & f.differs & (f.confidence > f.option("edit_threshold"))
    full = ~f.masked.any(axis=1)
    done = np.asarray([m or 0 for m in f.memory], dtype=np.int64) + full
    closed = full & (~rewrite.any(axis=1) | (done >= f.option("max_post_steps")[:, 0]))
    return Revision(np.zeros_like(rewrite), rewrite, done.tolist(), closed)


def _doubted(f: Field) -> tuple[Bools, Bools]:
    """(held positions that `hierarchy_remask` takes for masked, what it then transfers of those and the masked)."""
    doubtful = f.held & (f.confidence < f.option("remask_threshold"))
    pool = f.masked | doubtful
    take = best_of_runs(f.confidence, pool) & (f.confidence > f.option("low_threshold"))
    take |= pool & (f.confidence > f.option("threshold"))
    short = doubtful.sum(axis=1) + 1 - take.sum(axis=1)
    return doubtful, take | (pool & (ranked(f.confidence, pool & ~take) < short[:, None]))


def hierarchy_remask(f: Field) -> Verdict:
    """Hierarchical decoding over the masks and the committed tokens whose row is no longer sure of anything, c <
    remask_threshold; always one more is committed than are doubted, so that a step gains (dInfer's
    get_transfer_index_hierarchy_remask, 2025)."""
    return Verdict(_doubted(f)[1] & f.masked, f.confidence)


def remask_doubted(f: Field, accept: Bools) -> Revision:
    """Doubted tokens that are transferred are written anew, the others masked again: fewer than are committed, and
    never so many that the block would fall behind `steps`."""
    doubtful, take = _doubted(f)
    again = doubtful & ~take
    accepted = accept.sum(axis=1)
    allowed = np.minimum(accepted - 1, _spare(f, accepted))
    remask = again & (ranked(-f.confidence, again) < allowed[:, None])
    return Revision(remask, doubtful & take & f.differs, [None] * len(accepted))
