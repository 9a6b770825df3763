"""Block diffusion: blocks aligned to absolute positions, block-causal attention, exact K,V of what is finished.

A step on the active block is scratch: its K,V are not stored. When the block is final one forward must store them; it
is fused with the next block's first step (the span covers both, and the commit truncates to the end of the finished
block). That forward runs on the final ids by construction: a block closes only with the commit that fixes its last
token, or, under a rule that edits, with a step that changed nothing. Prefill and rebuilding after a preemption are the
same span over earlier blocks.

`block_length` shorter than the model's block (and dividing it) makes sub-blocks: they are filled left to right, while
attention and K,V keep to the model's blocks. Cache `sub_block` (Fast-dLLM v2, use_block_cache) then stores the K,V of
the model's block at the first step of each sub-block, and where the row before predicts at every step until the
sub-block's first token is there; the other steps run the sub-block alone, replacing its K,V. After a preemption those
K,V are made again from the ids they were made from (`CanvasState.snapshot`).

Models with shift 1 (Fast-dLLM v2): within a block row i-1 predicts position i; the first position of a block comes from
the last row of the forward that stores the block before it, which is then not fused, because the rest of the new block
can only be denoised once its first token is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dfastllm.core import Branch, Commit, DecodeParams, ModelInfo, Request, SequenceState, Span, Store, Tier
from dfastllm.decode.canvas.candidates import Active, active_rows
from dfastllm.decode.canvas.choice import caches_of
from dfastllm.decode.canvas.denoise import Decision, settle, span_rows
from dfastllm.decode.canvas.evidence import Scorer
from dfastllm.decode.canvas.layout import CanvasState, canvas_bound, compile_canvas
from dfastllm.decode.canvas.lookahead import absorb, chain, within
from dfastllm.decode.policy import Compiled
from dfastllm.errors import UnsupportedError, ValidationError
from dfastllm.kernels.rows import Rows

__all__ = ["BlockDiffusion"]


class BlockDiffusion:
    """The `block` policy. scorer: the autoregressive model of rule `apd`, None: that rule is refused."""

    name = "block"

    def __init__(self, scorer: Scorer | None = None) -> None:
        self.scorer = scorer

    def room(self, request: Request, model: ModelInfo, positions: int) -> int:
        """A canvas ends with a whole block, and where its length is ours has no more blocks than `steps`."""
        start, block, decode = len(request.prompt), max(1, model.block), request.decode or DecodeParams()
        stop = positions // block * block
        if decode.steps and "steps" in decode.given and "max_tokens" not in request.sampling.given:
            length = decode.block_length or block
            most = (start // length + decode.steps) * length // block * block
            stop = min(stop, max(most, start + max(1, request.sampling.min_tokens)))
        return stop - start

    def compile(self, request: Request, model: ModelInfo) -> Compiled:
        """Raises ValidationError or UnsupportedError naming the field."""
        if model.kind != "block" or model.mask_id is None or model.block < 1:
            raise UnsupportedError(
                f"the block decoder needs a block-diffusion model; {model.name} is of kind {model.kind!r}.",
                param="model",
            )
        if model.shift and not model.ar_first:
            raise UnsupportedError(
                f"{model.name} predicts from the row before but not the first token of a block.", param="model"
            )
        if request.suffix:
            raise UnsupportedError(
                f"{model.name} is block-causal: it cannot see a suffix while it writes.",
                param="suffix",
                hint="Choose a masked diffusion model.",
            )
        decode = request.decode or DecodeParams()
        if decode.cache is not None and decode.cache not in caches_of(model.kind):
            raise UnsupportedError(
                f"{model.name} keeps exact K,V of finished blocks; cache {decode.cache!r} does not apply.",
                param="cache",
                hint="Leave it out; sub_block, for sub-blocks, is the one there is.",
            )
        length = decode.block_length or model.block
        if model.block % length:
            raise ValidationError(
                f"block_length must divide the block of {model.name}, {model.block}, got {length}.",
                param="block_length",
            )
        scorer = self.scorer.vocab_size if self.scorer else None
        choice, layout = compile_canvas(request, model, length, align=model.block, scorer=scorer)
        tier = Tier.APPROXIMATE if choice.cache == "sub_block" else Tier.EXACT_FAST
        return Compiled(tier, layout.stop, (choice, layout, int(model.ar_first)))

    def begin(self, request: Request, model: ModelInfo, compiled: Compiled) -> tuple[list[int], Any]:
        """The canvas all masked."""
        assert model.mask_id is not None
        choice, layout, _ = compiled.plan
        return [*request.prompt, *[model.mask_id] * (layout.stop - layout.start)], CanvasState(choice, layout)

    def bound(self, compiled: Compiled) -> int:
        """Forwards at most after the prompt is in, rebuilding after preemptions not counted."""
        return canvas_bound(*compiled.plan)

    def plan(self, seq: SequenceState, limit: int) -> Span:
        """Stores finished blocks (at most `limit` rows of whole blocks) or denoises the active one, or both at once."""
        state: CanvasState = seq.policy
        size = seq.model.block
        start, stop = state.bounds
        base = start // size * size  # the model block the active block lies in
        held = min(seq.kv_len, base) // size * size
        active = _rows_of(seq, start, stop)
        inner = state.choice.cache == "sub_block"
        if inner and not _from_before(active) and not _refreshes(seq, state):
            if seq.kv_len >= base + size:
                return self._span(seq, _sub_block(state), stop, "replace", active, limit)
            return self._restored(seq, held, base, limit)
        if held == base:
            return self._span(seq, base, base + size, "keep" if inner else "scratch", active, limit)
        most = max(size, limit // size * size)
        if _from_before(active):
            end = min(base, held + most)
            return self._span(seq, held, end, "keep", active if end == base else None, limit)
        first = state.block_step == 0 and start <= max(base, state.layout.start)  # of the model's block
        if state.ahead is not None and held >= base - size:
            first = True  # its first steps may have been guesses beside the last of the block before it
        if not first or base + size - held > max(most, 2 * size):
            alone = base - size if first else base
            return self._span(seq, held, held + min(most, alone - held), "keep", None, limit)
        return self._span(seq, held, base + size, "keep", active, limit)

    @staticmethod
    def _restored(seq: SequenceState, held: int, base: int, limit: int) -> Span:
        """The next forward that restores the K,V of cache `sub_block`, those of [0, held) being there: of finished
        blocks, and in the end those of the model block at `base` as they were when its steps began to run apart."""
        size, state = seq.model.block, seq.policy
        stop = min(base + size, held + max(size, limit // size * size))
        ids = (*seq.tokens[held:base], *state.snapshot)[: stop - held]
        return Span(held, tuple(ids), "block", "keep", block=size)

    @staticmethod
    def _span(seq: SequenceState, low: int, high: int, store: Store, active: Active | None, limit: int) -> Span:
        ids, size = tuple(seq.tokens[low:high]), seq.model.block
        if active is None:
            return Span(low, ids, "block", store, block=size)
        want, shadows = span_rows(active, low, high - low)
        if active.state.ahead is None:
            return Span(low, ids, "block", store, want, size, shadows, (), (active,))  # by name it takes longer
        steps = chain(active, _rows_of, size)
        branches = within([_branch(a, high - size) for a in steps[1:]], limit - len(ids))
        steps = steps[: 1 + len(branches)]
        return Span(low, ids, "block", store, want, block=size, shadows=shadows, branches=branches, plan=steps)

    def absorb(self, items: Sequence[tuple[SequenceState, Span]], rows: Rows) -> list[Commit]:
        def first(seq: SequenceState, span: Span, a: Active, decision: Decision) -> Commit:
            size, own = seq.model.block, not _from_before(a)
            base = a.start // size * size
            if a.state.choice.cache != "sub_block" or not own:
                return settle(a, decision, kv_len=base if span.store == "keep" else None, counts=own)
            snapshot = tuple(seq.tokens[base : base + size]) if span.store == "keep" else None
            commit = settle(a, decision, kv_len=None, snapshot=snapshot)
            return replace(commit, kv_len=base) if commit.block_done and a.stop == base + size else commit

        return absorb(items, rows, self.scorer, first, _waiting, _reach)


def _rows_of(seq: SequenceState, start: int, stop: int) -> Active:
    """The rows of a step on the block [start, stop): where its first token comes from the row before it, that one."""
    if seq.model.ar_first and start % seq.model.block == 0 and seq.tokens[start] == seq.model.mask_id:
        return Active(seq, seq.policy, start, stop, (0,), (True,))
    return active_rows(seq, start, stop)


def _refreshes(seq: SequenceState, state: CanvasState) -> bool:
    """Whether a step with cache `sub_block` runs the whole block of the model."""
    return state.block_step == 0 or bool(seq.model.shift and seq.tokens[_sub_block(state)] == seq.model.mask_id)


def _sub_block(state: CanvasState) -> int:
    """The first position of the active sub-block, which may be the prompt's."""
    return state.bounds[0] // state.layout.length * state.layout.length


def _from_before(a: Active) -> bool:
    """Whether this is a block's first token, from the row before the block."""
    return a.masked is not None and a.seq.model.ar_first


def _branch(a: Active, base: int) -> Branch:
    """A canvas from the model block at `base` on, in which it may be finished and the next one active."""
    size = a.seq.model.block
    stop = a.start // size * size + (0 if _from_before(a) else size)
    return Branch(base, tuple(a.seq.tokens[base:stop]), span_rows(a, base, stop - base)[0])


def _waiting(seq: SequenceState, span: Span) -> Commit:
    """Of a forward that only stores K,V."""
    return Commit(state=seq.policy, stable=max(seq.stable, 0))


def _reach(last: Active) -> tuple[int, bool]:
    return last.seq.model.block, True
