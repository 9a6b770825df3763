"""bitsandbytes: four bits as numbers of a table of sixteen floats (nf4, fp4), and LLM.int8().

four bits:

    MODULE.weight                U8 [n * k / 2, 1]   two codes a byte, the first in the high half, row after row
    MODULE.weight.quant_map      F32 [16]            the table
    MODULE.weight.absmax         F32 [blocks]        or U8, codes of a second quantisation:
    MODULE.weight.nested_absmax, MODULE.weight.nested_quant_map     F32 [blocks / nested blocks], F32 [256]
    MODULE.weight.quant_state.bitsandbytes__nf4 (or __fp4)          U8, JSON: shape, blocksize, nested_blocksize,
                                                                    nested_offset, ...

weight = table[code] * absmax of its block of 64 (or so) weights, counted over the rows; a doubly quantised absmax is
nested_quant_map[code] * nested_absmax of its block + nested_offset.

eight bits:

    MODULE.weight  I8 [n, k]
    MODULE.SCB     F32 [n]      the largest magnitude of a row: weight = code * SCB / 127

The outliers of LLM.int8() are found in the activations while it runs; the weights know nothing of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dfastllm.quant.checkpoint import Stored
from dfastllm.quant.published.matrix import Codes, Matrix, Values, opened
from dfastllm.quant.published.parts import Parts, collect, option
from dfastllm.quant.stream import Entry

__all__ = ["STATES", "Bitsandbytes", "parse"]

STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
FOUR = ("weight.quant_map", "weight.absmax", "weight.nested_absmax", "weight.nested_quant_map", *STATES)
EIGHT = ("SCB", "weight_format")
LARGEST_STATE = 1 << 16  # bytes of the JSON; real ones have some 200


@dataclass(frozen=True, slots=True)
class _State:
    """What the JSON of a four-bit matrix says. nested: (weights of absmax that share a nested one, what is added)."""

    shape: tuple[int, int]
    block: int
    nested: tuple[int, float] | None


@dataclass(frozen=True, slots=True)
class Bitsandbytes:
    """label: what config.json says of it."""

    label: str

    def weights(self, found: Mapping[str, Entry]) -> dict[str, Stored]:
        """See `Method.weights`."""
        modules, rest = collect(found, "bitsandbytes", ("weight", *FOUR, *EIGHT), (*FOUR, "SCB"))
        weights = {name: Stored(None, entry.shape, {name: entry}) for name, entry in rest.items()}
        for owner, parts in modules.items():
            entries = {f"{owner}.{part}": entry for part, entry in parts.entries.items()}
            shape, make = _eight(parts) if parts.has("SCB") else _four(parts)
            weights[f"{owner}.weight"] = Stored(self.label, shape, entries, opened(make))
        return weights


def _eight(parts: Parts) -> tuple[tuple[int, int], Callable[[], Matrix]]:
    n, k = parts.entry("weight", ("I8",), (None, None)).shape
    parts.entry("SCB", ("F32", "F16", "BF16"), (n,))
    if parts.has("weight_format"):
        parts.entry("weight_format", ("U8",), ())
        layout = int(parts.read("weight_format"))
        if layout:
            raise parts.fault("weight_format", f"0, rows one after the other; it holds {layout}")

    def make() -> Codes:
        codes, scales = parts.read("weight"), parts.read("SCB").float() / 127

        def rows(start: int, stop: int) -> Tensor:
            return codes[start:stop].to(torch.int16) + 128

        return Codes(parts.where("weight"), (n, k), 8, rows, scales[:, None], k, 128)

    return (n, k), make


def _four(parts: Parts) -> tuple[tuple[int, int], Callable[[], Matrix]]:
    state = _state(parts)
    n, k = state.shape
    if (n * k) % 2 or (parts.has("weight") and parts.entries["weight"].shape not in ((n * k // 2, 1), (1, n * k // 2))):
        raise parts.fault("weight", f"U8 [{n * k // 2}, 1], the codes of {n} x {k} weights")
    parts.entry("weight", ("U8",))
    parts.entry("weight.quant_map", ("F32",), (16,))
    blocks = -(-n * k // state.block)
    if state.nested is None:
        parts.entry("weight.absmax", ("F32",), (blocks,))
    else:
        parts.entry("weight.absmax", ("U8",), (blocks,))
        parts.entry("weight.nested_quant_map", ("F32",), (256,))
        parts.entry("weight.nested_absmax", ("F32",), (-(-blocks // state.nested[0]),))
    kind = next(part for part in STATES if parts.has(part)).rpartition("__")[2]

    def make() -> Values:
        packed, table = parts.read("weight").view(-1), parts.read("weight.quant_map")
        absmax = _absmax(parts, state)

        def floats(start: int, stop: int) -> Tensor:
            first, last = start * k, stop * k
            some = packed[first // 2 : -(-last // 2)]
            codes = torch.stack([some >> 4, some & 15], dim=-1).view(-1)[first % 2 : first % 2 + last - first]
            values = table.index_select(0, codes.int())
            if k % state.block == 0:
                values.view(-1, state.block).mul_(absmax[first // state.block : last // state.block, None])
            else:
                values *= absmax[torch.arange(first, last) // state.block]
            return values.view(stop - start, k)

        return Values(parts.where("weight"), (n, k), floats, kind)

    return (n, k), make


def _absmax(parts: Parts, state: _State) -> Tensor:
    """float32 [blocks]."""
    found = parts.read("weight.absmax")
    if state.nested is None:
        return found
    block, offset = state.nested
    outer, table = parts.read("weight.nested_absmax"), parts.read("weight.nested_quant_map")
    return table[found.long()] * outer[torch.arange(len(found)) // block] + offset


def _state(parts: Parts) -> _State:
    """Raises CheckpointError for JSON that is none, or lacks what there must be."""
    part = next((part for part in STATES if parts.has(part)), STATES[0])
    entry = parts.entry(part, ("U8",), (None,))
    wanted = 'JSON with "shape": [n, k] and "blocksize"'
    if entry.shape[0] > LARGEST_STATE:
        raise parts.fault(part, f"{wanted}, of at most {LARGEST_STATE} bytes")
    try:
        raw = json.loads(bytes(parts.read(part).tolist()))
    except (ValueError, RecursionError) as error:
        raise parts.fault(part, f"{wanted}; it is none ({error})") from error
    said: dict[str, Any] = raw if isinstance(raw, dict) else {}
    shape, block = said.get("shape"), said.get("blocksize")
    matrix = isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)
    if not isinstance(shape, list) or not matrix or type(block) is not int or block < 1:
        raise parts.fault(part, f"{wanted}; it says {raw!r:.160}")
    nested = None
    if parts.has("weight.nested_absmax"):
        size, offset = said.get("nested_blocksize"), said.get("nested_offset")
        if type(size) is not int or size < 1 or not isinstance(offset, float | int):
            raise parts.fault(part, f'"nested_blocksize" and "nested_offset" too; it says {raw!r:.160}')
        nested = (size, float(offset))
    return _State((shape[0], shape[1]), block, nested)


def parse(raw: Mapping[str, Any], where: str) -> Bitsandbytes:
    """From quantization_config. Raises ModelLoadError for a four-bit type that there is not."""
    four = option(raw, "load_in_4bit", where, (True, False), False)
    kind = option(raw, "bnb_4bit_quant_type", where, ("nf4", "fp4"), "fp4")
    return Bitsandbytes(f"bitsandbytes ({kind})" if four else "bitsandbytes (int8)")
