"""Command-line options derived from two tables: the settings and the options of a request.

Every derived option takes text; the table it came from parses and validates it, so the command line, the environment
and Python report a bad value in the same words.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from dfastllm.errors import ValidationError
from dfastllm.options import DecodeParams, Option, SamplingParams, default_text
from dfastllm.settings import SETTINGS

__all__ = ["DECODE", "SAMPLING", "Flag", "decode_params", "from_settings", "sampling_params", "takes"]


PLAIN = ("a whole number", "a number", "true or false", "text", "a value")  # ranges that need no words


@dataclass(frozen=True)
class Flag:
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


def from_settings(*, alone: bool = False) -> tuple[Flag, ...]:
    """Options for every setting, or only for those of a command that loads one model and serves nothing."""
    panels = {"server": "Server", "model": "Model", "engine": "Engine"}
    rows = []
    for s in SETTINGS:
        if alone and not s.alone:
            continue
        default = "" if s.default is None or s.default == () else f"{s.default} {s.unit}".rstrip()
        rows.append(
            Flag(
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


def _from_table(table: Mapping[str, Option], panel: str) -> tuple[Flag, ...]:
    """A flag for each option of a request that the command line has."""
    return tuple(
        Flag(
            name=row.name,
            kind=bool if row.type is bool else str,
            repeat=row.many or row.keys is not None,
            help=row.help if row.wanted in PLAIN else f"{row.help[:-1]} ({row.wanted}).".replace("[", "\\["),
            metavar="NAME=VALUE" if row.keys is not None else {int: "INT", float: "NUMBER"}.get(row.type, "TEXT"),
            default=default_text(row),
            panel=panel,
        )
        for row in table.values()
        if row.flag
    )


SAMPLING = _from_table(SamplingParams.TABLE, "Sampling")
DECODE = _from_table(DecodeParams.TABLE, "Diffusion")


def _value(name: str, kind: type, text: Any) -> Any:
    if kind in (bool, str, object):
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
    except (ValueError, RecursionError):  # plain text; a number of more digits than Python reads is one too
        return key, value


def _typed(table: Mapping[str, Option], given: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, text in given.items():
        row = table[name]
        if row.keys is not None:
            pairs = dict(_pair(name, item) for item in text)
            typed = {_value(name, row.keys, key): _value(name, row.type, value) for key, value in pairs.items()}
            values[name] = typed
        elif row.many:
            values[name] = tuple(_value(name, row.type, item) for item in text)
        else:
            values[name] = _value(name, row.type, text)
    return values


def sampling_params(given: Mapping[str, Any]) -> SamplingParams:
    """SamplingParams from the text given on the command line. Raises ValidationError naming the option."""
    return SamplingParams(**_typed(SamplingParams.TABLE, given))


def decode_params(given: Mapping[str, Any]) -> DecodeParams | None:
    """DecodeParams, or None when no diffusion option was given. Raises ValidationError naming the option."""
    return DecodeParams(**_typed(DecodeParams.TABLE, given)) if given else None


def takes(**tables: Sequence[Flag]) -> Callable[[Callable[..., None]], Callable[..., None]]:
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
