"""What a Hugging Face directory holds, from headers alone: every tensor's file, dtype and shape. Reads no weights.

safetensors layout: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfastllm.errors import CheckpointError, ModelLoadError
from dfastllm.quant.stream import INDEX_FILE, WEIGHTS_FILE

__all__ = ["BYTES", "INDEX_FILE", "WEIGHTS_FILE", "TensorEntry", "inventory", "read_json"]

MAX_HEADER = 100_000_000  # bytes; the format's own limit
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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelLoadError when it is absent, unreadable or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadError(f"{path.name} is missing in {path.parent}.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ModelLoadError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} must hold a JSON object, got {type(value).__name__}.")
    return value


def inventory(directory: Path) -> dict[str, TensorEntry]:
    """Every tensor of a directory: of model.safetensors, or of the shards its index names.

    Raises CheckpointError for no weights, a missing or corrupt shard, an index path outside the directory, and an
    index that disagrees with its shards.
    """
    index = directory / INDEX_FILE
    if not index.exists():
        single = directory / WEIGHTS_FILE
        if not single.exists():
            others = sorted(p.name for p in directory.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
            instead = f"; found {', '.join(others)}, which are not read" if others else ""
            raise CheckpointError(
                f"no weights in {directory}: neither {WEIGHTS_FILE} nor {INDEX_FILE}{instead}.",
                hint="Convert the checkpoint to safetensors.",
            )
        return read_header(single)
    where = _weight_map(index)
    found: dict[str, TensorEntry] = {}
    for name in sorted(set(where.values())):
        for tensor, entry in read_header(_shard(directory, name)).items():
            if tensor in found:
                raise CheckpointError(f"tensor {tensor!r} is in two shards: {found[tensor].file.name} and {name}.")
            found[tensor] = entry
    for tensor, name in where.items():
        if tensor not in found or found[tensor].file != directory / name:
            raise CheckpointError(f"{INDEX_FILE} says tensor {tensor!r} is in {name}, which does not hold it.")
    return found


def _weight_map(index: Path) -> dict[str, str]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()) or not where:
        raise CheckpointError(f"{index.name}: weight_map must map tensor names to file names, got {where!r:.80}.")
    return where


def _shard(directory: Path, name: str) -> Path:
    """The shard's path, which must lie directly or below the directory: an index is untrusted input."""
    path = directory / name
    if Path(name).is_absolute() or ".." in Path(name).parts or "\x00" in name or path.suffix != ".safetensors":
        raise CheckpointError(f"{INDEX_FILE} names {name!r}, which is not a .safetensors file inside the directory.")
    if not path.is_file():
        raise CheckpointError(f"shard {name} named by {INDEX_FILE} is missing in {directory}.")
    return path


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Tensors of one safetensors file. Raises CheckpointError if the file is truncated, overlong or malformed."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise CheckpointError(
                    f"{path} is corrupt or truncated: {size} bytes, header length {length if size >= 8 else 'absent'}."
                )
            header = json.loads(file.read(length).decode("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} has an unreadable safetensors header: {error}.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a malformed safetensors header: not an object.")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    _check_layout(path, header, size - 8 - length)
    return entries


def _entry(path: Path, name: str, value: Any, start: int) -> TensorEntry:
    shape = value.get("shape") if isinstance(value, Mapping) else None
    offsets = value.get("data_offsets") if isinstance(value, Mapping) else None
    if (
        not isinstance(shape, list)
        or not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(isinstance(n, int) and n >= 0 for n in [*shape, *offsets])
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
