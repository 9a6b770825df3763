"""The file that answers go into: a head, then a line for each answer, each on the disk before the next one counts.

A run that was killed leaves at most a torn last line, which is cut off when the next run opens the file: its answer is
in the cache, and is written again. Rejected answers go to a second file beside it, so that nothing that was paid for is
lost or paid for again. One process writes at a time.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from dfastllm.distill.data.rows import HEADER
from dfastllm.errors import DataError
from dfastllm.quant.partial import storing

__all__ = ["Answered", "Ledger", "head_of", "read_answered", "rejected_path"]


def rejected_path(out: Path) -> Path:
    """Where the rejected answers of OUT.jsonl go: OUT.rejected.jsonl."""
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.rejected.jsonl")


@dataclass
class Answered:
    """What files of answers hold.

    done                (id, digest) of every question that has an answer, kept or rejected.
    prompt, completion  tokens of all of them, as their servers counted; lengths: of the answers, one by one.
    """

    done: set[tuple[str, str]] = field(default_factory=set)
    prompt: int = 0
    completion: int = 0
    lengths: list[int] = field(default_factory=list)

    def note(self, path: Path, line: bytes) -> None:
        """Take in a line. Raises DataError for one that is no answer."""
        try:
            row = json.loads(line)
            about = row["metadata"]["teacher"]
            self.done.add((row["id"], about["digest"]))
            prompt, completion = about.get("prompt_tokens"), about.get("completion_tokens")
            if prompt is not None and completion is not None:
                self.prompt += int(prompt)
                self.completion += int(completion)
                self.lengths.append(int(completion))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{path} has a line that is no answer of this command ({error!r:.80}).",
                param="out",
                hint="Remove that line; its question is answered again, from the cache where it is there.",
            ) from error


def read_answered(out: Path) -> Answered:
    """What OUT.jsonl and OUT.rejected.jsonl hold, without touching them. Raises DataError as `Answered.note`."""
    found = Answered()
    for path in (out, rejected_path(out)):
        if path.is_file():
            for line in islice(_whole_lines(path), 1, None):
                found.note(path, line)
    return found


def head_of(out: Path) -> Mapping[str, Any]:
    """What the head of a file says of how its answers were made; {} where there is none that can be read."""
    try:
        found = json.loads(next(_whole_lines(out)))[HEADER]
    except (OSError, StopIteration, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _whole_lines(path: Path) -> Iterator[bytes]:
    """The lines but a last one that was torn off."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line


class Ledger:
    """head: what every answer in the file follows from. A file that was made otherwise is refused. answered: what is
    there when it is opened.

    Raises DataError for a file of another head or of another kind, StorageError where nothing can be written.
    """

    def __init__(self, out: str | Path, head: Mapping[str, Any]) -> None:
        self.out = Path(out)
        self.rejected = rejected_path(self.out)
        self.answered = Answered()
        self._head: dict[str, Any] = json.loads(json.dumps(dict(head)))
        self._files: dict[Path, IO[bytes]] = {}
        try:
            self._open(self.out)
            if self.rejected.exists():
                self._open(self.rejected)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}

    def accept(self, line: Mapping[str, Any]) -> None:
        """Write an answer that is learnt from."""
        self._append(self.out, line)

    def reject(self, line: Mapping[str, Any]) -> None:
        """Write an answer that is not."""
        if self.rejected not in self._files:
            self._open(self.rejected)
        self._append(self.rejected, line)

    def _open(self, path: Path) -> None:
        """Take the file for this process alone, cut off a torn line, see that the head is ours, and note what is
        there."""
        with storing(path, 0):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._files[path] = path.open("ab", buffering=0)
        try:
            fcntl.flock(self._files[path], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"another run writes answers to {path}.", param="out", hint="Wait for it, or name another file."
            ) from None
        whole = 0
        for line in _whole_lines(path):
            if whole:
                self.answered.note(path, line)
            else:
                self._check_head(path, line)
            whole += len(line)
        if not whole and not _line({HEADER: self._head}).startswith(path.read_bytes()):
            raise _foreign(path)
        with storing(path, 0):
            os.truncate(path, whole)
        if not whole:
            self._append(path, {HEADER: self._head})

    def _append(self, path: Path, line: Mapping[str, Any]) -> None:
        data = _line(line)
        file = self._files[path]
        with storing(path, len(data)):
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())

    def _check_head(self, path: Path, line: bytes) -> None:
        head = self._head
        try:
            found = json.loads(line)[HEADER]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise _foreign(path) from None
        if found != head:
            differ = [name for name in head if not isinstance(found, dict) or found.get(name) != head[name]]
            raise DataError(
                f"{path} holds answers that were made otherwise: {', '.join(differ) or 'its head'} differ.",
                param="out",
                hint="Name another file for the new settings; the answers in this one stay as they are.",
            )


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=True, allow_nan=False).encode() + b"\n"


def _foreign(path: Path) -> DataError:
    return DataError(f"{path} is there and was not written by this command.", param="out", hint="Name another file.")
