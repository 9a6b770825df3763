"""Files of questions: the fields of the public sets, other names, and every row that cannot be asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dfastllm.errors import DataError, ValidationError
from dfastllm.eval import mix_questions, read_questions
from dfastllm.eval.questions import program_of

GSM = {"question": "Tom has 3 and gets 4. How many?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"}
MATH = {"problem": "What is half of 1?", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "level": "Level 1"}
HUMAN = {
    "task_id": "HumanEval/0",
    "prompt": 'from typing import List\n\n\ndef largest(xs: List[int]) -> int:\n    """The largest."""\n',
    "entry_point": "largest",
    "test": "def check(candidate):\n    assert candidate([1, 3, 2]) == 3\n    assert candidate([-1]) == -1\n",
}
MBPP = {
    "task_id": 2,
    "text": "Write a function to double a number.",
    "test_list": ["assert double(2) == 4", "assert double(0) == 0"],
    "test_setup_code": "",
}


def written(path: Path, *rows: Any) -> Path:
    file = path / "questions.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return file


@pytest.mark.parametrize(
    ("row", "kind", "right", "wrong"),
    [
        (GSM, "gsm8k", ["#### 7", "so \\boxed{7.0}", "It is 7"], ["8", ""]),
        (MATH, "math", ["\\boxed{1/2}", "Answer: 0.5"], ["\\boxed{2}", "half"]),
        (
            HUMAN,
            "humaneval",
            [
                "    return max(xs)\n",
                "Sure:\n```python\ndef largest(xs: List[int]) -> int:\n    return max(xs)\n```\nDone.",
                "```\ndef helper(x):\n    return x\n\ndef largest(xs):\n    return helper(max(xs))",
            ],
            ["    return xs[0]\n", "```python\ndef largest(xs): pass\n```", "    exit(0)\n", "\ud800"],
        ),
        (
            MBPP,
            "mbpp",
            ["```python\ndef double(x):\n    return 2 * x\n```", "def double(x): return x + x"],
            ["def double(x): return x", "I cannot", ""],
        ),
    ],
)  # fmt: skip
def test_each_kind(row: dict[str, Any], kind: str, right: list[str], wrong: list[str], tmp_path: Path) -> None:
    [question] = read_questions(written(tmp_path, row))
    assert question.task == kind
    assert [question.grade(text) for text in right] == [True] * len(right)
    assert [question.grade(text) for text in wrong] == [False] * len(wrong)
    assert str(row.get("question", row.get("problem", row.get("text", "largest")))) in str(question.sample.messages)
    assert question.id == str(row.get("task_id", "line-1"))


def test_other_names(tmp_path: Path) -> None:
    file = written(tmp_path, {"q": "1 + 1?", "gold": 2})
    [question] = read_questions(file, kind="gsm8k", fields={"question": "q", "answer": "gold"})
    assert question.grade("2")
    assert question.raw == "Question: 1 + 1?\nAnswer:"


def test_the_first_of_a_file(tmp_path: Path) -> None:
    rows = [{"question": str(i), "answer": str(i)} for i in range(5)]
    file = written(tmp_path, rows[0], "", *rows[1:], "no JSON")
    assert [q.id for q in read_questions(file, limit=5)] == ["line-1", "line-3", "line-4", "line-5", "line-6"]


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([], {}, "holds no rows"),
        (["nothing"], {}, "line 1 is no JSON"),
        (["[1]"], {}, "line 1 is no JSON object but list"),
        ([{"a": 1, "b": 2}], {}, r"has the fields a, b, by which no kind is told.*--field question=THEIRS"),
        ([GSM, {"question": "x"}], {}, r"line 2: gsm8k wants a field answer and found question.*--field answer="),
        ([{**GSM, "question": ["x"]}], {}, r"question is \['x'\], which is no question"),
        ([{**MBPP, "test_list": [1]}], {}, r"test_list is \[1\], which is no tests"),
        ([{**HUMAN, "entry_point": "a b"}], {}, "is no name of a function"),
        ([HUMAN, HUMAN], {}, "id 'HumanEval/0' is there twice"),
        (["9" * (1 << 20) + "9"], {}, "is longer than 1,048,576 bytes"),
        ([GSM], {"kind": "gsm8k", "fields": {"question": "q"}}, "wants a field q and found"),
    ],
)
def test_rows_that_cannot_be_asked(rows: list[Any], options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said) as caught:
        read_questions(written(tmp_path, *rows), **options)
    assert str(tmp_path) in str(caught.value)


def test_what_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="no kind of questions 'x'; there are humaneval, mbpp, gsm8k, math"):
        read_questions(written(tmp_path, GSM), kind="x")
    with pytest.raises(ValidationError, match="gsm8k has no field 'prompt'; it has question, answer"):
        read_questions(written(tmp_path, GSM), fields={"prompt": "p"})
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_questions(tmp_path / "none.jsonl")


def test_the_mix() -> None:
    questions = mix_questions(12)
    assert len({question.id for question in questions}) == 12
    for question in questions:
        assert question.grade(question.sample.response)
        assert not question.grade("nonsense")


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("x = 1", "\nx = 1"),
        ("```py\nx = 1\n```", "\nx = 1\n"),
        ("```\na\n```\nand\n```python\nb\n```", "\nb\n"),
        ("```python\nnever closed", "\nnever closed"),
    ],
)
def test_programs_of_answers(text: str, program: str) -> None:
    assert program_of(text) == program
