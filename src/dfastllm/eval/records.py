"""The answers of an evaluation in a file, a line each, so that one that was killed goes on where it was.

The first line says what the run is; answers of a run with other questions, another model or other limits are not mixed
with these. Answers come in batches: all of a batch took `seconds` together, and a batch that was not written whole is
asked again.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from dfastllm.errors import DataError, StorageError

__all__ = ["Answer", "Records", "opened_records"]

FILE = "answers.jsonl"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer.

    setting, id, task  which.
    right              the grader's word.
    tokens             of the answer, without an end token. forwards: of the model, for it.
    finish             why it ended.
    batch, size        the batch's number among those of its setting, and how many answers it has.
    seconds            that the whole batch took.
    text               of the answer.
    """

    setting: str
    id: str
    task: str
    right: bool
    tokens: int
    forwards: int
    finish: str
    batch: int
    size: int
    seconds: float
    text: str


class Records:
    """The answers that there are, and the file that gets more. Use `opened_records`."""

    def __init__(self, file: TextIO, answers: Iterable[Answer]) -> None:
        self._file = file
        self.answers = list(answers)

    def done(self, setting: str) -> set[str]:
        """Ids of the questions that are answered under this setting."""
        return {answer.id for answer in self.answers if answer.setting == setting}

    def add(self, batch: list[Answer]) -> None:
        """Write a batch, whole. Raises StorageError."""
        try:
            self._file.write("".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in batch))
            self._file.flush()
        except OSError as error:
            raise StorageError(f"{self._file.name} cannot be written: {error.strerror or error}.") from error
        self.answers += batch


@contextmanager
def opened_records(directory: Path, run: Mapping[str, Any], *, restart: bool) -> Iterator[Records]:
    """The records of this run. run: what it is, JSON; a file of another run is an error unless `restart`, which begins
    anew. Raises DataError for a file of another run, one that is no such file, and one that another process is writing;
    StorageError where none can be made."""
    path = directory / FILE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(
                f"{path} is being written by another evaluation.", param="out", hint="Wait, or give another --out."
            ) from None
        file.seek(0)
        lines = [] if restart else file.read().splitlines()
        kept = _read(path, lines, run) if lines else []
        file.seek(0)
        file.truncate()
        file.write(json.dumps({"version": VERSION, "run": run}, ensure_ascii=False) + "\n")
        records = Records(file, [])
        records.add(kept)
        yield records


def _read(path: Path, lines: list[str], run: Mapping[str, Any]) -> list[Answer]:
    """The answers of whole batches. The last line may be cut: the process that wrote it was killed."""
    head = _object(lines[0])
    if head.get("version") != VERSION or "run" not in head:
        raise DataError(f"{path} holds no answers of an evaluation.", param="out", hint="Give another --out.")
    if head["run"] != json.loads(json.dumps(run)):
        other = [name for name in run if head["run"].get(name) != json.loads(json.dumps(run[name]))]
        raise DataError(
            f"{path} holds answers of another evaluation: {', '.join(other) or 'its settings'} differ.",
            param="out",
            hint="Give another --out, or --restart to begin anew.",
        )
    found = []
    for line in lines[1:]:
        raw = _object(line)
        if raw.keys() == Answer.__dataclass_fields__.keys():
            found.append(Answer(**raw))
    sizes: dict[tuple[str, int], int] = {}
    for answer in found:
        sizes[answer.setting, answer.batch] = sizes.get((answer.setting, answer.batch), 0) + 1
    return [answer for answer in found if sizes[answer.setting, answer.batch] == answer.size]


def _object(line: str) -> dict[str, Any]:
    try:
        raw = json.loads(line)
    except ValueError:
        return {}
    return raw if isinstance(raw, dict) else {}
