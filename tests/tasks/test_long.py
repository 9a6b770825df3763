"""Tasks with long answers: how long they are, how a mix names them, and what they say, worked out from the prompt."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dfastllm.errors import ValidationError
from dfastllm.llm import resolve
from dfastllm.tasks import LONG, MIXED, TASKS, Sample, draw, grade, shares
from dfastllm.tasks.evaluator import Refused, run_function
from dfastllm.text.tokenizer import Tokenizer


def asked(sample: Sample) -> str:
    text = sample.messages[-1]["content"]
    assert isinstance(text, str)
    return text


def drawn(task: str, count: int = 150) -> list[Sample]:
    return [draw("train", 11, i, task) for i in range(count)]


@pytest.mark.parametrize("task", LONG)
def test_answers_have_48_tokens_and_more_and_fit_a_canvas_of_128(task: str) -> None:
    tokenizer = Tokenizer.load(resolve("demo-diffusion"))
    lengths = [len(tokenizer.encode(sample.response)) for sample in drawn(task)]
    assert min(lengths) >= 48
    assert max(lengths) < 128


def test_a_mix_gives_a_share_to_what_has_none_and_a_factor_to_what_has_one() -> None:
    plain = shares()
    assert sum(plain.values()) == pytest.approx(1)
    assert [name for name, share in plain.items() if not share] == list(LONG)
    mixed = shares({"table": 0.5, "code": 2.0, "prose": 0})
    assert mixed == plain | {"table": 0.5, "code": 2 * plain["code"], "prose": 0.0}
    tasks = [draw("train", 0, i, mix={"table": 1.0}).task for i in range(600)]
    assert 240 < tasks.count("table") < 360  # half of them: 1.0 beside the default mix's 1.0
    assert set(tasks) == {*MIXED, "table"}


@pytest.mark.parametrize(
    ("mix", "says"),
    [
        ({"tabel": 1.0}, "'tabel'"),
        ({"table": -1.0}, "table must be at least 0"),
        ({"code": float("nan")}, "code must be at least 0"),
        ({"code": float("inf")}, "code must be at least 0"),
        (dict.fromkeys(TASKS, 0.0), "leaves no task"),
    ],
)
def test_a_mix_that_means_nothing_is_refused_by_name(mix: dict[str, float], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        draw("train", 0, 0, mix=mix)


def test_lists_hold_the_words_of_the_prompt() -> None:
    for sample in drawn("listing"):
        words = asked(sample).partition(": ")[2].split(", ")
        said = re.findall(r"[a-z]+", sample.response)
        twice = "wice" in asked(sample) or "Double" in asked(sample)
        expected = [word for word in words for _ in range(1 + twice)]
        if re.search("last", asked(sample)):
            expected.reverse()
        assert said == expected
        assert len(sample.response.splitlines()) == len(words)


def test_an_edit_changes_the_one_word_and_nothing_else() -> None:
    kinds = set()
    for sample in drawn("edit"):
        head, _, text = asked(sample).partition(": ")
        match = re.fullmatch(r"Replace (\w+) with (\w+)|Write (\w+) for (\w+)", head)
        kinds.add(match is not None)
        if match is None:
            assert sample.response.replace("\n- ", " ").removeprefix("- ") == text
            continue
        old, new = (match[1], match[2]) if match[1] else (match[4], match[3])
        pieces = re.split(r"(\W)", text)
        assert old in pieces
        assert new not in pieces
        assert re.split(r"(\W)", sample.response) == [new if piece == old else piece for piece in pieces]
    assert kinds == {True, False}


def test_a_table_says_the_facts_of_the_prompt() -> None:
    for sample in drawn("table"):
        fields, facts = re.split(r"(?:table of|table with) ", asked(sample))[1].split(": ")
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in sample.response.splitlines()]
        assert cells[0] == fields.split(", ")
        assert set(cells[1]) == {"---"}
        assert ", ".join(" ".join(row) for row in cells[2:]) == facts


def test_a_record_is_json_of_the_facts_of_the_prompt() -> None:
    for sample in drawn("record"):
        facts = asked(sample).partition(": ")[2]
        found: Any = json.loads(sample.response)
        parts = facts.split("; ")
        objects = found if isinstance(found, list) else [found]
        assert len(objects) == len(parts)
        for one, part in zip(objects, parts, strict=True):
            assert [f"{name} {value}" for name, value in one.items()] == part.split(", ")
            assert all(isinstance(value, int) == str(value).isdigit() for value in one.values())


def test_ledgers_add_up() -> None:
    for sample in drawn("ledger"):
        text = asked(sample)
        if sample.grader == "answer":
            begin = int(re.search(r"(?:has|with) (\d+)", text)[1])  # type: ignore[index]
            changes = [(1 if verb == "gets" else -1) * int(n) for verb, n in re.findall(r"(gets|loses) (\d+)", text)]
            assert sample.expected == str(begin + sum(changes))
            assert len(sample.response.splitlines()) == len(changes) + 1
        sums = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", sample.response)
        assert len(sums) >= 6
        for a, sign, b, result in sums:
            assert int(result) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
            assert 1 <= int(result) <= 99


def module_of(source: str, path: Path) -> ModuleType:
    """The source as Python itself runs it."""
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_programs_compute_what_python_computes(tmp_path: Path) -> None:
    for i, sample in enumerate(drawn("program", 40)):
        module = module_of(sample.response, tmp_path / f"m{i}.py")
        name = sample.expected["name"]
        for inputs in sample.expected["inputs"]:
            assert run_function(sample.response, name, inputs) == getattr(module, name)(*inputs)


def test_a_program_with_a_changed_number_is_wrong() -> None:
    for sample in drawn("program", 40):
        number = re.findall(r"(?<!\w)\d+", sample.response)[0]  # the first: a threshold, a start, an addend
        changed = re.sub(rf"(?<!\w){number}(?!\d)", str(int(number) + 1), sample.response, count=1)
        assert not grade(sample, changed)


@pytest.mark.parametrize(
    "body",
    [
        ["while x: x = x"],
        ["for a in x:", "    for b in x:", "        for c in x:", "            s = 1", "return s"],
        ["for c in 'abc':", "    s = c", "return s"],
        ["import os", "return 1"],
        ["x.a = 1", "return x"],
        ["a, b = x", "return a"],
        ["x[0] = 1", "return x"],
        ["del x", "return 1"],
        ["return"],
        ["s = 1"],
        ["s += 1", "return s"],
        ["for a in x:", "    s = 1", "else:", "    s = 2", "return s"],
        ["with x: return 1"],
    ],
)
def test_the_evaluator_refuses_statements_it_does_not_know_and_what_never_returns(body: list[str]) -> None:
    source = "\n".join(["def f(x):", *(f"    {line}" for line in body)])
    with pytest.raises(Refused):
        run_function(source, "f", [list(range(30))])


def test_statements_run_as_in_python(tmp_path: Path) -> None:
    source = """def f(xs):
    total = 1
    last = 0
    for x in xs:
        if x > 3:
            total += x * 2
            last = x
        else:
            total -= x
        if total > 60:
            return [total, x]
    return [total, last]
"""
    module = module_of(source, tmp_path / "f.py")
    for inputs in ([], [1, 2, 3], [5, 1, 9], [40, 2, 7], [4, 4, 4, 4, 4, 4, 4, 4, 4]):
        assert run_function(source, "f", [inputs]) == module.f(inputs)
