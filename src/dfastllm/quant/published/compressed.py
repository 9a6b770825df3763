"""compressed-tensors, as llm-compressor writes it: formats pack-quantized, int-quantized, float-quantized and
naive-quantized, of 2 to 8 bits, per tensor, row, group or block.

pack-quantized:

    MODULE.weight_packed      I32 [n, ceil(k * bits / 32)]   codes packed along the inputs, lowest bits first, no gaps
    MODULE.weight_shape       I32 or I64 [2]                 n and k
    MODULE.weight_scale       [n, groups]
    MODULE.weight_zero_point  I32 [ceil(n * bits / 32), groups], packed along the outputs; absent: symmetric
    MODULE.weight_g_idx       I32 [k], the group of each input; written by earlier versions with actorder "group"

the others:

    MODULE.weight             I8 or F8_E4M3 [n, k]
    MODULE.weight_scale       [1], [n, 1], [n, groups] or one for each block
    MODULE.weight_zero_point  I8, of the shape of the scales; absent: symmetric

Codes and zero points are signed numbers; packed ones have 2^(bits - 1) added. weight = (code - zero) * scale. Which
group of the configuration a module belongs to is told by its targets: names, patterns after "re:", or a class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dfastllm.errors import CheckpointError
from dfastllm.quant.checkpoint import Stored
from dfastllm.quant.published.fp8 import EIGHT_BIT, block_sizes, eight_bit_floats, require_scale
from dfastllm.quant.published.matrix import Codes, Matrix, opened
from dfastllm.quant.published.parts import FLOATS, Parts, collect, fields, matches, option, pattern_of, refuse_option
from dfastllm.quant.stream import Entry

__all__ = ["Compressed", "Scheme", "parse"]

PACKED, PLAIN = "weight_packed", "weight"
SIDES = ("weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape")
UNUSED = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
STRATEGIES = ("tensor", "channel", "group", "block")
# Classes of modules that may be a target: what they share is a matrix called weight.
CLASSES = ("Linear", "Embedding")


@dataclass(frozen=True, slots=True)
class Scheme:
    """One group of the configuration.

    targets   what it is for: see the module's docstring.
    bits      of a weight. floats: they are floats, not whole numbers.
    strategy  what shares a scale. group: inputs of a group; block: rows and columns of a block.
    """

    targets: tuple[str, ...]
    bits: int
    floats: bool
    symmetric: bool
    strategy: str
    group: int | None
    block: tuple[int, int] | None

    def takes(self, owner: str) -> bool:
        """Whether a module of this name is a target."""
        return any(_named(owner, target) or target in CLASSES for target in self.targets)


@dataclass(frozen=True, slots=True)
class Compressed:
    """The groups of the configuration; the first that takes a module counts, one that names it before one that takes a
    class."""

    schemes: tuple[Scheme, ...]

    @property
    def label(self) -> str:
        kinds = sorted({f"{scheme.bits}-bit {'floats' if scheme.floats else 'codes'}" for scheme in self.schemes})
        return f"compressed-tensors ({', '.join(kinds)})"

    def weights(self, found: Mapping[str, Entry]) -> dict[str, Stored]:
        """See `Method.weights`."""
        modules, rest = collect(found, "compressed-tensors", (PACKED, PLAIN, *SIDES, *UNUSED), (PACKED, *SIDES))
        weights = {name: Stored(None, entry.shape, {name: entry}) for name, entry in rest.items()}
        for owner, parts in modules.items():
            weights[f"{owner}.weight"] = self._weight(owner, parts)
        return weights

    def _scheme(self, parts: Parts) -> Scheme:
        named = [s for s in self.schemes if any(_named(parts.owner, target) for target in s.targets)]
        for scheme in (*named, *(s for s in self.schemes if s.takes(parts.owner))):
            return scheme
        targets = ", ".join(target for scheme in self.schemes for target in scheme.targets)
        raise parts.fault(next(iter(parts.entries)), f"a group in config.json that names it; there are {targets}")

    def _weight(self, owner: str, parts: Parts) -> Stored:
        scheme = self._scheme(parts)
        entries = {f"{owner}.{part}": entry for part, entry in parts.entries.items()}
        if scheme.floats:
            n, k = parts.entry(PLAIN, EIGHT_BIT, (None, None)).shape
            side, block = "weight_scale", scheme.block if scheme.strategy == "block" else None
            require_scale(parts, side, (n, k), block)
            return Stored(self.label, (n, k), entries, opened(lambda: eight_bit_floats(parts, side, (n, k), block)))
        n, k = _shape(parts, scheme.bits)
        groups = _groups(parts, scheme, n, k)
        return Stored(self.label, (n, k), entries, opened(lambda: _matrix(parts, scheme, (n, k), groups)))


def _named(owner: str, target: str) -> bool:
    if target.startswith("re:"):
        return matches(target[3:], owner)
    return target == owner


def _shape(parts: Parts, bits: int) -> tuple[int, int]:
    """n and k, which must fit the codes."""
    if not parts.has(PACKED):
        n, k = parts.entry(PLAIN, ("I8",), (None, None)).shape
        return n, k
    rows, words = parts.entry(PACKED, ("I32",), (None, None)).shape
    parts.entry("weight_shape", ("I32", "I64"), (2,))
    n, k = (int(size) for size in parts.read("weight_shape"))
    if n != rows or k < 1 or -(-k * bits // 32) != words:
        raise parts.fault(PACKED, f"the codes of weight_shape [{n}, {k}]: I32 [{n}, {-(-max(k, 0) * bits // 32)}]")
    return n, k


def _groups(parts: Parts, scheme: Scheme, n: int, k: int) -> int:
    """How many scales a row has. Raises CheckpointError for sides that do not fit."""
    groups = 1
    if scheme.strategy == "group" and scheme.group is not None:
        if k % scheme.group:
            raise parts.fault(PACKED if parts.has(PACKED) else PLAIN, f"inputs that groups of {scheme.group} divide")
        groups = k // scheme.group
    if scheme.strategy == "block":
        raise parts.fault("weight_scale", "blocks of eight-bit floats only, not of whole numbers")
    if scheme.strategy == "tensor":
        found = parts.entry("weight_scale", FLOATS).shape
        if found not in ((), (1,), (1, 1)):
            raise parts.fault("weight_scale", "one scale")
    elif parts.entry("weight_scale", FLOATS).shape not in ((n, groups), *([(n,)] if groups == 1 else [])):
        raise parts.fault("weight_scale", f"{' or '.join(FLOATS)} [{n}, {groups}]")
    if not scheme.symmetric:
        _require_zeros(parts, scheme, n, groups)
    if parts.has("weight_g_idx"):
        parts.entry("weight_g_idx", ("I32", "I64"), (k,))
    return groups


def _require_zeros(parts: Parts, scheme: Scheme, n: int, groups: int) -> None:
    part = "weight_zero_point"
    if parts.has(PACKED) and scheme.strategy != "tensor":
        parts.entry(part, ("I32",), (-(-n * scheme.bits // 32), groups))
        return
    rows = 1 if scheme.strategy == "tensor" else n
    short = [(rows,)] if groups == 1 else []
    if parts.entry(part, ("I8",)).shape not in ((rows, groups), *short):
        raise parts.fault(part, f"I8 [{rows}, {groups}]")


def _matrix(parts: Parts, scheme: Scheme, shape: tuple[int, int], groups: int) -> Matrix:
    (n, k), bits = shape, scheme.bits
    middle = 1 << (bits - 1)
    packed = parts.has(PACKED)
    codes = parts.read(PACKED if packed else PLAIN)
    scales = parts.read("weight_scale").float().reshape(-1, groups).expand(n, groups).contiguous()

    def rows(start: int, stop: int) -> Tensor:
        return fields(codes[start:stop], bits, k) if packed else codes[start:stop].to(torch.int16) + middle

    zeros: Tensor | int = middle
    if not scheme.symmetric:
        found = parts.read("weight_zero_point")
        if found.dtype == torch.int32:
            zeros = fields(found.t(), bits, n).t().int().contiguous()
        else:
            zeros = found.reshape(-1, groups).int().expand(n, groups) + middle
    index = parts.read("weight_g_idx").long() if parts.has("weight_g_idx") else None
    if index is not None and (bool((index < 0).all()) or bool((index == torch.arange(k) // (k // groups)).all())):
        index = None  # -1 everywhere says that there is no order
    where = parts.where(PACKED if packed else PLAIN)
    if index is not None and (int(index.min()) < 0 or int(index.max()) >= groups):
        raise CheckpointError(
            f"{parts.where('weight_g_idx')} holds groups from {int(index.min())} to {int(index.max())}; there are "
            f"{groups}, 0 to {groups - 1}.",
            hint="The file is damaged; load another copy.",
        )
    if not packed and bits < 8:
        low, high = int(codes.min()), int(codes.max())
        if low < -middle or high >= middle:
            raise CheckpointError(f"{where} holds codes from {low} to {high}, which are not of {bits} bits.")
    return Codes(where, shape, bits, rows, scales, k // groups, zeros, index=index)


def parse(raw: Mapping[str, Any], where: str) -> Compressed:
    """From quantization_config. Raises ModelLoadError for a format, bits or a strategy that are not read."""
    option(raw, "format", where, FORMATS)
    sparsity = raw.get("sparsity_config") or {}
    if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
        raise refuse_option("sparsity_config", where, sparsity, 'format "dense"')
    groups = raw.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise refuse_option("config_groups", where, groups, "groups of targets and weights")
    return Compressed(tuple(_scheme(name, group, where) for name, group in groups.items()))


def _scheme(name: str, raw: object, where: str) -> Scheme:
    path = f"config_groups.{name}"
    weights = raw.get("weights") if isinstance(raw, Mapping) else None
    targets = raw.get("targets") if isinstance(raw, Mapping) else None
    if not isinstance(raw, Mapping) or not isinstance(weights, Mapping):
        raise refuse_option(path, where, raw, "an object with weights")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise refuse_option(f"{path}.targets", where, targets, "a list of names")
    if raw.get("format") is not None:
        option(raw, "format", where, FORMATS)
    for target in targets:
        if target.startswith("re:"):
            pattern_of(target[3:], f"{path}.targets", where)
    kind = option(weights, "type", where, ("int", "float"), "int")
    bits = option(weights, "num_bits", where, (8,) if kind == "float" else (2, 3, 4, 5, 6, 7, 8), 8)
    group = weights.get("group_size")
    strategy = option(weights, "strategy", where, STRATEGIES, "group" if group not in (None, -1) else "tensor")
    if strategy == "group" and (type(group) is not int or group < 1):
        raise refuse_option(f"{path}.weights.group_size", where, group, "a whole number of at least 1")
    block = None
    if strategy == "block":
        block = block_sizes(weights.get("block_structure"), f"{path}.weights.block_structure", where)
    symmetric = option(weights, "symmetric", where, (True, False), True)
    return Scheme(tuple(targets), bits, kind == "float", symmetric, strategy, group, block)
