"""The answers that a run of training began with are those that it goes on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dfastllm.distill.config import parse_config
from dfastllm.distill.prepare import data_files
from dfastllm.llm import resolve
from dfastllm.text import Tokenizer
from tests.distill.teacher.mock_teacher import MockTeacher, Step, fails
from tests.distill.teacher.test_collect import answers, echo, numbered


def test_a_row_that_failed_is_asked_again_until_training_begins(tmp_path: Path) -> None:
    """Rows that came later would change the order of all others, and with it every bit of the run."""
    prompts, home = numbered(tmp_path / "p.jsonl", 6), tmp_path / "run"
    tokenizer = Tokenizer.load(resolve("demo-ar"))
    said: list[str] = []

    def lacking(question: str, attempt: int) -> Step:
        return fails(503) if question in ("Question 2?", "Question 4?") else echo(question, attempt)

    with MockTeacher(lacking) as teacher:
        kd: dict[str, Any] = {"teacher": {"base_url": teacher.url, "model": "mock", "attempts": 1}}
        files = {"train": [str(prompts)], "validation": [str(prompts)]}
        config = parse_config({"model": {"student": "demo-ar"}, "data": files, "kd": kd})
        train, _ = data_files(config, home, tokenizer, None, said.append)
        assert list(answers(train[0])) == ["q0", "q1", "q3", "q5"]
        teacher.script = lambda question, attempt: fails(503) if question == "Question 4?" else echo(question, attempt)
        data_files(config, home, tokenizer, None, said.append)
        assert list(answers(train[0])) == ["q0", "q1", "q3", "q5", "q2"]
        (home / "step-1").mkdir()
        (home / "step-1" / "state.json").write_text("{}")
        teacher.script = echo
        before = len(teacher.bodies)
        assert data_files(config, home, tokenizer, None, said.append)[0] == train
        assert list(answers(train[0])) == ["q0", "q1", "q3", "q5", "q2"]
        assert len(teacher.bodies) == before
    assert any("no answer: 2 http_503" in line for line in said)
