"""Files that are written whole or not at all: under another name first, `.NAME.PID.part`, in the same directory.

A process that is killed leaves such files; the next writing in that directory removes those whose process is gone. A
disk that is too full is told before anything is written, and named when it fills up meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dfastllm.errors import StorageError

__all__ = ["clear_left", "part_of", "place", "require_space", "storing"]

_PART = re.compile(r"\..+\.(\d+)\.part")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def part_of(path: Path) -> Path:
    """Where this process writes what becomes `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def clear_left(directory: Path) -> None:
    """Remove what processes that are no more left of their writing; those of running ones, and of this one, stay."""
    for part in directory.glob(".*.part"):
        found = _PART.fullmatch(part.name)
        if found is not None and not _runs(int(found[1])):
            with contextlib.suppress(OSError):  # another's: it takes room, and does no harm
                part.unlink()


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def require_space(directory: Path, needed: int) -> None:
    """Raise StorageError where the disk of a directory has fewer bytes free than `needed`."""
    free = _free(directory)
    if free < needed:
        raise _full(directory, needed, free)


@contextmanager
def storing(path: Path, needed: int) -> Iterator[None]:
    """Turns an OSError of the block, which only writes `path`, into a StorageError. needed: bytes in all."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise _full(path, needed, _free(path)) from error
        raise StorageError(f"{path} cannot be written: {error.strerror or error}.") from error


def place(path: Path, data: bytes) -> None:
    """Write a whole small file, or none of it. Raises StorageError."""
    try:
        with storing(path, len(data)):
            part_of(path).write_bytes(data)
            os.replace(part_of(path), path)
    finally:
        part_of(path).unlink(missing_ok=True)


def _free(path: Path) -> int:
    """Bytes that are free on the disk where `path` is or would be."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def _full(path: Path, needed: int, free: int) -> StorageError:
    return StorageError(
        f"{path} cannot be written: it needs {needed:,} bytes, {free:,} are free on that disk.",
        hint="Make room, or write to another disk.",
    )
