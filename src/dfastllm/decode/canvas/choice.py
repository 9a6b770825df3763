"""The choice a request makes of rules, caches and their options, complete and checked once, at admission.

No positions and no logits here: what the choice means for a canvas is `layout`'s, `denoise`'s and the policies'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from dfastllm.core import DecodeParams, ModelInfo, SamplingParams, value
from dfastllm.decode.canvas.field import Option, Rule
from dfastllm.decode.canvas.rules import RULES
from dfastllm.decode.sampling import edits
from dfastllm.errors import UnsupportedError, ValidationError

__all__ = ["CACHES", "KEEPS", "Choice", "caches_of", "check_first_token", "check_rule", "choose"]

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
    for name in ("logits_eos_inf", "confidence_eos_eot_inf"):
        if getattr(decode, name) and not model.eos_ids:
            raise UnsupportedError(f"{name}: {model.name} has no ending token.", param=name, hint="Leave it out.")
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


def check_first_token(choice: Choice, given: Mapping[str, Any], model: ModelInfo) -> None:
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


def check_rule(rule: Rule, model: ModelInfo, scorer: int | None) -> None:
    """Raises UnsupportedError for a rule that needs something the model has not. scorer: the vocabulary size of the
    policy's, or None."""
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
