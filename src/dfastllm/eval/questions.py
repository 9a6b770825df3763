"""Questions from JSON Lines files in the fields of GSM8K, MATH, HumanEval and MBPP (or fields that are named), and from
the task mix.

| kind | fields (the first that is there) | answer is right if |
|---|---|---|
| gsm8k | question; answer | its final number is the one behind "####", or the answer itself |
| math | problem, question; answer, solution | its final answer is that one, or what the solution boxes |
| humaneval | prompt; test; entry_point | the program with it passes `test` |
| mbpp | text, prompt; test_list; test_setup_code, test_imports | the program with it passes every line of `test_list` |

Programs run in `sandbox.program`. Rows that cannot be asked are errors that name the file, the line and the field.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfastllm.errors import DataError, ValidationError
from dfastllm.metrics.workload import gradable
from dfastllm.sandbox import ProgramLimits, run_program
from dfastllm.tasks import GRADERS, Sample, grade
from dfastllm.tasks.answers import boxed

__all__ = ["KINDS", "Kind", "Question", "mix_questions", "program_of", "read_questions"]

LONGEST_LINE = 1 << 20  # bytes of a row
ID_FIELDS = ("task_id", "id", "unique_id", "idx")
REASON = "Reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Question:
    """One question. id: names it in the records, each once. task: its kind, or its task of the mix. sample: messages
    and tools, as the model is asked. raw: the text to continue, for a model that is asked without a chat template.
    grade: whether an answer's text is right."""

    id: str
    task: str
    sample: Sample
    raw: str
    grade: Callable[[str], bool]


@dataclass(frozen=True)
class Kind:
    """How rows of one kind are read. fields: own name -> the names that files have for it; optional: own names that a
    row may lack. ask: row -> what a chat model is told; raw: row -> the text to continue. grader: row -> grade."""

    fields: Mapping[str, tuple[str, ...]]
    ask: Callable[[Mapping[str, Any]], str]
    raw: Callable[[Mapping[str, Any]], str]
    grader: Callable[[Mapping[str, Any], ProgramLimits], Callable[[str], bool]]
    optional: tuple[str, ...] = ()


def _number(row: Mapping[str, Any], limits: ProgramLimits) -> Callable[[str], bool]:
    wanted = str(row["answer"]).rpartition("####")[2].strip()
    return lambda text: GRADERS["number"](text, wanted)


def _formula(row: Mapping[str, Any], limits: ProgramLimits) -> Callable[[str], bool]:
    said = str(row["answer"])
    wanted = boxed(said) or said
    return lambda text: GRADERS["formula"](text, wanted)


def _human_eval(row: Mapping[str, Any], limits: ProgramLimits) -> Callable[[str], bool]:
    def right(text: str) -> bool:
        program = program_of(text, row["prompt"], row["entry_point"])
        return _passes(f"{program}\n\n{row['test']}\n\ncheck({row['entry_point']})", limits)

    return right


def _mbpp(row: Mapping[str, Any], limits: ProgramLimits) -> Callable[[str], bool]:
    setup, tests = _lines(row.get("setup") or ""), _lines(row["tests"])
    return lambda text: _passes(f"{setup}\n{program_of(text)}\n\n{tests}", limits)


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _passes(program: str, limits: ProgramLimits) -> bool:
    if any(0xD800 <= ord(character) < 0xE000 for character in program):
        return False  # no file holds half of a character
    return run_program(program, limits).ended == "done"


def _ask_function(row: Mapping[str, Any]) -> str:
    return f"Complete this Python function. Answer with the whole function in one code block.\n\n{row['prompt']}"


def _ask_program(row: Mapping[str, Any]) -> str:
    return (
        f"{row['text']}\nAnswer with Python code in one code block. It should pass these tests:\n{_lines(row['tests'])}"
    )


KINDS: Mapping[str, Kind] = {
    "humaneval": Kind(
        {"prompt": ("prompt",), "test": ("test",), "entry_point": ("entry_point",)},
        _ask_function,
        lambda row: str(row["prompt"]),
        _human_eval,
    ),
    "mbpp": Kind(
        {"text": ("text", "prompt"), "tests": ("test_list",), "setup": ("test_setup_code", "test_imports")},
        _ask_program,
        lambda row: f'"""\n{row["text"]}\n{_lines(row["tests"])}\n"""\n',
        _mbpp,
        ("setup",),
    ),
    "gsm8k": Kind(
        {"question": ("question",), "answer": ("answer",)},
        lambda row: f"{row['question']}\n\n{REASON}",
        lambda row: f"Question: {row['question']}\nAnswer:",
        _number,
    ),
    "math": Kind(
        {"question": ("problem", "question"), "answer": ("answer", "solution")},
        lambda row: f"{row['question']}\n\n{REASON}",
        lambda row: f"Problem: {row['question']}\nSolution:",
        _formula,
    ),
}


def program_of(text: str, prompt: str = "", name: str = "") -> str:
    """The program that an answer is. Of code blocks the last that defines `name` (or the last at all), else the whole
    text; what does not define `name` is what follows the prompt; a definition gets the imports of the prompt."""
    blocks = re.findall(r"```(?:[Pp]ython3?|py)?[^\S\n]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    defines = re.compile(rf"^\s*(?:async\s+)?(?:def|class)\s+{re.escape(name)}\b", re.MULTILINE) if name else None
    chosen = [block for block in blocks if defines is None or defines.search(block)] or blocks
    code = chosen[-1] if chosen else text
    if defines is not None and not defines.search(code):
        return prompt + code
    preamble = re.split(r"^(?:async\s+def|def|class|@)\s*", prompt, maxsplit=1, flags=re.MULTILINE)[0]
    return f"{preamble}\n{code}"


def read_questions(
    path: str | Path,
    *,
    kind: str | None = None,
    fields: Mapping[str, str] | None = None,
    limit: int | None = None,
    limits: ProgramLimits | None = None,
) -> list[Question]:
    """The questions of a JSON Lines file, at most `limit`.

    kind: of `KINDS`; None: told by the fields of the first row. fields: own field of the kind -> the file's name for
    it. limits: of programs. Raises ValidationError for a kind or a field that there is not, DataError for a file that
    cannot be read, has no rows, or rows that cannot be asked.
    """
    if kind is not None and kind not in KINDS:
        raise ValidationError(f"there is no kind of questions {kind!r}; there are {', '.join(KINDS)}.", param="task")
    questions: list[Question] = []
    taken: set[str] = set()
    for line, row in _rows(Path(path)):
        kind = kind or _kind_of(row, path, line)
        read = _read(kind, row, fields or {}, f"{path}, line {line}")
        name = next((str(row[field]) for field in ID_FIELDS if isinstance(row.get(field), str | int)), f"line-{line}")
        if name in taken:
            raise DataError(
                f"{path}, line {line}: id {name!r} is there twice; answers are told apart by it.", param="data"
            )
        taken.add(name)
        known = KINDS[kind]
        sample = Sample(kind, ({"role": "user", "content": known.ask(read)},), "", None, None, (line,))
        grader = known.grader(read, limits or ProgramLimits())
        questions.append(Question(name, kind, sample, known.raw(read), grader))
        if limit is not None and len(questions) >= limit:
            break
    if not questions:
        raise DataError(f"{path} holds no rows.", param="data", hint="One JSON object a line.")
    return questions


def mix_questions(count: int, seed: int = 0) -> list[Question]:
    """Held-out samples of the task mix, every graded task equally often."""
    found = []
    for i, sample in enumerate(gradable(count, seed)):
        raw = "\n\n".join(str(message["content"]) for message in sample.messages)
        found.append(Question(f"{sample.task}-{i}", sample.task, sample, raw, _by_mix(sample)))
    return found


def _by_mix(sample: Sample) -> Callable[[str], bool]:
    return lambda text: grade(sample, text)


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line number, row). Empty lines are skipped."""
    try:
        with path.open("rb") as file:
            for line, raw in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
                if len(raw) > LONGEST_LINE:
                    raise DataError(f"{path}, line {line} is longer than {LONGEST_LINE:,} bytes.", param="data")
                if not raw.strip():
                    continue
                try:
                    row = json.loads(raw)
                except (ValueError, RecursionError) as error:
                    raise DataError(
                        f"{path}, line {line} is no JSON: {error}.", param="data", hint="One JSON object a line."
                    ) from error
                if not isinstance(row, dict):
                    raise DataError(f"{path}, line {line} is no JSON object but {type(row).__name__}.", param="data")
                yield line, row
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.", param="data") from error


def _kind_of(row: Mapping[str, Any], path: str | Path, line: int) -> str:
    for name, kind in KINDS.items():
        wanted = [names for own, names in kind.fields.items() if own not in kind.optional]
        if all(any(field in row for field in names) for names in wanted):
            return name
    raise DataError(
        f"{path}, line {line} has the fields {', '.join(sorted(row)) or 'of nothing'}, by which no kind is told.",
        param="data",
        hint=f"Give --task {', '.join(KINDS)} and, for fields of other names, --field question=THEIRS.",
    )


def _read(kind: str, row: Mapping[str, Any], fields: Mapping[str, str], where: str) -> dict[str, Any]:
    """The row in the kind's own fields."""
    known = KINDS[kind]
    if unknown := sorted(fields.keys() - known.fields.keys()):
        raise ValidationError(
            f"--field: {kind} has no field {unknown[0]!r}; it has {', '.join(known.fields)}.", param="field"
        )
    read: dict[str, Any] = {}
    for own, names in known.fields.items():
        names = (fields[own],) if own in fields else names
        value = next((row[name] for name in names if row.get(name) is not None), None)
        if value is None and own not in known.optional:
            raise DataError(
                f"{where}: {kind} wants a field {' or '.join(names)} and found {', '.join(sorted(row))}.",
                param="data",
                hint=f"Name the file's own with --field {own}=THEIRS.",
            )
        good = _fits(own, value)
        if value is not None and not good:
            raise DataError(f"{where}: {' or '.join(names)} is {value!r:.80}, which is no {own}.", param="data")
        read[own] = value
    if kind == "humaneval" and not str(read["entry_point"]).isidentifier():
        raise DataError(f"{where}: entry_point {read['entry_point']!r:.80} is no name of a function.", param="data")
    return read


def _fits(own: str, value: Any) -> bool:
    """Whether a field's value is of its type: tests are lists of lines, an answer may be a number, all else is text."""
    if own in ("tests", "setup"):
        lines: Sequence[Any] = value if isinstance(value, list) else [value]
        return all(isinstance(line, str) for line in lines)
    numbers = isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, str) or (own == "answer" and numbers)
