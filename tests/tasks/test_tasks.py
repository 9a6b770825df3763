"""The task mix: splits share no parameters, the generator is a pure function, graders judge."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest

from dfastllm.tasks import MIXED, SPLITS, TASKS, draw, grade, pick_split
from dfastllm.tasks.evaluator import Refused, run_function
from dfastllm.tasks.sample import Sample, Split

DRAWN = 400


@pytest.fixture(scope="module")
def samples() -> dict[tuple[str, str], list[Sample]]:
    return {(s, t): [draw(s, 0, i, t) for i in range(DRAWN)] for s in SPLITS for t in TASKS}


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_template_parameters(task: str, samples: dict[tuple[str, str], list[Sample]]) -> None:
    keys = {split: {sample.key for sample in samples[split, task]} for split in SPLITS}
    assert all(len(found) >= 20 for found in keys.values())
    assert not keys["train"] & keys["validation"]
    assert not keys["train"] & keys["test"]
    assert not keys["validation"] & keys["test"]


@pytest.mark.parametrize("task", TASKS)
def test_split_is_decided_by_the_key_alone(task: str, samples: dict[tuple[str, str], list[Sample]]) -> None:
    for split in SPLITS:
        assert {pick_split(task, sample.key) for sample in samples[split, task]} == {split}


def test_same_parameters_in_other_words_stay_in_one_split() -> None:
    """The numbers of a word problem decide, not the names around them: a test sum is never trained on."""
    splits: dict[tuple, set[str]] = {}
    prompts: dict[tuple, set[str]] = {}
    for split in SPLITS:
        for i in range(DRAWN):
            sample = draw(split, 1, i, "arithmetic")
            splits.setdefault(sample.key, set()).add(split)
            prompts.setdefault(sample.key, set()).add(sample.messages[-1]["content"])
    assert max(map(len, splits.values())) == 1
    assert max(map(len, prompts.values())) > 1  # the same sum was asked in other words


def test_generator_is_a_pure_function_of_split_seed_and_index() -> None:
    forward = [draw("train", 3, i) for i in range(50)]
    backward = [draw("train", 3, i) for i in reversed(range(50))][::-1]
    assert forward == backward
    assert forward != [draw("train", 4, i) for i in range(50)]


def test_the_mix_holds_every_task_and_mostly_distinct_samples() -> None:
    drawn = [draw("train", 0, i) for i in range(2000)]
    assert {s.task for s in drawn} == set(MIXED)
    assert len({(str(s.messages), s.response) for s in drawn}) > 1950
    more = [draw("train", 0, i, mix={"prose": 20.0, "code": 0.0}).task for i in range(500)]
    assert more.count("prose") > 100
    assert "code" not in more


@pytest.mark.parametrize("task", [t for t in TASKS if t != "prose"])
def test_every_response_passes_its_own_grader_and_no_other_answer_does(
    task: str, samples: dict[tuple[str, str], list[Sample]]
) -> None:
    for one, other in zip(samples["train", task], samples["train", task][1:], strict=False):
        assert grade(one, one.response)
        assert not grade(one, "")
        assert not grade(one, one.response[:-1])
        if one.expected != other.expected and one.grader == other.grader:
            assert not grade(one, other.response)


def test_prose_has_no_grader() -> None:
    with pytest.raises(ValueError, match="no grader"):
        grade(draw("test", 0, 0, "prose"), "text")


def sample(grader: str, expected: object) -> Sample:
    return Sample("t", (), "", expected, grader, ())


@pytest.mark.parametrize(
    ("grader", "expected", "right", "wrong"),
    [
        ("answer", "19", ["12 + 7 = 19\nAnswer: 19", "Answer: 19 "], ["19", "Answer: 190", "Answer: 19.5", "Answer:"]),
        ("json", {"a": 1, "b": "x"}, ['{"b":"x","a":1}'], ['{"a":1}', '{"a":true,"b":"x"}', "{", "[[[[", "null", ""]),
        ("json", {"a": 1}, ['{"a": 1}', '{"a": 1.0}'], ['{"a": "1"}', '{"a": 1} x', '{"a": 1, "b": 2}']),
        ("text", "- a\n- b", ["- a\n- b", " - a\n- b\n"], ["- a - b", "- a\n- B"]),
        (
            "tool_call",
            {"name": "f", "arguments": {"x": 1}},
            ['<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'],
            [
                '{"name": "f", "arguments": {"x": 1}}',
                '<tool_call>{"name": "g", "arguments": {"x": 1}}</tool_call>',
                '<tool_call>{"name": "f", "arguments": {"x": 2}}</tool_call>',
                '<tool_call>{"name": "f", "arguments": {"x": 1}</tool_call>',
                'ok <tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>',
            ],
        ),
        (
            "tool_call_within",
            {"name": "f", "arguments": {"x": 1}},
            [
                '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>',
                'Sure. I will call f. <tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>',
                '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\nDone.',
            ],
            [
                'Sure. {"name": "f", "arguments": {"x": 1}}',
                '<tool_call>{"name": "f", "arguments": {"x": 2}}</tool_call>',
                '<tool_call>{"name": "f", "arguments": {"x": 1}}',
                '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call><tool_call>',
                '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>' * 2,
            ],
        ),
        (
            "text_within",
            "- a\n- b",
            ["- a\n- b", "Sure.\nAnswer:\n- a\n- b\n", "Answer: no\nAnswer: - a\n- b"],
            ["Sure.\n- a\n- b", "Answer: - a\n- b\nDone.", "- a\n- b\nAnswer:"],
        ),
        (
            "json_within",
            {"a": 1},
            ['{"a": 1}', 'Here it is.\nAnswer: {"a": 1}'],
            ['Here it is. {"a": 1}', 'Answer: {"a": 2}'],
        ),
        (
            "function_within",
            {"name": "f", "source": "def f(x):\n    return x + 2", "inputs": [[0], [5]]},
            ["def f(x):\n    return x + 2", "Sure.\nAnswer:\ndef f(n):\n    return 2 + n"],
            ["Sure.\ndef f(x):\n    return x + 2", "Answer: def f(x):\n    return x"],
        ),
        (
            "function",
            {"name": "f", "source": "def f(x: int) -> int:\n    return x + 2", "inputs": [[0], [5]]},
            ["def f(x: int) -> int:\n    return x + 2", "def f(n):\n    return 2 + n"],
            [
                "def g(x):\n    return x + 2",
                "def f(x):\n    return x * 2",
                "def f(x):\n    return str(x + 2)",
                "def f(x):\n    return x +",
                "def f():\n    return 2",
                "def f(x):\n    return __import__('os')",
                "lambda x: x + 2",
            ],
        ),
    ],
)
def test_graders(grader: str, expected: object, right: list[str], wrong: list[str]) -> None:
    assert [grade(sample(grader, expected), text) for text in right] == [True] * len(right)
    assert [grade(sample(grader, expected), text) for text in wrong] == [False] * len(wrong)


@pytest.mark.parametrize(
    "body",
    [
        "x.__class__",
        "open('f')",
        "'a' * 10**9",
        "[0] * 10**9",
        "10**10**10",
        "99999999999 * 99999999999 * 99999999999",
        "(lambda: 1)()",
        "x.format(1)",
        "'%1000000d' % x",
        "1 // 0",
        "nope",
        "[y for y in x for z in x]",
    ],
)
def test_the_evaluator_refuses_what_is_not_a_plain_expression(body: str) -> None:
    with pytest.raises(Refused):
        run_function(f"def f(x):\n    return {body}", "f", ["s"])


def test_the_evaluator_computes_as_python_does() -> None:
    source = "def f(xs):\n    return [x * 2 for x in xs if x % 3 == 0 and not x < 0]"
    assert run_function(source, "f", [[3, 4, -6, 9]]) == [6, 18]
    assert run_function("def g(s):\n    return s.upper() + 'a'", "g", ["b"]) == "Ba"


# sha256 of the first 150 samples of each split as JSON: what models were trained on and are graded by.
KNOWN = {
    "arithmetic": "1f57c94b7c324c5e",
    "extract": "b989939e94b9b475",
    "tools": "148e0a9752734a59",
    "code": "c80beee31e1a3bb0",
    "rewrite": "02223e47a811850e",
    "instruct": "d4debc2a1babb44c",
    "prose": "dabf19f6fd5f01cf",
    "listing": "2ece3e9197d52d13",
    "edit": "2419a9ab22001247",
    "table": "d498e8291ab04e45",
    "record": "50794a524f3845da",
    "ledger": "6406070cde072cd7",
    "program": "01dee4acfe941131",
}


@pytest.mark.parametrize("task", TASKS)
def test_the_mix_is_the_one_that_was_published(task: str, samples: dict[tuple[str, str], list[Sample]]) -> None:
    """The shipped models were trained on these samples, and records of accuracy hold for them: a change of the
    generator, however small, makes them other data. Whoever means it changes the digest and the records."""
    drawn = [dataclasses.astuple(sample) for split in SPLITS for sample in samples[split, task][:150]]
    blob = json.dumps(drawn, sort_keys=True, ensure_ascii=False).encode()
    assert hashlib.sha256(blob).hexdigest()[:16] == KNOWN[task]


@pytest.mark.parametrize(
    ("splits", "seed", "mix", "digest"),
    [
        (SPLITS, 0, None, "d08f46bb0f81dbfa"),
        (("train",), 7, {"arithmetic": 2.5, "prose": 8.0, "code": 0.0}, "cc6b53bca331479a"),
    ],
)
def test_tasks_outside_the_mix_leave_its_stream_as_it_was(
    splits: tuple[Split, ...], seed: int, mix: dict[str, float] | None, digest: str
) -> None:
    """Digests of the stream before there were any."""
    drawn = [dataclasses.astuple(draw(split, seed, i, mix=mix)) for split in splits for i in range(300)]
    blob = json.dumps(drawn, sort_keys=True, ensure_ascii=False).encode()
    assert hashlib.sha256(blob).hexdigest()[:16] == digest
