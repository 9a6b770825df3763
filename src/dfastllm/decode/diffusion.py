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

from dfastllm.core import Commit, DecodeParams, ModelInfo, Request, SequenceState, Span, Store
from dfastllm.decode.candidates import Active, active_rows
from dfastllm.decode.canvas import CanvasState, Choice, Layout, check_canvas, choose, lay_out
from dfastllm.decode.denoise import denoise, settle, span_rows
from dfastllm.decode.evidence import Scorer
from dfastllm.decode.rows import Rows
from dfastllm.decode.unmask import RULES
from dfastllm.errors import UnsupportedError

__all__ = ["MaskedDiffusion"]

DEFAULT_BLOCK = 32


class MaskedDiffusion:
    """The `diffusion` policy. scorer: the autoregressive model of rule `apd`, None: that rule is refused."""

    name = "diffusion"

    def __init__(self, scorer: Scorer | None = None) -> None:
        self.scorer = scorer

    def check(self, request: Request, model: ModelInfo) -> None:
        """Raises ValidationError, ContextLengthError or UnsupportedError naming the field."""
        if model.kind != "diffusion" or model.mask_id is None:
            raise UnsupportedError(
                f"the diffusion decoder needs a full-attention model with a mask token; {model.name} is of kind "
                f"{model.kind!r} with mask id {model.mask_id}.",
                param="model",
            )
        choice, layout = self._choose(request)
        check_canvas(request, model, choice, layout, scorer=self.scorer.vocab_size if self.scorer else None)

    def begin(self, request: Request, model: ModelInfo) -> tuple[list[int], Any]:
        """The canvas all masked. Raises what `check` raises."""
        self.check(request, model)
        assert model.mask_id is not None
        choice, layout = self._choose(request)
        canvas = [model.mask_id] * (layout.stop - layout.start)
        return [*request.prompt, *canvas, *request.suffix], CanvasState(choice, layout)

    def bound(self, request: Request, model: ModelInfo) -> int:
        """Forwards at most, rebuilding after preemptions not counted."""
        choice, layout = self._choose(request)
        most = sum(layout.share(b) for b in range(layout.count))
        return most + layout.count * int(choice.options.get("max_post_steps", 0))

    def exactness(self, request: Request) -> str:
        cache = request.decode.cache if request.decode else None
        return "reference" if cache in (None, "none") else "approximate"

    def plan(self, seq: SequenceState, limit: int) -> Span:
        """A canvas is indivisible: `limit` does not shorten it."""
        state: CanvasState = seq.policy
        cache, total = state.choice.cache, len(seq.tokens)
        start, stop = state.bounds
        active = active_rows(seq, start, stop)
        if cache == "none" or _refreshes(state):
            want, shadows = span_rows(active, 0, total)
            stays: Store = "none" if cache == "none" else "keep"
            return Span(0, tuple(seq.tokens), "full", stays, want, shadows=shadows, plan=active)
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
        want, shadows = span_rows(active, low, high - low)
        return Span(low, tuple(seq.tokens[low:high]), "full", store, want, shadows=shadows, plan=active)

    def absorb(self, items: Sequence[tuple[SequenceState, Span]], rows: Rows) -> list[Commit]:
        active: list[Active] = [span.plan for _, span in items if span.want]
        decided = iter(zip(active, denoise(active, rows, self.scorer), strict=True))
        commits = []
        for seq, span in items:
            kept = _kept(seq) if span.store == "keep" else None
            if not span.want:  # only restored K,V
                commits.append(Commit(kv_len=kept, state=seq.policy, stable=seq.stable))
                continue
            a, decision = next(decided)
            snapshot = tuple(seq.tokens[a.start : a.stop]) if span.store == "keep" else None
            commits.append(settle(a, decision, kv_len=kept, snapshot=snapshot))
        return commits

    def _choose(self, request: Request) -> tuple[Choice, Layout]:
        decode = request.decode or DecodeParams()
        default = DEFAULT_BLOCK
        if decode.rule in RULES and RULES[decode.rule].paced:
            default = request.sampling.max_tokens  # Dream's schedule runs over the whole canvas
        choice = choose(decode, request.sampling, default)
        return choice, lay_out(request, choice)


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
