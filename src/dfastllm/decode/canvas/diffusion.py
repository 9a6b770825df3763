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
from typing import Any

from dfastllm.core import Branch, Commit, DecodeParams, ModelInfo, Request, SequenceState, Span, Store, Tier
from dfastllm.decode.canvas.candidates import Active, active_rows
from dfastllm.decode.canvas.denoise import Decision, settle, span_rows
from dfastllm.decode.canvas.evidence import Scorer
from dfastllm.decode.canvas.layout import CanvasState, canvas_bound, compile_canvas
from dfastllm.decode.canvas.lookahead import absorb, chain, within
from dfastllm.decode.canvas.rules import RULES
from dfastllm.decode.policy import Compiled
from dfastllm.errors import UnsupportedError
from dfastllm.kernels.rows import Rows
from dfastllm.options import kind_defaults

__all__ = ["MaskedDiffusion"]


class MaskedDiffusion:
    """The `diffusion` policy. scorer: the autoregressive model of rule `apd`, None: that rule is refused."""

    name = "diffusion"

    def __init__(self, scorer: Scorer | None = None) -> None:
        self.scorer = scorer

    def room(self, request: Request, model: ModelInfo, positions: int) -> int:
        """Without a suffix, blocks of a length that was given are whole; others are where the caller leaves the number
        of tokens to us. That number also gives way to `steps` that are too few for it."""
        left, length = positions - len(request.prompt) - len(request.suffix), _length(request)
        given, sampling = (request.decode or DecodeParams()).given, request.sampling
        demanded, free = "block_length" in given, "max_tokens" not in sampling.given
        if length is None:
            return left
        whole = left // length * length
        if not request.suffix and (demanded or (free and whole >= max(1, sampling.min_tokens))):
            left = whole
        if demanded and free and "steps" in given and request.decode is not None and request.decode.steps:
            left = min(left, max(request.decode.steps * length, sampling.min_tokens))
        return left

    def compile(self, request: Request, model: ModelInfo) -> Compiled:
        """Raises ValidationError or UnsupportedError naming the field."""
        if model.kind != "diffusion" or model.mask_id is None:
            raise UnsupportedError(
                f"the diffusion decoder needs a full-attention model with a mask token; {model.name} is of kind "
                f"{model.kind!r} with mask id {model.mask_id}.",
                param="model",
            )
        length = _length(request) or request.sampling.max_tokens or 1
        scorer = self.scorer.vocab_size if self.scorer else None
        choice, layout = compile_canvas(request, model, length, scorer=scorer)
        tier = Tier.APPROXIMATE if choice.cache != "none" else Tier.EXACT_FAST if choice.drafts else Tier.REFERENCE
        return Compiled(tier, layout.stop + len(request.suffix), (choice, layout))

    def begin(self, request: Request, model: ModelInfo, compiled: Compiled) -> tuple[list[int], Any]:
        """The canvas all masked."""
        assert model.mask_id is not None
        choice, layout = compiled.plan
        canvas = [model.mask_id] * (layout.stop - layout.start)
        return [*request.prompt, *canvas, *request.suffix], CanvasState(choice, layout)

    def bound(self, compiled: Compiled) -> int:
        """Forwards at most, rebuilding after preemptions not counted."""
        return canvas_bound(*compiled.plan)

    def plan(self, seq: SequenceState, limit: int) -> Span:
        """A canvas is indivisible: `limit` does not shorten it."""
        state: CanvasState = seq.policy
        cache, total = state.choice.cache, len(seq.tokens)
        start, stop = state.bounds
        active = active_rows(seq, start, stop)
        if cache == "none" or _refreshes(state):
            return _span(active, 0, total, "none" if cache == "none" else "keep", limit)
        low = start - seq.model.shift  # the first row the block needs
        if seq.kv_len < (low if cache == "prefix" else total):
            assert seq.model.mask_id is not None
            behind = [seq.model.mask_id] * (state.layout.stop - stop)
            ids = (*seq.tokens[:start], *state.snapshot, *behind, *seq.request.suffix)
            return Span(0, ids, "full", "keep")
        store: Store = "scratch" if cache == "prefix" else "replace"
        high = total if cache == "prefix" else stop
        if cache == "windowed":
            window = state.choice.options["window"]
            low, high = max(0, min(low, start - window)), min(total, stop + window)
        return _span(active, low, high, store, limit)

    def absorb(self, items: Sequence[tuple[SequenceState, Span]], rows: Rows) -> list[Commit]:
        def first(seq: SequenceState, span: Span, a: Active, decision: Decision) -> Commit:
            if span.store != "keep":
                return settle(a, decision, kv_len=None)
            return settle(a, decision, kv_len=_kept(seq), snapshot=tuple(seq.tokens[a.start : a.stop]))

        return absorb(items, rows, self.scorer, first, _waiting, _reach)


def _length(request: Request) -> int | None:
    """Of the blocks of its canvas; None: a schedule of the whole canvas (Dream's), which is one block."""
    decode = request.decode or DecodeParams()
    if decode.rule in RULES and RULES[decode.rule].paced and "block_length" not in decode.given:
        return None
    return decode.block_length or int(kind_defaults("diffusion")["block_length"])


def _refreshes(state: CanvasState) -> bool:
    """Whether this step is a full forward that stores K,V."""
    if state.block_step == 0:
        return True
    if state.choice.cache != "windowed":
        return False
    options = state.choice.options
    return bool(state.step < options["warmup"] or state.block_step % options["refresh"] == 0)


def _kept(seq: SequenceState) -> int | None:
    """K,V positions worth keeping after a full forward: for `prefix` those before the first row a step runs."""
    state: CanvasState = seq.policy
    return state.bounds[0] - seq.model.shift if state.choice.cache == "prefix" else None


def _span(active: Active, low: int, high: int, store: Store, limit: int) -> Span:
    """A step of the active block over [low, high), with the canvases it may lead to beside it."""
    seq = active.seq
    ids = tuple(seq.tokens[low:high])
    want, shadows = span_rows(active, low, high - low)
    if active.state.ahead is None:
        return Span(low, ids, "full", store, want, 0, shadows, (), (active,))  # by name it takes longer
    steps = chain(active, active_rows, high - low)
    maybe = [Branch(low, tuple(a.seq.tokens[low:high]), span_rows(a, low, high - low)[0]) for a in steps[1:]]
    branches = within(maybe, limit - len(ids))
    return Span(low, ids, "full", store, want, branches=branches, plan=steps[: 1 + len(branches)])


def _waiting(seq: SequenceState, span: Span) -> Commit:
    """Of a forward that only restored K,V."""
    return Commit(kv_len=_kept(seq), state=seq.policy, stable=seq.stable)


def _reach(last: Active) -> tuple[int, bool]:
    total = len(last.seq.tokens)
    if last.state.choice.cache == "none":
        return total, True
    return total - last.start + last.seq.model.shift, False  # prefix: a block begins with a forward that stores K,V
