"""What every canvas decoder shares: the choice a request makes, where its blocks lie, when its text ends.

No forward passes and no logits here. The canvas begins after the prompt and has `max_tokens` rounded up to whole blocks
(with a suffix it is exactly `max_tokens` and the last block may be shorter, because a cut would leave a hole before the
suffix). The text ends at the first EOS or stop token with no mask before it, or after `max_tokens`. `Commit.stable`
never passes that end, so the result is tokens[canvas_start : stable of the last commit], the ending token included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from dfastllm.core import DecodeParams, FinishReason, ModelInfo, Request, SamplingParams, SequenceState, value
from dfastllm.decode.canvas.rules import RULES, Option, Rule
from dfastllm.decode.sampling import edits
from dfastllm.errors import UnsupportedError, ValidationError

__all__ = [
    "CACHES",
    "Ahead",
    "CanvasState",
    "Choice",
    "Ending",
    "Layout",
    "Passes",
    "caches_of",
    "canvas_bound",
    "choose",
    "compile_canvas",
    "ending",
    "fill_id",
]

_FIRST_TOKEN = Option(
    "alone",
    "where the row before predicts (Dream): the full forward of a block commits its first token alone, and steps run "
    "the block's own rows; by_rule: it commits what the rule says, and steps run the row before the block too",
    choices=("alone", "by_rule"),
)
CACHES: dict[str, dict[str, Option]] = {
    "none": {},
    "prefix": {"first_token": _FIRST_TOKEN},
    "dual": {"first_token": _FIRST_TOKEN},
    "windowed": {
        "window": Option(16, "positions recomputed on each side of the block"),
        "refresh": Option(8, "a full forward every so many steps of a block", 1),
        "warmup": Option(4, "first steps of a request that are full forwards"),
    },
    "delayed": {"refresh": Option(8, "a full forward every so many steps of a block", 1)},
    "sub_block": {},
}
MOST_POINTS = 1 << 20  # steps of a rule with a schedule of its own, whose time grid is an array
KEEPS = ("dual", "windowed", "delayed", "sub_block")  # caches that store the K,V of every step


@value(frozen=True, slots=True)
class Choice:
    """Decoder options of one request, complete and checked, and what follows from them for every step.

    needs    of the rule.
    spreads  the rule looks at entropy or margin. noisy: it draws positions. revises: it changes what it committed.
    reports  the request asks for guesses or records, or drafts (then all candidates of a step are wanted after it).
    drafts   it guesses its next steps and runs some of them beside this one.
    alone    a block's first token is committed by its full forward, alone (option first_token of a cache).
    guidance  scale of classifier-free guidance; 0: none. barred: ids that are no candidates; doubted: those whose
             confidence is 0.
    drawn    confidence, entropy and margin are those of the distribution a token is drawn from, not of the logits.
    cut      top_k and top_p cut that at temperature 0 too.
    way      (whether the rows are edited, drawn from or compared, so that their statistics alone do not do; if not:
             whether they need records, entropy and margin): rows of one way are looked at together.
    """

    rule: str
    cache: str
    block_length: int
    early_stop: bool
    provisional: bool
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: frozenset[str] = frozenset()
    spreads: bool = False
    noisy: bool = False
    revises: bool = False
    reports: bool = False
    drafts: bool = False
    alone: bool = False
    guidance: float = 0.0
    barred: tuple[int, ...] = ()
    doubted: tuple[int, ...] = ()
    drawn: bool = False
    cut: bool = False
    way: tuple[bool, ...] = (True,)


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


def caches_of(kind: str) -> tuple[str, ...]:
    """The caches that a model of this kind takes, by name."""
    return ("sub_block",) if kind == "block" else tuple([name for name in CACHES if name != "sub_block"])


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
    whole = isinstance(option.default, int)
    good = isinstance(value, int | float) and not isinstance(value, bool) and option.low <= value <= option.high
    if not good or (whole and not float(value).is_integer()):
        kind = "a whole number" if whole else "a number"
        raise ValidationError(f"{name} must be {kind} in [{option.low:g}, {option.high:g}], got {value!r}.", param=name)
    return int(value) if whole else float(value)


def choose(decode: DecodeParams, sampling: SamplingParams, length: int, model: ModelInfo) -> Choice:
    """The complete choice of a request whose blocks have `length` tokens. Raises UnsupportedError for an unknown or
    unusable name, ValidationError for a bad value."""
    rule = _rule_of(decode)
    cache = "none" if decode.cache is None else decode.cache
    given = _rule_options(decode, rule)
    if given.get("draft_steps", rule.options["draft_steps"].default if "draft_steps" in rule.options else 0) and (
        "cache" not in decode.given and cache in KEEPS
    ):
        cache = "none"  # a default gives way
    if decode.cfg_scale and "cache" not in decode.given:
        cache = "none"
    known = {**rule.options, **CACHES[cache]}
    for name in given:
        if name not in known:
            raise UnsupportedError(
                f"option {name!r} is unknown to rule {rule.name!r} with cache {cache!r}.",
                param=name,
                hint=f"Known: {', '.join(sorted(known))}.",
            )
    options = {name: _option(name, given.get(name, o.default), o) for name, o in known.items()}
    order = options.get("remasking") or options.get("ordering")
    spreads = "spread" in rule.needs or order in ("entropy", "margin", "topk_margin")
    drafts = options.get("draft_steps", 0) > 0
    if drafts and cache in KEEPS:
        raise UnsupportedError(
            f"draft_steps run beside a step whose K,V are not stored; cache {cache!r} stores every step's.",
            param="cache",
            hint="Use draft_steps 0, or "
            + ("leave out the cache." if model.kind == "block" else "cache none or prefix."),
        )
    if decode.cfg_scale:
        _check_guidance(rule, cache, drafts, model)
    if rule.name == "threshold" and model.kind == "block":  # the published loops: more than the threshold
        options["threshold"] = math.nextafter(options["threshold"], math.inf)
    told = options["confidence"] if options["confidence"] != "model" else model.confidence
    hot = sampling.temperature > 0
    cut = told == "filtered" and not hot and (sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0)
    ends, edited = model.eos_ids, bool(decode.cfg_scale or decode.logits_eos_inf or decode.confidence_eos_eot_inf)
    logits = hot or cut or edited or edits(sampling) or not rule.needs <= {"spread"}
    return Choice(
        rule=rule.name,
        cache=cache,
        block_length=length,
        early_stop=decode.early_stop,
        provisional=decode.provisional,
        options=options,
        needs=rule.needs,
        spreads=spreads,
        noisy=order in ("random", "origin") or options.get("alg_temp", 0) > 0,
        revises=rule.revise is not None,
        reports=decode.provisional or sampling.logprobs is not None or drafts,
        drafts=drafts,
        alone=bool(model.shift) and "held" not in rule.needs and options.get("first_token") == "alone",
        guidance=decode.cfg_scale,
        barred=ends[:1] if decode.logits_eos_inf else (),
        doubted=ends if decode.confidence_eos_eot_inf else (),
        drawn=told != "raw" and (hot or cut),
        cut=cut,
        way=(True,) if logits else (False, sampling.logprobs is not None, spreads),
    )


def _check_guidance(rule: Rule, cache: str, drafts: bool, model: ModelInfo) -> None:
    """What cfg_scale cannot be combined with. Raises UnsupportedError."""
    why, hint = "", ""
    if model.kind != "diffusion":
        why = f"{model.name} keeps the K,V of its prompt, and those of the masked prompt would be others"
        hint = "Choose a masked diffusion model."
    elif cache != "none":
        why = f"cache {cache!r} keeps K,V of one canvas, and guidance runs two"
        hint = "Use cache none."
    elif drafts:
        why = "draft_steps run guessed canvases, and each would need its own masked prompt"
        hint = "Use draft_steps 0." if rule.name != "free_dave" else "Use rule schedule, which gives the same tokens."
    elif "shadow" in rule.needs:
        why = f"rule {rule.name!r} judges by shadow rows, which have no masked prompt beside them"
        hint = "Choose another rule."
    if why:
        raise UnsupportedError(f"cfg_scale needs a second forward of every step: {why}.", param="cfg_scale", hint=hint)


def _check_first_token(choice: Choice, given: Mapping[str, Any], model: ModelInfo) -> None:
    """Raises UnsupportedError for an option first_token that would say nothing."""
    if "first_token" not in given:
        return
    if not model.shift:
        raise UnsupportedError(
            f"first_token is for models whose row before predicts; in {model.name} a token's own row does.",
            param="first_token",
            hint="Leave it out.",
        )
    if given["first_token"] == "alone" and not choice.alone:
        raise UnsupportedError(
            f"rule {choice.rule!r} looks at every token of a block again; with first_token alone the row of the first "
            "one is not run.",
            param="first_token",
            hint="Use first_token by_rule.",
        )


def _rule_options(decode: DecodeParams, rule: Rule) -> dict[str, Any]:
    """The options that are given to the rule, in `options` or by a field of their own."""
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
            raise UnsupportedError(f"rule {rule.name!r} has no {name}.", param=name, hint="Leave it out.")
    return given


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
    _check_rule(RULES[choice.rule], model, scorer)
    _check_first_token(choice, decode.options, model)
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


def _check_rule(rule: Rule, model: ModelInfo, scorer: int | None) -> None:
    """Rules that need something of the model."""
    if "edit" in rule.needs and not model.edit:
        raise UnsupportedError(
            f"rule {rule.name!r} needs a model trained to edit its tokens; {model.name} was not.", param="rule"
        )
    if "held" in rule.needs and model.ar_first:
        raise UnsupportedError(
            f"rule {rule.name!r} looks at every token of a block again; the first one of a block of {model.name} is "
            "predicted outside it.",
            param="rule",
        )
    if "shadow" in rule.needs and model.shift:
        raise UnsupportedError(
            f"rule {rule.name!r} hides a token from its own row; in {model.name} the row before predicts it.",
            param="rule",
        )
    if "scorer" not in rule.needs:
        return
    if scorer is None:
        raise UnsupportedError(f"rule {rule.name!r} needs a draft model, and none is configured.", param="rule")
    if scorer != model.vocab_size:
        raise UnsupportedError(
            f"the draft model has a vocabulary of {scorer}, {model.name} one of {model.vocab_size}.", param="rule"
        )


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
