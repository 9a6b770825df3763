"""The settings that are compared: every cache with every way to choose what is unmasked, or the model's own way."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dfastllm.core import DecodeParams, Kind
from dfastllm.errors import UnsupportedError

__all__ = ["Setting", "grid"]

DEFAULT = "default"


@dataclass(frozen=True)
class Setting:
    """name: in tables and records; it says all that `options` say. options: fields of DecodeParams, {}: the model's own
    way."""

    name: str
    options: dict[str, Any]

    @property
    def decode(self) -> DecodeParams | None:
        return DecodeParams(**self.options) if self.options else None


def grid(
    kind: Kind,
    *,
    caches: Sequence[str] = (),
    thresholds: Sequence[float] = (),
    factors: Sequence[float] = (),
    steps: Sequence[int] = (),
    block_length: int | None = None,
) -> list[Setting]:
    """Every combination, in the order given; the first is the baseline that others are compared with. Nothing given:
    the model's own way alone. Raises UnsupportedError for an axis that a model of this kind has not, ValidationError
    for a value out of range."""
    blocks = () if block_length is None else (block_length,)
    axes = {"cache": caches, "threshold": thresholds, "factor": factors, "steps": steps, "block_length": blocks}
    given = [name for name, values in axes.items() if values]
    if kind == "ar" and given:
        raise UnsupportedError(
            f"an autoregressive model has no {given[0]} to set: its tokens come one by one.",
            param=given[0],
            hint="Leave these options out, or compare drafters with `dfastllm bench --model`.",
        )
    if kind == "block" and caches:
        raise UnsupportedError(
            "a block-diffusion model keeps the exact K,V of its finished blocks: there is no cache to choose.",
            param="cache",
            hint="Leave --no-cache, --use-cache and --use-dual-cache out.",
        )
    ways: list[tuple[str, dict[str, Any]]] = [
        *((f"t{value:g}", {"threshold": value}) for value in thresholds),
        *((f"f{value:g}", {"factor": value}) for value in factors),
        *((f"s{value}", {"steps": value}) for value in steps),
    ]
    held = {} if block_length is None else {"block_length": block_length}
    found = []
    for cache, (way, options) in itertools.product(caches or [""], ways or [("", {})]):
        names = [name for name in (cache, way, f"b{block_length}" if block_length else "") if name]
        setting = Setting("-".join(names) or DEFAULT, {**({"cache": cache} if cache else {}), **options, **held})
        _ = setting.decode  # what is out of range is told before a model is loaded
        found.append(setting)
    return list({setting.name: setting for setting in found}.values())
