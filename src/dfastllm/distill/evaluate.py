"""How good a student is, in the engine that will serve it: which samples it is asked, and asking them.

Samples come from the task mix, whose test split no training set of it holds, or from a distillation set (JSON lines).
What is counted of the answers is `metrics.evaluation`'s; whether two students are equal is `paired`'s.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfastllm.core import DecodeParams, SamplingParams
from dfastllm.distill.data.rows import BadRow, Row, RowFile, Skips
from dfastllm.errors import DataError, ValidationError
from dfastllm.llm import LLM
from dfastllm.metrics.evaluation import Evaluation, evaluate
from dfastllm.metrics.workload import gradable
from dfastllm.tasks import CALL_GRADERS, GRADERS, TASKS, Sample, Split, draw
from dfastllm.text import parse_tool_calls

__all__ = ["Questions", "evaluate_student", "held_out", "read_samples"]


@dataclass(frozen=True)
class Questions:
    """The samples of a file.

    ids    one a sample: the row's own, or its line.
    skips  the rows that cannot be asked, by reason.
    """

    samples: tuple[Sample, ...]
    ids: tuple[str, ...]
    skips: Skips


def evaluate_student(
    llm: LLM,
    samples: Sequence[Sample],
    *,
    max_tokens: int = 64,
    decode: DecodeParams | None = None,
    ids: Sequence[str] | None = None,
) -> Evaluation:
    """Greedy answers of a loaded model to samples with a grader, all in flight at once, and what `metrics.evaluation`
    counts of them. decode: None: as the model decodes by default. ids: of the samples; None: task and place. Raises
    ValidationError for no samples, and what the engine raises for what it cannot honour."""
    return evaluate(llm, samples, SamplingParams(temperature=0.0, max_tokens=max_tokens), decode, ids=ids)


def held_out(n: int, seed: int = 0, tasks: Sequence[str] | None = None, split: Split = "test") -> list[Sample]:
    """n samples of a split that training sets of the task mix do not hold, each of the tasks equally often. tasks None:
    the graded ones of the mix. Raises ValidationError for n < 1, and for a task that is unknown or not graded."""
    if n < 1:
        raise ValidationError(f"n must be at least 1, got {n}.", param="n")
    if tasks is None and split == "test":
        return gradable(n, seed)
    names = list(dict.fromkeys(sample.task for sample in gradable(len(TASKS), seed))) if tasks is None else list(tasks)
    for name in names or [""]:
        if name not in TASKS:
            raise ValidationError(f"there is no task {name!r}; there are {', '.join(TASKS)}.", param="tasks")
        if draw(split, seed, 0, name).grader is None:
            raise ValidationError(f"task {name!r} has no grader: its answers are open.", param="tasks")
    return [draw(split, seed, i // len(names), names[i % len(names)]) for i in range(n)]


def read_samples(path: str | Path, limit: int | None = None) -> Questions:
    """The rows of a distillation set as samples with a grader, at most `limit`.

    A row with grader and expected is held to those. Otherwise the teacher's text is the right answer: its call, if it
    begins with one (whatever the form), else the text itself, so that only an equal answer is right. Raises DataError
    for a file that is not there and for one without a usable row."""
    rows = RowFile(path)
    samples: list[Sample] = []
    ids: dict[str, None] = {}
    for row in rows:
        if limit is not None and len(samples) >= limit:
            break
        name = row.id if row.id is not None else f"line-{row.line}"
        try:
            if name in ids:
                raise BadRow("id_twice", f"id {name!r} is there twice; answers are paired by it.")
            sample = _sample(row)
        except BadRow as error:
            rows.skip(row.line, error)
            continue
        samples.append(sample)
        ids[name] = None
    if not samples:
        raise DataError(
            f"{path} holds no row that can be asked: {rows.skips}.",
            param="data",
            hint="A row needs prompt and teacher_text.",
        )
    return Questions(tuple(samples), tuple(ids), rows.skips)


def _sample(row: Row) -> Sample:
    grader, expected = row.grader, row.expected
    if grader is not None and grader not in GRADERS:
        raise BadRow("unknown_grader", f"there is no grader {grader!r}; there are {', '.join(GRADERS)}.")
    if grader is None or expected is None:
        grader, expected = _from_text(row)
    if grader in CALL_GRADERS and not _is_call(expected):
        raise BadRow("bad_expected", f"a tool_call is expected as {{name, arguments}}, got {expected!r:.80}.")
    if grader in CALL_GRADERS and not row.tools:
        raise BadRow("no_tools", "a tool should be called, but the row offers none.")
    return Sample(row.task or "rows", tuple(row.messages), row.teacher_text, expected, grader, (row.line,), row.tools)


def _from_text(row: Row) -> tuple[str, Any]:
    """Grader and right answer of a row that names none."""
    if _is_call(row.expected) and row.tools:
        return "tool_call", row.expected
    parsed = parse_tool_calls(row.teacher_text) if row.tools else None
    if parsed is not None and parsed.tool_calls and not parsed.content and parsed.tool_calls[0].whole:
        call = parsed.tool_calls[0]
        return "tool_call", {"name": call.name, "arguments": json.loads(call.arguments)}
    return "text", row.teacher_text.strip()


def _is_call(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str) and isinstance(value.get("arguments"), dict)
