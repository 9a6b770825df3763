"""The journal: a file that keeps what the ledger owes the database while that does not answer.

A line is a row of the ledger as it stood (`{checksum} {JSON}`), so the newest line of an id is the truth and reading a
line twice changes nothing. A process that is killed while it writes leaves half a line at the end, which nobody was
told of; it is cut off. The first line says whose file it is: the database's mark, and its writers.

A running server holds its file with a lock. A second server beside it takes FILE.1, and so on; who finds a file that
nobody holds takes over what it owes, and knows that its writer is dead.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dfastllm.errors import StorageError, ValidationError

__all__ = ["Journal", "Row"]

Row = Mapping[str, Any]  # the columns of the usage table; `id` and `version` among them
_SLOTS = 64  # servers beside each other

log = logging.getLogger("dfastllm.tenants")


class Journal:
    """The first free file of PATH, PATH.1, ... held until `close`. Used by one thread at a time.

    mark: of the database; a file of another one is refused. writer: of this process.
    left: the rows that these files owed, newest of each id. dead: the writers that left them,
    which stay in the first line as long as they stay here.
    Raises ValidationError where it cannot be written or is another database's, StorageError where a write fails later.
    """

    def __init__(self, path: Path, mark: str, writer: str) -> None:
        self.left: dict[str, Row] = {}
        self.dead: list[str] = []
        self._mark = mark
        self._writer = writer
        held: list[tuple[Path, int]] = []
        try:
            for slot in range(_SLOTS):
                file = path if slot == 0 else path.with_name(f"{path.name}.{slot}")
                if (not held or file.exists()) and (descriptor := _hold(file)) is not None:
                    held.append((file, descriptor))
                    self._read(file, descriptor)
        except OSError as error:
            _close(held)
            raise ValidationError(
                f"usage_journal: {path} cannot be written: {error.strerror}.",
                param="usage_journal",
                hint="Name a file in a directory that is there and that this user may write to.",
            ) from None
        except ValidationError:
            _close(held)
            raise
        if not held:
            raise ValidationError(f"usage_journal: {_SLOTS} servers use {path} already.", param="usage_journal")
        self.path, self._descriptor = held[0]
        self.rewrite(self.left.values())
        for file, descriptor in held[1:]:  # what they owed is in ours now
            file.unlink()
            os.close(descriptor)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self._descriptor).st_size

    def append(self, rows: Iterable[Row]) -> None:
        """Write rows behind the others; they outlive the process from then on."""
        self._write(b"".join(map(_line, rows)))

    def rewrite(self, rows: Iterable[Row]) -> None:
        """Keep these rows and no others."""
        header = {"database": self._mark, "writers": [self._writer, *self.dead]}
        whole = self.path.with_name(f"{self.path.name}.new")
        try:
            descriptor = os.open(whole, os.O_CREAT | os.O_RDWR | os.O_TRUNC | os.O_APPEND, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                _write_all(descriptor, b"".join(map(_line, (header, *rows))))
                os.replace(whole, self.path)
            except OSError:
                os.close(descriptor)
                raise
        except OSError as error:
            raise _failed(self.path, error) from error
        os.close(self._descriptor)
        self._descriptor = descriptor

    def close(self, *, keep: bool) -> None:
        """Let go of the file. keep: it still owes something."""
        if not keep:
            self.path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _write(self, data: bytes) -> None:
        before = self.size
        try:
            _write_all(self._descriptor, data)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._descriptor, before)  # no half line before what comes next
            raise _failed(self.path, error) from error

    def _read(self, file: Path, descriptor: int) -> None:
        os.lseek(descriptor, 0, os.SEEK_SET)
        with os.fdopen(os.dup(descriptor), "rb") as reader:
            whole, _, torn = reader.read().rpartition(b"\n")
        if torn:
            log.warning("%s ends in half a line, which nobody was told of: left out", file)
        rows = [row for line in whole.splitlines() if (row := _row(file, line)) is not None]
        if not rows:
            return  # killed before its first line: it owes nothing
        header = rows.pop(0)
        if header.get("database") != self._mark:
            raise ValidationError(
                f"usage_journal: {file} belongs to another database.",
                param="usage_journal",
                hint="Start the server with that database first, or name another file.",
            )
        self.dead += header["writers"]
        for row in rows:
            known = self.left.get(row["id"])
            if known is None or known["version"] < row["version"]:
                self.left[row["id"]] = row


def _hold(file: Path) -> int | None:
    """The file, locked; None where another process holds it."""
    while True:
        descriptor = os.open(file, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == os.stat(file).st_ino:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        os.close(descriptor)  # its holder removed it between our two looks


def _close(held: Iterable[tuple[Path, int]]) -> None:
    for _, descriptor in held:
        os.close(descriptor)


def _line(row: Row) -> bytes:
    text = json.dumps(dict(row), separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _row(file: Path, line: bytes) -> Row | None:
    checksum, _, text = line.partition(b" ")
    if checksum == b"%08x" % zlib.crc32(text):
        row: Row = json.loads(text)
        return row
    log.error("%s holds a damaged line, which is left out: %.200r", file, line)
    return None


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _failed(path: Path, error: OSError) -> StorageError:
    return StorageError(f"The journal of usage {path} cannot be written: {error.strerror}.")
