"""safetensors files read and written a tensor at a time, without a memory map: never more than one tensor in memory.

Writing needs the dtype and shape of every tensor beforehand (a file starts with them), the data in any order. Files are
written beside their final names and take their places together at the end. Does not know what the tensors mean.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dfastllm.core.filetype import INDEX_FILE, WEIGHTS_FILE
from dfastllm.errors import CheckpointError, StorageError
from dfastllm.quant.partial import clear_left, part_of, require_space, storing

__all__ = [
    "DTYPES",
    "INDEX_FILE",
    "WEIGHTS_FILE",
    "Entry",
    "Planned",
    "SafetensorsWriter",
    "cut_shards",
    "read_tensor",
    "same_numbers",
]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U32": torch.uint32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SPELLING = {dtype: name for name, dtype in DTYPES.items()}
PIECE = 1 << 20  # bytes that are compared at a time


class Entry(Protocol):
    """Where a tensor lies (quant.header.TensorEntry): dtype in safetensors' spelling, offset in bytes from the start
    of the file."""

    @property
    def file(self) -> Path: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def offset(self) -> int: ...


def read_tensor(entry: Entry, name: str, file: RawIOBase | None = None) -> Tensor:
    """The tensor, in memory of its own: a mapped file would count as resident a second time, and one that is cut while
    it is read would kill the process. file: the entry's, where it is open already, unbuffered. Raises
    CheckpointError."""
    if entry.dtype not in DTYPES:
        raise CheckpointError(f"{entry.file}: tensor {name!r} has dtype {entry.dtype}, which is not read.")
    try:
        out = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    except RuntimeError as error:  # a shape like [0, 2^62], or no memory for it
        raise CheckpointError(
            f"{entry.file}: tensor {name!r} of {list(entry.shape)} cannot be held: {error}."
        ) from error
    if out.numel() == 0:
        return out
    view = memoryview(out.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer
    try:
        with nullcontext(file) if file is not None else entry.file.open("rb", buffering=0) as opened:
            opened.seek(entry.offset)
            at = 0
            while at < len(view):
                got = opened.readinto(view[at:])
                if not got:
                    raise CheckpointError(f"{entry.file} ends inside tensor {name!r}.")
                at += got
    except OSError as error:
        raise CheckpointError(f"{entry.file} cannot be read: {error}.") from error
    return out


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor that will be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def same_numbers(one: Entry, other: Entry) -> bool:
    """Whether two tensors are the same bytes, compared a piece at a time. Raises CheckpointError where a file cannot be
    read."""
    if (one.dtype, one.shape) != (other.dtype, other.shape) or one.dtype not in DTYPES:
        return False
    left = math.prod(one.shape) * DTYPES[one.dtype].itemsize
    try:
        with one.file.open("rb", buffering=0) as first, other.file.open("rb", buffering=0) as second:
            first.seek(one.offset)
            second.seek(other.offset)
            while left > 0:
                piece = first.read(min(left, PIECE))
                if not piece or piece != second.read(len(piece)):
                    return False
                left -= len(piece)
    except OSError as error:
        raise CheckpointError(f"{one.file} cannot be read: {error.strerror or error}.") from error
    return True


class SafetensorsWriter:
    """A context manager: `write` each planned tensor once, in any order. Leaving the block well puts the files (and an
    index where there are several) in place; leaving it by an error removes what was written. Raises StorageError where
    the disk has no room for the plan, before anything is written, and when a file cannot be written.

    plan: names in the order that decides the shards, at most `shard_bytes` each unless one tensor alone is larger.
    """

    def __init__(self, directory: Path, plan: Mapping[str, Planned], *, shard_bytes: int = 5 * 10**9) -> None:
        self.directory = directory
        self.plan = dict(plan)
        self.shards = cut_shards({name: planned.nbytes for name, planned in self.plan.items()}, shard_bytes)
        self._offset: dict[str, tuple[str, int]] = {}
        self._left = set(self.plan)

    def _temporary(self, shard: str) -> Path:
        return part_of(self.directory / shard)

    def __enter__(self) -> SafetensorsWriter:
        with storing(self.directory, self.nbytes):
            self.directory.mkdir(parents=True, exist_ok=True)
        clear_left(self.directory)
        require_space(self.directory, self.nbytes)
        try:
            for shard, names in self.shards.items():
                header = self._header(shard, names)
                with storing(self.directory / shard, self.nbytes), self._temporary(shard).open("wb") as file:
                    file.write(len(header).to_bytes(8, "little") + header)
        except StorageError:
            self._remove()
            raise
        return self

    def _remove(self) -> None:
        for name in (*self.shards, INDEX_FILE):
            self._temporary(name).unlink(missing_ok=True)

    @property
    def nbytes(self) -> int:
        """Bytes of all planned tensors."""
        return sum(planned.nbytes for planned in self.plan.values())

    def _header(self, shard: str, names: list[str]) -> bytes:
        """Widest dtypes first, so that every tensor is aligned to its own."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in sorted(names, key=lambda name: -self.plan[name].dtype.itemsize):
            planned = self.plan[name]
            entries[name] = {
                "dtype": SPELLING[planned.dtype],
                "shape": list(planned.shape),
                "data_offsets": [at, at + planned.nbytes],
            }
            self._offset[name] = (shard, at)
            at += planned.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        for name in names:
            self._offset[name] = (shard, self._offset[name][1] + 8 + len(text))
        return text

    def write(self, name: str, tensor: Tensor) -> None:
        """Raises CheckpointError for a tensor that was not planned like this, or is written twice."""
        planned = self.plan.get(name)
        if planned is None or planned != Planned(tensor.dtype, tuple(tensor.shape)) or name not in self._left:
            state = "not planned" if planned is None else f"planned as {planned.dtype} {list(planned.shape)}, once"
            raise CheckpointError(f"tensor {name!r} of {tensor.dtype} {list(tensor.shape)} is {state}.")
        shard, offset = self._offset[name]
        data = tensor.detach().to("cpu").contiguous().view(-1)
        with storing(self.directory / shard, self.nbytes), self._temporary(shard).open("r+b") as file:
            file.seek(offset)
            if data.numel():
                file.write(data.view(torch.uint8).numpy())  # type: ignore[arg-type]
            elif file.tell() > file.seek(0, os.SEEK_END):
                file.truncate(offset)
        self._left.discard(name)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                if self._left:
                    raise CheckpointError(f"{len(self._left)} planned tensors were not written: {min(self._left)}, ...")
                with storing(self.directory, self.nbytes):
                    self._place()
        finally:
            self._remove()

    def _place(self) -> None:
        index = self.directory / INDEX_FILE
        for shard in self.shards:
            os.replace(self._temporary(shard), self.directory / shard)
        for old in self.directory.glob("model*.safetensors"):
            if old.name not in self.shards:
                old.unlink()  # weights of an earlier writing would contradict these
        if len(self.shards) == 1:
            index.unlink(missing_ok=True)
            return
        where = {name: shard for shard, names in self.shards.items() for name in names}
        total = sum(planned.nbytes for planned in self.plan.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2)
        partial = self._temporary(INDEX_FILE)
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, index)


def cut_shards(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """File name -> tensors, in order, each file at most `limit` bytes unless one tensor alone is larger. sizes: tensor
    name -> bytes."""
    groups: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        if groups[-1] and total + size > limit:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += size
    if len(groups) == 1:
        return {WEIGHTS_FILE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}
