"""Prompts of chat requests in a file, for training on one's own traffic. Off unless the server was told a file.

A row is what a distillation set begins with: {"prompt": [messages], "tools": [tools]}. Nothing else of a request is
written: no key, no header, no address, no option, no answer. The file is readable by its owner alone (0600).

Rows are written by a thread of their own, so that a slow disk holds up no request; what it cannot take in time, and
what it refuses, is left out and counted, never an error of the request. `dfastllm.distill.students.draft` reads it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import queue
import stat
import threading
from collections.abc import Sequence
from pathlib import Path

from dfastllm.errors import ValidationError
from dfastllm.server.schemas import Message, Tool

__all__ = ["Recording"]

WAITING = 64  # rows that wait for the disk
PATIENCE = 5.0  # s that closing waits for the rows that are left

log = logging.getLogger("dfastllm.server")


class Recording:
    """Appends rows to `path`, which never has more than `most` bytes: when the next row does not fit, the file becomes
    PATH.1 in place of an older one, and a new one begins. So at most 2 * most bytes are kept.

    written   rows that are in the file.
    left_out  rows that are not: longer than the whole file, too many at once, or refused by the disk.

    Raises ValidationError naming record_prompts where the path cannot be opened for writing, is no regular file (a link
    neither), or is another server's.
    """

    def __init__(self, path: str | Path, most: int) -> None:
        self.path = Path(path)
        self.most = most
        self.written = self.left_out = 0
        self._file = _opened(self.path)
        self._ragged = _ragged(self._file)
        self._rows: queue.Queue[tuple[Sequence[Message], Sequence[Tool] | None] | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._run, name="dfastllm-record", daemon=True)
        self._thread.start()
        log.warning(
            "recording: the messages and tools of every chat request are written to %s (mode 0600, at most %d bytes and"
            " as many in %s); start without --record-prompts to stop it",
            self.path,
            most,
            self._older.name,
        )

    @property
    def _older(self) -> Path:
        return self.path.with_name(self.path.name + ".1")

    def see(self, messages: Sequence[Message], tools: Sequence[Tool] | None) -> None:
        """Have a request's prompt written. Returns at once."""
        try:
            self._rows.put_nowait((messages, tools))
        except queue.Full:
            self._leave_out("more prompts at once than the disk takes")

    def flush(self) -> None:
        """Wait until every row that was seen is written or left out."""
        self._rows.join()

    def close(self) -> None:
        """Write what is left, for some seconds at most, and close the file."""
        with contextlib.suppress(queue.Full):  # a disk that hangs: what waits for it is lost
            self._rows.put(None, timeout=PATIENCE)
        self._thread.join(PATIENCE)
        if not self._thread.is_alive():
            os.close(self._file)

    def _run(self) -> None:
        while (row := self._rows.get()) is not None:
            try:
                self._write(line_of(*row))
            except OSError as error:
                self._ragged = True  # part of the row may be there
                self._leave_out(f"{self.path} cannot be written: {error.strerror or error}")
            finally:
                self._rows.task_done()
        self._rows.task_done()

    def _write(self, line: bytes) -> None:
        start = b"\n" if self._ragged else b""
        if len(line) > self.most:
            self._leave_out(f"a prompt of {len(line)} bytes; the file may have {self.most}")
            return
        if os.fstat(self._file).st_size + len(start) + len(line) > self.most:
            self._begin_anew()
            start = b""
        rest = memoryview(start + line)
        while rest:
            rest = rest[os.write(self._file, rest) :]
        self._ragged = False
        self.written += 1

    def _begin_anew(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # somebody took the file away
            os.replace(self.path, self._older)
        try:
            fresh = _opened(self.path)
        except ValidationError as error:  # somebody put another file there in that moment
            raise OSError(error.message) from error
        os.close(self._file)
        self._file, self._ragged = fresh, False

    def _leave_out(self, why: str) -> None:
        """Count a row that is not written; say so the first time, and each time that their number has doubled."""
        self.left_out += 1
        if self.left_out & (self.left_out - 1) == 0:
            log.warning("recording: %d prompts were left out, the last because of %s", self.left_out, why)


def line_of(messages: Sequence[Message], tools: Sequence[Tool] | None) -> bytes:
    """A row as a line of JSON. A lone surrogate, which is no text in UTF-8, stays the escape that it came as."""
    row = {"prompt": [message.model_dump(exclude_none=True) for message in messages]}
    if tools:
        row["tools"] = [tool.model_dump(exclude_none=True) for tool in tools]
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _opened(path: Path) -> int:
    """A descriptor that appends to the file, which is ours alone from then on and has mode 0600."""
    # NOFOLLOW: a link that another user put there would have us write elsewhere. NONBLOCK: a pipe must not hold us up.
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = os.open(path, flags, 0o600)
    except OSError as error:
        why = "it is a link" if path.is_symlink() else error.strerror or str(error)
        raise _refused(path, why) from error
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise _refused(path, "it is no regular file")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.fchmod(file, 0o600)
    except BlockingIOError as error:
        os.close(file)
        raise _refused(path, "another server records to it") from error
    except OSError as error:
        os.close(file)
        raise _refused(path, error.strerror or str(error)) from error
    except ValidationError:
        os.close(file)
        raise
    return file


def _ragged(file: int) -> bool:
    """Whether the file ends in the middle of a row, as a server that was killed leaves it."""
    size = os.fstat(file).st_size
    return size > 0 and os.pread(file, 1, size - 1) != b"\n"


def _refused(path: Path, why: str) -> ValidationError:
    return ValidationError(
        f"Prompts cannot be recorded in {path}: {why}.",
        param="record_prompts",
        hint="Name a file in a directory that is there and that this user may write.",
    )
