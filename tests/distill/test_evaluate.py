"""Which samples a student is asked: of the task mix, and of a distillation set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dfastllm.distill.evaluate import evaluate_student, held_out, read_samples
from dfastllm.errors import DataError, ValidationError
from dfastllm.llm import LLM
from dfastllm.metrics.workload import gradable
from dfastllm.tasks import pick_split

CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}}},
}
CALL = {"name": "clock", "arguments": {"zone": "UTC"}}
TEXT = f"<tool_call>{json.dumps(CALL)}</tool_call>"


def file(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_held_out_samples() -> None:
    assert held_out(12, 3) == gradable(12, 3)
    chosen = held_out(4, 0, ["tools", "extract"], split="validation")
    assert [sample.task for sample in chosen] == ["tools", "extract"] * 2
    assert {pick_split(sample.task, sample.key) for sample in chosen} == {"validation"}
    assert all(sample.grader for sample in held_out(7, split="validation"))


@pytest.mark.parametrize(
    ("n", "tasks", "said"),
    [(0, None, "n must be"), (3, ["toolz"], "no task 'toolz'"), (3, ["prose"], "no grader"), (3, [], "no task ''")],
)
def test_samples_that_there_are_not(n: int, tasks: list[str] | None, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        held_out(n, 0, tasks)


def test_rows_become_samples(tmp_path: Path) -> None:
    found = read_samples(
        file(
            tmp_path / "rows.jsonl",
            {"__header__": {"teacher": "t"}},
            {"prompt": "Time?", "teacher_text": TEXT, "tools": [CLOCK], "id": "a"},
            {"prompt": "Time?", "teacher_text": "x", "tools": [CLOCK], "expected": CALL},
            {"prompt": "Time?", "teacher_text": '[TOOL_CALLS]clock[ARGS]{"zone": "UTC"}', "tools": [CLOCK]},
            {"prompt": [{"role": "user", "content": "Hello!"}], "teacher_text": " Hi. ", "tools": [CLOCK]},
            {"prompt": "Sum?", "teacher_text": "so 4", "grader": "answer", "expected": "4", "task": "sums"},
            {"prompt": "Time?", "teacher_text": TEXT},  # no tool is offered: it is but text
        )
    )
    assert found.ids == ("a", "line-3", "line-4", "line-5", "line-6", "line-7")
    assert [(sample.grader, sample.expected) for sample in found.samples] == [
        ("tool_call", CALL),
        ("tool_call", CALL),
        ("tool_call", CALL),
        ("text", "Hi."),
        ("answer", "4"),
        ("text", TEXT),
    ]
    assert [sample.task for sample in found.samples] == ["rows"] * 4 + ["sums", "rows"]
    assert found.samples[0].messages == ({"role": "user", "content": "Time?"},)
    assert not found.skips.counts
    assert read_samples(tmp_path / "rows.jsonl", limit=2).ids == ("a", "line-3")


def test_rows_that_cannot_be_asked_are_counted(tmp_path: Path) -> None:
    found = read_samples(
        file(
            tmp_path / "rows.jsonl",
            {"prompt": "a", "teacher_text": "b", "id": "x"},
            {"prompt": "a", "teacher_text": "b", "id": "x"},
            {"prompt": "a", "teacher_text": "b", "grader": "opinion", "expected": 1},
            {"prompt": "a", "teacher_text": "b", "grader": "tool_call", "expected": 1},
            {"prompt": "a", "teacher_text": "b", "grader": "tool_call", "expected": CALL},
            {"prompt": "a"},
        )
    )
    assert found.ids == ("x",)
    assert dict(found.skips.counts) == {
        "id_twice": 1,
        "unknown_grader": 1,
        "bad_expected": 1,
        "no_tools": 1,
        "no_teacher_text": 1,
    }
    with pytest.raises(DataError, match="no row that can be asked: 1 x no_prompt"):
        read_samples(file(tmp_path / "none.jsonl", {"teacher_text": "b"}))
    with pytest.raises(DataError, match="is not there"):
        read_samples(tmp_path / "missing.jsonl")


def test_a_student_is_asked_the_rows_of_a_file(tmp_path: Path) -> None:
    """Its own answers as the teacher's: all of them right, and as long as the teacher's."""
    samples = held_out(6)
    with LLM("demo-ar") as llm:
        answers = evaluate_student(llm, samples).rows
        rows = [
            {"prompt": list(s.messages), "teacher_text": row.text, "tools": list(s.tools) or None, "id": row.id}
            for s, row in zip(samples, answers, strict=True)
        ]
        asked = read_samples(file(tmp_path / "rows.jsonl", *rows))
        found = evaluate_student(llm, asked.samples, ids=asked.ids)
    assert found.exact_match == 1.0
    assert found.summary()["length_ratio"] == 1.0
    assert [row.id for row in found.rows] == [row.id for row in answers]
