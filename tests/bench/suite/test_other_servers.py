"""The suite against servers that are not ours, where their environments are made (`python -m dfastllm.bench servers`
makes them); what it relies on in each of them, asked of the running server."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dfastllm.bench.__main__ import app
from dfastllm.bench.cpu.environment import default_cache
from dfastllm.bench.suite import others
from dfastllm.bench.suite.client import Answer, Call, Client
from dfastllm.bench.suite.counting import TokenCounter
from dfastllm.bench.suite.others import OTHERS, SERVERS, across_servers, running_server
from dfastllm.bench.suite.probe import Fields, connect, probe
from dfastllm.bench.suite.schema import ServerStatus, Target, load_results
from dfastllm.errors import GenerationError, ValidationError
from tests.kit.suite_example import configuration, results

pytestmark = pytest.mark.timeout(900)  # a peer may compile before it answers

CACHE = default_cache()
QUESTION = Call(({"role": "user", "content": "What is 12 + 30?"},), max_tokens=64)
SPECULATION = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}


def made(name: str) -> bool:
    """Whether the environment is there; a test makes none: that takes minutes and a network."""
    server = OTHERS[name]
    return (CACHE / server.environment.name / "steps").exists()


@pytest.fixture(scope="module", params=list(OTHERS))
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    name = request.param
    if not made(name):
        pytest.skip(f"no environment for {name} under {CACHE}: python -m dfastllm.bench servers --only {name}")
    with running_server(name, CACHE, tmp_path_factory.mktemp(name) / "server.log", threads=1) as url:
        yield name, url


async def connected(url: str) -> tuple[Client, Target]:
    status = await probe("trial", url)
    if status.status != "running":
        status = ServerStatus(name="trial", url=url, status="running", message="")
    return await connect(status, others.MODEL)


def asked(url: str, *calls: Call) -> tuple[list[Answer], Target]:
    async def run() -> tuple[list[Answer], Target]:
        client, target = await connected(url)
        answers = [await client.ask(call) for call in calls]
        await TokenCounter(client).fill(answers)
        await client.aclose()
        return answers, target

    return asyncio.run(run())


@pytest.mark.slow
def test_answers_are_whole_and_their_tokens_counted_without_the_end_of_text(server: tuple[str, str]) -> None:
    name, url = server
    (answer,), target = asked(url, QUESTION)
    assert answer.ok, answer.message
    assert answer.finish_reason == "stop"
    assert "Answer" in answer.text
    # A byte-level tokenizer gives demo-ar's sums a token a chunk on both servers.
    assert answer.completion_tokens == len(answer.chunks)
    source = {"llama-cpp-python": "tokenize"}.get(name, "usage")
    assert answer.tokens_source == source
    said = " ".join(target.fallbacks)
    assert ("counts the end of text" in said) == (name in ("transformers", "vllm"))
    assert ("no usage with a stream" in said) == (name == "llama-cpp-python")


@pytest.mark.slow
def test_both_speak_as_the_model_does_here(server: tuple[str, str]) -> None:
    """transformers holds the same bits as our server: its greedy answers are ours; Q8_0's may differ in places."""
    from dfastllm.core.request import SamplingParams
    from dfastllm.llm import LLM

    name, url = server
    if name != "transformers":
        pytest.skip("another precision")
    (answer,), _ = asked(url, QUESTION)
    with LLM(others.MODEL, backend="torch") as llm:
        ours = llm.chat([dict(m) for m in QUESTION.messages], SamplingParams(temperature=0.0, max_tokens=64))[0]
    assert answer.text == ours.text


@pytest.mark.slow
def test_speculation_is_refused_or_known_to_be_ignored(server: tuple[str, str]) -> None:
    name, url = server

    async def run() -> tuple[str | None, dict[str, str]]:
        client, _ = await connected(url)
        fields = Fields(client)
        why = await fields.refusal(SPECULATION)
        await client.aclose()
        return why, dict(fields.found)

    why, found = asyncio.run(run())
    assert found == {"speculative_config": {"llama-cpp-python": "ignored"}.get(name, "no")}
    assert why is not None
    assert ("ignores speculative_config" in why) == (name == "llama-cpp-python")


@pytest.mark.slow
def test_a_prompt_beyond_the_context_is_an_error_or_an_answer_never_an_exception(server: tuple[str, str]) -> None:
    name, url = server
    long = Call(({"role": "user", "content": "hello there " * 600},), max_tokens=8)
    (answer,), _ = asked(url, long)
    if name == "llama-cpp-python":
        assert answer.error in ("disconnected", "refused", "server_error", "truncated")
        assert answer.message
    else:
        assert answer.ok


@pytest.mark.slow
def test_the_whole_suite_runs(server: tuple[str, str], tmp_path: Path) -> None:
    from dfastllm.cli import app as cli

    _, url = server
    small = ["--quick", "--requests", "1", "--types", "arithmetic,tools", "--load", "1", "--load-requests", "2"]
    run = CliRunner().invoke(
        cli, ["bench", url, "--model", others.MODEL, "--out", str(tmp_path), "--load-seconds", "0.5", *small]
    )
    assert run.exit_code == 0, run.output
    found = load_results(tmp_path / "test_results.json")
    base = found.baseline
    assert base is not None
    assert base.figures is not None
    assert base.figures.speed.errors == 0
    assert base.figures.accuracy is not None
    assert base.figures.accuracy.n > 0
    refused = [c for c in found.configurations if c.status == "refused"]
    assert refused
    assert all(c.message for c in refused)
    assert any("speculative_config" in (c.message or "") for c in refused)
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("<svg") >= 2


# what needs no other server


def test_servers_are_told_apart_by_name(tmp_path: Path) -> None:
    assert SERVERS == ("dfastllm", "llama-cpp-python", "transformers", "vllm")
    with (
        pytest.raises(ValidationError, match="there is no server 'ollama'; there are dfastllm"),
        running_server("ollama", tmp_path, tmp_path / "log", 1),
    ):
        pass


@pytest.mark.parametrize("name", list(OTHERS))
def test_commands_name_the_model_and_never_its_place(name: str, tmp_path: Path) -> None:
    command = OTHERS[name].command(tmp_path / "python", tmp_path / "dir" / "demo-ar", 1234, 2)
    assert "1234" in command
    assert "127.0.0.1" in command
    if name == "transformers":
        assert "demo-ar" in command, "the name in every request and record"
    elif name == "vllm":
        assert command[command.index("--served-model-name") + 1] == "demo-ar"
    else:
        assert command[command.index("--model_alias") + 1] == "demo-ar"
        assert command[command.index("--interrupt_requests") + 1] == "false"


def test_a_server_that_does_not_come_up_says_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Here:
        def ensure(self, cache: Path) -> Path:
            return Path(sys.executable)

    broken = others.OtherServer(
        "broken",
        Here(),  # type: ignore[arg-type]
        lambda cache: tmp_path,
        lambda python, model, port, threads: [str(python), "-c", "raise SystemExit('no such model')"],
        "/health",
        lambda python, threads: {},
    )
    monkeypatch.setattr(others, "OTHERS", {"broken": broken})
    monkeypatch.setattr(others, "SERVERS", ("broken",))
    with (
        pytest.raises(GenerationError, match=r"ended with code 1.*no such model"),
        running_server("broken", tmp_path, tmp_path / "log", 1),
    ):
        pass


def test_servers_side_by_side() -> None:
    empty = results(configuration("other", "no baseline", 1.2), partial=True, partial_reason="the server died")
    table = across_servers({"one": results(), "two": empty})
    assert [cell.text for cell in table.rows[0]] == ["one", "100", "9.00", "10.0", "400", "93.3 % (28/30)", "0"]
    assert table.rows[1][-1].text == "the server died"


def test_the_command_runs_the_suite_on_each_and_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the suite itself replaced: which servers, which arguments, what is made of the results."""
    from contextlib import contextmanager

    from dfastllm.bench import __main__ as command
    from dfastllm.bench.suite.schema import save_results

    calls: list[list[str]] = []

    @contextmanager
    def nothing(name: str, cache: Path, log: Path, threads: int) -> Iterator[str]:
        yield f"http://{name}"

    class Done:
        returncode = 0

    def run(arguments: list[str]) -> Done:
        calls.append(arguments[3:])
        save_results(results(), Path(arguments[arguments.index("--out") + 1]) / "test_results.json")
        return Done()

    monkeypatch.setattr(others, "running_server", nothing)
    monkeypatch.setattr(command.subprocess, "run", run)
    only = ["--only", "dfastllm", "--only", "transformers"]
    done = CliRunner().invoke(app, ["servers", *only, "--out", str(tmp_path), "--quick", "--rounds", "2"])
    assert done.exit_code == 0, done.output
    assert calls == [
        ["bench", f"http://{n}", "--model", "demo-ar", "--out", str(tmp_path / n), "--quick", "--rounds", "2"]
        for n in ("dfastllm", "transformers")
    ]
    assert "The same model under several servers" in done.output
