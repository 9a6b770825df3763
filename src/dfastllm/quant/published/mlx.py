"""MLX's affine quantisation, as mlx-lm writes it: config.json has "quantization" (and mostly the same again as
"quantization_config", without a quant_method) with group_size and bits; a module's name there has its own, or false.

    MODULE.weight  U32 [n, k * bits / 32]   codes packed along the inputs, lowest bits first, no gaps
    MODULE.scales  [n, k / group_size]
    MODULE.biases  [n, k / group_size]      not a layer's own bias, which is MODULE.bias

weight = code * scale + bias. Embeddings are quantised too. The experts of a mixture are one tensor, `switch_mlp`, whose
first dim counts them: a module of each is made of its slices.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dfastllm.quant.checkpoint import Stored
from dfastllm.quant.header import BYTES, TensorEntry
from dfastllm.quant.published.matrix import Codes, opened
from dfastllm.quant.published.parts import FLOATS, Parts, collect, fields, option, refuse_option
from dfastllm.quant.stream import Entry

__all__ = ["Mlx", "parse"]

PARTS = ("weight", "scales", "biases")
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (16, 32, 64, 128)
STACKED = ".switch_mlp."


@dataclass(frozen=True, slots=True)
class Mlx:
    """bits, group: of every module that has scales, where `other` (module -> bits, group) says nothing else."""

    bits: int
    group: int
    other: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"mlx ({self.bits} bits, groups of {self.group})"

    def weights(self, found: Mapping[str, Entry]) -> dict[str, Stored]:
        """See `Method.weights`."""
        found = _apart(found)
        modules, rest = collect(found, "MLX", PARTS, ("scales", "biases"))
        for name, entry in rest.items():
            if entry.dtype == "U32":
                owner, _, part = name.rpartition(".")
                raise Parts("MLX", owner, {part: entry}).fault("scales", "the scales of its codes")
        weights = {name: Stored(None, entry.shape, {name: entry}) for name, entry in rest.items()}
        for owner, parts in modules.items():
            weights[f"{owner}.weight"] = self._weight(owner, parts)
        return weights

    def _weight(self, owner: str, parts: Parts) -> Stored:
        told = re.sub(r"\.experts\.\d+\.", STACKED, owner)  # its settings are those of all experts
        bits, group = self.other.get(owner, self.other.get(told, (self.bits, self.group)))
        n, words = parts.entry("weight", ("U32",), (None, None)).shape
        k = words * 32 // bits
        if words * 32 % bits or k % group:
            raise parts.fault("weight", f"{bits}-bit codes of inputs that groups of {group} divide")
        for part in ("scales", "biases"):
            parts.entry(part, FLOATS, (n, k // group))
        entries = {f"{owner}.{part}": entry for part, entry in parts.entries.items()}
        return Stored(self.label, (n, k), entries, opened(lambda: _matrix(parts, bits, group, (n, k))))


def _apart(found: Mapping[str, Entry]) -> dict[str, Entry]:
    """The same with tensors of each expert in place of those of all: [experts, n, ...] lies expert after expert."""
    apart: dict[str, Entry] = {}
    for name, entry in found.items():
        if STACKED not in name or len(entry.shape) != 3 or entry.dtype not in BYTES:
            apart[name] = entry
            continue
        count, *shape = entry.shape
        step = math.prod(shape) * BYTES[entry.dtype]
        for i in range(count):
            own = name.replace(STACKED, f".experts.{i}.")
            apart[own] = TensorEntry(entry.file, entry.dtype, tuple(shape), entry.offset + i * step)
    return apart


def _matrix(parts: Parts, bits: int, group: int, shape: tuple[int, int]) -> Codes:
    words = parts.read("weight")

    def rows(start: int, stop: int) -> Tensor:
        return fields(words[start:stop], bits, shape[1])

    scales, offsets = parts.read("scales").float(), parts.read("biases").float()
    return Codes(parts.where("weight"), shape, bits, rows, scales, group, offsets=offsets)


def parse(raw: Mapping[str, Any], where: str) -> Mlx:
    """From "quantization". Raises ModelLoadError for a mode, bits or groups that are not read."""
    bits, group = _sizes(raw, where)
    other = {name: _sizes(own, where) for name, own in raw.items() if isinstance(own, Mapping)}
    unknown = [name for name, own in raw.items() if own is True]
    if unknown:
        raise refuse_option(unknown[0], where, True, "an object with group_size and bits, or false")
    return Mlx(bits, group, other)


def _sizes(raw: Mapping[str, Any], where: str) -> tuple[int, int]:
    option(raw, "mode", where, ("affine",), "affine")
    return option(raw, "bits", where, BITS), option(raw, "group_size", where, GROUPS)
