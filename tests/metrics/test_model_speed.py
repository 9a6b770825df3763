"""Measuring the speed of a model in this process, and the samples it is measured on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from dfastllm.core import Finish, FinishReason, SamplingParams, StepEvent, Usage
from dfastllm.llm import LLM, resolve
from dfastllm.metrics.gates import check, make_report
from dfastllm.metrics.model_speed import measure_speed
from dfastllm.metrics.timelines import aggregate
from dfastllm.metrics.tool_schemas import is_valid_tool_json
from dfastllm.metrics.workload import speed_samples
from dfastllm.text import Tokenizer


def test_every_other_sample_calls_a_tool() -> None:
    samples = speed_samples(6)
    assert [sample.grader == "tool_call" for sample in samples] == [True, False] * 3
    assert samples == speed_samples(6)
    assert samples != speed_samples(6, seed=1)
    for sample in samples[::2]:
        assert is_valid_tool_json(sample.response, sample.tools)  # so a right answer is a hit


class Clocked:
    """A stand-in for a loaded model whose right answers come token by token under a clock of its own."""

    def __init__(self, first: float, gap: float, warm_up: float) -> None:
        self.tokenizer = Tokenizer.load(resolve("demo-ar"))
        self.now, self.asked = 0.0, 0
        self.first, self.gap, self.warm_up = first, gap, warm_up
        self.answers: dict[str, str] = {}

    def render(self, messages: Any, tools: Any = None) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(self.tokenizer.apply_chat_template(messages, tools), add_special=False))

    def stream(self, prompt: Any, sampling: Any, decode: Any) -> Iterator[StepEvent]:
        self.asked += 1
        slow = self.warm_up if self.asked <= 2 else 0.0
        ids = self.tokenizer.encode(self.answers[self.tokenizer.decode(list(prompt))], add_special=False)
        for i, token in enumerate(ids):
            self.now += slow + self.first if i == 0 else self.gap
            yield StepEvent("r", (token,))
        usage = Usage(prompt_tokens=1, completion_tokens=len(ids), forwards=1, exactness="reference")
        yield StepEvent("r", finish=Finish(FinishReason.STOP, usage))


def test_measuring_sees_known_delays_and_no_warm_up() -> None:
    model, samples = Clocked(0.25, 0.01, warm_up=60.0), speed_samples(4)
    for sample in samples:
        prompt = model.render(sample.messages, sample.tools or None)
        model.answers[model.tokenizer.decode(list(prompt))] = sample.response
    got = measure_speed(model, samples, clock=lambda: model.now)  # type: ignore[arg-type]
    assert model.asked == 6
    assert [row["ttft_ms"] for row in got] == pytest.approx([250.0] * 4)
    assert [row["tps"] for row in got] == pytest.approx([100.0] * 4)
    for row, sample in zip(got, samples, strict=True):
        if sample.grader != "tool_call":
            assert row["ttfa_tokens"] is None
            continue
        ids = model.tokenizer.encode(sample.response, add_special=False)
        assert row["ttfa_tokens"] == len(ids)  # the whole answer is the call
        assert row["ttfa_ms"] == pytest.approx(250.0 + 10.0 * (len(ids) - 1))


@pytest.mark.parametrize("model", ["demo-ar", "demo-diffusion"])
def test_a_real_model_is_measured(model: str) -> None:
    with LLM(model) as llm:
        got = aggregate(measure_speed(llm, speed_samples(4), SamplingParams(temperature=0, max_tokens=64)))
    assert got["n"] == 4
    assert got["ttfa_hit_rate"] == 1.0
    assert 0 < got["ttft_ms"]["p50"] <= got["ttfa_ms"]["p95"]
    assert 5 < got["ttfa_tokens"]["p50"] < 64
    report = make_report(got, workload={"model": model})
    assert check(report, report)["tps_regression"]["p50"]["passed"]
