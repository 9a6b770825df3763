"""`--check`: what can be tried before a teacher is paid, and what it says of each thing that is wrong."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from dfastllm.cli import app
from dfastllm.distill.check import Check, check_config, show_checks
from dfastllm.distill.choose import choose_answers
from dfastllm.distill.data.generate import generate
from dfastllm.distill.data.rows import RowFile
from dfastllm.distill.sections import ChooseSection
from dfastllm.errors import DataError
from dfastllm.tasks import Sample, grade
from tests.kit import distilled

NAMES = ["configuration", "student", "teacher", "data", "shapes", "losses", "training step", "QAT", "teacher's cost"]


def checks(raw: dict[str, Any], tmp_path: Path) -> dict[str, Check]:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(raw))  # JSON is YAML
    return {check.name: check for check in check_config(path, threads=1)}


def test_everything_is_tried_and_no_server_is_called(tmp_path: Path) -> None:
    """The prompts have no answers yet, and the teacher's port is closed."""
    train, held_out = distilled.prompts(tmp_path, 20)
    teacher = {"base_url": "http://127.0.0.1:9/v1", "model": "big", "price_prompt": 2.0, "price_completion": 8.0}
    raw = distilled.settings(
        data={"generate": None, "train": [str(train)], "validation": [str(held_out)]}, kd={"teacher": teacher}
    )
    before = sorted(tmp_path.iterdir())
    found = checks(raw, tmp_path)
    assert list(found) == NAMES
    assert [check.found for check in found.values() if not check.passed] == []
    assert "not called" in found["teacher"].found
    assert "stand in for the teacher's" in found["data"].found
    for name in ("ce_teacher", "length_kd", "early_tool"):
        assert name in found["losses"].found
    assert "w8g from step 12" in found["QAT"].found
    assert "32 of 32 prompts are to be asked" in found["teacher's cost"].found
    assert "price about" in found["teacher's cost"].found
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "config.yaml"])
    out = io.StringIO()
    show_checks(list(found.values()), Console(file=out, width=80, color_system=None))
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert "all checks passed; no teacher was called" in out.getvalue()


def test_what_is_not_part_of_the_run_is_said(tmp_path: Path) -> None:
    raw = distilled.settings(
        quant={"enabled": False}, train={"use_enumerated_shapes": False, "seq_lengths": None, "shape_probs": None}
    )
    found = checks(raw, tmp_path)
    assert [name for name, check in found.items() if check.skipped] == ["teacher", "shapes", "QAT", "teacher's cost"]
    assert all(check.passed for check in found.values())


def test_one_failure_does_not_hide_what_can_still_be_tried(tmp_path: Path) -> None:
    train, _ = distilled.prompts(tmp_path, 4)
    raw = distilled.settings(data={"generate": None, "train": [str(train)]})
    found = checks(raw, tmp_path)
    assert "no teacher to ask" in found["data"].found
    assert found["losses"].found == "not made: the check of the data failed"
    passed = [name for name, check in found.items() if check.passed]
    assert passed == ["configuration", "student", "teacher", "teacher's cost"]


def test_a_key_that_is_not_set_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    teacher = {"base_url": "http://127.0.0.1:9/v1", "model": "big", "api_key_env": "NO_SUCH_KEY"}
    found = checks(distilled.settings(kd={"teacher": teacher}), tmp_path)
    assert "NO_SUCH_KEY, which is not set" in found["teacher"].found
    assert found["losses"].passed


def test_the_command_s_exit_codes(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(json.dumps(distilled.settings(train={"stepps": 3})))
    result = CliRunner().invoke(app, ["distill", str(path), "--check"])
    assert result.exit_code == 1
    assert "stepps. Did you mean steps?" in " ".join(result.stdout.replace("│", " ").split())
    assert CliRunner().invoke(app, ["distill", str(path)]).exit_code == 2


def test_the_shortest_right_answer_is_chosen(tmp_path: Path) -> None:
    """Each kept row's answer is right by its grader; with more samples answers only get shorter."""

    prompts = tmp_path / "prompts.jsonl"
    generate(prompts, 12, tasks=("tools", "arithmetic"), prompts_only=True)
    lengths = []
    for samples in (1, 3):
        out = tmp_path / f"{samples}.jsonl"
        said = choose_answers(prompts, out, "demo-draft", ChooseSection(samples=samples, max_tokens=48))
        rows = {row.id: row for row in RowFile(out)}
        assert f"{len(rows)} of 12 rows" in said
        for row in rows.values():
            sample = Sample("rows", tuple(row.messages), "", row.expected, row.grader, (), row.tools)
            assert grade(sample, row.teacher_text)
        lengths.append({name: len(row.teacher_text) for name, row in rows.items()})
    assert lengths[0].keys() <= lengths[1].keys()
    assert all(lengths[1][name] <= length for name, length in lengths[0].items())
    ungraded = tmp_path / "ungraded.jsonl"
    ungraded.write_text('{"prompt": "hello"}\n')
    with pytest.raises(DataError, match="line 1 has no grader"):
        choose_answers(ungraded, tmp_path / "x.jsonl", "demo-draft", ChooseSection())
