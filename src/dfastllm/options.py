"""Every option of a request, declared once: the fields of SamplingParams, DecodeParams, SpeculativeParams and
RequestOptions. Imports no room but errors, and no torch.

An option is a typed field with a range, a default and a help line. From that one table derive the Python parameters
and their checks, the command line (`--top-k`), the fields of the HTTP API with their other names, the defaults that a
model's generation_config.json sets, the reference page (`python -m dfastllm.options` prints docs/options.md) and the
test that every field of every front reaches the engine. A new option is a new field here, and the code that obeys it.

What a caller did not give is not a demand: a parameter object knows which fields were `given`, and at admission the
others take, in this order, what the preset `mode` says, what the model's generation_config.json says, what its kind of
model takes (`kinds`), and the default (see `resolved`).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from dfastllm.errors import ValidationError

__all__ = [
    "FRONTS",
    "GROUPS",
    "HINTS",
    "OPTIONS",
    "SPECULATIVE_HELP",
    "SPECULATIVE_WIRE",
    "Acceptance",
    "Cache",
    "DecodeParams",
    "Front",
    "Hint",
    "Option",
    "RequestOptions",
    "SamplingParams",
    "SpeculativeMethod",
    "SpeculativeParams",
    "WireField",
    "changed",
    "default_text",
    "generation_config",
    "generation_defaults",
    "kind_defaults",
    "reference",
    "resolved",
    "wire_fields",
]

Cache = Literal["none", "prefix", "dual", "windowed", "delayed", "sub_block"]
SpeculativeMethod = Literal["none", "ngram", "suffix", "draft_model", "diffusion", "self"]
Acceptance = Literal["coupled", "rejection"]
Mode = Literal["standard", "fast", "streaming", "turbo"]
Remasking = Literal["low_confidence", "random", "entropy", "margin", "sequential"]
Group = Literal["sampling", "decode", "speculative", "request"]
Applies = Literal["any", "ar", "canvas"]
Front = Literal["completions", "chat"]

FRONTS: tuple[Front, ...] = ("completions", "chat")
GROUPS: Mapping[Group, str] = {
    "sampling": "Sampling: how tokens are drawn and when a text ends.",
    "decode": "Decoding of a canvas: diffusion and block-diffusion models; an autoregressive model refuses them.",
    "speculative": "Speculation: how an autoregressive model drafts.",
    "request": "The request itself.",
}
Params = TypeVar("Params", "SamplingParams", "DecodeParams", "SpeculativeParams")


@dataclass(frozen=True, slots=True)
class Wire:
    """A field of the HTTP API by which an option is given.

    name        a dot leads into an object of the body.
    fronts      routes that have it.
    annotation  its type in JSON where that is not the option's, else None.
    help        what it says where that is not the option's help.
    """

    name: str
    fronts: tuple[Front, ...] = FRONTS
    annotation: Any = None
    help: str = ""


@dataclass(frozen=True, slots=True)
class Option:
    """One row of the table.

    type          of one value: int, float, bool or str; object for values that the rule itself checks.
    many          a tuple of such values. keys: the type of the keys of a mapping to such values, else None.
    optional      None is a value, and means what `default_help` says.
    default       of a Python object that was not given it. kinds: by kind of model, where it depends on that.
    low, high     least and greatest number, or length of a text. above: a number it must exceed.
    applies       to every model, to autoregressive ones or to those with a canvas.
    wire          its fields in the HTTP API. flag: whether the command line has it.
    generation    its name in generation_config.json, "" where that has none.
    """

    name: str
    group: Group
    keys: type | None
    type: type
    many: bool
    optional: bool
    default: Any
    kinds: Mapping[str, Any]
    default_help: str
    help: str
    low: float | None
    high: float | None
    above: float | None
    choices: tuple[str, ...]
    applies: Applies
    wire: tuple[Wire, ...]
    flag: bool
    generation: str

    @property
    def wanted(self) -> str:
        """What a value must be, for messages and the reference page."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        what = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(self.type, "a value")
        if self.type is str and self.high is not None:
            return f"{what} of {self.low:g} to {self.high:g} characters"
        if self.low is not None and self.high is not None:
            return f"{what} in [{self.low:g}, {self.high:g}]"
        if self.above is not None:
            return (
                f"{what} in ({self.above:g}, {self.high:g}]"
                if self.high is not None
                else f"{what} above {self.above:g}"
            )
        return f"{what} of at least {self.low:g}" if self.low is not None else what

    @property
    def annotation(self) -> Any:
        """Its type in JSON, as a Python annotation without None."""
        one: Any = Literal[self.choices] if self.choices else Any if self.type is object else self.type
        if self.keys is not None:
            return dict[str, one]
        return (str | list[str] if one is str else list[one]) if self.many else one

    def check(self, value: Any) -> Any:
        """`value` as the parameters hold it: a list becomes a tuple. Raises ValidationError."""
        if value is None and (self.optional or self.many or self.keys is not None):
            return None if self.optional else {} if self.keys is not None else ()
        if self.keys is not None:
            return self._mapping(value)
        if not self.many:
            self._one(value)
            return value
        values = (value,) if isinstance(value, str) else self._tuple(value)
        if self.type is not int or set(map(type, values)) - {int}:  # many thousands of ids may be allowed
            for one in values:
                self._one(one)
        self._require(bool(values) or not self.optional, f"{self.name} must not be empty.")
        return values

    def _tuple(self, value: Any) -> tuple[Any, ...]:
        self._require(isinstance(value, Iterable), f"{self.name} must be a list, got {value!r:.80}.")
        return tuple(value)

    def _mapping(self, value: Any) -> Mapping[Any, Any]:
        self._require(isinstance(value, Mapping), f"{self.name} must be a mapping, got {value!r:.80}.")
        for key, one in value.items():
            good = isinstance(key, str) if self.keys is str else isinstance(key, Integral)
            what = "names" if self.keys is str else "token ids"
            self._require(good, f"{self.name} must map {what} to values, got the key {key!r:.80}.")
            if self.type is not object:
                self._one(one, f"{self.name} of {key}")
        return typing.cast("Mapping[Any, Any]", value)

    def _one(self, value: Any, name: str = "") -> None:
        kind = self.type
        if kind is float or kind is int:
            good = type(value) is kind or (
                isinstance(value, Real if kind is float else Integral) and not isinstance(value, bool)
            )
            good = good and (kind is int or math.isfinite(value))
            good = good and (self.low is None or value >= self.low) and (self.high is None or value <= self.high)
            good = good and (self.above is None or value > self.above)
        elif kind is str:
            good = isinstance(value, str) and (value in self.choices if self.choices else bool(value) or not self.many)
            good = good and (self.low is None or len(value) >= self.low)
            good = good and (self.high is None or len(value) <= self.high)
        else:
            good = kind is object or isinstance(value, kind)
        if not good:
            empty = kind is str and self.many and value == ""
            wanted = "strings that are not empty" if empty else self.wanted
            raise ValidationError(f"{name or self.name} must be {wanted}, got {value!r:.80}.", param=self.name)

    def _require(self, ok: bool, message: str) -> None:
        if not ok:
            raise ValidationError(message, param=self.name)

    def names(self, front: Front) -> tuple[str, ...]:
        """Its fields in the bodies of a route."""
        return tuple(wire.name for wire in self.wire if front in wire.fronts)


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    applies: Applies = "any",
    kinds: Mapping[str, Any] | None = None,
    default_help: str = "",
    wire: tuple[Wire, ...] | None = None,
    flag: bool = True,
    generation: str = "",
) -> Any:
    """The field of an option; name, type, choices and group follow from where it stands. See `Option`. wire None: a
    field of the same name on both routes."""
    row = {
        "default_help": default_help,
        "help": help,
        "low": low,
        "high": high,
        "above": above,
        "applies": applies,
        "kinds": kinds or {},
        "wire": wire,
        "flag": flag,
        "generation": generation,
    }
    if default is dict:
        return field(default_factory=dict, metadata={"option": row})
    return field(default=default, metadata={"option": row})


def _table(cls: Any, group: Group) -> dict[str, Option]:
    """The options of a class by name."""
    hints = typing.get_type_hints(cls)
    found = {}
    for f in dataclasses.fields(cls):
        if "option" not in f.metadata:
            continue
        hint, row = hints[f.name], dict(f.metadata["option"])
        optional = typing.get_origin(hint) in (types.UnionType, typing.Union)
        if optional:
            hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
        origin, args, keys, choices = typing.get_origin(hint), typing.get_args(hint), None, ()
        if origin is Literal:
            hint, choices = str, args
        elif origin is tuple:
            hint = args[0]
        elif origin is not None:  # a mapping
            keys, hint = args[0], object if args[1] is Any else args[1]
        default = {} if f.default is dataclasses.MISSING else f.default
        row["wire"] = (Wire(f.name),) if row["wire"] is None else row["wire"]
        found[f.name] = Option(
            f.name, group, keys, hint, origin is tuple, optional, default, choices=choices, **row
        )  # fmt: skip
    return found


if TYPE_CHECKING:
    from dataclasses import dataclass as parameters
else:

    def parameters(*, frozen):
        """A frozen dataclass of options that checks the fields it was given and remembers which those are.

        Its `given` passes through `dataclasses.replace`, which hands every field over: there what differs from the
        default counts as given too (`changed` is exact).
        """
        assert frozen

        def make(cls):
            made = dataclass(frozen=True)(cls)
            group = cls.__name__.removesuffix("Params").lower()
            table = made.TABLE = _table(made, group)
            names = tuple(table)
            plain = {name: o.default for name, o in table.items() if o.keys is None}
            fresh = tuple(name for name, o in table.items() if o.keys is not None)
            relate = getattr(cls, "_relate", None)

            @functools.wraps(made.__init__)
            def init(self, *args, given=None, **fields):
                for name, value in zip(names, args, strict=False):
                    if name in fields:
                        raise TypeError(f"{cls.__name__} got two values for {name!r}")
                    fields[name] = value
                if len(args) > len(names) or not fields.keys() <= table.keys():
                    extra = sorted(fields.keys() - table.keys()) or args[len(names) :]
                    near = [n for name in extra for n in difflib.get_close_matches(str(name), names, n=1)]
                    hint = f" Did you mean {' and '.join(map(repr, near))}?" if near else ""
                    raise TypeError(f"{cls.__name__} got unexpected arguments: {', '.join(map(repr, extra))}.{hint}")
                state = self.__dict__
                state.update(plain)
                for name in fresh:
                    state[name] = {}
                if given is not None:  # from dataclasses.replace, which hands over every field
                    fields = {n: v for n, v in fields.items() if n in given or v != table[n].default}
                for name, value in list(fields.items()):
                    state[name] = checked = table[name].check(value)
                    if checked is None:  # says nothing
                        del fields[name]
                state["given"] = frozenset(fields)
                if relate is not None:
                    relate(self)

            made.__init__ = init
            return made

        return make


@parameters(frozen=True)
class SamplingParams:
    """How tokens are drawn. vLLM's field names; what each means, its range and its default: docs/options.md.

    One order everywhere: penalties -> logit_bias (and allowed_token_ids, min_tokens) -> temperature -> top_k -> top_p
    -> min_p -> draw. `given`: names of the fields that were given. Raises ValidationError naming the field.
    """

    TABLE: typing.ClassVar[Mapping[str, Option]]

    n: int = option(1, "Number of completions of each prompt. Choice i of a seeded call draws with seed + i.", low=1)
    presence_penalty: float = option(
        0.0, "Subtracted once from the logit of every token generated before.", low=-2, high=2
    )
    frequency_penalty: float = option(
        0.0, "Subtracted per occurrence from the logit of a token generated before.", low=-2, high=2
    )
    repetition_penalty: float = option(
        1.0,
        "Divides positive and multiplies negative logits of tokens seen before, the prompt's too; 1: off.",
        above=0,
        generation="repetition_penalty",
    )
    temperature: float = option(
        1.0,
        "Randomness of the draw; 0: the best token (greedy).",
        low=0,
        kinds={"diffusion": 0.0, "block": 0.0},
        default_help="1.0; for a canvas 0.0",
        generation="temperature",
    )
    top_p: float = option(
        1.0,
        "Draw from the smallest set of tokens with this much probability; 1: off, 0: the best token.",
        low=0,
        high=1,
        generation="top_p",
    )
    top_k: int = option(0, "Draw from the k best tokens; 0 or -1: off.", low=-1, generation="top_k")
    min_p: float = option(
        0.0, "Drop tokens less probable than this share of the best one; 0: off.", low=0, high=1, generation="min_p"
    )
    seed: int | None = option(
        None, "Seed of the draws; the same request with the same seed gives the same tokens.", default_help="drawn anew"
    )
    stop: tuple[str, ...] = option(
        (), "Text that ends the completion, special tokens that are not shown included; repeatable."
    )
    stop_token_ids: tuple[int, ...] = option((), "Token id that ends the completion; repeatable.")
    ignore_eos: bool = option(False, "Go on after the end-of-text token.")
    max_tokens: int | None = option(
        None,
        "New tokens at most; for diffusion the length of the canvas, rounded up to whole blocks. What lies beyond it is"
        " not part of the output. A number that does not fit the context is refused.",
        low=1,
        kinds={"diffusion": 128, "block": 128},
        default_help="what the context leaves; for a canvas 128 of it at most, or as many as the steps given to blocks "
        "of a given length can fill",
        wire=(
            Wire("max_tokens"),
            Wire("max_completion_tokens", ("chat",), help="The newer name of max_tokens."),
        ),
        generation="max_new_tokens",
    )
    min_tokens: int = option(0, "No end of the text before this many tokens; at most max_tokens.", low=0)
    logprobs: int | None = option(
        None,
        "Report the log probability of each token and of this many best ones (command line: needs --json).",
        low=0,
        high=20,
        default_help="none reported",
        wire=(
            Wire("logprobs", ("completions",)),
            Wire("logprobs", ("chat",), bool, "Report the log probability of each token."),
            Wire("top_logprobs", ("chat",), help="With logprobs: report this many best ones of each position too."),
        ),
    )
    include_stop_str_in_output: bool = option(False, "Keep the stop text in the completion.")
    skip_special_tokens: bool = option(True, "Leave special tokens out of the text.")
    logit_bias: Mapping[int, float] = option(
        dict, "Added to that token's logit; ID=BIAS, repeatable.", low=-100, high=100
    )
    allowed_token_ids: tuple[int, ...] | None = option(
        None, "Token id that may be generated, and no other; repeatable.", default_help="all"
    )
    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False, kw_only=True)

    def _relate(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValidationError(
                f"min_tokens must be in [0, max_tokens={self.max_tokens}], got {self.min_tokens}.", param="min_tokens"
            )


@parameters(frozen=True)
class DecodeParams:
    """How positions of a canvas are unmasked: rule x cache x block. Ignored by no one: an autoregressive model refuses
    a request that sets it. What each field means, its range and its default: docs/options.md; the rules, caches and
    their own options: docs/decoders.md. `given`: names of the fields that were given. Raises ValidationError.
    """

    TABLE: typing.ClassVar[Mapping[str, Option]]

    rule: str | None = option(
        None,
        "Unmasking rule by name: how positions are chosen. 'ar' on a checkpoint of both modes: autoregression.",
        applies="canvas",
        default_help="factor or threshold where that is given, else schedule",
    )
    cache: Cache | None = option(
        None,
        "K,V reuse in masked diffusion. A block-diffusion model keeps the exact K,V of its finished blocks and takes "
        "sub_block alone, for the block it writes.",
        applies="canvas",
        kinds={"diffusion": "dual"},
        default_help="dual for masked diffusion (none for a rule that guesses ahead, and under guidance)",
        wire=(
            Wire("cache"),
            Wire("use_cache", annotation=bool, help="false is cache none; true the default."),
            Wire(
                "use_dual_cache", annotation=bool, help="false is cache prefix, true dual: also what follows the block."
            ),
        ),
    )
    steps: int | None = option(
        None,
        "Denoise steps over the whole canvas, at least one a block: a minimum rate. Each block commits its fair share.",
        low=1,
        applies="canvas",
        kinds={"diffusion": 128},
        default_help="128 for masked diffusion, or more if the canvas has more blocks; else one a token",
    )
    block_length: int | None = option(
        None,
        "Canvas tokens per block.",
        low=1,
        applies="canvas",
        kinds={"diffusion": 32},
        default_help="32, wider for fewer steps, the last one shorter where the context ends; the model's own block "
        "for block diffusion; the whole canvas for rule dream",
    )
    remasking: Remasking = option("low_confidence", "Order of the fixed schedule.", applies="canvas")
    threshold: float | None = option(
        None, "Unmask every position at least this sure.", above=0, high=1, applies="canvas", default_help="the rule's"
    )
    factor: float | None = option(
        None,
        "Factor of the factor rule, a bar that follows the crowd; overrides threshold.",
        above=0,
        applies="canvas",
        default_help="the rule's",
    )
    options: Mapping[str, Any] = option(
        dict,
        "Further options of the rule by its own names (docs/decoders.md); NAME=VALUE, repeatable.",
        applies="canvas",
        wire=(Wire("rule_options"),),
    )
    cfg_scale: float = option(
        0.0,
        "Classifier-free guidance of masked diffusion: each step also runs the canvas with the prompt masked, and "
        "reads unguided + (cfg_scale + 1) * (logits - unguided); counts as two forward passes; 0: off. Cache none.",
        low=0,
        high=100,
        applies="canvas",
    )
    logits_eos_inf: bool = option(
        False,
        "Never draw the end-of-text token, the first of the model's ending tokens (the others still end a text).",
        applies="canvas",
    )
    confidence_eos_eot_inf: bool = option(
        False,
        "Give candidates that would end the text confidence 0, and others theirs among the tokens that do not, so that "
        "the ends are committed last. For rules that rank by confidence.",
        applies="canvas",
    )
    early_stop: bool = option(
        True,
        "End once an end-of-text token is settled (lossless; a rule that revises ends with its block).",
        applies="canvas",
    )
    provisional: bool = option(
        False,
        "Report guesses of the positions still masked, for a live display; on where a canvas is drawn.",
        applies="canvas",
        wire=(
            Wire(
                "stream_options.canvas_events",
                help="Further chunks with empty choices carry the typed events of each denoising step in `canvas`.",
            ),
        ),
    )
    mode: Mode | None = option(
        None,
        "A preset of the other fields; a field that is given wins over it.",
        applies="canvas",
        default_help="none",
    )
    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False, kw_only=True)


@parameters(frozen=True)
class SpeculativeParams:
    """Drafter x verifier of one request. Names are those of vLLM's `--speculative-config` where it has them; what each
    means, its range and its default: docs/options.md.

    acceptance   coupled: the draft counts where it is the token that the request's own keyed draw gives, so the output
                 is that of plain decoding, token for token, at any temperature. rejection: accept with min(1, p/q),
                 else draw from the rest (Leviathan et al. 2023, Chen et al. 2023): accepts a little more where a draft
                 model samples, keeps the distribution but not the tokens of a seed. Greedy, the two are the same.
    given        names of the fields that were given.

    Raises ValidationError naming the field.
    """

    TABLE: typing.ClassVar[Mapping[str, Option]]

    method: SpeculativeMethod = option(
        "none",
        "none: no drafts. ngram: prompt lookup. suffix: a suffix tree over the text and past outputs. draft_model: a "
        "smaller autoregressive model. diffusion: a masked model drafts a block in one forward. self: the model's own "
        "bidirectional mode drafts for its causal one.",
        applies="ar",
        default_help="none (HTTP: the server's)",
    )
    num_speculative_tokens: int = option(5, "Most tokens drafted per step.", low=1, high=64, applies="ar")
    prompt_lookup_min: int = option(2, "Shortest n-gram that is looked up.", low=1, applies="ar")
    prompt_lookup_max: int = option(
        5,
        "Longest n-gram that is looked up; at least prompt_lookup_min. Where only one of them is given, the other's "
        "default gives way.",
        low=1,
        applies="ar",
    )
    acceptance: Acceptance = option(
        "coupled",
        "coupled: the tokens of plain decoding at any temperature. rejection: their distribution.",
        applies="ar",
    )
    adaptive: bool = option(
        True,
        "The length follows the measured acceptance and cost, down to no drafts; false: always num_speculative_tokens.",
        applies="ar",
    )
    suffix_decoding_max_tree_depth: int = option(24, "Longest pattern of the suffix tree.", low=1, applies="ar")
    suffix_decoding_max_cached_requests: int = option(
        1000, "Past outputs that the suffix tree keeps; 0: the request's own text only.", low=0, applies="ar"
    )
    suffix_decoding_max_spec_factor: float = option(2.0, "Tokens drafted per matched token.", above=0, applies="ar")
    suffix_decoding_min_token_prob: float = option(
        0.1, "Least frequency of a drafted continuation.", low=0, high=1, applies="ar"
    )
    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False, kw_only=True)

    def _relate(self) -> None:
        low, high = self.prompt_lookup_min, self.prompt_lookup_max
        if high >= low:
            return
        if "prompt_lookup_min" not in self.given:  # a default gives way to what was asked for
            object.__setattr__(self, "prompt_lookup_min", high)
        elif "prompt_lookup_max" not in self.given:
            object.__setattr__(self, "prompt_lookup_max", low)
        else:
            raise ValidationError(
                f"prompt_lookup_max must be at least prompt_lookup_min {low}, got {high}.", param="prompt_lookup_max"
            )


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """Options of a request that say nothing about its text. Raises ValidationError naming the field."""

    priority: int = option(0, "Lower runs first.", flag=False)
    timeout: float | None = option(
        None,
        "Seconds from arrival until the request ends with 504, waiting included; the server's limit at most.",
        above=0,
        default_help="none (HTTP: the server's limit)",
        flag=False,
    )
    cache_salt: str = option(
        "",
        "K,V of a common beginning are shared only among requests of the same salt. Refused by masked-diffusion models,"
        " which share nothing.",
        low=1,
        high=1024,
        default_help="shared among requests without one",
        flag=False,
    )
    lora: str = option(
        "",
        "Name of the LoRA adapter that the request runs with; see docs/lora.md.",
        low=1,
        high=256,
        default_help="none: the model itself",
        wire=(
            Wire(
                "lora",
                annotation=str | list[dict[str, Any]],
                help="Name of the LoRA adapter that the request runs with, also [{id: NAME, scale: 1}]. Default: the"
                " one that `model` names, else none.",
            ),
            Wire("adapter_id", help="Another name of lora."),
        ),
    )

    def __post_init__(self) -> None:
        for name, row in REQUEST.items():
            if (value := getattr(self, name)) != row.default:
                row.check(value)


REQUEST: Mapping[str, Option] = _table(RequestOptions, "request")
TABLES: Mapping[Group, Mapping[str, Option]] = {
    "sampling": SamplingParams.TABLE,
    "decode": DecodeParams.TABLE,
    "speculative": SpeculativeParams.TABLE,
    "request": REQUEST,
}
OPTIONS: tuple[Option, ...] = tuple(row for table in TABLES.values() for row in table.values())
SPECULATIVE_WIRE = "speculative_config"  # one object of the body holds the whole group
SPECULATIVE_HELP = (
    "Autoregressive: how this request drafts, with the models that the server has for it. What is left out is as in "
    "the server's default (--speculative-config); where it has none, `method` is required and the rest has its default."
)


def changed(params: Params, **fields: Any) -> Params:
    """`dataclasses.replace` that counts as given exactly what was given before and `fields`."""
    given = params.given
    old = {name: value for name, value in vars(params).items() if name in given}
    return type(params)(**{**old, **fields})


def resolved(params: Params, *layers: Mapping[str, Any]) -> Params:
    """The parameters with each field that was not given taken from the first layer that has it. `given` stays."""
    given, table = params.given, type(params).TABLE
    more = {name: value for layer in reversed(layers) for name, value in layer.items() if name in table}
    more = {name: value for name, value in more.items() if name not in given}
    if not more:
        return params
    copy = object.__new__(type(params))
    vars(copy).update(vars(params))
    vars(copy).update(more)
    return copy


@functools.cache
def kind_defaults(kind: str) -> Mapping[str, Any]:
    """The defaults that follow from a model's kind."""
    return types.MappingProxyType({row.name: row.kinds[kind] for row in OPTIONS if kind in row.kinds})


def generation_defaults(config: Mapping[str, Any], kind: str = "") -> dict[str, Any]:
    """The defaults that the generation_config.json of a model of this kind sets: sampling options by the names they
    have there, further options of ours under the key "dfastllm"; do_sample false means temperature 0. Raises
    ValidationError, also for an option that an autoregressive model cannot take and for n, which is the caller's."""
    found: dict[str, Any] = {}
    for row in OPTIONS:
        value = config.get(row.generation) if row.generation else None
        if value is not None:
            found[row.name] = row.check(value)
    if config.get("do_sample") is False:
        found["temperature"] = 0.0
    own = config.get("dfastllm", {})
    rows = {row.name: row for row in OPTIONS if row.group in ("sampling", "decode") and row.name != "n"}
    if not isinstance(own, Mapping):
        raise ValidationError(f"dfastllm must be an object of options, got {own!r:.80}.", param="dfastllm")
    for name in own:
        if name not in rows:
            near = difflib.get_close_matches(name, rows, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(rows)}."
            raise ValidationError(f"dfastllm has no option {name!r}. {hint}", param=name)
        if kind == "ar" and rows[name].applies == "canvas":
            raise ValidationError(
                f"dfastllm.{name} is an option of diffusion models; this model is of kind ar.", param=name
            )
    return found | {name: rows[name].check(value) for name, value in own.items()}


def generation_config(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The generation_config.json that `generation_defaults` reads back as these defaults."""
    names = {row.name: row.generation for row in OPTIONS if row.generation}
    config = {names[name]: value for name, value in defaults.items() if name in names}
    own = {name: value for name, value in defaults.items() if name not in names}
    if defaults.get("temperature") == 0:  # other programs refuse the number and know the word
        config["do_sample"] = False
        del config["temperature"]
    return {**config, "dfastllm": own} if own else config


# ---- the wire --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WireField:
    """A field of a route's body: by what name which option comes, its type in JSON and its range."""

    name: str
    option: Option
    annotation: Any
    help: str
    low: float | None = None
    high: float | None = None
    above: float | None = None


@functools.cache
def wire_fields(front: Front) -> tuple[WireField, ...]:
    """The option fields of a route's body, in the table's order. A name with a dot is a field of an object."""
    found = []
    for row in OPTIONS:
        for wire in row.wire:
            if front in wire.fronts:
                name = f"{SPECULATIVE_WIRE}.{wire.name}" if row.group == "speculative" else wire.name
                annotation = row.annotation if wire.annotation is None else wire.annotation
                plain = wire.annotation is None
                limits = (row.low, row.high, row.above) if plain else (None, None, None)
                words = ("Diffusion: " if row.applies == "canvas" else "") + (wire.help or row.help)
                if not wire.help and (said := default_text(row)):
                    words += f" Default: {said}."
                found.append(WireField(name, row, annotation, words, *limits))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Hint:
    """A field without effect: bookkeeping of the caller, or a request for what is done anyway.

    accepts  the values taken, None for any; another one asks for what is not done and is refused.
    """

    name: str
    annotation: Any
    help: str
    accepts: tuple[Any, ...] | None = None
    fronts: tuple[Front, ...] = FRONTS


HINTS: tuple[Hint, ...] = (
    Hint("user", str, "The caller's own name for its user."),
    Hint("metadata", dict[str, Any], "Nothing is stored."),
    Hint("store", bool, "Nothing is stored; true is refused.", (False,)),
    Hint("safety_identifier", str, "The caller's own."),
    Hint("service_tier", str, "There is one tier.", ("auto", "default", "flex")),
    Hint("prompt_cache_key", str, "Common beginnings are shared anyway; see cache_salt."),
    Hint("prompt_cache_retention", str, "Shared K,V stay while there is room."),
    Hint("verbosity", str, "A wish, which no model here knows."),
    Hint("reasoning_effort", str, "A wish, which no model here knows; see chat_template_kwargs."),
    Hint("use_beam_search", bool, "true is refused.", (False,)),
    Hint("length_penalty", float, "Of beam search; 1 asks for nothing.", (1, 1.0)),
    Hint("function_call", str, "The older tool_choice; without functions none is called.", ("none",), ("chat",)),
    Hint("echo", bool, "An answer of a chat never repeats the prompt; true is refused.", (False,), ("chat",)),
    Hint("add_special_tokens", bool, "The template writes them; true is refused.", (False,), ("chat",)),
)


# ---- the reference page ----------------------------------------------------------------------------------------------

HEAD = """# Options of a request

Made by `python -m dfastllm.options > docs/options.md`; a test fails when it is stale.

One table for every front: the same option has the same name, range and default in Python (`SamplingParams`,
`DecodeParams`, `SpeculativeParams`), on the command line and in the HTTP API. What a request does not give is taken
from the preset it names by `mode`, else from the model's `generation_config.json` (`temperature`, `top_p`, `top_k`,
`min_p`, `repetition_penalty`, `max_new_tokens`; `do_sample` false is temperature 0; options of ours by name under a
key `dfastllm`), else from this table. What a request does give is honoured or refused by name.
"""


def default_text(row: Option) -> str:
    """What a person reads as the default; "" for nothing."""
    if row.default_help:
        return row.default_help
    if row.default is None or row.default in ((), {}, ""):
        return ""
    return str(row.default).lower() if row.type is bool else f"{row.default}"


def reference() -> str:
    """The reference page, as Markdown."""
    lines = [HEAD]
    for group, title in GROUPS.items():
        head, _, rest = title.partition(": ")
        lines += [f"## {head.rstrip('.')}", "", *([f"{rest[0].upper()}{rest[1:]}", ""] if rest else [])]
        if group == "speculative":
            lines += [f"In the HTTP API the fields of the object `{SPECULATIVE_WIRE}`.", ""]
        lines += ["| option | value | default | HTTP | flag | |", "|---|---|---|---|---|---|"]
        lines += [_row(row) for row in TABLES[group].values()]
        lines.append("")
    lines += [
        "## Without effect",
        "",
        "Taken by the HTTP API and not acted on.",
        "",
        "| field | value | |",
        "|---|---|---|",
    ]
    for hint in HINTS:
        value = "any" if hint.accepts is None else " or ".join(dict.fromkeys(str(v).lower() for v in hint.accepts))
        only = "" if len(hint.fronts) == len(FRONTS) else f" ({', '.join(hint.fronts)} only)"
        lines.append(f"| `{hint.name}`{only} | {value} | {hint.help} |")
    return "\n".join(lines).rstrip() + "\n"


def _row(row: Option) -> str:
    value = row.wanted
    if row.many or row.keys is not None:
        value = f"a list, each {value}" if row.many else f"a mapping, each {value}"
    fronts: dict[str, set[Front]] = {}
    for one in row.wire:
        fronts.setdefault(one.name, set()).update(one.fronts)
    names = (f"`{name}`" + (f" ({', '.join(on)} only)" if len(on) < len(FRONTS) else "") for name, on in fronts.items())
    inside = row.group == "speculative"
    wire = f"`{SPECULATIVE_WIRE}.{row.name}`" if inside else ", ".join(names)
    flag = "`--speculative-config`" if inside else f"`--{row.name.replace('_', '-')}`" if row.flag else ""
    return f"| `{row.name}` | {value} | {default_text(row)} | {wire} | {flag} | {row.help} |"


if __name__ == "__main__":
    print(reference(), end="")
