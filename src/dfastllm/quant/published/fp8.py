"""Eight-bit floats with a scale for each block, each row or the whole matrix: DeepSeek's and Qwen's block layout, and
the per-tensor and per-row layouts that vLLM's "fp8" and Meta's "fbgemm_fp8" write.

    MODULE.weight            F8_E4M3 [n, k]
    MODULE.weight_scale_inv  F32, BF16 or F8_E8M0 [ceil(n / rows), ceil(k / columns)], in blocks of weight_block_size
    MODULE.weight_scale      F32 or BF16 [], [1], [1, 1] (one for all), [n] or [n, 1] (one a row)
    MODULE.input_scale       of activations, which are rounded as they come here: not used

weight = the eight-bit float times the scale of its block, although the name of the block's scales says the inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dfastllm.quant.checkpoint import Stored
from dfastllm.quant.published.matrix import Values, opened
from dfastllm.quant.published.parts import FLOATS, Parts, collect, option, refuse_option
from dfastllm.quant.stream import Entry

__all__ = ["EIGHT_BIT", "Fp8", "block_sizes", "eight_bit_floats", "numbers_of", "parse", "require_scale"]

PARTS = ("weight", "weight_scale_inv", "weight_scale", "input_scale", "activation_scale", "input_scale_ub")
SCALES = ("weight_scale_inv", "weight_scale")
EIGHT_BIT = ("F8_E4M3", "F8_E5M2")
SCALE_TYPES = (*FLOATS, "F8_E8M0")
SAID = "eight-bit floats"


@dataclass(frozen=True, slots=True)
class Fp8:
    """block: rows and columns that share a scale in weight_scale_inv, None: there is none."""

    block: tuple[int, int] | None

    @property
    def label(self) -> str:
        return "fp8" if self.block is None else f"fp8 (blocks of {self.block[0]} x {self.block[1]})"

    def weights(self, found: Mapping[str, Entry]) -> dict[str, Stored]:
        """See `Method.weights`."""
        marks = {f"{name.removesuffix('.weight')}" for name, entry in found.items() if entry.dtype in EIGHT_BIT}
        modules, rest = collect(found, "FP8", PARTS, SCALES)
        bare = {name: entry for name, entry in rest.items() if name.removesuffix(".weight") in marks}
        for name, entry in bare.items():
            owner, _, part = name.rpartition(".")
            raise Parts("FP8", owner, {part: entry}).fault("weight_scale", "the scales of its eight-bit floats")
        weights = {name: Stored(None, entry.shape, {name: entry}) for name, entry in rest.items()}
        for owner, parts in modules.items():
            weights[f"{owner}.weight"] = self._weight(owner, parts)
        return weights

    def _weight(self, owner: str, parts: Parts) -> Stored:
        n, k = parts.entry("weight", EIGHT_BIT, (None, None)).shape
        part = next(part for part in SCALES if parts.has(part))
        block = self.block if part == "weight_scale_inv" else None
        if part == "weight_scale_inv" and block is None:
            raise parts.fault(part, "weight_block_size in config.json's quantization_config")
        require_scale(parts, part, (n, k), block)
        entries = {f"{owner}.{name}": entry for name, entry in parts.entries.items()}
        return Stored(self.label, (n, k), entries, opened(lambda: eight_bit_floats(parts, part, (n, k), block)))


def require_scale(parts: Parts, part: str, shape: tuple[int, int], block: tuple[int, int] | None) -> None:
    """Raise CheckpointError unless this part has scales for a matrix of this shape. block: rows and columns of one;
    None: one for all, or one a row."""
    n, k = shape
    if block is not None:
        parts.entry(part, SCALE_TYPES, (-(-n // block[0]), -(-k // block[1])))
        return
    found = parts.entry(part, SCALE_TYPES).shape
    if found not in ((), (1,), (1, 1), (n,), (n, 1)):
        raise parts.fault(part, f"one scale, or one a row ([{n}] or [{n}, 1])")


def eight_bit_floats(parts: Parts, part: str, shape: tuple[int, int], block: tuple[int, int] | None) -> Values:
    """The matrix: MODULE.weight times the scales of `part`, whose shape was checked by `require_scale`."""
    n, k = shape
    weight, scales = parts.read("weight"), parts.read(part).float()
    scales = scales.view(len(scales) if scales.ndim else 1, -1)
    size = (n if len(scales) == 1 else 1, k) if block is None else block

    columns = torch.arange(k) // size[1]
    numbers = numbers_of(weight)

    def floats(start: int, stop: int) -> Tensor:
        rows = torch.arange(start, stop) // size[0]
        return numbers(start, stop).mul_(scales.index_select(0, rows).index_select(1, columns))

    return Values(parts.where("weight"), shape, floats, SAID)


def numbers_of(weight: Tensor) -> Callable[[int, int], Tensor]:
    """(start, stop) -> these rows of eight-bit floats as float32, by a table: torch converts them one by one."""
    table = torch.arange(256).to(torch.uint8).view(weight.dtype).float()
    codes = weight.view(torch.uint8)
    return lambda start, stop: table.index_select(0, codes[start:stop].flatten().int()).view(stop - start, -1)


def block_sizes(raw: object, name: str, where: str) -> tuple[int, int]:
    """Two whole numbers of at least 1. Raises ModelLoadError."""
    if isinstance(raw, list) and len(raw) == 2 and all(type(size) is int and size >= 1 for size in raw):
        return raw[0], raw[1]
    raise refuse_option(name, where, raw, "[rows, columns]")


def parse(raw: Mapping[str, Any], where: str) -> Fp8:
    """From quantization_config. Raises ModelLoadError for another kind of float or blocks that are none."""
    option(raw, "fmt", where, ("e4m3", "e5m2"), "e4m3")
    block = raw.get("weight_block_size")
    return Fp8(None if block is None else block_sizes(block, "weight_block_size", where))
