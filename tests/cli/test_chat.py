"""Conversations through a pipe: history, commands, and errors that end a turn and not the program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from dfastllm.core import DecodeParams, SamplingParams
from dfastllm.llm import LLM

Cli = Callable[..., Result]
OPTIONS = ("--max-tokens", 8, "--block-length", 8, "--temperature", 1, "--seed", 4)
SAMPLING = SamplingParams(temperature=1.0, seed=4, max_tokens=8)
DECODE = DecodeParams(block_length=8)


def talk(model: Path, turns: list[str], system: str = "") -> list[str]:
    """The answers that the facade gives to these turns, each with all before it."""
    messages = [{"role": "system", "content": system}] if system else []
    answers = []
    with LLM(model) as llm:
        for turn in turns:
            messages.append({"role": "user", "content": turn})
            answers.append(llm.chat(messages, SAMPLING, DECODE)[0].text)
            messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_history_reaches_the_model(cli: Cli, diffusion: Path) -> None:
    result = cli("chat", "--model", diffusion, *OPTIONS, "--system", "brief", input="one\n\ntwo\n")
    assert result.exit_code == 0, result.output
    answers = talk(diffusion, ["one", "two"], "brief")
    assert result.stdout == "".join(f"{answer}\n" for answer in answers)
    assert answers[1] != talk(diffusion, ["two"], "brief")[0], "the test would not see a lost history"


def test_reset_forgets(cli: Cli, diffusion: Path) -> None:
    result = cli("chat", "--model", diffusion, *OPTIONS, input="one\n/reset\ntwo\n/quit\nthree\n")
    first, second = talk(diffusion, ["one"])[0], talk(diffusion, ["two"])[0]
    assert result.stdout == f"{first}\nforgotten\n{second}\n"


def test_an_error_ends_the_turn_only(cli: Cli, diffusion: Path) -> None:
    result = cli("chat", "--model", diffusion, *OPTIONS, input=f"{'long ' * 80}\ntwo\n")
    assert "context" in result.stderr
    assert "/reset starts afresh" in result.stderr
    assert result.stdout == talk(diffusion, ["two"])[0] + "\n"
    assert result.exit_code == 0


def test_commands(cli: Cli, diffusion: Path) -> None:
    result = cli("chat", "--model", diffusion, input="/help\n/nothing\n")
    for word in ("/reset", "/quit", "Ctrl-C"):
        assert word in result.stdout
    assert "there is no command /nothing" in result.stderr


@pytest.mark.parametrize("option", [("--n", 2), ("--logprobs", 1)])
def test_what_has_no_place_in_a_conversation(cli: Cli, diffusion: Path, option: tuple[str, int]) -> None:
    result = cli("chat", "--model", diffusion, *option)
    assert result.exit_code == 2
    assert "no place in a conversation" in result.stderr


def test_a_model_without_template(cli: Cli, tmp_path: Path) -> None:
    from tests.kit.cli_models import write_model

    model = write_model(tmp_path / "bare", "llama", chat=False)
    result = cli("chat", "--model", model)
    assert result.exit_code == 2
    assert "no chat template" in result.stderr
    assert cli("generate", "x", "--model", model, "--max-tokens", 2).exit_code == 0
    assert cli("generate", "x", "--model", model, "--system", "s").exit_code == 2
