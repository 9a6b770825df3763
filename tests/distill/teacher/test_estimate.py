"""What a run will cost, against what it then cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dfastllm.distill.teacher.collect import collect
from dfastllm.distill.teacher.estimate import estimate
from dfastllm.distill.teacher.questions import read_questions
from dfastllm.distill.teacher.settings import TeacherSettings
from dfastllm.errors import DataError
from dfastllm.text import Tokenizer
from tests.distill.teacher.mock_teacher import MockTeacher, Step, says
from tests.distill.teacher.test_collect import numbered, write_prompts


def prompt_tokens(question: str) -> int:
    return len(f"[user]{question}[assistant]")  # what the template writes, a token for each byte


def counting(question: str, attempt: int) -> Step:
    return says("x" * 30, usage=(prompt_tokens(question), 30))


def test_before_anything_is_known(tmp_path: Path, bytes_tokenizer: Tokenizer) -> None:
    questions, _ = read_questions(numbered(tmp_path / "p.jsonl", 10))
    read = sum(prompt_tokens(f"Question {n}?") for n in range(10))
    settings = TeacherSettings.of({"base_url": "http://t", "model": "m", "max_tokens": 50})
    found = estimate(questions, settings, bytes_tokenizer)
    assert (found.rows, found.had, found.cached, found.to_ask) == (10, 0, 0, 10)
    assert (found.prompt_tokens, found.completion_tokens, found.most_completion_tokens) == (read, 500, 500)
    assert "max_tokens each" in found.basis
    assert (found.price, found.seconds, found.within_budget) == (None, None, None)
    priced = settings.model_copy(
        update={"price_prompt": 2.0, "price_completion": 8.0, "budget_price": 0.004, "requests_per_minute": 5.0}
    )
    found = estimate(questions, priced, bytes_tokenizer)
    assert found.price == pytest.approx((2 * read + 8 * 500) / 1e6) == found.most_price
    assert found.seconds == pytest.approx(120)
    assert found.within_budget is False
    assert any("MORE THAN THE BUDGET" in line for line in found.lines())


def test_expected_answers_say_how_long_they_will_be(tmp_path: Path, bytes_tokenizer: Tokenizer) -> None:
    rows = [{"prompt": f"{n}?", "expected": "y" * 9} for n in range(4)] + [{"prompt": "z", "teacher_text": "had"}]
    questions, _ = read_questions(write_prompts(tmp_path / "p.jsonl", rows))
    settings = TeacherSettings.of({"base_url": "http://t", "model": "m", "max_tokens": 50})
    found = estimate(questions, settings, bytes_tokenizer)
    assert (found.had, found.to_ask, found.completion_tokens) == (1, 4, 40)


def test_after_a_part_of_the_run_it_is_what_the_rest_costs(tmp_path: Path, bytes_tokenizer: Tokenizer) -> None:
    prompts, out = numbered(tmp_path / "p.jsonl", 20), tmp_path / "a.jsonl"
    questions, _ = read_questions(prompts)
    with MockTeacher(counting) as teacher:
        settings = TeacherSettings.of({"base_url": teacher.url, "model": "m", "budget_tokens": 10_000})
        collect(prompts, out, settings, bytes_tokenizer, limit=8, show=False)
        kept = out.read_text().splitlines(keepends=True)
        out.write_text("".join(kept[:-2]) + kept[-2][:50])  # the last two are in the cache only
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        found = estimate(questions, settings, bytes_tokenizer, out=out)
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert (found.had, found.cached, found.to_ask) == (6, 2, 12)
        assert "6 answers that are there" in found.basis
        assert found.within_budget is True
        summary = collect(prompts, out, settings, bytes_tokenizer, show=False)
    assert (summary.prompt_tokens, summary.completion_tokens) == (found.prompt_tokens, found.completion_tokens)
    assert summary.cached == 2
    out.write_text(json.dumps({"__header__": {}}) + "\n" + '{"prompt": "x"}\n')
    with pytest.raises(DataError, match="a line that is no answer"):
        estimate(questions, settings, bytes_tokenizer, out=out)
