"""What a safetensors file holds, from its header alone. Reads no weights.

The layout: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dfastllm.core.filetype import mistaken
from dfastllm.errors import CheckpointError

__all__ = ["BYTES", "TensorEntry", "header_of", "read_header", "read_metadata"]

MAX_HEADER = 100_000_000  # bytes; the format's own limit
MAX_DIMENSIONS = 16
BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: its file, dtype in safetensors' spelling (F32, BF16, ...), shape, and the byte of the file
    that its data starts at."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Tensors of one safetensors file. Raises CheckpointError if the file is truncated, overlong or malformed."""
    try:
        if (found := mistaken(path)) is not None:
            raise CheckpointError(f"{path} is no safetensors file but {found.what}.", hint=found.hint)
        with path.open("rb") as file:
            return header_of(file, path)
    except OSError as error:
        raise CheckpointError(f"{path} has an unreadable safetensors header: {error}.") from error


def read_metadata(path: Path) -> dict[str, str]:
    """What a file says of itself beside its tensors: the texts of "__metadata__". Raises as `read_header`."""
    try:
        with path.open("rb") as file:
            _, header = _parsed(file, path)
    except OSError as error:
        raise CheckpointError(f"{path} has an unreadable safetensors header: {error}.") from error
    said = header.get("__metadata__")
    return {key: text for key, text in said.items() if isinstance(text, str)} if isinstance(said, dict) else {}


def header_of(file: BinaryIO, path: Path) -> dict[str, TensorEntry]:
    """The same of a file that is open at its beginning, for who reads its tensors from it too, whatever takes its place
    meanwhile. path: for entries and messages."""
    length, header = _parsed(file, path)
    size = os.fstat(file.fileno()).st_size
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    _check_layout(path, header, size - 8 - length)
    return entries


def _parsed(file: BinaryIO, path: Path) -> tuple[int, dict[str, Any]]:
    """The length of the JSON, and what it is."""
    try:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise CheckpointError(
                f"{path} is corrupt or truncated: {size} bytes, header length {length if size >= 8 else 'absent'}."
            )
        header = json.loads(file.read(length).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has an unreadable safetensors header: {error}.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a malformed safetensors header: not an object.")
    return length, header


def _entry(path: Path, name: str, value: Any, start: int) -> TensorEntry:
    shape = value.get("shape") if isinstance(value, Mapping) else None
    offsets = value.get("data_offsets") if isinstance(value, Mapping) else None
    if (
        not isinstance(shape, list)
        or not isinstance(offsets, list)
        or len(offsets) != 2
        or len(shape) > MAX_DIMENSIONS
        or not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 63 for n in [*shape, *offsets])
    ):
        raise CheckpointError(f"{path}: malformed header entry of tensor {name!r}: {value!r:.120}.")
    dtype = str(value.get("dtype"))
    entry = TensorEntry(path, dtype, tuple(shape), start + offsets[0])
    if dtype in BYTES and offsets[1] - offsets[0] != entry.size * BYTES[dtype]:
        raise CheckpointError(
            f"{path}: tensor {name!r} of {dtype} {shape} takes {entry.size * BYTES[dtype]} bytes, "
            f"its data_offsets span {offsets[1] - offsets[0]}."
        )
    return entry


def _check_layout(path: Path, header: Mapping[str, Any], data: int) -> None:
    """Tensors must cover the data area exactly: no overlap, no hole, nothing past the end."""
    end = 0
    for start, stop in sorted(tuple(value["data_offsets"]) for value in header.values()):
        if start != end:
            raise CheckpointError(f"{path} is corrupt: tensor data overlap or leave a hole at byte {end}.")
        end = stop
    if end != data:
        state = "truncated" if data < end else "overlong"
        raise CheckpointError(f"{path} is {state}: its header describes {end} bytes of data, the file has {data}.")
