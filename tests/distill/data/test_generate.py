"""The generator: sets are a function of their arguments, splits stay apart, and wordy answers are graded right."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

from dfastllm.distill import KDDataset
from dfastllm.distill.data.generate import distinct_samples, draw_sample, generate, main
from dfastllm.distill.data.rows import RowFile
from dfastllm.distill.data.wordy import WITHIN, wordy
from dfastllm.errors import DataError, ValidationError
from dfastllm.tasks import GRADERS, SPLITS, TASKS, Sample, draw, grade
from dfastllm.text import Tokenizer, call_reading, parse_tool_calls

DRAWN = 300


def test_a_set_is_a_function_of_its_arguments(tmp_path: Path) -> None:
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert generate(tmp_path / name, 40, seed=seed, style="verbose", brief=0.2) == 40
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1] != texts[2]
    header = json.loads(texts[0].splitlines()[0])["__header__"]
    assert header["made_by"] == "dfastllm.distill.data.generate"
    assert (header["rows"], header["seed"], header["style"], header["brief"]) == (40, 1, "verbose", 0.2)
    rows = list(RowFile(tmp_path / "a"))
    assert len({row.id for row in rows}) == 40
    assert len({json.dumps([row.messages, row.tools]) for row in rows}) == 40


def test_splits_stay_apart() -> None:
    keys = {
        split: {(one.task, one.key) for _, one in distinct_samples(DRAWN, split=split, style="verbose")}
        for split in SPLITS
    }
    assert not keys["train"] & keys["validation"]
    assert not keys["train"] & keys["test"]
    assert not keys["validation"] & keys["test"]


@pytest.mark.parametrize("task", TASKS)
def test_wordy_and_brief_answers_are_right_and_wrong_ones_are_not(task: str) -> None:
    """The same grader takes the teacher's wordy answer and the brief one of a student that learnt to be short; words
    alone, and the answer to another question, are wrong."""
    for index in range(60):
        plain = draw_sample("train", 5, index, task=task)
        said = draw_sample("train", 5, index, task=task, style="verbose")
        assert (plain.messages, plain.expected, plain.key) == (said.messages, said.expected, said.key)
        assert said.response.endswith(plain.response)
        assert len(said.response) > len(plain.response) + 10
        if plain.grader is None:
            assert said.grader is None
            continue
        words = said.response.removesuffix(plain.response)
        assert grade(said, said.response)
        assert grade(said, plain.response)
        assert grade(plain, plain.response)
        assert not grade(said, words)
        assert not grade(said, words + plain.response[:-1])
        other = draw_sample("train", 5, index + 1000, task=task)
        if other.expected != said.expected and other.grader == plain.grader:
            assert not grade(said, words + other.response)


def test_every_grader_has_a_form_for_wordy_answers() -> None:
    assert set(WITHIN) | set(WITHIN.values()) == set(GRADERS)
    odd = Sample("t", ({"role": "user", "content": "q"},), "a", "a", "tool_call_within", ())
    with pytest.raises(ValidationError, match="no form for wordy answers"):
        wordy(odd, random.Random(0))


def test_a_wordy_call_is_read_as_the_server_reads_it(tokenizer: Tokenizer) -> None:
    """What a client gets of it: the call, and the words as content."""
    calls = 0
    for index in range(80):
        said = draw_sample("train", 6, index, task="tools", style="verbose")
        if said.grader != "tool_call_within":
            assert parse_tool_calls(said.response).tool_calls == ()
            continue
        names = [tool["function"]["name"] for tool in said.tools]
        read = call_reading(tokenizer, names).parse(said.response)
        [call] = read.tool_calls
        assert {"name": call.name, "arguments": json.loads(call.arguments)} == said.expected
        assert read.content
        calls += 1
    assert calls > 20


def test_a_share_of_a_wordy_set_is_brief() -> None:
    brief = [
        draw_sample("train", 7, i, style="verbose", brief=0.3).response == draw("train", 7, i).response
        for i in range(DRAWN)
    ]
    assert 0.2 < sum(brief) / DRAWN < 0.4
    assert all(
        draw_sample("train", 7, i, style="verbose", brief=1.0).response == draw("train", 7, i).response
        for i in range(50)
    )


def test_a_wordy_set_is_longer_and_calls_later_at_equal_accuracy(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """What a student can win: tokens of an answer, and tokens before its call."""
    found = {}
    for style in ("plain", "verbose"):
        generate(tmp_path / style, 150, style=style, tasks=["tools", "instruct"])  # type: ignore[arg-type]
        found[style] = KDDataset(tmp_path / style, tokenizer)
        assert found[style].skipped == {}
        assert found[style].summary()["teacher_right"] == 1.0
        assert found[style].summary()["tool_should_be_used"] > 20

    def begins(data: KDDataset) -> float:
        """The median place of the call's first token in its response."""
        opening = tokenizer.token_to_id("<tool_call>")
        answers = [row["input_ids"][row["response_start"] :].tolist() for row in (data[i] for i in range(len(data)))]
        return median(answer.index(opening) for answer in answers if opening in answer)

    plain, verbose = found["plain"], found["verbose"]
    assert verbose.summary()["median_response_tokens"] > 1.5 * plain.summary()["median_response_tokens"]
    assert begins(plain) == 0
    assert begins(verbose) > 8


def test_prompts_only_are_for_a_teacher(tmp_path: Path) -> None:
    generate(tmp_path / "p", 20, prompts_only=True, tasks=["tools"])
    rows = list(RowFile(tmp_path / "p", needs_text=False))
    assert len(rows) == 20
    assert all(row.teacher_text == "" and row.messages and row.tools and row.grader for row in rows)
    assert list(RowFile(tmp_path / "p")) == []


def test_the_mix_and_the_tasks_can_be_chosen(tmp_path: Path) -> None:
    tasks = [one.task for _, one in distinct_samples(30, tasks=["code", "extract"])]
    assert sorted(set(tasks)) == ["code", "extract"]
    assert abs(tasks.count("code") - 15) <= 2
    mixed = [one.task for _, one in distinct_samples(100, mix={"prose": 0.0, "tools": 20.0})]
    assert "prose" not in mixed
    assert mixed.count("tools") > 50


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n": 0}, "at least 1"),
        ({"split": "exam"}, "split must be one of"),
        ({"style": "loud"}, "plain or verbose"),
        ({"style": "verbose", "brief": 1.5}, "from 0 to 1"),
        ({"tasks": ["chess"]}, "no task 'chess'"),
        ({"tasks": ["code"], "mix": {"code": 2.0}}, "both say"),
        ({"mix": {"chess": 2.0}}, "no task 'chess'"),
    ],
)
def test_what_cannot_be_generated_is_named(options: dict, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=says):
        generate(tmp_path / "x", **{"n": 5, **options})
    assert list(tmp_path.iterdir()) == []


def test_a_split_that_is_used_up_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    one = draw("test", 0, 0, "prose")
    monkeypatch.setattr("dfastllm.distill.data.generate.draw", lambda *_: one)
    with pytest.raises(DataError, match="only 1 samples of split test"):
        list(distinct_samples(2, split="test"))


def test_the_command_writes_a_set_and_refuses_to_write_over_one(tmp_path: Path) -> None:
    out = tmp_path / "set.jsonl"
    command = [sys.executable, "-m", "dfastllm.distill.data.generate", str(out), "--n", "7", "--style", "verbose"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{out}: 7 rows\n"
    assert done.stderr == ""
    assert len(list(RowFile(out))) == 7
    with pytest.raises(SystemExit):
        main([str(out), "--n", "7"])
    main([str(out), "--n", "3", "--force", "--mix", "tools=3,prose=0", "--split", "test", "--seed", "4"])
    assert [row.id.split("/")[1:3] for row in RowFile(out) if row.id] == [["test", "4"]] * 3
    with pytest.raises(SystemExit):
        main([str(out), "--mix", "tools"])
