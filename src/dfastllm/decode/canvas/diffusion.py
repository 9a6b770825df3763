"""Masked diffusion on a canvas: rule x cache x block length, all values of one policy.

Caches (the K,V of a bidirectional model depend on every token, so all but `none` are approximations, chosen by name):

none      every step runs the whole sequence and stores nothing: the reference.
prefix    a full forward at each block start stores K,V of what lies before the block; each step runs the rest.
dual      a full forward at each block start stores K,V of everything; each step runs the block, replacing its K,V.
windowed  as dual, but a step runs the block and `window` positions on each side, with a full forward every `refresh`
          steps of a block and for the first `warmup` steps of the request.
delayed   a step runs every masked position of the canvas and those the last step committed, wherever they lie; so K,V
          of a token are made once it has been committed, and stay until the next full forward: every `refresh` steps of
          a block, and its second (dKV-Cache-Decode, Ma et al., 2025).

The first commit of a block comes from its full forward. Where row i-1 predicts position i, with prefix and dual that
forward commits the block's first token alone, and the steps after it run the block's own rows (Fast-dLLM's loop for
Dream); under the option first_token "by_rule", and with the other caches, the row before the block is part of what
every step runs. Guidance (`cfg_scale`) runs the canvas without its prompt beside itself, with cache none.

After a preemption the outside K,V are rebuilt by one forward over the tokens they were made from: before the active
block the committed ones, in it `CanvasState.snapshot`, after it masks. With cache `delayed` the forwards since then
follow, as they were (`CanvasState.passes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dfastllm.core import Branch, Commit, DecodeParams, ModelInfo, Request, SequenceState, Span, Store, Tier
from dfastllm.decode.canvas.candidates import Active, active_rows, watching
from dfastllm.decode.canvas.choice import caches_of
from dfastllm.decode.canvas.denoise import Decision, settle, span_rows
from dfastllm.decode.canvas.evidence import Scorer
from dfastllm.decode.canvas.layout import CanvasState, Passes, canvas_bound, compile_canvas
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
        asked = request.decode.cache if request.decode is not None else None
        if asked is not None and asked not in caches_of(model.kind):
            raise UnsupportedError(
                f"cache {asked!r} is for block diffusion; {model.name} attends to its whole canvas.",
                param="cache",
                hint=f"Use one of {', '.join(caches_of(model.kind))}.",
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
        active = _rows_of(seq, start, stop)
        if state.choice.guidance:
            return _guided(active, total)
        if cache == "none" or _refreshes(seq, state):
            return _span(active, 0, total, "none" if cache == "none" else "keep", limit)
        low = _low(seq, state)
        if seq.kv_len < (low if cache == "prefix" else total):
            assert seq.model.mask_id is not None
            behind = [seq.model.mask_id] * (state.layout.stop - stop)
            ids = (*seq.tokens[:start], *state.snapshot, *behind, *seq.request.suffix)
            return Span(0, ids, "full", "keep")
        if cache == "delayed":
            return _delayed(active, total)
        store: Store = "scratch" if cache == "prefix" else "replace"
        high = total if cache == "prefix" else stop
        if cache == "windowed":
            window = state.choice.options["window"]
            low, high = max(0, min(low, start - window)), min(total, stop + window)
        return _span(active, low, high, store, limit)

    def absorb(self, items: Sequence[tuple[SequenceState, Span]], rows: Rows) -> list[Commit]:
        def first(seq: SequenceState, span: Span, a: Active, decision: Decision) -> Commit:
            whole = not (a.state.choice.alone and a.state.block_step == 0)
            if span.store == "keep":
                snapshot = tuple(seq.tokens[a.start : a.stop])
                commit = settle(a, decision, kv_len=_kept(seq), snapshot=snapshot, remembers=whole)
            else:
                commit = settle(a, decision, kv_len=None)
            if a.state.choice.cache == "delayed":
                commit = replace(commit, state=replace(commit.state, passes=_passed(a.state, span, decision)))
            return commit

        return absorb(items, rows, self.scorer, first, _waiting, _reach)


def _length(request: Request) -> int | None:
    """Of the blocks of its canvas; None: a schedule of the whole canvas (Dream's), which is one block."""
    decode = request.decode or DecodeParams()
    if decode.rule in RULES and RULES[decode.rule].paced and "block_length" not in decode.given:
        return None
    return decode.block_length or int(kind_defaults("diffusion")["block_length"])


def _rows_of(seq: SequenceState, start: int, stop: int) -> Active:
    """The rows of a step on the block [start, stop): of its full forward the one before the block alone, where that
    commits the first token alone."""
    state: CanvasState = seq.policy
    if state.choice.alone and state.block_step == 0:
        return Active(seq, state, start, stop, (0,), (True,))
    return active_rows(seq, start, stop)


def _refreshes(seq: SequenceState, state: CanvasState) -> bool:
    """Whether this step is a full forward that stores K,V."""
    cache, options = state.choice.cache, state.choice.options
    if state.block_step == 0:
        return True
    if cache == "delayed":  # the published loop for Dream has no second one at the second step
        return state.block_step % options["refresh"] == 0 or (state.block_step == 1 and not seq.model.shift)
    return cache == "windowed" and bool(state.step < options["warmup"] or state.block_step % options["refresh"] == 0)


def _low(seq: SequenceState, state: CanvasState) -> int:
    """The first row that a step of the active block needs, its full forward aside."""
    return state.bounds[0] - (0 if state.choice.alone else seq.model.shift)


def _kept(seq: SequenceState) -> int | None:
    """K,V positions worth keeping after a full forward: for `prefix` those before the first row a step runs."""
    state: CanvasState = seq.policy
    return _low(seq, state) if state.choice.cache == "prefix" else None


def _guided(active: Active, total: int) -> Span:
    """A step of the active block, and beside it the same canvas with masks for the prompt and the suffix."""
    seq, active = active.seq, watching(active, total)
    mask = seq.model.mask_id
    assert mask is not None
    want, _ = span_rows(active, 0, total)
    layout = active.state.layout
    unguided = (*[mask] * layout.start, *seq.tokens[layout.start : layout.stop], *[mask] * (total - layout.stop))
    beside = (Branch(0, unguided, want),)
    return Span(0, tuple(seq.tokens), "full", "none", want, branches=beside, passes=2, plan=(active,))


def _delayed(active: Active, total: int) -> Span:
    """A step with cache `delayed`: what is masked, what the last step changed, and the rows that predict those. Or,
    while K,V are made again, the next of the forwards that made them."""
    seq, active = active.seq, watching(active, total)
    passes, mask, shift = active.state.passes, seq.model.mask_id, seq.model.shift
    assert passes is not None
    if passes.held < len(passes.made):
        places, ids = passes.made[passes.held]
        return Span(places[0], ids, "full", "replace", places=places)
    canvas = range(seq.canvas_start, active.state.layout.stop)
    late = {p for p in canvas if seq.tokens[p] == mask}.union(passes.fresh)
    run = late.union([p - shift for p in (*late, *active.positions)] if shift else active.positions)
    places = tuple(sorted(run))
    want, shadows = span_rows(active, 0, total)
    row = {p: r for r, p in enumerate(places)}
    want = tuple([row[w] if w < total else w - total + len(places) for w in want])
    ids = tuple([seq.tokens[p] for p in places])
    return Span(places[0], ids, "full", "replace", want, 0, shadows, places=places, plan=(active,))


def _passed(state: CanvasState, span: Span, decision: Decision) -> Passes:
    """What the K,V of cache `delayed` are made of after a step."""
    made: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()
    if span.store != "keep":
        assert state.passes is not None
        made = (*state.passes.made, (span.places, span.ids))
    return Passes(made, len(made), tuple(decision.fixed))


def _span(active: Active, low: int, high: int, store: Store, limit: int) -> Span:
    """A step of the active block over [low, high), with the canvases it may lead to beside it."""
    seq, active = active.seq, watching(active, high)
    ids = tuple(seq.tokens[low:high])
    want, shadows = span_rows(active, low, high - low)
    if active.state.ahead is None:
        return Span(low, ids, "full", store, want, 0, shadows, (), (active,))  # by name it takes longer
    steps = chain(active, _rows_of, high - low)
    maybe = [Branch(low, tuple(a.seq.tokens[low:high]), span_rows(a, low, high - low)[0]) for a in steps[1:]]
    branches = within(maybe, limit - len(ids))
    return Span(low, ids, "full", store, want, branches=branches, plan=steps[: 1 + len(branches)])


def _waiting(seq: SequenceState, span: Span) -> Commit:
    """Of a forward that only restored K,V."""
    state: CanvasState = seq.policy
    if state.passes is not None:
        held = 0 if span.store == "keep" else state.passes.held + 1
        state = replace(state, passes=replace(state.passes, held=held))
    return Commit(kv_len=_kept(seq), state=state, stable=seq.stable)


def _reach(last: Active) -> tuple[int, bool]:
    total = len(last.seq.tokens)
    if last.state.choice.cache == "none":
        return total, True
    return total - _low(last.seq, last.state), False  # prefix: a block begins with a forward that stores K,V
