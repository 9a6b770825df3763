"""Command-line options derived from tables: the settings table, and the fields of SamplingParams and DecodeParams.

Every derived option takes text; the table it came from parses and validates it, so the command line, the environment
and Python report a bad value in the same words.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from dfastllm.core import DecodeParams, SamplingParams
from dfastllm.errors import ValidationError
from dfastllm.settings import SETTINGS

__all__ = ["DECODE", "SAMPLING", "Option", "decode_params", "from_settings", "sampling_params", "takes"]

# The command line's own defaults where they differ from SamplingParams: an answer, the same one each time.
DEFAULTS: Mapping[str, Any] = {"temperature": 0.0, "max_tokens": 128}

SAMPLING_HELP: Mapping[str, str] = {
    "n": "Number of completions.",
    "presence_penalty": "Subtracted once from the logit of every token generated before, -2 to 2.",
    "frequency_penalty": "Subtracted per occurrence from the logit of a token generated before, -2 to 2.",
    "repetition_penalty": "Divides positive and multiplies negative logits of tokens seen before; 1: off.",
    "temperature": "Randomness of the draw; 0: the best token.",
    "top_p": "Draw from the smallest set of tokens with this much probability; 1: off.",
    "top_k": "Draw from the k best tokens; 0: off.",
    "min_p": "Drop tokens less probable than this share of the best one; 0: off.",
    "seed": "Seed of the draws; the same seed gives the same text.",
    "stop": "Text that ends the completion; repeatable.",
    "stop_token_ids": "Token id that ends the completion; repeatable.",
    "ignore_eos": "Go on after the end-of-text token.",
    "max_tokens": "New tokens; for diffusion the length of the canvas, rounded up to the block.",
    "min_tokens": "No end before this many tokens.",
    "logprobs": "Report the log probability of each token and of this many best ones (needs --json).",
    "include_stop_str_in_output": "Keep the stop text in the completion.",
    "skip_special_tokens": "Leave special tokens out of the text.",
    "logit_bias": "ID=BIAS, added to that token's logit, -100 to 100; repeatable.",
    "allowed_token_ids": "Token id that may be generated, and no other; repeatable.",
}
DECODE_HELP: Mapping[str, str] = {
    "rule": "How positions are chosen to unmask; default: from --threshold or --factor, else the fixed schedule.",
    "cache": "K,V reuse in masked diffusion: none, prefix, dual or windowed.",
    "steps": "Denoise steps for the whole canvas; fewer is faster.",
    "block_length": "Canvas tokens per block.",
    "remasking": "Order of the fixed schedule: low_confidence, random, entropy or margin.",
    "threshold": "Unmask every position at least this sure, 0 to 1.",
    "factor": "Factor of the factor rule; overrides --threshold.",
    "options": "NAME=VALUE, a further option of the rule; repeatable.",
    "early_stop": "End once the end-of-text token is certain.",
    "provisional": "Report guesses of masked positions; on where a canvas is drawn.",
}


@dataclass(frozen=True)
class Option:
    """One derived option. `kind` is bool, or str for everything that is parsed from text; `repeat` collects a list."""

    name: str
    kind: type
    repeat: bool
    help: str
    metavar: str
    default: str
    panel: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def parameter(self) -> inspect.Parameter:
        """The typer parameter; its default is always None (not given)."""
        names = [f"{self.flag}/--no-{self.flag[2:]}"] if self.kind is bool else [self.flag]
        shown = f" \\[default: {self.default}]" if self.default else ""
        info = typer.Option(
            *names,
            help=self.help + shown,
            metavar=None if self.kind is bool else self.metavar,
            show_default=False,  # typer's would be that of the option (not given), not of the table
            rich_help_panel=self.panel,
        )
        hint: Any = list[str] if self.repeat else self.kind
        annotation = Annotated[hint | None, info]
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def from_settings(*, alone: bool = False) -> tuple[Option, ...]:
    """Options for every setting, or only for those of a command that loads one model and serves nothing."""
    panels = {"server": "Server", "model": "Model", "engine": "Engine"}
    rows = []
    for s in SETTINGS:
        if alone and not s.alone:
            continue
        default = "" if s.default is None or s.default == () else f"{s.default} {s.unit}".rstrip()
        rows.append(
            Option(
                name=s.name,
                kind=bool if s.type is bool else str,
                repeat=s.type is tuple,
                help=f"{s.help} \\[{s.variable}]",
                metavar={int: "INT", float: "NUMBER"}.get(s.type, "TEXT"),
                default=default,
                panel=panels[s.group],
            )
        )
    return tuple(rows)


def _kind(hint: Any) -> tuple[type, bool]:
    """(type of one value, takes many) of a field's annotation: int, float, str, bool, or dict for NAME=VALUE pairs."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    origin = typing.get_origin(hint)
    if origin is tuple:
        return typing.get_args(hint)[0], True
    if origin is typing.Literal:
        return str, False
    if origin is not None and issubclass(origin, Mapping):
        return dict, True
    return hint, False


def _from_params(cls: type, help: Mapping[str, str], panel: str) -> tuple[Option, ...]:
    hints = typing.get_type_hints(cls)
    rows = []
    for f in dataclasses.fields(cls):
        kind, many = _kind(hints[f.name])
        default = DEFAULTS.get(f.name, f.default)
        plain = default is None or default is dataclasses.MISSING or default == () or isinstance(default, bool)
        rows.append(
            Option(
                name=f.name,
                kind=bool if kind is bool else str,
                repeat=many,
                help=help[f.name],
                metavar={int: "INT", float: "NUMBER", dict: "NAME=VALUE"}.get(kind, "TEXT"),
                default="" if plain else str(default),
                panel=panel,
            )
        )
    return tuple(rows)


SAMPLING = _from_params(SamplingParams, SAMPLING_HELP, "Sampling")
DECODE = _from_params(DecodeParams, DECODE_HELP, "Diffusion")


def _value(name: str, kind: type, text: Any) -> Any:
    if kind in (bool, str):
        return text
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise ValidationError(f"{name} must be {wanted}; got {text!r}.", param=name) from None


def _pair(name: str, text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ValidationError(f"{name} must be NAME=VALUE; got {text!r}.", param=name)
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _typed(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, text in given.items():
        kind, many = _kind(hints[name])
        if kind is dict:
            pairs = dict(_pair(name, item) for item in text)
            if typing.get_args(hints[name])[0] is int:
                values[name] = {_value(name, int, k): _value(name, float, v) for k, v in pairs.items()}
            else:
                values[name] = pairs
        elif many:
            values[name] = tuple(_value(name, kind, item) for item in text)
        else:
            values[name] = _value(name, kind, text)
    return values


def sampling_params(given: Mapping[str, Any]) -> SamplingParams:
    """SamplingParams from the text given on the command line. Raises ValidationError naming the option."""
    return SamplingParams(**{**DEFAULTS, **_typed(SamplingParams, given)})


def decode_params(given: Mapping[str, Any]) -> DecodeParams | None:
    """DecodeParams, or None when no diffusion option was given. Raises ValidationError naming the option."""
    return DecodeParams(**_typed(DecodeParams, given)) if given else None


def takes(**tables: Sequence[Option]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds the options of each table to a command. Its function receives, under the table's name, a dict of the values
    that were given."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(function, eval_str=True)
        kept = [p for p in own.parameters.values() if p.name not in tables]
        kept = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in kept]
        added = [option.parameter() for table in tables.values() for option in table]

        @functools.wraps(function)
        def command(**values: Any) -> None:
            for table, options in tables.items():
                given = {option.name: values.pop(option.name) for option in options}
                values[table] = {name: value for name, value in given.items() if value not in (None, [])}
            function(**values)

        command.__signature__ = own.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in (*kept, *added)}
        return command

    return decorate
