"""Measuring a model's speed, and speed reports made of what the suite wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from dfastllm.bench.gates import check, make_report, save_report
from dfastllm.bench.speed import load_current, measure_speed, speed_samples, suite_report
from dfastllm.bench.suite.schema import (
    ConfigurationResult,
    Environment,
    Figures,
    Latency,
    Output,
    Results,
    Run,
    Speed,
    Target,
    save_results,
)
from dfastllm.bench.timelines import aggregate
from dfastllm.bench.tool_schemas import is_valid_tool_json
from dfastllm.core import Finish, FinishReason, SamplingParams, StepEvent, Usage
from dfastllm.errors import ValidationError
from dfastllm.llm import LLM, resolve
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


QUANTILES = tuple(float(10 + i) for i in range(21))  # 0, 5, ... 100 %


def latency(p50: float, p95: float) -> Latency:
    return Latency(mean=p50, median=p50, std=0, p50=p50, p90=(p50 + p95) / 2, p95=p95, p99=p95, n=3)


def figures(**more: Any) -> Figures:
    speed = Speed(
        requests=3,
        duration=1.0,
        request_throughput=3.0,
        ttft=latency(100, 200),
        cdf={"tpot": QUANTILES},
        **more,
    )
    return Figures(
        speed=speed, output=Output(mean_tokens=4, mean_characters=8, empty=0, repetition=0, finish_reasons={})
    )


def suite(path: Path, *, local: bool | None = True, **more: Any) -> Path:
    """A run of two configurations."""
    result = Results(
        started="a",
        finished="b",
        seconds=1.0,
        environment=Environment(
            hardware={"cpu": "x"}, profile_key="here", server_is_local=local, versions={"dfastllm": "1"}, commit="c"
        ),
        run=Run(
            parts=(), prompt_types=("tools",), requests=3, rounds=1, concurrency=1, max_tokens=8, temperature=0, seed=0,
            quick=False,
        ),
        target=Target(url="http://far:1", model="m"),
        configurations=(
            ConfigurationResult(
                name="plain", label="plain", axis="baseline", baseline=True, status="measured", figures=figures(**more)
            ),
            ConfigurationResult(name="k3", label="k 3", axis="speculation", status="measured", figures=figures()),
            ConfigurationResult(name="k9", label="k 9", axis="speculation", status="refused"),
        ),
    )  # fmt: skip
    save_results(result, path)
    return path


def test_the_suites_own_percentiles(tmp_path: Path) -> None:
    got = load_current(suite(tmp_path / "test_results.json"))
    assert got.speed_metrics["ttft_ms"] == {"p50": 100, "p90": 150, "p95": 200}
    assert got.speed_metrics["tps"] == {
        "p50": 1e3 / QUANTILES[10],
        "p90": 1e3 / QUANTILES[2],
        "p95": 1e3 / QUANTILES[1],
        "p05": 1e3 / QUANTILES[19],
    }
    assert (got.n, got.hardware_profile_key) == (3, "here")
    result = check(got, got)
    assert result["gates_passed"] is True
    assert result["ttfa_gate"]["reason"] == "no_tool_requests"


def test_calls_whose_token_is_unknown_fail_the_ttfa_gate(tmp_path: Path) -> None:
    got = suite_report(suite(tmp_path / "test_results.json", ttfa=latency(150, 180)))
    assert got.speed_metrics["ttfa_ms"] == {"p50": 150, "p95": 180}
    assert check(got, got)["gates_passed"] is False


def row(**changes: Any) -> Mapping[str, Any]:
    chunks = [[0.1, 4, 2], [0.2, 4, 2], [0.3, 4, 2]]
    form = {"part": "sweep", "name": "plain", "error": None, "e2el": 0.4, "output_tokens": 6, "chunks": chunks}
    return {**form, "wants_call": False, "ttfa": None, **changes}


def test_single_requests_beside_the_results(tmp_path: Path) -> None:
    path = suite(tmp_path / "test_results.json", ttfa=latency(150, 180))
    rows = [
        row(),
        row(wants_call=True, ttfa=0.2),
        row(wants_call=True),
        row(error="timeout"),
        row(part="load"),
        row(name="k3", chunks=[[5.0, 4, 2]]),
    ]
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    got = suite_report(path)
    assert got.n == 3
    assert got.speed_metrics["ttft_ms"]["p95"] == pytest.approx(100)
    assert got.speed_metrics["tps"]["p50"] == pytest.approx(25)
    assert got.speed_metrics["ttfa_tokens"] == {"p50": 4, "p95": 4}
    assert got.speed_metrics["ttfa_ms"]["p50"] == pytest.approx(200)
    assert got.speed_metrics["ttfa_hit_rate"] == 0.5
    assert suite_report(path, "k3").speed_metrics["ttft_ms"]["p50"] == pytest.approx(5000)


def test_bad_suite_files(tmp_path: Path) -> None:
    path = suite(tmp_path / "test_results.json")
    with pytest.raises(ValidationError, match="no measured configuration 'k9'; there are: plain, k3"):
        load_current(path, "k9")
    (tmp_path / "requests.jsonl").write_text(json.dumps(row()) + '\n{"part": "swe')
    with pytest.raises(ValidationError, match="line 2, is no JSON"):
        load_current(path)
    older = {name: value for name, value in row().items() if name != "wants_call"}
    for line in (older, 3):
        (tmp_path / "requests.jsonl").write_text(json.dumps(line) + "\n")
        with pytest.raises(ValidationError, match="another version of the suite"):
            load_current(path)
    (tmp_path / "requests.jsonl").write_text(json.dumps(row(error="timeout")) + "\n")
    with pytest.raises(ValidationError, match="no request of 'plain' ended well"):
        load_current(path)
    path.write_text(path.read_text()[:200])
    with pytest.raises(ValidationError, match="cut short"):
        load_current(path)


def test_a_far_server_has_no_known_hardware(tmp_path: Path) -> None:
    far = suite_report(suite(tmp_path / "test_results.json", local=False))
    assert far.hardware_profile_key == "unknown-server-http://far:1"
    near = suite_report(suite(tmp_path / "near.json"))
    assert check(near, far)["reason"] == "hardware_mismatch"


def test_reports_are_read_too(tmp_path: Path) -> None:
    metrics = {"ttft_ms": {"p50": 1.0, "p95": math.inf}, "n": 1}
    save_report(make_report(metrics), tmp_path / "r.json")
    assert load_current(tmp_path / "r.json").speed_metrics["ttft_ms"]["p95"] == math.inf
    with pytest.raises(ValidationError, match="no configurations"):
        load_current(tmp_path / "r.json", "plain")
