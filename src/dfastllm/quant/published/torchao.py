"""torchao, as transformers saves it into safetensors files: its tensor classes taken apart.

    MODULE._weight_qdata, MODULE._weight_scale, MODULE._weight_zero_point, ...

and in each file's header, under "__metadata__", JSON for every tensor: its class and the attributes that are no
tensors. Read are:

    Int8Tensor                I8 [n, k], scale and zero point [n, 1], [n, groups] or one: (code - zero) * scale
    IntxUnpackedToInt8Tensor  the same of 1 to 8 bits (target_dtype), one code a byte
    Float8Tensor              F8_E4M3 [n, k], scale [n, 1], one, or one for each block
    Int4Tensor                U8 [n, k / 2], two codes a byte, the first in the low half, each from -8 to 7; scale and
                              zero point [groups, n]: code * scale + zero point

The others are laid out for one kernel of one device, and refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfastllm.errors import CheckpointError
from dfastllm.quant.checkpoint import Stored
from dfastllm.quant.header import read_metadata
from dfastllm.quant.published.fp8 import SAID, numbers_of
from dfastllm.quant.published.matrix import Codes, Matrix, Values, opened
from dfastllm.quant.published.parts import FLOATS, Parts, collect
from dfastllm.quant.stream import Entry

__all__ = ["Torchao", "parse"]

QDATA = "_weight_qdata"
DATA = (QDATA, "_weight_scale", "_weight_zero_point")
REFUSED = ("_weight_act_pre_scale", "_weight_act_quant_scale", "_weight_act_quant_zero_point")
KINDS = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor", "Int4Tensor")


@dataclass(frozen=True, slots=True)
class Torchao:
    """label: as other methods have it."""

    label: str = "torchao"

    def weights(self, found: Mapping[str, Entry]) -> dict[str, Stored]:
        """See `Method.weights`."""
        modules, rest = collect(found, "torchao", (*DATA, *REFUSED), (*DATA, *REFUSED))
        weights = {name: Stored(None, entry.shape, {name: entry}) for name, entry in rest.items()}
        said: dict[Path, Mapping[str, str]] = {}
        for owner, parts in modules.items():
            file = parts.entry(QDATA, ("I8", "U8", "F8_E4M3"), (None, None)).file
            if file not in said:
                said[file] = read_metadata(file)
            weights[f"{owner}.weight"] = self._weight(owner, parts, said[file])
        return weights

    def _weight(self, owner: str, parts: Parts, said: Mapping[str, str]) -> Stored:
        kind = _kind(parts, said.get(f"{owner}.weight"))
        for part in REFUSED:
            if parts.has(part):
                raise parts.fault(part, "weights alone: what activations are multiplied by first is not computed here")
        rows, width = parts.entries[QDATA].shape
        shape = (rows, 2 * width) if kind == "Int4Tensor" else (rows, width)
        _require_sides(parts, kind, shape)
        entries = {f"{owner}.{part}": entry for part, entry in parts.entries.items()}
        return Stored(f"{self.label} ({kind})", shape, entries, opened(lambda: _matrix(parts, kind, shape)))


def _kind(parts: Parts, text: str | None) -> str:
    """The tensor's class. Raises CheckpointError where the file does not say it, or it is not read."""
    try:
        said = json.loads(text) if text is not None else None
    except (ValueError, RecursionError):
        said = None
    kind = said.get("_type") if isinstance(said, dict) else None
    if kind not in KINDS:
        what = "is not told by the file's header" if kind is None else f"is {kind!r:.60}"
        raise CheckpointError(
            f"{parts.where(QDATA)}: its class {what}; read are {', '.join(KINDS)}.",
            hint="Load the original bfloat16 or float32 checkpoint, and quantise it with `dfastllm quantize`.",
        )
    return str(kind)


def _require_sides(parts: Parts, kind: str, shape: tuple[int, int]) -> None:
    n, k = shape
    wanted = {"Float8Tensor": "F8_E4M3", "Int4Tensor": "U8"}.get(kind, "I8")
    packed = (wanted, "I8") if kind == "Int4Tensor" else (wanted,)
    parts.entry(QDATA, packed)
    entry = parts.entry("_weight_scale", FLOATS)
    if kind == "Int4Tensor":
        parts.entry("_weight_scale", FLOATS, (None, n))
        parts.entry("_weight_zero_point", FLOATS, entry.shape)
        fits = entry.shape[0] > 0 and k % entry.shape[0] == 0
    else:
        rows, groups = _two(entry.shape)
        divides = len(entry.shape) < 3 and rows > 0 and groups > 0 and n % rows == 0 and k % groups == 0
        fits = divides and (kind == "Float8Tensor" or rows in (1, n))
    if not fits:
        raise parts.fault("_weight_scale", f"scales that share {n} x {k} weights evenly")
    if parts.has("_weight_zero_point"):
        parts.entry("_weight_zero_point", ("I8", "I32", *FLOATS), entry.shape)


def _two(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of scales as rows and groups: one for all, one a row, or as it is."""
    if len(shape) == 2:
        return shape[0], shape[1]
    return (shape[0], 1) if len(shape) == 1 else (1, 1)


def _matrix(parts: Parts, kind: str, shape: tuple[int, int]) -> Matrix:
    data, scale = parts.read(QDATA), parts.read("_weight_scale").float()
    where, (n, k) = parts.where(QDATA), shape
    if kind == "Int4Tensor":
        bytes_ = data.view(torch.uint8)
        groups = len(scale)

        def nibbles(start: int, stop: int) -> Tensor:
            some = bytes_[start:stop]
            return torch.stack([some & 15, some >> 4], dim=-1).flatten(1) ^ 8  # -8 to 7 as 0 to 15

        offsets = parts.read("_weight_zero_point").float().t().contiguous()
        return Codes(where, shape, 4, nibbles, scale.t().contiguous(), k // groups, 8, offsets)
    scale = scale.reshape(_two(tuple(scale.shape)))
    rows, groups = scale.shape
    if kind == "Float8Tensor":
        columns, numbers = torch.arange(k) // (k // groups), numbers_of(data)

        def floats(start: int, stop: int) -> Tensor:
            side = torch.arange(start, stop) // (n // rows)
            return numbers(start, stop).mul_(scale.index_select(0, side).index_select(1, columns))

        return Values(where, shape, floats, SAID)
    return _plain(parts, data, scale.expand(n, groups).contiguous(), where)


def _plain(parts: Parts, data: Tensor, scale: Tensor, where: str) -> Codes:
    """Codes of one byte each. Their bits are told by their range: a file of four bits has none outside -8 to 7."""
    (n, k), groups = data.shape, scale.shape[1]
    least, most = (int(data.min()), int(data.max())) if data.numel() else (0, 0)
    bits = next(bits for bits in range(2, 9) if -(1 << bits - 1) <= least and most < 1 << bits - 1)
    middle = 1 << (bits - 1)
    zeros: Tensor | int = middle
    if parts.has("_weight_zero_point"):
        found = parts.read("_weight_zero_point").reshape(_two(tuple(parts.entries["_weight_scale"].shape)))
        if bool((found != found.round()).any() if found.is_floating_point() else False):
            raise CheckpointError(f"{parts.where('_weight_zero_point')} holds numbers that are not whole.")
        if bool(found.any()):
            zeros = found.int().expand(n, groups) + middle

    def rows(start: int, stop: int) -> Tensor:
        return data[start:stop].to(torch.int16) + middle

    return Codes(where, (n, k), bits, rows, scale, k // groups, zeros)


def parse(raw: Mapping[str, Any], where: str) -> Torchao:
    """From quantization_config, of which nothing is needed: the files say all themselves."""
    return Torchao()
