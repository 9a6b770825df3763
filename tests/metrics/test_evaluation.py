"""What is counted of a model's answers: answers made up here, against marks worked out by hand, and a real model's."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest

from dfastllm.core import FinishReason, SamplingParams, Usage
from dfastllm.errors import ValidationError
from dfastllm.llm import LLM, Completion, RequestOutput, resolve
from dfastllm.metrics.evaluation import Evaluation, evaluate, sample_ids
from dfastllm.metrics.workload import gradable, speed_samples
from dfastllm.tasks import Sample, draw, grade
from dfastllm.text import Tokenizer

GREEDY = SamplingParams(temperature=0.0, max_tokens=64)
CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}, "required": ["zone"]},
    },
}


class Told:
    """A stand-in for a loaded model whose answers are given, each with so many forwards."""

    def __init__(self, answers: Sequence[tuple[str, int]]) -> None:
        self.tokenizer = Tokenizer.load(resolve("demo-ar"))
        self.answers = answers
        self.info = type("Info", (), {"name": "told"})

    def render(self, messages: Any, tools: Any = None) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(self.tokenizer.apply_chat_template(messages, tools)))

    def generate(self, prompts: Any, sampling: Any, decode: Any, *, shown: Any = ()) -> list[RequestOutput]:
        found = []
        for prompt, (text, forwards) in zip(prompts, self.answers, strict=True):
            ids = tuple(self.tokenizer.encode(text))
            usage = Usage(len(prompt), len(ids), forwards, exactness="reference")
            found.append(RequestOutput("r", prompt, (Completion(0, text, ids, FinishReason.STOP, usage),)))
        return found


def asked(tools: bool, grader: str, expected: Any, response: str = "x") -> Sample:
    message = {"role": "user", "content": "What time is it?"}
    return Sample("t", (message,), response, expected, grader, (), (CLOCK,) if tools else ())


def call(name: str = "clock", **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


RIGHT = {"name": "clock", "arguments": {"zone": "UTC"}}


def told(*cases: tuple[Sample, str, int]) -> Evaluation:
    model: Any = Told([(text, forwards) for _, text, forwards in cases])
    return evaluate(model, [sample for sample, _, _ in cases], GREEDY)


@pytest.mark.parametrize(
    ("text", "marks"),
    [  # right, named, argued, valid, complete, came
        (call(zone="UTC"), (True, True, True, True, True, True)),
        (call(zone="CET"), (False, True, False, True, True, True)),
        (call(city="UTC"), (False, True, False, False, False, False)),  # lacks what the schema requires
        (call("watch", zone="UTC"), (False, False, False, False, False, False)),  # no such tool
        ("I look. " + call(zone="UTC"), (False, True, True, True, True, True)),  # exact match wants nothing else
        ("It is noon.", (False, False, False, False, False, False)),
        (call(zone="UTC")[:-20], (False, False, False, False, False, False)),
    ],
)
def test_marks_of_a_wanted_call(text: str, marks: tuple[bool, ...]) -> None:
    (row,) = told((asked(True, "tool_call", RIGHT), text, 7)).rows
    assert row.ttfa_tokens is not None
    assert (row.right, row.named, row.argued, row.valid, row.complete, math.isfinite(row.ttfa_tokens)) == marks
    assert row.false_call is None
    if marks[-1]:
        tokenizer = Tokenizer.load(resolve("demo-ar"))
        assert row.ttfa_tokens == len(tokenizer.encode(text))  # the call ends the text


def test_marks_of_other_answers() -> None:
    rows = told(
        (asked(True, "text", "no"), "no", 1),
        (asked(True, "text", "no"), call(zone="UTC"), 1),
        (asked(False, "text", "no"), call(zone="UTC"), 1),  # no tool was offered: wrong, but no false call
        (asked(False, "json", {"a": 1, "b": 2}), '{"a": 1, "b": 2}', 1),
        (asked(False, "json", {"a": 1, "b": 2}), '{"a": 3}', 1),
        (asked(False, "json", {"a": 1, "b": 2}), '{"a": 1', 1),
    ).rows
    assert [row.right for row in rows] == [True, False, False, True, False, False]
    assert [row.false_call for row in rows] == [False, True, None, None, None, None]
    assert [row.valid for row in rows] == [None, None, None, True, True, False]
    assert [row.complete for row in rows] == [None, None, None, True, False, False]
    assert {row.ttfa_tokens for row in rows} == {None}


def test_marks_of_wordy_answers() -> None:
    """Graders that also take an answer which says more: the call or the JSON within is what is marked."""
    rows = told(
        (asked(True, "tool_call_within", RIGHT), "I look. " + call(zone="UTC"), 1),
        (asked(False, "json_within", {"a": 1}), 'Sure. Answer: {"a": 1}', 1),
        (asked(False, "json_within", {"a": 1}), "Sure. Answer: 1,", 1),
    ).rows
    assert [row.right for row in rows] == [True, True, False]
    assert [row.valid for row in rows] == [True, True, False]
    assert [row.complete for row in rows] == [True, True, False]
    assert rows[0].ttfa_excess_tokens is not None
    assert rows[0].ttfa_excess_tokens >= len(Tokenizer.load(resolve("demo-ar")).encode("I look. "))


def test_a_call_in_another_form_is_right_too() -> None:
    """The demo task's grader knows one form; a model of another form is graded by what its call says."""
    mistral = '[TOOL_CALLS][{"name": "clock", "arguments": {"zone": "UTC"}}]'
    found = told((asked(True, "tool_call", RIGHT), mistral, 1), (asked(True, "tool_call", RIGHT), "Now: " + mistral, 1))
    assert [row.right for row in found.rows] == [True, False]
    assert [row.argued for row in found.rows] == [True, True]


def test_the_summary_by_hand() -> None:
    found = told(
        (asked(True, "tool_call", RIGHT, call(zone="UTC")), call(zone="UTC"), 4),
        (asked(True, "tool_call", RIGHT, call(zone="UTC")), "never", 2),
        (asked(True, "text", "no", "no"), "no", 1),
        (asked(False, "text", "yes", "yes"), "no", 1),
    )
    rows, got = found.rows, found.summary()
    assert got["exact_match"] == found.exact_match == 0.5
    assert (
        got["tool_name_accuracy"] == got["argument_exact_match"] == got["completeness"] == got["ttfa_hit_rate"] == 0.5
    )
    assert got["false_call_rate"] == 0.0
    tokens = sorted(row.tokens for row in rows)
    assert got["median_tokens"] == (tokens[1] + tokens[2]) / 2
    assert got["ttfa_tokens"] == rows[0].tokens
    assert got["forwards"] == 2.0
    assert got["tokens_per_forward"] == sum(tokens) / 8
    assert rows[0].reference_tokens == rows[0].tokens
    assert found.by_task == {"t": 0.5}
    kept = json.loads(json.dumps(found.record(), allow_nan=False))
    assert kept["rows"][1]["ttfa_tokens"] == "Infinity"
    assert kept["n"] == 4


def test_drift_by_shape() -> None:
    long = asked(False, "text", "no", "word " * 40)
    found = told((asked(False, "text", "no", "no"), "no", 1), (asked(False, "text", "no"), "?", 1), (long, "no", 1))
    lengths = [row.length for row in found.rows]
    shapes = found.by_shape([lengths[0] + 8, 4096, 64_000])
    assert list(shapes) == [lengths[0] + 8, 4096]
    small, large = shapes.values()
    assert (small.samples, small.accuracy, small.drift) == (2, 0.5, pytest.approx(0.5 - 2 / 3))
    assert (large.samples, large.accuracy, large.drift) == (1, 1.0, pytest.approx(1 / 3))
    assert [one.samples for one in found.by_shape([1]).values()] == [3]  # longer than all: the largest
    exact = found.by_shape([max(lengths[:2]), lengths[2]])
    assert [one.samples for one in exact.values()] == [2, 1]  # filled to the last token
    with pytest.raises(ValidationError, match="shapes"):
        found.by_shape([])


def test_samples_that_cannot_be_evaluated() -> None:
    model: Any = Told([("a", 1)] * 2)
    one = asked(False, "text", "no")
    for samples, ids in (([], None), ([one, one], ["a", "a"]), ([one], ["a", "b"])):
        with pytest.raises(ValidationError, match="id each"):
            evaluate(model, samples, GREEDY, ids=ids)
    with pytest.raises(ValidationError, match="no grader"):
        evaluate(model, [draw("test", 0, 0, "prose")], GREEDY)


def test_a_real_model_is_graded_as_its_answers_are() -> None:
    samples = [*gradable(6), *speed_samples(3)]
    with LLM("demo-ar") as llm:
        found = evaluate(llm, samples, GREEDY)
        answers = [llm.chat(list(s.messages), GREEDY, tools=list(s.tools) or None)[0].outputs[0] for s in samples]
    assert [row.id for row in found.rows] == sample_ids(samples)
    assert [row.text for row in found.rows] == [answer.text for answer in answers]
    assert [row.right for row in found.rows] == [grade(s, a.text) for s, a in zip(samples, answers, strict=True)]
    assert [(row.tokens, row.forwards) for row in found.rows] == [
        (answer.usage.completion_tokens, answer.usage.forwards) for answer in answers
    ]
    assert {row.named is None for row in found.rows if row.task == "tools"} <= {True, False}
    assert (found.model, found.decode) == ("demo-ar", "greedy")
