"""Prompts: every type can be graded, the graders tell right from wrong, own files are read or refused by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dfastllm.bench.suite.workloads import LABELS, load_prompts, prompt_types
from dfastllm.errors import ValidationError
from dfastllm.tasks import draw


def test_every_type_has_prompts_that_can_be_graded() -> None:
    sources = prompt_types(0)
    assert set(sources) == set(LABELS)
    for name, source in sources.items():
        prompts = [source(i) for i in range(8)]
        assert len({prompt.id for prompt in prompts}) == 8, name
        assert sum(prompt.grader is not None for prompt in prompts) >= 4, name
        assert prompts == [source(i) for i in range(8)], "the same index is the same prompt"
        assert all(prompt.type == name for prompt in prompts)


@pytest.mark.parametrize(("type", "task"), [("code", "code"), ("extraction", "extract"), ("tools", "tools")])
def test_samples_of_the_task_mix_are_right_by_their_own_answer(type: str, task: str) -> None:
    source = prompt_types(3)[type]
    for index in range(6):
        assert source(index).grade(draw("test", 3, index, task).response) is True
        assert source(index).grade("nonsense") is False


def test_calls_in_messages_have_arguments_as_json_text() -> None:
    source = prompt_types(0)["tools"]
    calls = [c for i in range(40) for m in source(i).messages for c in m.get("tool_calls") or ()]
    assert calls
    assert all(isinstance(json.loads(call["function"]["arguments"]), dict) for call in calls)


@pytest.mark.parametrize(
    ("type", "index", "right", "wrong"),
    [
        ("security", 1, "It is Strict-Transport-Security.", "X-Frame-Options"),
        ("security", 3, "Port 22.", "Port 2222."),
        ("technical", 7, "404 Not Found", "4040"),
        ("creative", 1, "- a\n- b\n- c", "- a\n- b"),
        ("creative", 3, "Golden Crust", "The Golden Crust"),
        ("creative", 5, "Will the rain ever end?", "Rain falls."),
        ("creative", 7, "one\ntwo", "one\ntwo\nthree"),
    ],
)
def test_closed_questions(type: str, index: int, right: str, wrong: str) -> None:
    prompt = prompt_types()[type](index)
    assert prompt.grade(right) is True
    assert prompt.grade(wrong) is False


def test_open_questions_are_not_graded() -> None:
    assert prompt_types()["creative"](0).grade("anything") is None


def test_a_system_prompt_takes_the_place_of_the_questions_own() -> None:
    prompt = prompt_types()["code"](0)
    roles = [m["role"] for m in prompt.under("Be brief.").messages]
    assert roles == ["system", "user"]
    assert [m["role"] for m in prompt.under("Be brief.").under("").messages] == ["user"]
    assert prompt.under("Be brief.").id == prompt.id


def test_own_prompts(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(
        '{"prompt": "Capital of France?", "grader": "contains", "expected": "Paris"}\n\n'
        '{"messages": [{"role": "user", "content": "Hi"}], "type": "chat"}\n'
    )
    sources = load_prompts(path)
    assert set(sources) == {"own", "chat"}
    assert sources["own"](5).grade("It is Paris.") is True
    assert sources["chat"](0).grade("Hello") is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1: no JSON"),
        ("[]", "wanted an object"),
        ('{"prompt": "a", "messages": []}', "either prompt or messages"),
        ("{}", "either prompt or messages"),
        ('{"messages": []}', "messages is a list"),
        ('{"prompt": "a", "weight": 2}', "unknown field 'weight'"),
        ('{"prompt": "a", "grader": "magic", "expected": 1}', "no grader 'magic'"),
        ('{"prompt": "a", "grader": "text"}', "go together"),
        ("", "holds no prompts"),
    ],
)
def test_own_prompts_that_are_wrong_are_named(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValidationError, match=words):
        load_prompts(path)
