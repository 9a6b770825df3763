"""Measuring the speed of a model in this process, and the samples it is measured on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from dfastllm.core import SamplingParams, StepEvent
from dfastllm.errors import ValidationError
from dfastllm.llm import LLM
from dfastllm.metrics.gates import check
from dfastllm.metrics.model_speed import measure_speed, speed_report, speed_reports
from dfastllm.metrics.timelines import aggregate
from dfastllm.metrics.tool_schemas import is_valid_tool_json
from dfastllm.metrics.workload import speed_samples
from tests.kit.clocked import Clocked


def test_every_other_sample_calls_a_tool() -> None:
    samples = speed_samples(6)
    assert [sample.grader == "tool_call" for sample in samples] == [True, False] * 3
    assert samples == speed_samples(6)
    assert samples != speed_samples(6, seed=1)
    for sample in samples[::2]:
        assert is_valid_tool_json(sample.response, sample.tools)  # so a right answer is a hit


def test_measuring_sees_known_delays_and_no_warm_up() -> None:
    model, samples = Clocked(0.25, 0.01, warm_up=60.0), speed_samples(4)
    model.answer(samples)
    got = measure_speed(model, samples, clock=lambda: model.now)  # type: ignore[arg-type]
    assert model.asked == 6
    assert [row["ttft_ms"] for row in got] == pytest.approx([250.0] * 4)
    assert [row["tps"] for row in got] == pytest.approx([100.0] * 4)
    for row, sample in zip(got, samples, strict=True):
        if sample.grader != "tool_call":
            assert row["ttfa_tokens"] is row["ttfa_excess_tokens"] is None
            continue
        ids = model.tokenizer.encode(sample.response, add_special=False)
        assert row["ttfa_tokens"] == len(ids)  # the whole answer is the call
        assert row["ttfa_ms"] == pytest.approx(250.0 + 10.0 * (len(ids) - 1))


def test_what_is_said_before_a_call_is_its_excess() -> None:
    """The same calls with and without words before them: the excess grows by exactly their tokens."""
    words = "Let me look that up for you. "
    samples = [sample for sample in speed_samples(8) if sample.grader == "tool_call"]
    rows = []
    for before in ("", words):
        model = Clocked(0.25, 0.01)
        model.answer(samples, before)
        rows.append(measure_speed(model, samples, clock=lambda m=model: m.now))  # type: ignore[arg-type, misc]
    said = len(model.tokenizer.encode(words, add_special=False))
    for bare, talkative in zip(*rows, strict=True):
        assert bare["ttfa_excess_tokens"] is not None
        assert talkative["ttfa_excess_tokens"] == bare["ttfa_excess_tokens"] + said
        assert bare["ttfa_excess_tokens"] <= 3  # what writing the arguments without spaces would save


@pytest.mark.parametrize("model", ["demo-ar", "demo-diffusion"])
def test_a_real_model_is_measured(model: str) -> None:
    with LLM(model) as llm:
        got = aggregate(measure_speed(llm, speed_samples(4), SamplingParams(temperature=0, max_tokens=64)))
    assert got["n"] == 4
    assert got["ttfa_hit_rate"] == 1.0
    assert 0 < got["ttft_ms"]["p50"] <= got["ttfa_ms"]["p95"]
    assert 5 < got["ttfa_tokens"]["p50"] < 64


class Hour:
    """A machine that is slow while its first requests are answered: whoever is asked then."""

    def __init__(self) -> None:
        self.now = 0.0
        self.asked = 0
        self.order: list[str] = []

    def delay(self) -> float:
        self.asked += 1
        return 0.3 if self.asked <= 12 else 0.0


class Beside(Clocked):
    """A stand-in on a machine that it shares."""

    def __init__(self, hour: Hour, first: float, name: str) -> None:
        super().__init__(first, 0.01)
        self.hour = hour
        self.info = type("Info", (), {"name": name})

    def stream(self, prompt: Any, sampling: Any, decode: Any, **options: Any) -> Iterator[StepEvent]:
        self.hour.order.append(self.info.name)
        started, slow = self.now, self.hour.delay()
        for event in super().stream(prompt, sampling, decode, **options):
            self.hour.now += self.now - started + slow
            started, slow = self.now, 0.0
            yield event


def test_models_asked_in_turns_share_a_slow_hour() -> None:
    """Asked once each, the first would look slower still; in rounds the two are as far apart as they are."""
    hour = Hour()
    pair: tuple[Any, Any] = (Beside(hour, 0.2, "old"), Beside(hour, 0.1, "new"))
    samples = speed_samples(8)
    for model in pair:
        model.answer(samples)
    old, new = speed_reports(*pair, 8, clock=lambda: hour.now)
    assert hour.order == [name for name in ("old", "new", "new", "old", "old", "new") for _ in range(2 + 8)]
    fast = [report.speed_metrics["ttft_ms"] for report in (old, new)]
    assert [(one["p50"], one["p95"]) for one in fast] == [pytest.approx((200.0,) * 2), pytest.approx((100.0,) * 2)]
    assert [report.fingerprints["workload"]["model"] for report in (old, new)] == ["old", "new"]
    assert check(new, old, other_model=True)["gates_passed"]
    assert not check(old, new, other_model=True)["gates_passed"]


def test_a_sample_asked_more_than_once_counts_by_its_median() -> None:
    """One slow moment of many seconds is in no percentile then; asked once it is."""
    for rounds, slow in ((3, 200.0), (1, 30_200.0)):
        hour = Hour()
        pair: tuple[Any, Any] = (Beside(hour, 0.2, "old"), Beside(hour, 0.2, "new"))
        for model in pair:
            model.answer(speed_samples(2))
        waits = iter([0.0] * 3 + [30.0] + [0.0] * 30)  # the second measured request of the first
        hour.delay = lambda waits=waits: next(waits)  # type: ignore[method-assign,misc]
        old, new = speed_reports(*pair, 2, rounds=rounds, clock=lambda hour=hour: hour.now)  # type: ignore[misc]
        assert max(old.speed_metrics["ttft_ms"].values()) > 0.9 * slow
        assert max(old.speed_metrics["ttft_ms"].values()) <= slow + 1e-6
        assert new.speed_metrics["ttft_ms"]["p95"] == pytest.approx(200.0)
    with pytest.raises(ValidationError, match="rounds must be at least 1, got 0"):
        speed_reports(*pair, 2, rounds=0)


def test_a_demo_model_passes_its_own_gates() -> None:
    """Its calls are longer than the limit of 25 tokens, and nothing else: the call's own length is not held against it,
    what a model says before the call is."""
    with LLM("demo-ar") as llm:
        report = speed_report(llm, 8)
    metrics = report.speed_metrics
    assert metrics["ttfa_tokens"]["p95"] > 25
    found = check(report, report)
    assert found["gates_passed"], found["errors"]
    assert found["ttfa_gate"]["counted"] == "ttfa_excess_tokens"
    assert found["ttfa_gate"]["p95"] <= 3
    assert report.fingerprints["workload"]["model"] == "demo-ar"
    late = report.model_copy(update={"speed_metrics": {**metrics, "ttfa_excess_tokens": {"p50": 30.0, "p95": 30.0}}})
    assert not check(late, report)["gates_passed"]
