"""A run that is stopped goes on, settings are asked in turn, and figures follow from the answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dfastllm.core import SamplingParams
from dfastllm.errors import DataError, UnsupportedError, ValidationError
from dfastllm.eval import Plan, Setting, evaluate, grid, mix_questions, results_of, table_of
from dfastllm.eval.records import Answer, opened_records
from dfastllm.eval.report import figures
from dfastllm.llm import LLM

SAMPLING = SamplingParams(temperature=0.0, max_tokens=48)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo-diffusion") as loaded:
        yield loaded


def plan(count: int = 6, **more: Any) -> Plan:
    settings = grid("diffusion", caches=("prefix", "dual"), thresholds=(0.9,))
    return Plan(mix_questions(count), settings, SAMPLING, batch=2, **more)


def texts(answers: list[Answer]) -> list[tuple[str, str, str, bool]]:
    return [(a.setting, a.id, a.text, a.right) for a in answers]


def test_a_run_that_is_stopped_goes_on(llm: LLM, tmp_path: Path) -> None:
    whole = evaluate(llm, plan(), tmp_path / "whole")
    assert [(a.setting, a.batch) for a in whole] == [
        (name, batch) for name in ("prefix-t0.9", "dual-t0.9") for batch in (1, 1, 2, 2, 3, 3)
    ]
    assert sum(a.right for a in whole) >= 6  # the demo model knows the mix

    class Stop(Exception):
        pass

    def stopping(done: int, total: int, name: str) -> None:
        if done == 6:
            raise Stop

    with pytest.raises(Stop):
        evaluate(llm, plan(), tmp_path / "cut", progress=stopping)
    file = tmp_path / "cut" / "answers.jsonl"
    lines = file.read_text().splitlines()
    assert len(lines) == 1 + 6
    # Killed in the middle of a line: that batch is asked again.
    file.write_text("\n".join([*lines[:-1], lines[-1][:40]]))
    seen: list[int] = []
    again = evaluate(llm, plan(), tmp_path / "cut", progress=lambda done, total, name: seen.append(done))
    assert seen[0] == 4
    assert texts(again) == texts(whole)
    assert evaluate(llm, plan(), tmp_path / "cut") == again  # nothing is asked twice


def test_settings_may_come_later(llm: LLM, tmp_path: Path) -> None:
    evaluate(llm, plan(2), tmp_path)
    more = Plan(mix_questions(2), grid("diffusion", caches=("dual", "none")), SAMPLING, batch=2)
    assert {a.setting for a in evaluate(llm, more, tmp_path)} == {"dual", "none"}


def test_another_run_is_not_mixed_in(llm: LLM, tmp_path: Path) -> None:
    evaluate(llm, plan(2), tmp_path)
    with pytest.raises(DataError, match=r"answers of another evaluation: questions differ.*--restart"):
        evaluate(llm, plan(4), tmp_path)
    assert len(evaluate(llm, plan(4), tmp_path, restart=True)) == 8
    (tmp_path / "answers.jsonl").write_text("hello\n")
    with pytest.raises(DataError, match="holds no answers of an evaluation"):
        evaluate(llm, plan(2), tmp_path)


def test_two_at_once(tmp_path: Path) -> None:
    with (
        opened_records(tmp_path, {}, restart=False),
        pytest.raises(DataError, match="being written by another"),
        opened_records(tmp_path, {}, restart=False),
    ):
        pass


def test_bad_plans(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="questions with an id each, got 0"):
        evaluate(llm, Plan([], [Setting("default", {})], SAMPLING), tmp_path)
    with pytest.raises(ValidationError, match="batch must be at least 1"):
        evaluate(llm, Plan(mix_questions(1), [Setting("default", {})], SAMPLING, batch=0), tmp_path)


def test_grids() -> None:
    names = [s.name for s in grid("diffusion", caches=("none", "dual"), thresholds=(0.7, 0.9), steps=(32,))]
    assert names == ["none-t0.7", "none-t0.9", "none-s32", "dual-t0.7", "dual-t0.9", "dual-s32"]
    assert [s.options for s in grid("block", factors=(1.0,), block_length=8)] == [{"factor": 1.0, "block_length": 8}]
    [default] = grid("ar")
    assert default.decode is None
    with pytest.raises(UnsupportedError, match="autoregressive model has no threshold to set"):
        grid("ar", thresholds=(0.9,))
    with pytest.raises(UnsupportedError, match="there is no cache to choose"):
        grid("block", caches=("dual",))
    with pytest.raises(ValidationError, match="threshold"):
        grid("diffusion", thresholds=(1.5,))


def answer(setting: str, i: int, *, right: bool = True, tokens: int = 10, seconds: float = 2.0) -> Answer:
    return Answer(setting, f"q{i}", "t", right, tokens, 4, "stop", i // 2, 2, seconds, "")


def test_figures_by_hand() -> None:
    found = figures([answer("a", i, right=i != 0, tokens=5 + i) for i in range(4)])
    assert (found["n"], found["right"], found["accuracy"]) == (4, 3, 0.75)
    assert found["interval"] == [pytest.approx(0.3006, abs=1e-3), pytest.approx(0.9544, abs=1e-3)]
    assert found["forwards"] == 4
    assert found["tokens_per_forward"] == 26 / 16
    assert found["tokens_per_second"] == 26 / 4  # two batches of 2 s


def test_speeds_are_those_of_the_same_batches() -> None:
    settings = [Setting("a", {}), Setting("b", {})]
    answers = [answer("a", i) for i in range(16)] + [answer("b", i, seconds=1.0) for i in range(16)]
    first, second = results_of(settings, answers, {"model": "m"})["settings"]
    assert first["speed"] is None
    assert second["speed"] == {"median": 2.0, "low": 2.0, "high": 2.0, "n": 8}
    # A batch that the other has not is no pair.
    assert results_of(settings, answers[:-2], {})["settings"][1]["speed"] is None


@pytest.mark.parametrize(("seconds", "ends"), [(8.0, "1.00 (1.00-1.00)"), (0.01, "  1.00")])
def test_the_table_fits_eighty_columns(seconds: float, ends: str) -> None:
    """Where speeds are of seven digits, their intervals are left out."""
    settings = [Setting("none", {}), *grid("diffusion", caches=("prefix",), thresholds=(0.95,), block_length=128)]
    answers = [
        Answer(s.name, f"q{i}", "t", True, 1234, 256, "length", i // 8, 8, seconds, "")
        for s in settings
        for i in range(1320)
    ]
    results = results_of(settings, answers, {})
    table = table_of(results).splitlines()
    assert max(map(len, table)) <= 80
    assert table[2].startswith("none ")
    assert table[3].startswith("prefix-t0.95-b128 ")
    assert table[3].endswith(ends)
    assert json.loads(json.dumps(results)) == results
