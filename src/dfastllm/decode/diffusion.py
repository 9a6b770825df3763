"""Masked diffusion on a canvas: rule x cache x block length, all values of one policy.

Caches (the K,V of a bidirectional model depend on every token, so all but `none` are approximations, chosen by name):

none      every step runs the whole sequence and stores nothing: the reference.
prefix    a full forward at each block start stores K,V of what lies before the block; each step runs the rest.
dual      a full forward at each block start stores K,V of everything; each step runs the block, replacing its K,V.
windowed  as dual, but a step runs the block and `window` positions on each side, with a full forward every `refresh`
          steps of a block and for the first `warmup` steps of the request.

The first commit of a block comes from its full forward. On models whose row i-1 predicts position i the row before the
block is always part of what is run. After a preemption the outside K,V are rebuilt by one forward over the tokens they
were made from: before the active block the committed ones, in it `CanvasState.snapshot`, after it masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from dfastllm.core import Commit, ModelInfo, Request, SequenceState, Span
from dfastllm.decode.canvas import (
    CanvasState,
    block_bounds,
    block_steps,
    canvas_length,
    check_canvas,
    ending,
    fill_id,
)
from dfastllm.decode.denoise import Active, Decision, denoise
from dfastllm.errors import UnsupportedError

__all__ = ["MaskedDiffusion"]


class MaskedDiffusion:
    """The `diffusion` policy."""

    name = "diffusion"

    def check(self, request: Request, model: ModelInfo) -> None:
        """Raises ValidationError, ContextLengthError or UnsupportedError naming the field."""
        if model.kind != "diffusion":
            raise UnsupportedError(
                f"the diffusion decoder needs a masked full-attention model, but {model.name} is {model.kind!r}.",
                param="model",
            )
        check_canvas(request, model, aligned=False)

    def begin(self, request: Request, model: ModelInfo) -> tuple[list[int], Any]:
        choice = check_canvas(request, model, aligned=False)
        assert model.mask_id is not None
        canvas = [model.mask_id] * canvas_length(request, choice.block_length, aligned=False)
        return [*request.prompt, *canvas, *request.suffix], CanvasState(choice)

    def bound(self, request: Request, model: ModelInfo) -> int:
        """Forwards at most, rebuilding after preemptions not counted."""
        choice = check_canvas(request, model, aligned=False)
        length = canvas_length(request, choice.block_length, aligned=False)
        return length if choice.steps is None else min(length, choice.steps)

    def exactness(self, request: Request) -> str:
        cache = request.decode.cache if request.decode else None
        return "reference" if cache in (None, "none") else "approximate"

    def plan(self, seq: SequenceState, limit: int) -> Span:
        state: CanvasState = seq.policy
        cache, total = state.choice.cache, len(seq.tokens)
        start, stop = block_bounds(seq, state, aligned=False)
        mask = seq.model.mask_id
        rows = [p - seq.model.shift for p in range(start, stop) if seq.tokens[p] == mask]
        if cache == "none":
            return Span(0, tuple(seq.tokens), "full", "none", want=tuple(rows))
        if _refresh_due(state):
            return Span(0, tuple(seq.tokens), "full", "keep", want=tuple(rows))
        low = start - seq.model.shift  # first row the block needs
        if seq.kv_len < (low if cache == "prefix" else total):
            assert mask is not None
            ids = (*seq.tokens[:start], *state.snapshot, *[mask] * (seq.canvas_stop - stop), *seq.request.suffix)
            return Span(0, ids, "full", "keep")
        if cache == "prefix":
            return Span(low, tuple(seq.tokens[low:]), "full", "scratch", want=tuple(r - low for r in rows))
        window = state.choice.options["window"] if cache == "windowed" else 0
        low, high = max(0, min(low, start - window)), min(total, stop + window)
        return Span(low, tuple(seq.tokens[low:high]), "full", "replace", want=tuple(r - low for r in rows))

    def absorb(self, items: Sequence[tuple[SequenceState, Span]], logits: torch.Tensor) -> list[Commit]:
        active = [_active(seq) for seq, span in items if span.want]
        decisions = iter(denoise(active, logits))
        return [_commit(seq, span, next(decisions)) if span.want else _rebuilt(seq) for seq, span in items]


def _refresh_due(state: CanvasState) -> bool:
    """Whether this step is a full forward that stores K,V."""
    if state.block_step == 0:
        return True
    if state.choice.cache != "windowed":
        return False
    options = state.choice.options
    return bool(state.step < options["warmup"] or state.block_step % options["refresh"] == 0)


def _active(seq: SequenceState) -> Active:
    state: CanvasState = seq.policy
    start, stop = block_bounds(seq, state, aligned=False)
    mask = seq.model.mask_id
    positions = tuple(p for p in range(start, stop) if seq.tokens[p] == mask)
    return Active(seq, state, start, stop, block_steps(seq, state, stop - start, aligned=False), positions)


def _kept(seq: SequenceState) -> int | None:
    """K,V positions worth keeping after a full forward."""
    state: CanvasState = seq.policy
    if state.choice.cache != "prefix":
        return None
    return block_bounds(seq, state, aligned=False)[0] - seq.model.shift


def _rebuilt(seq: SequenceState) -> Commit:
    """Nothing is decided by a forward that only restores K,V."""
    return Commit(kv_len=_kept(seq), state=seq.policy, stable=seq.stable)


def _commit(seq: SequenceState, span: Span, d: Decision) -> Commit:
    state: CanvasState = seq.policy
    start, stop = block_bounds(seq, state, aligned=False)
    first, mask = seq.canvas_start, seq.model.mask_id
    canvas = seq.tokens[first : seq.canvas_stop]
    for p, token in d.fixed.items():
        canvas[p - first] = token
    left = next((p for p in range(start, stop) if canvas[p - first] == mask), stop)
    done = left == stop
    end = ending(seq, state, canvas, firm=left)
    fixed = {**d.fixed, **dict.fromkeys(end.fill, fill_id(seq.model))}
    full = span.store == "keep"
    after = replace(
        state,
        block=state.block + done,
        step=state.step + 1,
        block_step=0 if done else state.block_step + 1,
        snapshot=tuple(seq.tokens[start:stop]) if full else state.snapshot,
        end=end.end,
        memory=None if done else d.memory,
    )
    return Commit(
        fixed=fixed,
        kv_len=_kept(seq) if full else None,
        state=after,
        stable=max(end.stable, seq.stable),
        finish=end.finish,
        logprobs=d.records,
        provisional={} if end.finish else d.provisional,
        block_done=done,
    )
