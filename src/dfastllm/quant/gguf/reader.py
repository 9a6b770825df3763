"""Reading GGUF files (versions 2 and 3, little-endian): metadata, and tensors as views of a memory map.

Knows the container, not what models or tokenizers mean by it. Every count, length and offset is checked against the
bytes that are there before anything is allocated, so a damaged or hostile file costs at most a small multiple of its
own size and always ends in a CheckpointError that names the place. A file that another process truncates while it is
mapped is beyond that: replace model files, never overwrite them.

Layout: magic, version, tensor count, pair count; key-value pairs; tensor infos; padding; data (each tensor aligned).
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dfastllm.core.filetype import mistaken, shards_of
from dfastllm.errors import CheckpointError, ModelLoadError
from dfastllm.quant.gguf.types import BY_NUMBER, GgmlType

__all__ = ["MAGIC", "GgufFile", "GgufTensor"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # bytes, where general.alignment says nothing
MOST_ALIGNMENT = 1 << 16
MOST_DIMS = 4
MOST_DEPTH = 2  # arrays of arrays; nothing published nests deeper
LONGEST_NAME = 1 << 16  # bytes of a key or a tensor's name
_PAIR_BYTES, _INFO_BYTES = 13, 33  # the least a pair and a tensor info can take

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_UNKNOWN_TYPES = {4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """shape: slowest dim first, as torch has it ([n, k] for a matrix); offset: bytes from the start of the file; part:
    which file of a split one."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    part: int = 0

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])


class _Cursor:
    """A position in the header. Each read raises CheckpointError rather than run past the end."""

    def __init__(self, data: memoryview, path: Path) -> None:
        self.data = data
        self.path = path
        self.at = 0

    def fail(self, what: str, at: int | None = None) -> CheckpointError:
        place = self.at if at is None else at
        return CheckpointError(
            f"{self.path} is no sound GGUF file: {what} (at byte {place} of {len(self.data)}).",
            hint="Download it again; it may be truncated or damaged.",
        )

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, size: int, what: str) -> memoryview:
        if size > self.left:
            raise self.fail(f"{what} needs {size} bytes, {self.left} are left")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code), what))[0]

    def text(self, what: str, longest: int | None = None) -> str:
        start = self.at
        size = self.number("<Q", f"the length of {what}")
        if longest is not None and size > longest:
            raise self.fail(f"{what} is {size} bytes long, at most {longest} are allowed", start)
        try:
            return str(self.take(size, what), "utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8", start) from None

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        """A metadata value: a number, a bool, a str, a numpy array, or a list (of str, of arrays)."""
        if kind == _FLOAT32:  # as the shortest decimal of this float32: 1e-06, not 9.99999997e-07
            return float(str(np.float32(self.number("<f", what))))
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what)
        if kind == _STRING:
            return self.text(what)
        if kind != _ARRAY:
            raise self.fail(f"{what} has the unknown value type {kind}")
        return self._array(what, depth)

    def _array(self, what: str, depth: int) -> Any:
        start = self.at
        kind, count = self.number("<I", f"the element type of {what}"), self.number("<Q", f"the length of {what}")
        least = {_STRING: 8, _ARRAY: 12}.get(kind) or struct.calcsize(_SCALARS.get(kind, "<B"))
        if kind not in _SCALARS and kind not in (_STRING, _ARRAY):
            raise self.fail(f"{what} has elements of the unknown type {kind}", start)
        if count * least > self.left:
            raise self.fail(f"{what} claims {count} elements, more than the file can hold", start)
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind]) if kind != 7 else np.dtype(np.uint8)
            found = np.frombuffer(self.take(count * dtype.itemsize, what), dtype=dtype)
            return found.astype(bool) if kind == 7 else found.copy()
        if kind == _ARRAY and depth + 1 >= MOST_DEPTH:
            raise self.fail(f"{what} nests arrays more than {MOST_DEPTH} deep", start)
        if kind == _STRING:
            return [self.text(what) for _ in range(count)]
        return [self.value(kind, what, depth + 1) for _ in range(count)]


class GgufFile:
    """An open GGUF file: `metadata` (key -> number, bool, str, numpy array or list) and `tensors` (name -> GgufTensor,
    in the order of the file). Of a split file all parts are open, and its metadata is the first's. Use it as a context
    manager, or call `close`."""

    def __init__(
        self, path: Path, data: mmap.mmap, metadata: dict[str, Any], tensors: dict[str, GgufTensor], version: int
    ) -> None:
        self.path = path
        self.version = version
        self.metadata = metadata
        self.tensors = tensors
        self._maps: list[mmap.mmap] = [data]

    @classmethod
    def open(cls, path: str | Path) -> GgufFile:
        """Map the file and read its header, and those of the other parts of a split file, of which `path` is the first.
        Raises ModelLoadError when a file cannot be opened, CheckpointError when it is not a sound GGUF file, or of a
        version or byte order this reader does not read."""
        file = cls._open(Path(path))
        try:
            for part in _parts(file):
                file._add(cls._open(part))
            wanted = file.metadata.get("split.tensors.count", len(file.tensors))
            if file.parts > 1 and wanted != len(file.tensors):
                raise CheckpointError(
                    f"{path} is split into {file.parts} parts with {wanted} tensors; they hold {len(file.tensors)}.",
                    hint="The parts are of different files: download them again.",
                )
        except Exception:
            file.close()
            raise
        return file

    @classmethod
    def _open(cls, path: Path) -> GgufFile:
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                head = file.read(8)
                if (found := mistaken(path)) is not None:
                    raise CheckpointError(f"{path} is not a GGUF file but {found.what}.", hint=found.hint)
                if head[:4] != MAGIC or size < 24:
                    raise CheckpointError(
                        f"{path} is not a GGUF file: it starts with {head[:4]!r} and has {size} bytes.",
                        hint="Download it again.",
                    )
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelLoadError(f"{path} cannot be opened: {error.strerror or error}.") from error
        try:
            with memoryview(data) as view:
                version, metadata, tensors = _read_header(view, path)
        except Exception:
            data.close()
            raise
        return cls(path, data, metadata, tensors, version)

    def _add(self, other: GgufFile) -> None:
        """Take over another part. Raises CheckpointError for a tensor that both have."""
        self._maps += other._maps
        twice = self.tensors.keys() & other.tensors.keys()
        if twice:
            raise CheckpointError(f"tensor {min(twice)!r:.80} is in {other.path} and in a part before it.")
        self.tensors |= {name: replace(one, part=len(self._maps) - 1) for name, one in other.tensors.items()}

    @property
    def parts(self) -> int:
        return len(self._maps)

    def raw(self, tensor: GgufTensor, start: int = 0, stop: int | None = None) -> np.ndarray:
        """A copy of rows [start, stop) as bytes, uint8 [rows, bytes of a row]. Raises ModelLoadError once closed."""
        if not self._maps:
            raise ModelLoadError(f"{self.path} is closed.")
        stop = tensor.rows if stop is None else stop
        width = tensor.type.row_bytes(tensor.shape[-1])
        first = tensor.offset + start * width
        with memoryview(self._maps[tensor.part]) as view:  # a copy: nothing keeps the map from being closed
            return np.frombuffer(view[first : first + (stop - start) * width], np.uint8).reshape(-1, width).copy()

    def release(self, tensor: GgufTensor) -> None:
        """Tell the system that this tensor's pages will not be read again, so they stop counting as resident memory."""
        if not self._maps or not hasattr(self._maps[tensor.part], "madvise"):
            return
        page = mmap.PAGESIZE
        first = tensor.offset // page * page
        self._maps[tensor.part].madvise(mmap.MADV_DONTNEED, first, tensor.offset + tensor.nbytes - first)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def close(self) -> None:
        for part in self._maps:
            part.close()
        self._maps = []

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _parts(first: GgufFile) -> list[Path]:
    """The other files of a split one. Raises ModelLoadError for a part that is not the first, and where the names do
    not say which files they are."""
    count = first.metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return []
    names = shards_of(first.path.name)
    number = first.metadata.get("split.no", 0)
    if len(names) != count:
        raise ModelLoadError(
            f"{first.path} is one of {count} parts of a split GGUF file, which its name does not say.",
            hint=f"Name the parts as they were published, NAME-00001-of-{count:05d}.gguf, in one directory.",
            param="split.count",
        )
    if number != 0 or first.path.name != names[0]:
        raise ModelLoadError(
            f"{first.path} is part {int(number) + 1} of {count} of a split GGUF file.",
            hint=f"Name the first part, {first.path.with_name(names[0])}.",
            param="split.no",
        )
    missing = [name for name in names if not first.path.with_name(name).is_file()]
    if missing:
        raise ModelLoadError(
            f"{first.path} is the first of {count} parts; missing: {', '.join(missing[:8])}.",
            hint="Download the rest into the same directory.",
            param="split.count",
        )
    return [first.path.with_name(name) for name in names[1:]]


def _read_header(view: memoryview, path: Path) -> tuple[int, dict[str, Any], dict[str, GgufTensor]]:
    cursor = _Cursor(view, path)
    cursor.take(4, "the magic")
    version = cursor.number("<I", "the version")
    if version & 0xFFFF == 0:
        raise cursor.fail("it is big-endian, only little-endian files are read", 4)
    if version not in VERSIONS:
        raise cursor.fail(f"version {version} is not read, only {' and '.join(map(str, VERSIONS))}", 4)
    tensor_count, pair_count = cursor.number("<Q", "the tensor count"), cursor.number("<Q", "the pair count")
    if pair_count * _PAIR_BYTES + tensor_count * _INFO_BYTES > cursor.left:
        raise cursor.fail(f"{tensor_count} tensors and {pair_count} pairs do not fit into the file", 8)
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        start = cursor.at
        key = cursor.text("a key", LONGEST_NAME)
        if key in metadata:
            raise cursor.fail(f"key {key!r:.80} occurs twice", start)
        metadata[key] = cursor.value(cursor.number("<I", f"the type of {key!r:.80}"), f"the value of {key!r:.80}")
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or not 1 <= alignment <= MOST_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.fail(f"general.alignment is {alignment!r:.40}, wanted a power of two up to {MOST_ALIGNMENT}")
    infos = [_read_info(cursor, alignment) for _ in range(tensor_count)]
    start = -(-cursor.at // alignment) * alignment
    return version, metadata, _placed(cursor, infos, start)


def _read_info(cursor: _Cursor, alignment: int) -> tuple[int, GgufTensor]:
    """One tensor info and where it stands; the tensor's offset still counts from the start of the data."""
    at = cursor.at
    name = cursor.text("a tensor's name", LONGEST_NAME)
    where = f"tensor {name!r:.80}"
    dims = cursor.number("<I", f"the dim count of {where}")
    if not 1 <= dims <= MOST_DIMS:
        raise cursor.fail(f"{where} has {dims} dims, wanted 1 to {MOST_DIMS}", at)
    shape = tuple(cursor.number("<Q", f"dim {i} of {where}") for i in range(dims))
    number, offset = cursor.number("<I", f"the type of {where}"), cursor.number("<Q", f"the offset of {where}")
    if number not in BY_NUMBER:
        known = f" ({_UNKNOWN_TYPES[number]})" if number in _UNKNOWN_TYPES else ""
        raise cursor.fail(f"{where} has GGML type {number}{known}, which is not read", at)
    kind = BY_NUMBER[number]
    if min(shape) < 1 or math.prod(shape) > len(cursor.data) * kind.block:
        raise cursor.fail(f"{where} has shape {list(reversed(shape))}, which the file cannot hold", at)
    if shape[0] % kind.block:
        raise cursor.fail(f"{where} of {kind.name} has rows of {shape[0]}, no multiple of {kind.block}", at)
    if offset % alignment:
        raise cursor.fail(f"{where} starts at offset {offset}, no multiple of the alignment {alignment}", at)
    size = math.prod(shape[1:]) * kind.row_bytes(shape[0])
    return at, GgufTensor(name, kind, tuple(reversed(shape)), offset, size)


def _placed(cursor: _Cursor, infos: list[tuple[int, GgufTensor]], start: int) -> dict[str, GgufTensor]:
    """Tensors by name with offsets from the start of the file. None may overlap or end past the file."""
    end = 0
    for at, tensor in sorted(infos, key=lambda entry: entry[1].offset):
        if tensor.offset < end:
            raise cursor.fail(f"tensor {tensor.name!r:.80} overlaps the tensor before it", at)
        end = tensor.offset + tensor.nbytes
        if start + end > len(cursor.data):
            raise cursor.fail(f"tensor {tensor.name!r:.80} ends at byte {start + end}, past the end of the file", at)
    placed: dict[str, GgufTensor] = {}
    for at, tensor in infos:
        if tensor.name in placed:
            raise cursor.fail(f"tensor {tensor.name!r:.80} occurs twice", at)
        placed[tensor.name] = GgufTensor(tensor.name, tensor.type, tensor.shape, start + tensor.offset, tensor.nbytes)
    return placed
