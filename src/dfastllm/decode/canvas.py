"""What every canvas decoder shares: the choice a request makes, where its blocks lie, when its text ends.

No forward passes and no logits here. The canvas is [canvas_start, canvas_stop): `max_tokens` rounded up to whole blocks
(with a suffix it is exactly `max_tokens` and the last block may be shorter, because a cut would leave a hole before the
suffix). Text ends at the first EOS or stop token with no mask before it, or after `max_tokens`; `Commit.stable` never
passes that end, so the result is tokens[canvas_start : stable of the last commit], the ending token included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dfastllm.core import DecodeParams, FinishReason, ModelInfo, Request, SequenceState
from dfastllm.decode.ar import check_prompt, enders
from dfastllm.decode.sampling import check_sampling
from dfastllm.decode.unmask import RULES, Option, Rule
from dfastllm.errors import ContextLengthError, UnsupportedError, ValidationError

__all__ = [
    "CACHES",
    "CanvasState",
    "Choice",
    "Ending",
    "blocks",
    "canvas_length",
    "check_canvas",
    "choose",
    "ending",
    "fill_id",
]

CACHES: dict[str, dict[str, Option]] = {
    "none": {},
    "prefix": {},
    "dual": {},
    "windowed": {
        "window": Option(16, "positions recomputed on each side of the block"),
        "refresh": Option(8, "full forward every so many steps of a block", 1),
        "warmup": Option(4, "first steps of a request that are full forwards"),
    },
}


@dataclass(frozen=True, slots=True)
class Choice:
    """Decoder options of one request, complete and checked. steps: denoise steps of each block, None: one per token."""

    rule: str
    cache: str
    block_length: int
    steps: int | None
    early_stop: bool
    provisional: bool
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CanvasState:
    """Policy state of a canvas. Positions are absolute.

    block       index of the active block; step: denoise steps so far (it keys the draws); block_step: within the block.
    snapshot    ids of the active block when the K,V outside it were made; what a rebuild runs over.
    end         one past the first stable ending token, once there is one.
    memory      the rule's own state.
    """

    choice: Choice
    block: int = 0
    step: int = 0
    block_step: int = 0
    snapshot: tuple[int, ...] = ()
    end: int | None = None
    memory: Any = None


def _rule_of(decode: DecodeParams) -> Rule:
    name = decode.rule
    if name is None:
        name = "factor" if decode.factor is not None else "threshold" if decode.threshold is not None else "schedule"
    if name not in RULES:
        raise UnsupportedError(f"rule {name!r} is unknown.", param="rule", hint=f"Known: {', '.join(sorted(RULES))}.")
    return RULES[name]


def _option(name: str, value: Any, option: Option) -> Any:
    """`value` converted to the option's type; ValidationError when it does not fit."""
    if option.choices:
        if value not in option.choices:
            raise ValidationError(f"{name} must be one of {', '.join(option.choices)}, got {value!r}.", param=name)
        return value
    wanted: type = type(option.default)
    good = isinstance(value, bool) if wanted is bool else isinstance(value, int | float) and not isinstance(value, bool)
    if wanted is int and good:
        good = float(value).is_integer()
    if not good or not (wanted is bool or option.low <= value <= option.high):
        raise ValidationError(
            f"{name} must be {'true or false' if wanted is bool else f'in [{option.low:g}, {option.high:g}]'}"
            f"{' and whole' if wanted is int else ''}, got {value!r}.",
            param=name,
        )
    return wanted(value)


def choose(decode: DecodeParams, model: ModelInfo) -> Choice:
    """The complete choice of a request. Raises UnsupportedError for an unknown or unusable name, ValidationError for a
    bad value."""
    rule = _rule_of(decode)
    given: dict[str, Any] = dict(decode.options)
    for name in ("threshold", "factor", "remasking"):
        value = getattr(decode, name)
        if value is None or (name == "remasking" and value == "low_confidence"):
            continue
        if name in given:
            raise ValidationError(f"{name} is given twice, as a field and in options.", param=name)
        if name in rule.options:
            given[name] = value
        elif not (name == "threshold" and rule.name == "factor"):  # factor overrides threshold by definition
            raise UnsupportedError(
                f"rule {rule.name!r} has no {name}.", param=name, hint="Leave it out or change rule."
            )
    cache = "none" if decode.cache is None else decode.cache
    known = {**rule.options, **CACHES[cache]}
    for name in given:
        if name not in known:
            raise UnsupportedError(
                f"option {name!r} is unknown to rule {rule.name!r} with cache {cache!r}.",
                param=name,
                hint=f"Known: {', '.join(sorted(known))}.",
            )
    options = {name: _option(name, given.get(name, o.default), o) for name, o in known.items()}
    return Choice(
        rule=rule.name,
        cache=cache,
        block_length=decode.block_length or model.block or 32,
        steps=decode.steps,
        early_stop=decode.early_stop,
        provisional=decode.provisional,
        options=options,
    )


def canvas_length(request: Request, block_length: int, aligned: bool) -> int:
    """Canvas tokens. aligned: blocks lie at absolute multiples of block_length (block diffusion)."""
    wanted = request.sampling.max_tokens
    if request.suffix:
        return wanted
    head = len(request.prompt) % block_length if aligned else 0
    return -(-(head + wanted) // block_length) * block_length - head


def blocks(start: int, stop: int, block_length: int, aligned: bool) -> int:
    """How many blocks the canvas [start, stop) has."""
    base = start // block_length * block_length if aligned else start
    return -(-(stop - base) // block_length)


def block_bounds(seq: SequenceState, state: CanvasState, aligned: bool) -> tuple[int, int]:
    """[start, stop) of the active block's canvas positions; the first aligned block begins inside the prompt's last."""
    length = state.choice.block_length
    base = seq.canvas_start // length * length if aligned else seq.canvas_start
    start = base + state.block * length
    return max(start, seq.canvas_start), min(start + length, seq.canvas_stop)


def block_steps(seq: SequenceState, state: CanvasState, size: int, aligned: bool) -> int:
    """Denoise steps the active block may take: a fair share of `steps`, the first blocks getting the remainder."""
    steps = state.choice.steps
    if steps is None:
        return size
    count = blocks(seq.canvas_start, seq.canvas_stop, state.choice.block_length, aligned)
    return steps // count + (state.block < steps % count)


def check_canvas(request: Request, model: ModelInfo, aligned: bool) -> Choice:
    """Raises ValidationError, ContextLengthError or UnsupportedError naming the field; returns the choice."""
    if model.mask_id is None:
        raise UnsupportedError(f"model {model.name} has no mask token, so it has no canvas.", param="model")
    check_prompt(request, model)
    check_sampling(request.sampling, model)
    choice = choose(request.decode or DecodeParams(), model)
    length = canvas_length(request, choice.block_length, aligned)
    total = len(request.prompt) + length + len(request.suffix)
    if total > model.max_len:
        raise ContextLengthError(
            f"prompt ({len(request.prompt)}), canvas ({length}) and suffix ({len(request.suffix)}) make {total} "
            f"tokens, but the context of {model.name} is {model.max_len}.",
            param="max_tokens" if len(request.prompt) < model.max_len else "prompt",
            hint="Shorten the prompt or lower max_tokens.",
        )
    start = len(request.prompt)
    count = blocks(start, start + length, choice.block_length, aligned)
    if choice.steps is not None and choice.steps < count:
        raise ValidationError(
            f"steps must be at least the number of blocks, {count} (canvas {length}, block_length "
            f"{choice.block_length}), got {choice.steps}.",
            param="steps",
            hint="Raise steps or block_length.",
        )
    most = int(choice.options.get("max_parallel_tokens", 0))
    if choice.steps is not None and most and -(-choice.block_length // (choice.steps // count)) > most:
        raise ValidationError(
            f"steps {choice.steps} needs more commits a step than max_parallel_tokens {most} allows.",
            param="max_parallel_tokens",
            hint="Raise steps or max_parallel_tokens.",
        )
    return choice


def fill_id(model: ModelInfo) -> int:
    """What undecided positions after the end of the text become in the last commit, so that no mask id is left."""
    if model.pad_id is not None and model.pad_id != model.mask_id:
        return model.pad_id
    return model.eos_ids[0] if model.eos_ids else int(model.mask_id == 0)


@dataclass(frozen=True, slots=True)
class Ending:
    """stable and finish of a commit, `end` for the state, `fill`: positions still masked at the finish."""

    stable: int
    end: int | None
    finish: FinishReason | None
    fill: tuple[int, ...] = ()


def ending(seq: SequenceState, state: CanvasState, canvas: Sequence[int], firm: int) -> Ending:
    """Where the text stands after a commit. canvas: ids of [canvas_start, canvas_stop) after it; firm: absolute
    position before which nothing can change any more (and nothing is masked)."""
    s, first = seq.sampling, seq.canvas_start
    visible = min(seq.canvas_stop, first + s.max_tokens)
    end = state.end
    if end is None:
        stops = enders(s.stop_token_ids, s.ignore_eos, seq.model)
        for p in range(max(seq.stable, first), min(firm, visible)):
            if canvas[p - first] in stops:
                end = p + 1
                break
    stable = min(firm, visible if end is None else end)
    mask = seq.model.mask_id
    over = firm >= seq.canvas_stop
    if over or (state.choice.early_stop and (end is not None or firm >= visible)):
        fill = () if over else tuple(first + i for i, t in enumerate(canvas) if t == mask)
        return Ending(stable, end, FinishReason.LENGTH if end is None else FinishReason.STOP, fill)
    return Ending(stable, end, None)
