"""AWQ, as AutoAWQ writes it, in the layouts "gemm" and "gemv" with 4 bits.

gemm:

    MODULE.qweight  I32 [k, n / 8]       codes packed along the outputs: bits 4 j of a word are output ORDER[j] of its 8
    MODULE.qzeros   I32 [groups, n / 8]  zero points, in the same order
    MODULE.scales   F16 [groups, n]

gemv:

    MODULE.qweight  I32 [n, k / 8]       codes packed along the inputs, the first in the lowest bits
    MODULE.qzeros   I32 [n, w]           zero points packed along the groups, w words with the unused ones at the end
    MODULE.scales   F16 [n, 8 w]         the unused ones at the end

weight[o, i] = (code - zero) * scale, of the group of i. A zero point is stored as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dfastllm.quant.checkpoint import Stored
from dfastllm.quant.published.matrix import Codes, opened
from dfastllm.quant.published.parts import FLOATS, Parts, collect, fields, option, refuse_option
from dfastllm.quant.stream import Entry

__all__ = ["Awq", "parse"]

PARTS = ("qweight", "qzeros", "scales")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
BITS, EACH = 4, 8


@dataclass(frozen=True, slots=True)
class Awq:
    """group: inputs that share a scale, -1: all. layout: gemm or gemv."""

    group: int
    layout: str

    @property
    def label(self) -> str:
        return f"awq ({self.layout}, 4 bits)"

    def weights(self, found: Mapping[str, Entry]) -> dict[str, Stored]:
        """See `Method.weights`."""
        modules, rest = collect(found, "AWQ", PARTS, PARTS)
        weights = {name: Stored(None, entry.shape, {name: entry}) for name, entry in rest.items()}
        for owner, parts in modules.items():
            weights[f"{owner}.weight"] = self._weight(owner, parts)
        return weights

    def _weight(self, owner: str, parts: Parts) -> Stored:
        rows, words = parts.entry("qweight", ("I32",), (None, None)).shape
        n, k = (words * EACH, rows) if self.layout == "gemm" else (rows, words * EACH)
        if not k:
            raise parts.fault("qweight", "rows and columns")
        group = k if self.group == -1 else self.group
        if k % group:
            raise parts.fault("qweight", f"inputs that groups of {group} divide; it has {k}")
        groups = k // group
        if self.layout == "gemm":
            parts.entry("qzeros", ("I32",), (groups, n // EACH))
            parts.entry("scales", FLOATS, (groups, n))
        else:
            wide = parts.entry("qzeros", ("I32",), (n, None)).shape[1]
            if wide * EACH < groups:
                raise parts.fault("qzeros", f"I32 [{n}, {-(-groups // EACH)} or more]")
            parts.entry("scales", FLOATS, (n, wide * EACH))
        entries = {f"{owner}.{part}": entry for part, entry in parts.entries.items()}
        return Stored(self.label, (n, k), entries, opened(lambda: self._matrix(parts, group, (n, k))))

    def _matrix(self, parts: Parts, group: int, shape: tuple[int, int]) -> Codes:
        k = shape[1]
        words, scales = parts.read("qweight"), parts.read("scales").float()
        if self.layout == "gemm":
            zeros, scales = _in_order(parts.read("qzeros")).t().int(), scales.t()
        else:
            zeros, scales = fields(parts.read("qzeros"), BITS, k // group).int(), scales[:, : k // group]

        def rows(start: int, stop: int) -> Tensor:
            if self.layout == "gemv":
                return fields(words[start:stop], BITS, k)
            first = start // EACH
            some = _in_order(words[:, first : -(-stop // EACH)])
            return some.t()[start - first * EACH : stop - first * EACH].contiguous()

        where, sides = parts.where("qweight"), (scales.contiguous(), group, zeros.contiguous())
        return Codes(where, shape, BITS, rows, *sides)


def _in_order(words: Tensor) -> Tensor:
    """int32 [rows, words] packed along the outputs in AWQ's order -> uint8 [rows, 8 words]."""
    moved = torch.zeros_like(words)
    for at, output in enumerate(ORDER):
        moved |= ((words >> BITS * at) & 15) << BITS * output
    return fields(moved, BITS, words.shape[1] * EACH)


def parse(raw: Mapping[str, Any], where: str) -> Awq:
    """From quantization_config. Raises ModelLoadError for bits, groups or a layout that are not read."""
    option({"bits": raw.get("bits", raw.get("w_bit"))}, "bits", where, (BITS,))
    option(raw, "zero_point", where, (True,), True)
    group = raw.get("group_size", raw.get("q_group_size"))
    if type(group) is not int or (group != -1 and group < 1):
        raise refuse_option("group_size", where, group, "-1 or a whole number of at least 1")
    version = raw.get("version")
    layout = option({"version": str(version or "gemm").lower()}, "version", where, ("gemm", "gemv"))
    return Awq(group, layout)
