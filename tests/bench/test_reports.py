"""Speed reports made of what the suite wrote."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dfastllm.bench.reports import _of_request, load_current, suite_report
from dfastllm.bench.suite.client import Call, Client
from dfastllm.bench.suite.figures import Measured
from dfastllm.bench.suite.record import Recorder
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
from dfastllm.bench.suite.workloads import Prompt, prompt_types
from dfastllm.errors import ValidationError
from dfastllm.llm import load_engine, resolve
from dfastllm.metrics.gates import check, evaluate_speed_gates, make_report, save_report
from dfastllm.metrics.timelines import aggregate
from dfastllm.text import Tokenizer
from tests.kit.live import serving

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


CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'


def row(**changes: Any) -> Mapping[str, Any]:
    chunks = [[0.1, 4, 2], [0.2, 4, 2], [0.3, 4, 2]]
    form = {"part": "sweep", "name": "plain", "error": None, "e2el": 0.4, "output_tokens": 6, "chunks": chunks}
    return {**form, "wants_call": False, "ttfa": None, "text": "", **changes}


def test_single_requests_beside_the_results(tmp_path: Path) -> None:
    path = suite(tmp_path / "test_results.json", ttfa=latency(150, 180))
    rows = [
        row(),
        row(wants_call=True, ttfa=0.2, text="12345678" + CALL + "and more"),
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
    unneeded = (8 + 1) / (8 + len(CALL))  # what came before, and a space inside the arguments
    assert got.speed_metrics["ttfa_excess_tokens"]["p50"] == pytest.approx(4 * unneeded)
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


def recorded(path: Path, *prompts: Prompt) -> list[dict[str, float | None]]:
    """What the suite's client and recorder keep of a served demo-ar, and what a report makes of it."""

    async def work(url: str) -> list[Measured]:
        client = Client(url, "demo-ar")
        try:
            return [
                Measured(prompt, await client.ask(Call(prompt.messages, prompt.tools, max_tokens=64)))
                for prompt in prompts
            ]
        finally:
            await client.aclose()

    with serving({"demo-ar": load_engine("demo-ar")}) as live, Recorder(path) as record:
        record.write("sweep", "plain", asyncio.run(work(live.url)))
    return [_of_request(json.loads(line)) for line in path.read_text().splitlines()]


def test_calls_of_a_served_model_are_bare_too(tmp_path: Path) -> None:
    """Over HTTP a call comes in pieces beside its tokens; the token that completed it is known, and nothing is in
    excess but a space."""
    source = prompt_types(0)["tools"]
    prompts = [prompt for prompt in (source(i) for i in range(12)) if prompt.wants_call][:3]
    found = recorded(tmp_path / "requests.jsonl", *prompts)
    tokenizer = Tokenizer.load(resolve("demo-ar"))
    for row, line in zip(found, (tmp_path / "requests.jsonl").read_text().splitlines(), strict=True):
        kept = json.loads(line)
        assert kept["correct"]
        length = len(tokenizer.encode(kept["text"]))
        assert kept["output_tokens"] == length
        assert row["ttfa_tokens"] in range(length - 4, length + 1)  # its arguments are whole before its closing tag
        assert row["ttfa_excess_tokens"] is not None
        assert 0 <= row["ttfa_excess_tokens"] < 1
        assert sum(tokens for _, _, tokens in kept["chunks"]) == kept["output_tokens"]
    metrics = aggregate(found)
    assert evaluate_speed_gates(metrics, metrics)["gates_passed"]


def test_calls_whose_chunks_tell_nothing_are_placed_by_their_number() -> None:
    """A server that tells no tokens, and an answer that is but a call: chunks stand for them."""
    silent = [[0.1, 0, None], [0.200001, 0, None], [0.3, 0, None]]
    found = _of_request(row(wants_call=True, ttfa=0.2000007, text=CALL, chunks=silent, output_tokens=9))
    assert found["ttfa_tokens"] == 6
