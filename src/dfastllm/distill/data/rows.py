"""The lines of a distillation set: one JSON object each, read one by one, checked, and written.

A line that cannot be used is left out and counted by its reason (`Skips`); no line stops a set from being read. Knows
no tokens: what a tokenizer decides is `encode`'s work.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from dfastllm.errors import DataError, StorageError, ValidationError
from dfastllm.text.messages import conversation

__all__ = ["HEADER", "LONGEST_LINE", "BadRow", "Row", "RowFile", "Skips", "check_row", "write_rows"]

HEADER = "__header__"  # the one key of an optional first line, which says how the set was made
LONGEST_LINE = 8 << 20  # bytes
_BLOCK = 1 << 20  # bytes of a line that is too long are passed over in pieces
_SHOWN = 200  # characters of a reason's first example
_LOG_TOLERANCE = 1e-3  # a log-probability may be this much above 0: servers round


class BadRow(ValidationError):
    """A row that cannot be used. reason: a word for the count, the same for all rows of one kind of fault."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message, param=reason)
        self.reason = reason


class Skips:
    """The lines that were left out.

    counts  how many for each reason.
    first   the first of each reason: "FILE:LINE: what was wrong with it".
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, where: str, error: BadRow) -> None:
        self.counts[error.reason] += 1
        self.first.setdefault(error.reason, f"{where}: {error.message[:_SHOWN]}")

    def merge(self, other: Skips) -> None:
        """Also those of another file."""
        self.counts += other.counts
        self.first = {**other.first, **self.first}

    def __str__(self) -> str:
        """The reasons, the most frequent first, each with its first example."""
        named = [f"{count} x {reason} ({self.first[reason]})" for reason, count in self.counts.most_common()]
        return "; ".join(named) or "none"


@dataclass(frozen=True)
class Row:
    """One exchange with a teacher's answer. A field that the line does not have is None (or empty).

    prompt                   a user's text, or the conversation up to the assistant's turn.
    teacher_text             the teacher's answer; "" only where rows need none.
    line                     where it stood, from 1.
    tools                    OpenAI's tool objects.
    expected, grader         what a grader of `dfastllm.tasks` compares an answer with.
    tool_should_be_used      the answer should be a tool call.
    teacher_prefix_ids       first token ids that an early call is taught by.
    required_fields_present  the answer says all that the tool's schema requires.
    teacher_attention_mask   1 on the tokens of the teacher's answer.
    teacher_topk             for each token of the answer (with or without its end), pairs of id and log-probability.
    metadata                 the line's own metadata, and its fields that have no meaning here.
    """

    prompt: str | tuple[Mapping[str, Any], ...]
    teacher_text: str
    line: int = 0
    id: str | None = None
    source: str | None = None
    task: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    expected: Any = None
    grader: str | None = None
    tool_should_be_used: bool | None = None
    teacher_prefix_ids: tuple[int, ...] | None = None
    required_fields_present: bool | None = None
    teacher_attention_mask: tuple[int, ...] | None = None
    teacher_topk: tuple[tuple[tuple[int, float], ...], ...] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def messages(self) -> list[Mapping[str, Any]]:
        """The prompt as a conversation; a text is one user's message."""
        return [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else list(self.prompt)


def check_row(value: Any, line: int = 0, *, needs_text: bool = True) -> Row:
    """A parsed line as a row. needs_text: a row without teacher_text is of no use. Optional fields are looked for at
    the top level, then in the line's metadata; null is absence. Raises BadRow."""
    if not isinstance(value, Mapping):
        raise BadRow("not_an_object", f"a row is a JSON object, got {type(value).__name__}.")
    inner = value.get("metadata")
    if inner is not None and not isinstance(inner, Mapping):
        raise BadRow("bad_metadata", f"metadata must be an object, got {type(inner).__name__}.")
    inner = inner or {}
    given = {name: value[name] if value.get(name) is not None else inner.get(name) for name in _OPTIONAL}
    optional = {name: read(name, given[name]) for name, read in _OPTIONAL.items() if given[name] is not None}
    rest = {k: v for k, v in value.items() if k not in _OPTIONAL and k not in ("prompt", "teacher_text", "metadata")}
    kept = {k: v for k, v in inner.items() if k not in _OPTIONAL}
    return Row(
        prompt=_prompt(value.get("prompt")),
        teacher_text=_teacher_text(value.get("teacher_text"), needs_text),
        line=line,
        metadata={**kept, **rest},
        **optional,
    )


def _prompt(prompt: Any) -> str | tuple[Mapping[str, Any], ...]:
    if prompt is None:
        raise BadRow("no_prompt", "the row has no prompt.")
    if isinstance(prompt, str):
        if not prompt.strip():
            raise BadRow("empty_prompt", "the prompt is blank.")
        return prompt
    try:
        turns = conversation(prompt)
    except ValidationError as error:
        raise BadRow("bad_prompt", f"prompt: {error.message}") from error
    except RecursionError as error:
        raise BadRow("bad_prompt", "prompt: it is nested too deeply.") from error
    if turns[-1]["role"] == "assistant":
        raise BadRow("bad_prompt", "prompt: it ends with the assistant's turn, so there is nothing to answer.")
    return tuple(prompt)


def _teacher_text(text: Any, needed: bool) -> str:
    if text is None:
        if needed:
            raise BadRow("no_teacher_text", "the row has no teacher_text.")
        return ""
    if not isinstance(text, str):
        raise BadRow("bad_teacher_text", f"teacher_text must be text, got {type(text).__name__}.")
    if needed and not text.strip():
        raise BadRow("empty_teacher_text", "teacher_text is blank.")
    return text


def _wrong(name: str, wanted: str, got: Any) -> BadRow:
    return BadRow(f"bad_{name}", f"{name} must be {wanted}, got {got!r:.80}.")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(name, "text", value)
    return value


def _label(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _wrong(name, "text or a whole number", value)
    return str(value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, "true or false", value)
    return value


def _list(name: str, value: Any, wanted: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise _wrong(name, wanted, value)
    return value


def _ids(name: str, value: Any) -> tuple[int, ...] | None:
    wanted = "a list of token ids"
    for one in _list(name, value, wanted):
        if isinstance(one, bool) or not isinstance(one, int) or one < 0:
            raise _wrong(name, wanted, one)
    return tuple(value) or None  # no ids say as little as no field


def _mask(name: str, value: Any) -> tuple[int, ...] | None:
    wanted = "a list of 0 and 1"
    for one in _list(name, value, wanted):
        if not isinstance(one, int) or one not in (0, 1):
            raise _wrong(name, wanted, one)
    return tuple(map(int, value)) or None


def _topk(name: str, value: Any) -> tuple[tuple[tuple[int, float], ...], ...] | None:
    wanted = "a list with, for each token, a list of [id, log-probability]"
    tokens = []
    for token in _list(name, value, wanted):
        pairs = []
        for pair in _list(name, token, wanted):
            if len(_list(name, pair, wanted)) != 2:
                raise _wrong(name, wanted, pair)
            id, log = pair
            if isinstance(id, bool) or not isinstance(id, int) or id < 0:
                raise _wrong(name, wanted, pair)
            if isinstance(log, bool) or not isinstance(log, int | float) or not log <= _LOG_TOLERANCE:
                raise _wrong(name, wanted, pair)
            pairs.append((id, min(0.0, _float(name, log))))
        if len({id for id, _ in pairs}) != len(pairs):
            raise _wrong(name, "lists that name an id once", token)
        tokens.append(tuple(pairs))
    return tuple(tokens) or None


def _float(name: str, value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number beyond what a float holds, which is below 0 here
        return -math.inf


def _tools(name: str, value: Any) -> tuple[Mapping[str, Any], ...]:
    wanted = "a list of tools, each with a function's name"
    for tool in _list(name, value, wanted):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        named = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(named, str) or not named:
            raise _wrong(name, wanted, tool)
        if not isinstance(function.get("parameters") or {}, Mapping):
            raise _wrong(name, "tools whose parameters are a JSON Schema", tool)
    return tuple(value)


def _anything(name: str, value: Any) -> Any:
    return value


_OPTIONAL: Mapping[str, Callable[[str, Any], Any]] = {
    "id": _label,
    "source": _text,
    "task": _text,
    "tools": _tools,
    "expected": _anything,
    "grader": _text,
    "tool_should_be_used": _flag,
    "teacher_prefix_ids": _ids,
    "required_fields_present": _flag,
    "teacher_attention_mask": _mask,
    "teacher_topk": _topk,
}


class RowFile:
    """A set on disk. Iterating reads it from its beginning, a line at a time, and gives its rows.

    header  what the first line says of how the set was made, once it is read; {} for a set without one.
    skips   the lines that were left out in the last reading, or so far.
    """

    def __init__(self, path: str | Path, *, needs_text: bool = True, longest_line: int = LONGEST_LINE) -> None:
        """needs_text: see `check_row`. longest_line: of a row, in bytes. Raises DataError for a file that is not there
        or is a directory."""
        self.path = Path(path)
        self.needs_text = needs_text
        self.longest_line = longest_line
        self.header: Mapping[str, Any] = {}
        self.skips = Skips()
        if not self.path.is_file():
            what = "is a directory, not a file" if self.path.is_dir() else "is not there"
            raise DataError(
                f"the data set {self.path} {what}.",
                param="data",
                hint="It is a file of JSON lines; `python -m dfastllm.distill.data.generate OUT.jsonl` makes one.",
            )

    def __iter__(self) -> Iterator[Row]:
        self.header, self.skips = {}, Skips()
        first = True
        try:
            with self.path.open("rb") as file:
                for line, data in self._lines(file):
                    try:
                        value = self._parsed(data)
                        if isinstance(value, Mapping) and HEADER in value:
                            self._take_header(value[HEADER], first)
                        else:
                            yield check_row(value, line, needs_text=self.needs_text)
                    except BadRow as error:
                        self.skip(line, error)
                    except RecursionError:
                        self.skip(line, BadRow("bad_json", "the line is nested too deeply."))
                    first = False
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}.", param="data") from error

    def skip(self, line: int, error: BadRow) -> None:
        """Count a line as left out; a reader that finds a row unfit counts it here too."""
        self.skips.add(f"{self.path.name}:{line}", error)

    def _lines(self, file: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
        """Number and bytes of each line that is not blank; None for one that is too long, which is never held whole."""
        number = 0
        while data := file.readline(self.longest_line + 2):  # one more than the row and its line break
            number += 1
            if len(data.rstrip(b"\r\n")) > self.longest_line:
                while data and not data.endswith(b"\n"):
                    data = file.readline(_BLOCK)
                yield number, None
            elif data.strip():
                yield number, data.removeprefix(b"\xef\xbb\xbf") if number == 1 else data

    def _parsed(self, data: bytes | None) -> Any:
        if data is None:
            raise BadRow("line_too_long", f"the line is longer than {self.longest_line} bytes.")
        try:
            return json.loads(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise BadRow("not_utf8", f"the line is not UTF-8 ({error.reason} at byte {error.start}).") from error
        except ValueError as error:  # also a number of too many digits
            raise BadRow("bad_json", f"the line is not JSON: {error}.") from error

    def _take_header(self, header: Any, first: bool) -> None:
        if not first:
            raise BadRow("late_header", "a header that is not the first line, as of two sets in one file.")
        if not isinstance(header, Mapping):
            raise BadRow("bad_header", f"{HEADER} must be an object, got {type(header).__name__}.")
        self.header = header


def write_rows(
    path: str | Path, rows: Iterable[Mapping[str, Any]], header: Mapping[str, Any] | None = None, *, force: bool = False
) -> int:
    """Write a set, whole or not at all, and return how many rows it has. force: also over a file that is there.

    Raises DataError for one that is there otherwise and for a value that is no JSON (NaN, half a character),
    StorageError when it cannot be written.
    """
    path = Path(path)
    if path.exists() and not force:
        raise DataError(
            f"{path} is there already.", param="out", hint="Name another file, or say --force (force=True)."
        )
    count = 0
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            if header is not None:
                file.write(_line({HEADER: header}))
            for row in rows:
                file.write(_line(row))
                count += 1
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        _forget(temporary)
        raise StorageError(f"{path} cannot be written: {error.strerror or error}.") from error
    except BaseException:
        _forget(temporary)
        raise
    return count


def _line(row: Mapping[str, Any]) -> bytes:
    try:
        return f"{json.dumps(row, ensure_ascii=False, allow_nan=False)}\n".encode()
    except ValueError as error:  # also for half a surrogate pair
        raise DataError(f"a row holds what JSON does not know: {error}.", param="rows") from error


def _forget(temporary: str | None) -> None:
    if temporary is not None and os.path.exists(temporary):
        os.unlink(temporary)
