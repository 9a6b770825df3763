"""Writing GGUF files (version 3): header first, then tensors one by one, so that memory holds about one tensor.

The header's sizes follow from names, shapes and types, so tensors are declared up front and their data streamed after.
The file appears under its name only when it is whole.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from dfastllm.errors import ValidationError
from dfastllm.quant.gguf.reader import ALIGNMENT, MAGIC
from dfastllm.quant.gguf.types import BY_NAME, FILE_TYPES, GgmlType
from dfastllm.quant.partial import clear_left, part_of, require_space, storing

__all__ = ["Planned", "encode", "type_for", "write_file"]

CHUNK = 1 << 22  # elements encoded at a time
_STRING, _ARRAY, _FLOAT32, _BOOL = 8, 9, 6, 7
_NUMPY = {"|u1": 0, "|i1": 1, "<u2": 2, "<i2": 3, "<u4": 4, "<i4": 5, "<f4": 6, "|b1": 7, "<u8": 10, "<i8": 11}


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor to be written. shape in torch order; read gives its float values when its turn comes."""

    name: str
    shape: tuple[int, ...]
    type: str
    read: Callable[[], Tensor]


def type_for(shape: tuple[int, ...], wanted: str) -> str:
    """The type a tensor of this shape gets in a file of type `wanted`: vectors stay F32, rows that the blocks do not
    divide become F16. Raises ValidationError for a type that is not written."""
    if wanted not in FILE_TYPES:
        raise ValidationError(f"type must be one of {', '.join(sorted(FILE_TYPES))}, got {wanted!r}.", param="type")
    if len(shape) < 2:
        return "F32"
    return "F16" if shape[-1] % BY_NAME[wanted].block else wanted


def encode(values: Tensor, kind: GgmlType) -> np.ndarray:
    """Float values [n, k] -> the bytes of their blocks, uint8 [n, bytes of a row]. Bit for bit what ggml's reference
    quantisation gives (blocks below 2^-40, zero either way, have zero codes). Raises ValidationError for values that
    are NaN, infinite or, but for F32 and BF16, beyond float16."""
    if not torch.isfinite(values).all():
        raise ValidationError("weights are NaN or infinite.", param="weights")
    wide = values.float().contiguous().numpy()
    largest = float(np.abs(wide).max(initial=0))
    # Scales and minima of blocks are float16; a minimum is as large as the largest weight can be.
    if kind.name not in ("F32", "BF16") and largest > 65504.0:
        raise ValidationError(f"weights reach {largest:g}, which {kind.name} cannot hold.", param="weights")
    if kind.block > 1:
        blocks = wide.reshape(-1, kind.block)
        tiny = np.abs(blocks).max(axis=-1) < 2.0**-40  # float16 makes its scale 0; its inverse would overflow
        if tiny.any():
            wide = np.where(tiny[:, None], np.float32(0), blocks).reshape(wide.shape)
    encoded: np.ndarray = quants.quantize(wide, GGMLQuantizationType(kind.number))
    return encoded.view(np.uint8).reshape(len(wide), -1)


def write_file(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Iterable[Planned],
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a file whole or not at all. progress(bytes of tensors written, bytes in all) after each tensor.

    metadata values: bool, int (uint32, or int64 / uint64 where they do not fit), float (float32), str, list of str,
    numpy arrays. Raises ValidationError for other values and for weights that cannot be encoded (naming the tensor),
    StorageError when the file cannot be written, before anything is where the disk has no room for it.
    """
    planned = list(tensors)
    kinds = [BY_NAME[entry.type] for entry in planned]
    sizes = [
        kind.row_bytes(entry.shape[-1]) * math.prod(entry.shape[:-1])
        for entry, kind in zip(planned, kinds, strict=True)
    ]
    temporary = part_of(path)
    needed = sum(sizes)
    clear_left(path.parent)
    try:
        require_space(path.parent, needed)
        with storing(path, needed), temporary.open("wb") as file:
            _write_header(file, metadata, planned, kinds, sizes)
            done, total = 0, sum(sizes)
            for entry, kind, size in zip(planned, kinds, sizes, strict=True):
                _write_tensor(file, entry, kind)
                _pad(file)
                done += size
                if progress is not None:
                    progress(done, total)
        with storing(path, needed):
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _write_header(
    file: BinaryIO, metadata: Mapping[str, Any], planned: list[Planned], kinds: list[GgmlType], sizes: list[int]
) -> None:
    file.write(MAGIC + struct.pack("<IQQ", 3, len(planned), len(metadata)))
    for key, value in metadata.items():
        file.write(_text(key) + _value(key, value))
    offset = 0
    for entry, kind, size in zip(planned, kinds, sizes, strict=True):
        dims = tuple(reversed(entry.shape))
        file.write(_text(entry.name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind.number, offset))
        offset += -(-size // ALIGNMENT) * ALIGNMENT
    _pad(file)


def _write_tensor(file: BinaryIO, entry: Planned, kind: GgmlType) -> None:
    values = entry.read()
    if tuple(values.shape) != entry.shape:
        raise ValidationError(f"tensor {entry.name} has shape {list(values.shape)}, declared {list(entry.shape)}.")
    rows = values.reshape(-1, entry.shape[-1])
    step = max(1, CHUNK // entry.shape[-1])
    for start in range(0, len(rows), step):
        try:
            file.write(encode(rows[start : start + step], kind).data)
        except ValidationError as error:
            raise ValidationError(f"tensor {entry.name}: {error}", param="weights") from error


def _pad(file: BinaryIO) -> None:
    file.write(b"\0" * (-file.tell() % ALIGNMENT))


def _text(value: str) -> bytes:
    data = value.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        kind, code = (4, "I") if 0 <= value < 1 << 32 else (11, "q") if value < 1 << 63 else (10, "Q")
        return struct.pack(f"<I{code}", kind, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.str in _NUMPY:
        return struct.pack("<IIQ", _ARRAY, _NUMPY[value.dtype.str], len(value)) + value.tobytes()
    raise ValidationError(f"GGUF metadata {key!r} cannot hold {type(value).__name__}.", param=key)
