"""`dfastllm bench` as a person calls it: its files, its last line, its exit codes, its words for wrong input."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dfastllm.bench.command import _serve_arguments
from dfastllm.bench.suite import load_results
from dfastllm.bench.suite.run import Plan, Suite
from dfastllm.bench.suite.sweep import Settings
from dfastllm.bench.suite.workloads import prompt_types
from dfastllm.cli import app
from dfastllm.llm import resolve
from tests.kit.mock_server import Behaviour, MockServer, faster

SPECULATES = Behaviour(ttft=0.005, itl=0.002, tokens=12, honours={"speculative_config": faster(1.1)})
SMALL = ["--requests", "1", "--rounds", "6", "--types", "code,security", "--k", "3", "--method", "ngram"]
SMALL += ["--system", "empty,concise", "--load", "1,2", "--rate", "20", "--load-requests", "4", "--load-seconds", "0.2"]


def bench(tmp_path: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["bench", *words, "--out", str(tmp_path / "out")])


def last_line(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_the_whole_suite_on_a_server_that_speculates(tmp_path: Path) -> None:
    with MockServer(SPECULATES) as server:
        kept = tmp_path / "kept" / "mine.json"
        result = bench(tmp_path, server.url, *SMALL, "--slo", "ttft=1000", "--output", str(kept))
    assert result.exit_code == 0, result.output
    line = last_line(result)
    assert (line["status"], line["best_configuration"], line["verdict"]) == ("complete", "ngram-3", "faster")
    assert line["errors"] == 0
    out = tmp_path / "out"
    results = load_results(out / "test_results.json")
    assert load_results(kept) == results
    assert str(kept) in result.stderr
    assert [s.status for s in results.servers] == ["running"]
    assert [(c.name, c.status) for c in results.configurations] == [("none", "measured"), ("ngram-3", "measured")]
    assert [t.name for t in results.prompt_types] == ["code", "security"]
    assert set(results.configurations[1].prompt_types) == {"code", "security"}
    systems = {(s.name, s.configuration) for s in results.system_prompts}
    assert systems == {(name, c) for name in ("empty", "concise") for c in ("none", "ngram-3")}
    assert [p.kind for p in results.load] == ["closed", "closed", "poisson"] * 2
    assert all(p.figures.speed.request_goodput is not None for p in results.load)
    assert results.client is not None
    assert results.client.chunks > 100
    assert not results.partial
    assert results.run.arguments["slo"] == ["ttft=1000"]
    assert "api_key" not in results.run.arguments
    assert "<html" in (out / "report.html").read_text().lower()
    rows = [json.loads(row) for row in (out / "requests.jsonl").read_text().splitlines()]
    assert {row["part"] for row in rows} == {"sweep", "systems", "load"}
    assert len(list((out / "history").iterdir())) == 1
    assert "ngram, 3 tokens" in result.stdout


def test_a_second_run_is_compared_with_the_first(tmp_path: Path) -> None:
    with MockServer(SPECULATES) as server:
        words = [server.url, *SMALL, "--parts", "sweep"]
        first, second = bench(tmp_path, *words), bench(tmp_path, *words)
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert "earlier" not in first.stdout.lower()
    assert len(second.stdout) > len(first.stdout)


def test_a_server_that_only_ignores_is_not_said_to_speculate(tmp_path: Path) -> None:
    with MockServer(Behaviour(ttft=0.005, itl=0.001)) as server:
        result = bench(tmp_path, server.url, *SMALL, "--parts", "sweep")
    assert result.exit_code == 0
    results = load_results(tmp_path / "out" / "test_results.json")
    assert [(c.name, c.status) for c in results.configurations] == [("default", "measured"), ("ngram-3", "refused")]
    assert "ignores speculative_config" in str(results.configurations[1].message)
    assert results.target is not None
    assert results.target.fields == {"speculative_config": "ignored"}


def test_a_server_that_dies_leaves_partial_results(tmp_path: Path) -> None:
    with MockServer(SPECULATES, stop_after=30) as server:
        result = bench(tmp_path, server.url, *SMALL)
    assert result.exit_code == 3
    line = last_line(result)
    assert line["status"] == "partial"
    assert "stopped answering" in line["reason"]
    results = load_results(tmp_path / "out" / "test_results.json")
    assert results.partial
    assert results.configurations[0].figures is not None
    assert not (tmp_path / "out" / "history").exists()


@pytest.mark.parametrize("fault", ["bad_json", "dies", "wrong_type", "error_event"])
def test_a_server_that_only_fails_is_told(tmp_path: Path, fault: Any) -> None:
    with MockServer(Behaviour(fault=fault)) as server:
        result = bench(tmp_path, server.url, *SMALL, "--timeout", "1")
    assert result.exit_code == 2
    assert "does not answer a small request" in result.stderr
    assert load_results(tmp_path / "out" / "test_results.json").partial


def test_a_configuration_that_fails_is_not_a_result(tmp_path: Path) -> None:
    """It answers the small question, then fails every longer one."""

    def fail(value: Any, b: Behaviour) -> Behaviour | None:
        return replace(b, status=500) if value == "broken" else None

    behaviour = replace(SPECULATES, honours={"cache": fail})
    with MockServer(behaviour) as server:
        result = bench(tmp_path, server.url, *SMALL, "--parts", "sweep", "--config", 'bad={"cache": "broken"}')
    assert result.exit_code == 0
    found = {c.name: c for c in load_results(tmp_path / "out" / "test_results.json").configurations}
    assert found["bad"].status == "refused"
    assert found["bad"].message == "told to fail"


def test_nobody_there(tmp_path: Path) -> None:
    with MockServer() as server:
        url = server.url
    result = bench(tmp_path, url, *SMALL)
    assert result.exit_code == 1
    assert "Nothing listens there" in result.stderr
    results = load_results(tmp_path / "out" / "test_results.json")
    assert results.servers[0].status == "refused"


def test_status_alone_never_fails(tmp_path: Path) -> None:
    with MockServer() as server:
        up = bench(tmp_path, server.url, "--parts", "status")
        url = server.url
    down = bench(tmp_path, url, "--parts", "status")
    assert (up.exit_code, down.exit_code) == (0, 0)
    assert last_line(up)["servers_running"] == [url]
    assert last_line(down)["servers_running"] == []
    assert "requests.jsonl" not in up.stderr + down.stderr, "no file is named that is not there"
    assert (tmp_path / "out" / "test_results.json").exists()
    assert "Performance by prompt type" not in up.stdout


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["http://"], "URL"),
        (["--requests", "0"], "requests"),
        (["--rounds", "0"], "rounds"),
        (["--rate", "-1"], "rate"),
        (["--rate", "fast"], "rate"),
        (["--load", "0"], "concurrency"),
        (["--load-requests", "0"], "load_requests"),
        (["--parts", "everything"], "parts"),
        (["--types", "poems"], "types"),
        (["--system", ""], "system"),
        (["--k", "0"], "k"),
        (["--method", "magic"], "method"),
        (["--threshold", "2"], "threshold"),
        (["--config", "x"], "config"),
        (["--slo", "ttft"], "SLO"),
        (["--ramp", "1:2"], "ramp"),
        (["--arrivals", "random"], "arrivals"),
        (["--timeout", "0"], "timeout"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--temperature", "-1"], "temperature"),
        (["--prompts", "nothing.jsonl"], "nothing.jsonl"),
        (["--output", "."], "output"),
    ],
)
def test_wrong_input_is_one_line_that_names_it(tmp_path: Path, words: list[str], named: str) -> None:
    result = bench(tmp_path, *words)
    assert result.exit_code == 2
    assert named in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("number", "code", "reason"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "ended by SIGTERM"),
        (signal.SIGKILL, -9, "the run is not over"),
    ],
)
def test_a_signal_keeps_what_is_there(tmp_path: Path, number: int, code: int, reason: str) -> None:
    """In a real process: its exit code, and partial results in the file, whatever way it ends."""
    out = tmp_path / "out"
    with MockServer(replace(SPECULATES, itl=0.02)) as server:
        words = [sys.executable, "-c", "from dfastllm.cli import main; main()", "bench", server.url, "--out", str(out)]
        words += ["--types", "security", "--k", "3", "--method", "ngram", "--rounds", "500", "--parts", "sweep"]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and len(server.bodies) < 40:
            time.sleep(0.05)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == code, stderr
    results = load_results(out / "test_results.json")
    assert (results.partial, results.partial_reason) == (True, reason)
    if number != signal.SIGKILL:
        assert json.loads(stdout.splitlines()[-1])["reason"] == reason
        assert results.configurations[0].figures is not None


def test_a_server_is_started_for_a_checkpoint_that_lies_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped models behind our own server: right answers, and gone afterwards."""
    settings = Settings(requests=2, rounds=1, max_tokens=48)
    plan = Plan(
        sources={"extraction": prompt_types()["extraction"]},
        parts=("sweep",),
        settings=settings,
        model=str(resolve("demo-ar")),  # a directory: it is served under its last part
        serve=("--model", str(resolve("demo-ar")), "--threads", "1"),
    )
    with MockServer(SPECULATES) as other:  # on a usual port; a model named by its directory is served from here
        monkeypatch.setattr("dfastllm.bench.suite.run.DEFAULT_SERVERS", {"other": other.url})
        results = asyncio.run(Suite(plan, tmp_path).run())
    assert other.bodies == []
    assert not results.partial, results.partial_reason
    assert results.target is not None
    assert (results.target.started_here, results.target.kind, results.target.model) == (True, "ar", "demo-ar")
    base = results.baseline
    assert base is not None
    assert base.figures is not None
    assert base.figures.speed.tokens_source == "usage"
    assert base.figures.accuracy is not None
    assert base.figures.accuracy.correct >= 1
    assert base.figures.forwards is not None
    log = (tmp_path / "server.log").read_text()
    assert "SIGTERM" in log
    url = results.target.url
    result = bench(tmp_path, url, "--parts", "status")
    assert last_line(result)["servers_running"] == []


def test_arguments_of_the_started_server() -> None:
    assert _serve_arguments("", None)[:2] == ("--model", "demo-ar")
    assert "--speculative-config" in _serve_arguments("", None)
    assert _serve_arguments("", "demo-diffusion") == ("--model", "demo-diffusion")
    assert _serve_arguments("--model x --threads 2", None) == ("--model", "x", "--threads", "2")
