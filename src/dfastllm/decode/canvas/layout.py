"""What every canvas decoder shares: where its blocks lie, what it remembers, when its text ends.

No forward passes and no logits here. The canvas begins after the prompt and has `max_tokens` rounded up to whole blocks
(with a suffix it is exactly `max_tokens` and the last block may be shorter, because a cut would leave a hole before the
suffix). The text ends at the first EOS or stop token with no mask before it, or after `max_tokens`. `Commit.stable`
never passes that end, so the result is tokens[canvas_start : stable of the last commit], the ending token included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from dfastllm.core import DecodeParams, FinishReason, ModelInfo, Request, SequenceState, value
from dfastllm.decode.canvas.choice import Choice, check_first_token, check_rule, choose
from dfastllm.decode.canvas.rules import RULES
from dfastllm.errors import ValidationError

__all__ = ["Ahead", "CanvasState", "Ending", "Layout", "Passes", "canvas_bound", "compile_canvas", "ending", "fill_id"]

MOST_POINTS = 1 << 20  # steps of a rule with a schedule of its own, whose time grid is an array


@value(frozen=True, slots=True)
class Layout:
    """Where the blocks of a canvas lie. Positions are absolute; block b begins at origin + b * length.

    start, stop  the canvas. origin: start, or for block diffusion the multiple of `length` at or before it.
    steps        denoise steps of the whole canvas, or None for one per token.
    """

    start: int
    stop: int
    origin: int
    length: int
    steps: int | None
    bounds: tuple[tuple[int, int], ...] = field(init=False)  # [start, stop) of each block's canvas positions

    def __post_init__(self) -> None:
        begins = range(self.origin, self.stop, self.length)
        bounds = tuple([(max(b, self.start), min(b + self.length, self.stop)) for b in begins])
        object.__setattr__(self, "bounds", bounds)

    @property
    def count(self) -> int:
        return len(self.bounds)

    def share(self, block: int) -> int:
        """Denoise steps of a block at most: a fair share of `steps`, and no more than it has tokens (a step commits at
        least one)."""
        begin, end = self.bounds[block]
        return end - begin if self.steps is None else min(end - begin, self.points(block))

    def points(self, block: int) -> int:
        """A block's fair share of `steps`, the first blocks getting one more."""
        if self.steps is None:
            begin, end = self.bounds[block]
            return end - begin
        return self.steps // self.count + (block < self.steps % self.count)

    def pace(self, block: int, own: bool) -> tuple[int, int]:
        """(tokens, steps) that a block's quotas come from. own: of a rule that follows a schedule of its own, which is
        over the block's masks and may have more steps than those. Else, of a block that the prompt has begun the quotas
        are a whole block's, as in the published loops of block diffusion: it is done sooner."""
        begin, end = self.bounds[block]
        if own:
            return end - begin, self.points(block)
        size = self.length if block == 0 and self.origin < self.start else end - begin
        return size, size if self.steps is None else min(size, self.points(block))


@value(frozen=True, slots=True)
class Ahead:
    """What a sequence expects of its own next steps (see `lookahead`).

    steps     per step what it would commit, (position, token) pairs ascending; the last one at most fills the block.
    branches  how many of the canvases after them run beside the next step.
    rate      share of guesses that held, the recent ones weighing most.
    """

    steps: tuple[tuple[tuple[int, int], ...], ...]
    branches: int
    rate: float


@value(frozen=True, slots=True)
class Passes:
    """What the K,V of cache `delayed` are made of, after the last full forward.

    made  (positions, ids) of each forward since, in order. held: how many of them the K,V hold; fewer than there are
          while they are made again after a preemption.
    fresh  positions whose tokens changed with the last step: their K,V are still those of what stood there before.
    """

    made: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()
    held: int = 0
    fresh: tuple[int, ...] = ()


@value(frozen=True, slots=True)
class CanvasState:
    """Policy state of a canvas.

    block       the active block; step: denoise steps so far (it keys the draws); block_step: those within the block.
    snapshot    ids of the active block (cache sub_block: of the model's block) when the K,V outside it were made; what
                a rebuild runs over.
    end         one past the first stable ending token, once there is one.
    memory      the rule's own, for this block.
    open        the columns of the active block that are still masked, as the last step left them; None: `tokens` say.
    ahead       guesses of the next steps, of a request that asks for them.
    passes      of cache `delayed`.
    """

    choice: Choice
    layout: Layout
    block: int = 0
    step: int = 0
    block_step: int = 0
    snapshot: tuple[int, ...] = ()
    end: int | None = None
    memory: Any = None
    open: tuple[int, ...] | None = None
    ahead: Ahead | None = None
    passes: Passes | None = None

    @property
    def bounds(self) -> tuple[int, int]:
        return self.layout.bounds[self.block]


def compile_canvas(
    request: Request, model: ModelInfo, length: int, *, align: int = 0, scorer: int | None
) -> tuple[Choice, Layout]:
    """The choice and the layout of a request's canvas, in blocks of `length` tokens. align: 0, or the model's block
    length: then blocks lie at absolute multiples and the canvas ends with a whole model block. scorer: its vocabulary
    size, or None when the policy has none. A length that was not given gives way: near the end of the context the last
    block is shorter, and to few steps the blocks are wider. Raises ValidationError or UnsupportedError naming the
    field."""
    decode, tokens = request.decode or DecodeParams(), request.sampling.max_tokens
    assert tokens is not None, "max_tokens is resolved before a policy sees the request"
    start = len(request.prompt)
    if align:
        stop, origin = -(-(start + tokens) // align) * align, start // length * length
    else:
        stop, origin = start + (tokens if request.suffix else -(-tokens // length) * length), start
        if "block_length" not in decode.given:
            room = model.max_len - len(request.suffix)
            stop = room if start + tokens <= room < stop else stop
            length = _widened(decode, stop - start, length)
    choice = choose(decode, request.sampling, length, model)
    check_rule(RULES[choice.rule], model, scorer)
    check_first_token(choice, decode.options, model)
    count = -(-(stop - origin) // length)
    return choice, Layout(start, stop, origin, length, _steps(decode, choice, count, stop - start))


def _widened(decode: DecodeParams, canvas: int, length: int) -> int:
    """A default length of the blocks of a canvas, or a multiple of it where `steps` are given that have not one for
    each block."""
    steps, blocks = decode.steps, -(-canvas // length)
    return length * -(-blocks // steps) if steps and "steps" in decode.given else length


def _steps(decode: DecodeParams, choice: Choice, blocks: int, canvas: int) -> int | None:
    """The denoise steps of a canvas, None for one a token. What was given is checked, a default gives way. Raises
    ValidationError."""
    steps, most = decode.steps, choice.options["max_parallel_tokens"]
    if steps is None:
        return None
    if "steps" not in decode.given:
        steps = max(steps, blocks * (-(-choice.block_length // most) if most else 1))
    if steps < blocks:
        raise ValidationError(
            f"steps must be at least the number of blocks, {blocks} (canvas {canvas}, "
            f"block_length {choice.block_length}), got {steps}.",
            param="steps",
            hint="Raise steps or block_length, or ask for fewer tokens.",
        )
    if most and -(-choice.block_length // (steps // blocks)) > most:
        raise ValidationError(
            f"steps {steps} needs more commits a step than max_parallel_tokens {most} allows.",
            param="max_parallel_tokens",
            hint="Raise steps or max_parallel_tokens.",
        )
    if not RULES[choice.rule].paced:
        return None if steps // blocks >= choice.block_length else steps
    if steps > MOST_POINTS and "steps" in decode.given:
        raise ValidationError(
            f"steps of rule {choice.rule!r} must be at most {MOST_POINTS}, got {steps}.",
            param="steps",
            hint="Lower steps; one a token already changes one token at a time.",
        )
    return steps if steps <= MOST_POINTS else None


def canvas_bound(choice: Choice, layout: Layout, more: int = 0) -> int:
    """Deciding forwards of a canvas at most; more: of each block beside its denoise steps."""
    slow = RULES[choice.rule].paced and choice.options["max_parallel_tokens"]  # behind its schedule: one a step
    shares = [b - a for a, b in layout.bounds] if slow else [layout.share(b) for b in range(layout.count)]
    most = sum(shares)
    more += choice.alone
    return most + layout.count * (int(choice.options.get("max_post_steps", 0)) + more)


def fill_id(model: ModelInfo) -> int:
    """What undecided positions after the end of the text become in the last commit, so that no mask id is left."""
    if model.pad_id is not None and model.pad_id != model.mask_id:
        return model.pad_id
    return model.eos_ids[0] if model.eos_ids else int(model.mask_id == 0)


@value(frozen=True, slots=True)
class Ending:
    """stable and finish of a commit, `end` for the state, `fill`: positions still masked at the finish."""

    stable: int
    end: int | None
    finish: FinishReason | None
    fill: tuple[int, ...] = ()


def ending(seq: SequenceState, state: CanvasState, changed: Mapping[int, int], firm: int) -> Ending | None:
    """Where the text stands after a commit. changed: what the commit writes, position -> id; firm: absolute position
    before which nothing is masked and nothing can change any more. Stopping early is lossless: what lies behind an
    ending token or max_tokens is never shown. None: nothing became stable and nothing ended, as at most steps."""
    layout, end, ends = state.layout, state.end, seq.ends
    if end is None and firm <= seq.stable and firm < layout.stop and firm < ends.last:
        return None
    tokens, visible = seq.tokens, min(layout.stop, ends.last)
    if end is None:
        for p in range(max(seq.stable, layout.start), min(firm, visible)):
            token = changed.get(p, tokens[p])
            if token in ends.ids and ends.reason(p, token) is FinishReason.STOP:  # most are no ending token
                end = p + 1
                break
    stable = max(seq.stable, min(firm, visible if end is None else end))
    if firm < layout.stop and not (state.choice.early_stop and (end is not None or firm >= visible)):
        return Ending(stable, end, None)
    mask = seq.model.mask_id
    fill = tuple([p for p in range(layout.start, layout.stop) if changed.get(p, tokens[p]) == mask])
    return Ending(stable, end, FinishReason.LENGTH if end is None else FinishReason.STOP, fill)
