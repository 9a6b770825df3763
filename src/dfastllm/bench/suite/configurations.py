"""The configurations that are compared: no speculation and so many draft tokens of each method, or the axes of
diffusion, or whatever fields are given by hand. Which of them a server can do is asked of it, never assumed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from dfastllm.bench.suite.probe import Fields
from dfastllm.core.speculative import SpeculativeMethod
from dfastllm.errors import ValidationError

__all__ = ["Axes", "Configuration", "configurations", "parse_custom", "vet"]

METHODS: tuple[str, ...] = tuple(name for name in get_args(SpeculativeMethod) if name != "none")
CACHES = ("none", "prefix", "dual")


@dataclass(frozen=True)
class Configuration:
    """A name and the request fields that make it. See schema.ConfigurationResult."""

    name: str
    label: str
    axis: Literal["baseline", "speculation", "diffusion", "custom"]
    options: dict[str, Any] = field(default_factory=dict)
    method: str | None = None
    num_speculative_tokens: int | None = None

    @property
    def baseline(self) -> bool:
        return self.axis == "baseline"


@dataclass(frozen=True)
class Axes:
    """Which values to try. `ks` and `methods` are for autoregressive models, the others for diffusion, where every
    cache meets the fixed schedule and every threshold, factor, number of steps and rule. adaptive: dfastllm's draft
    length follows acceptance (True), is k (False), or as the server does (None). Raises ValidationError."""

    ks: Sequence[int] = (3, 5, 7)
    methods: Sequence[str] = METHODS
    caches: Sequence[str] = CACHES
    thresholds: Sequence[float] = (0.7, 0.8, 0.9, 0.95)
    factors: Sequence[float] = ()
    steps: Sequence[int] = ()
    rules: Sequence[str] = ("free_dave",)
    adaptive: bool | None = None

    def __post_init__(self) -> None:
        for k in self.ks:
            if not 1 <= k <= 64:
                raise ValidationError(f"k is a number of draft tokens in [1, 64], got {k}.", param="k")
        caches = (*CACHES, "windowed", "delayed")
        for name, values, known in (("method", self.methods, METHODS), ("cache", self.caches, caches)):
            if bad := [value for value in values if value not in known]:
                raise ValidationError(f"{name} is one of {', '.join(known)}, got {bad[0]!r}.", param=name)
        for threshold in self.thresholds:
            if not 0 < threshold <= 1:
                raise ValidationError(f"threshold is in (0, 1], got {threshold}.", param="threshold")
        for name, numbers in (("factor", self.factors), ("steps", self.steps)):
            if bad_number := [number for number in numbers if not number > 0]:
                raise ValidationError(f"{name} is above 0, got {bad_number[0]}.", param=name)


def configurations(
    kind: str | None, axes: Axes, max_tokens: int, customs: Iterable[Configuration] = ()
) -> list[Configuration]:
    """The baseline first. kind: ar, diffusion, block, or None where the server does not tell (taken as ar)."""
    if kind == "diffusion":
        base = Configuration("plain", "no cache, a step a token", "baseline", {"cache": "none", "steps": max_tokens})
        found = [base, *_diffusion(axes, max_tokens)]
    elif kind == "block":
        base = Configuration("plain", "threshold 1", "baseline", {"threshold": 1.0})
        found = [base, *_block(axes, max_tokens)]
    else:
        base = Configuration(
            "none", "no speculation", "baseline", {"speculative_config": {"method": "none"}}, method="none"
        )
        found = [base, *_speculation(axes)]
    found += customs
    names = [configuration.name for configuration in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValidationError(f"Two configurations are called {twice!r}.", param="config")
    return found


def _speculation(axes: Axes) -> Iterable[Configuration]:
    for method, k in itertools.product(axes.methods, axes.ks):
        config: dict[str, Any] = {"method": method, "num_speculative_tokens": k}
        if method == "suffix":
            # Every configuration answers the same questions: remembered answers would be the answers.
            config["suffix_decoding_max_cached_requests"] = 0
        if axes.adaptive is not None:
            config["adaptive"] = axes.adaptive
        yield Configuration(
            f"{method}-{k}", f"{method}, {k} tokens", "speculation", {"speculative_config": config}, method, k
        )


def _settings(axes: Axes, max_tokens: int) -> Iterable[tuple[str, str, dict[str, Any]]]:
    """(name, label, fields) of the ways to choose what is unmasked."""
    for threshold in axes.thresholds:
        yield f"t{threshold:g}", f"threshold {threshold:g}", {"threshold": threshold}
    for factor in axes.factors:
        yield f"f{factor:g}", f"factor {factor:g}", {"factor": factor}
    for steps in axes.steps:
        yield f"s{steps}", f"{steps} steps", {"steps": steps}
    for rule in axes.rules:
        # free_dave repeats the baseline's schedule, which is one of so many steps
        yield rule, f"rule {rule}", {"rule": rule, **({"steps": max_tokens} if rule == "free_dave" else {})}


def _diffusion(axes: Axes, max_tokens: int) -> Iterable[Configuration]:
    for cache in axes.caches:
        if cache != "none":  # that one is the baseline
            fields = {"cache": cache, "steps": max_tokens}
            yield Configuration(f"{cache}-plain", f"{cache} cache, a step a token", "diffusion", fields)
        for name, label, options in _settings(axes, max_tokens):
            yield Configuration(f"{cache}-{name}", f"{cache} cache, {label}", "diffusion", {"cache": cache, **options})


def _block(axes: Axes, max_tokens: int) -> Iterable[Configuration]:
    for name, label, options in _settings(axes, max_tokens):
        yield Configuration(name, label, "diffusion", options)


def parse_custom(text: str) -> Configuration:
    """NAME=JSON, an object of request fields. Raises ValidationError."""
    name, equals, raw = text.partition("=")
    try:
        options = json.loads(raw) if equals else None
    except ValueError as error:
        raise ValidationError(f"{text!r}: what follows = is no JSON ({error}).", param="config") from error
    if not name.strip() or not isinstance(options, dict):
        raise ValidationError(f"{text!r} is no configuration.", param="config", hint='Give NAME={"field": value, ...}.')
    spec = options.get("speculative_config")
    spec = spec if isinstance(spec, dict) else {}
    method, k = spec.get("method"), spec.get("num_speculative_tokens")
    return Configuration(name.strip(), name.strip(), "custom", options, method, k)


async def vet(
    wanted: Sequence[Configuration], fields: Fields
) -> tuple[list[Configuration], list[tuple[Configuration, str]], list[str]]:
    """(those the server does, those it refuses with its words, notes). The baseline is never refused: where its fields
    are not known to the server, its own default is the baseline, and a note says so."""
    able: list[Configuration] = []
    refused: list[tuple[Configuration, str]] = []
    notes: list[str] = []
    for configuration in wanted:
        why = await fields.refusal(configuration.options)
        if why is None:
            able.append(configuration)
        elif configuration.baseline:
            names = ", ".join(configuration.options)
            notes.append(f"The baseline is the server's own default: it does not take {names} ({why}).")
            able.append(replace(configuration, name="default", label="the server's default", options={}))
        else:
            refused.append((configuration, why))
    return able, refused, notes
