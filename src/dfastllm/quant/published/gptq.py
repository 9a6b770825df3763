"""GPTQ, as AutoGPTQ and GPTQModel write it.

    MODULE.qweight  I32 [k * bits / 32, n]        codes packed along the inputs, the first input in the lowest bits
    MODULE.qzeros   I32 [groups, n * bits / 32]   zero points packed along the outputs
    MODULE.scales   F16 [groups, n]
    MODULE.g_idx    I32 [k]                       the group of each input; may be absent

weight[o, i] = (code[i, o] - zero[g_idx[i], o]) * scale[g_idx[i], o]. Files of the first format ("gptq", what is meant
where config.json says nothing) store every zero point less 1, those of "gptq_v2" store it as it is; the 1 is added to
the unpacked number, so that a stored 15 is 16. With desc_act the groups are of inputs that are not neighbours, unless
the inputs were in the order of their groups anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dfastllm.errors import CheckpointError
from dfastllm.quant.checkpoint import Stored
from dfastllm.quant.published.matrix import Codes, opened
from dfastllm.quant.published.parts import FLOATS, Parts, collect, fields, matches, option, pattern_of, refuse_option
from dfastllm.quant.stream import Entry

__all__ = ["Gptq", "parse"]

PARTS = ("qweight", "qzeros", "scales", "g_idx")
BITS = (2, 4, 8)


@dataclass(frozen=True, slots=True)
class Gptq:
    """bits, group (-1: one for all inputs) of every module; added: 1 where zero points are stored less 1; other:
    (pattern of a module's name, its bits, its group), the first that matches counts."""

    bits: int
    group: int
    added: int
    other: tuple[tuple[str, int, int], ...] = ()

    @property
    def label(self) -> str:
        return f"gptq ({self.bits} bits)"

    def weights(self, found: Mapping[str, Entry]) -> dict[str, Stored]:
        """See `Method.weights`."""
        modules, rest = collect(found, "GPTQ", PARTS, PARTS)
        weights = {name: Stored(None, entry.shape, {name: entry}) for name, entry in rest.items()}
        for owner, parts in modules.items():
            weights[f"{owner}.weight"] = self._weight(owner, parts)
        return weights

    def _weight(self, owner: str, parts: Parts) -> Stored:
        found = next(((bits, group) for pattern, bits, group in self.other if matches(pattern, owner)), None)
        bits, group = found or (self.bits, self.group)
        each = 32 // bits
        rows, n = parts.entry("qweight", ("I32",), (None, None)).shape
        k = rows * each
        if not k:
            raise parts.fault("qweight", "rows")
        group = k if group == -1 else group
        if k % group:
            raise parts.fault("qweight", f"inputs that groups of {group} divide; it has {k}")
        groups = k // group
        if n % each:
            raise parts.fault("qweight", f"a multiple of {each} outputs, as zero points are packed {each} to a word")
        parts.entry("scales", FLOATS, (groups, n))
        parts.entry("qzeros", ("I32",), (groups, n // each))
        if parts.has("g_idx"):
            parts.entry("g_idx", ("I32", "I64"), (k,))
        entries = {f"{owner}.{part}": entry for part, entry in parts.entries.items()}
        return Stored(self.label, (n, k), entries, opened(lambda: self._matrix(parts, bits, group, (n, k))))

    def _matrix(self, parts: Parts, bits: int, group: int, shape: tuple[int, int]) -> Codes:
        n, k = shape
        words, groups = parts.read("qweight"), k // group

        def rows(start: int, stop: int) -> torch.Tensor:
            return fields(words[:, start:stop].t(), bits, k)

        zeros = (fields(parts.read("qzeros"), bits, n).int() + self.added).t().contiguous()
        scales = parts.read("scales").float().t().contiguous()
        same = int(zeros.flatten()[0]) if bool((zeros == zeros.flatten()[0]).all()) else zeros
        index = None
        if parts.has("g_idx"):
            index = parts.read("g_idx").long()
            low, high = int(index.min()), int(index.max())
            if low < 0 or high >= groups:
                raise CheckpointError(
                    f"{parts.where('g_idx')} holds groups from {low} to {high}; there are {groups}, 0 to {groups - 1}.",
                    hint="The file is damaged; load another copy.",
                )
            if bool((index == torch.arange(k) // group).all()):
                index = None
        return Codes(parts.where("qweight"), (n, k), bits, rows, scales, group, same, index=index)


def parse(raw: Mapping[str, Any], where: str) -> Gptq:
    """From quantization_config. Raises ModelLoadError for bits, groups or a layout that are not read."""
    bits, group = _sizes(raw, where, None, None)
    layout = option(raw, "checkpoint_format", where, ("gptq", "gptq_v2"), "gptq")
    option(raw, "is_marlin_format", where, (False,), False)
    other = []
    dynamic = raw.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise refuse_option("dynamic", where, dynamic, "an object, pattern by pattern")
    for pattern, changes in dynamic.items():
        if pattern.startswith("-:"):
            continue  # modules that are not quantised: their weights are there as floats
        if not isinstance(changes, Mapping):
            raise refuse_option(f"dynamic.{pattern}", where, changes, "an object with bits or group_size")
        own = pattern_of(pattern.removeprefix("+:"), "dynamic", where)
        other.append((own, *_sizes(changes, where, bits, group)))
    return Gptq(bits, group, 1 if layout == "gptq" else 0, tuple(other))


def _sizes(raw: Mapping[str, Any], where: str, bits: int | None, group: int | None) -> tuple[int, int]:
    """Bits and group, by default these."""
    found = option(raw, "bits", where, BITS, bits)
    size = raw.get("group_size", group)
    if type(size) is not int or (size != -1 and size < 1):
        raise refuse_option("group_size", where, size, "-1 or a whole number of at least 1")
    return found, size
