"""Every command without a terminal: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from dfastllm.core import DecodeParams, SamplingParams
from dfastllm.llm import LLM

Cli = Callable[..., Result]
SIZE = ("--max-tokens", 16, "--block-length", 8)


def expected(model: Path, text: str, sampling: SamplingParams, decode: DecodeParams | None = None) -> str:
    with LLM(model) as llm:
        return llm.chat([{"role": "user", "content": text}], sampling, decode)[0].text


def test_generate_prints_the_text_and_nothing_else(cli: Cli, diffusion: Path) -> None:
    result = cli("generate", "hello", "--model", diffusion, *SIZE, "--temperature", 1, "--seed", 5)
    sampling = SamplingParams(temperature=1.0, seed=5, max_tokens=16)
    assert result.exit_code == 0, result.output
    assert result.stdout == expected(diffusion, "hello", sampling, DecodeParams(block_length=8)) + "\n"
    assert result.stderr == ""


def test_generate_autoregressive(cli: Cli, ar: Path) -> None:
    result = cli("generate", "hello", "--model", ar, "--max-tokens", 12, "--temperature", 0)
    assert result.stdout == expected(ar, "hello", SamplingParams(temperature=0.0, max_tokens=12)) + "\n"


def test_generate_raw_infills_between_prompt_and_suffix(cli: Cli, diffusion: Path) -> None:
    report = json.loads(cli("generate", "ab", "--raw", "--suffix", "cd", "--json", "--model", diffusion, *SIZE).stdout)
    assert report["choices"][0]["usage"]["prompt_tokens"] == 4
    with LLM(diffusion) as llm:
        sampling = SamplingParams(temperature=0.0, max_tokens=16)
        [wanted] = llm.generate("ab", sampling, DecodeParams(block_length=8), suffixes=["cd"])
    assert report["choices"][0]["token_ids"] == list(wanted.outputs[0].token_ids)


def test_rule_apd_takes_a_draft_model(cli: Cli, diffusion: Path, ar: Path) -> None:
    options = ("generate", "hello", "--model", diffusion, *SIZE, "--rule", "apd")
    without = cli(*options)
    assert without.exit_code == 2
    assert "draft" in without.stderr
    assert cli(*options, "--draft", ar).exit_code == 0
    wrong = cli("generate", "hello", "--model", ar, "--draft", ar)
    assert wrong.exit_code == 2
    assert "a draft model serves canvas models" in wrong.stderr


def test_generate_reads_standard_input(cli: Cli, diffusion: Path) -> None:
    def tokens(prompt: str, **piped: str) -> int:
        report = cli("generate", prompt, "--model", diffusion, "--raw", "--json", *SIZE, **piped)
        return int(json.loads(report.stdout)["prompt_tokens"])

    piped = cli("generate", "-", "--model", diffusion, *SIZE, input="hello")
    assert piped.stdout == cli("generate", "hello", "--model", diffusion, *SIZE).stdout
    assert tokens("-", input="hello\n") == tokens("hello") < tokens("-", input="hello\n\n") == tokens("hello\n")


def test_generate_json_reports_usage_and_logprobs(cli: Cli, ar: Path) -> None:
    options = ("--n", 2, "--temperature", 1, "--seed", 3, "--logprobs", 1, "--max-tokens", 6, "--ignore-eos")
    report = json.loads(cli("generate", "hello", "--model", ar, "--json", *options).stdout)
    first, second = report["choices"]
    assert first["token_ids"] != second["token_ids"]
    assert len(first["logprobs"]) == len(first["token_ids"]) == 6
    usage = first["usage"]
    assert usage["forwards"] == 6
    assert usage["tokens_per_forward"] == usage["completion_tokens"] / 6 > 0
    assert usage["exactness"] == "reference"


def test_generate_several_answers_are_told_apart_on_stderr(cli: Cli, ar: Path) -> None:
    result = cli("generate", "hello", "--model", ar, "--n", 2, "--max-tokens", 4, "--allowed-token-ids", 65)
    assert result.stderr.splitlines() == ["--- 1 of 2", "--- 2 of 2"]
    assert len(result.stdout.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--temperature", "-1"], "temperature must be a number of at least 0, got -1.0."),
        (["--temperature", "hot"], "temperature must be a number; got 'hot'."),
        (["--block-length", "0"], "block_length must be a whole number of at least 1, got 0."),
        (["--steps", "x"], "steps must be a whole number; got 'x'."),
        (["--cache", "big"], "cache must be one of none, prefix, dual, windowed, delayed, sub_block, got 'big'."),
        (["--logit-bias", "5"], "logit_bias must be NAME=VALUE; got '5'."),
        (["--logit-bias", "a=1"], "logit_bias must be a whole number; got 'a'."),
        (["--device", "gpu"], "device must be cpu, cuda, cuda:N or mps; got 'gpu' (from --device)."),
        (["--max-model-len", "2"], "max_model_len must be a whole number, at least 8; got '2' (from --max-model-len)."),
        (["--suffix", "x"], "--suffix continues plain text: give --raw as well."),
        (["--raw", "--system", "x"], "--system needs the chat template"),
        (["--logprobs", "1"], "--logprobs are shown in JSON only"),
        (["--max-tokens", "1000"], "context"),
        (["--options", "gamma=1"], "gamma"),
        (["--rule", "no_such_rule"], "no_such_rule"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(cli: Cli, diffusion: Path, arguments: list[str], says: str) -> None:
    result = cli("generate", "hello", "--model", diffusion, *arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert says in line


def test_autoregressive_model_refuses_diffusion_options(cli: Cli, ar: Path) -> None:
    result = cli("generate", "hello", "--model", ar, "--steps", 4)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert "steps" in result.stderr or "decode" in result.stderr


@pytest.mark.parametrize("command", ["generate", "check"])
def test_unknown_model(cli: Cli, command: str) -> None:
    result = cli(*(["generate", "x", "--model"] if command == "generate" else ["check"]), "no-such-model")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: no model 'no-such-model'")


def test_empty_prompt(cli: Cli, diffusion: Path) -> None:
    result = cli("generate", "", "--raw", "--model", diffusion)
    assert result.exit_code == 2
    assert "prompt must hold at least one token" in result.stderr


def test_broken_checkpoint_is_a_failure_not_bad_input(cli: Cli, diffusion: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(diffusion, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes((diffusion / "model.safetensors").read_bytes()[:-100])
    result = cli("generate", "hello", "--model", broken)
    assert result.exit_code == 1
    [line] = result.stderr.splitlines()
    assert "truncated" in line


def test_debug_shows_the_traceback(cli: Cli, diffusion: Path) -> None:
    arguments = ("generate", "hello", "--model", diffusion, "--temperature", "-1")
    assert "Traceback" not in cli(*arguments).output
    assert "Traceback (most recent call last)" in cli("--debug", *arguments).output


def test_unexpected_errors_are_one_line_too(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import dfastllm.kernels

    def fail() -> None:
        raise OSError("no\nmemory \x1b[2J left")

    monkeypatch.setattr(dfastllm.kernels, "table", fail)
    result = cli("doctor")
    assert result.exit_code == 1
    assert result.stderr == "error: OSError: no memory ␛[2J left (dfastllm --debug COMMAND shows where)\n"


def test_check_passes(cli: Cli, diffusion: Path) -> None:
    result = cli("check", diffusion)
    assert result.exit_code == 0
    assert "It would load." in result.stdout
    assert "llada (diffusion)" in result.stdout
    report = json.loads(cli("check", diffusion, "--json", "--dtype", "bfloat16").stdout)
    assert report["loads"] is True
    assert report["weight_bytes"] == 2 * report["parameters"]


def damage_weights(directory: Path) -> str:
    (directory / "model.safetensors").write_bytes(b"not safetensors")
    return "bad_checkpoint"


def damage_config(directory: Path) -> str:
    (directory / "config.json").write_text("{")
    return "model_load_failed"


def damage_tokenizer(directory: Path) -> str:
    (directory / "tokenizer.json").write_text("{}")
    return "bad_tokenizer"


def remove_tokenizer(directory: Path) -> str:
    (directory / "tokenizer.json").unlink()
    return "bad_tokenizer"


@pytest.mark.parametrize("damage", [damage_weights, damage_config, damage_tokenizer, remove_tokenizer])
def test_check_names_what_is_wrong(cli: Cli, diffusion: Path, tmp_path: Path, damage: Callable[[Path], str]) -> None:
    directory = Path(shutil.copytree(diffusion, tmp_path / "damaged"))
    code = damage(directory)
    result = cli("check", directory)
    assert result.exit_code == 1
    assert "It would not load" in result.stdout
    assert code in result.stdout
    report = json.loads(cli("check", directory, "--json").stdout)
    assert report["loads"] is False
    assert code in [problem["code"] for problem in report["problems"]]
    assert cli("generate", "x", "--model", directory).exit_code == 1, "check says no, but it loads"


def test_doctor(cli: Cli) -> None:
    import os

    import torch

    from dfastllm.kernels import table

    report = json.loads(cli("doctor", "--json").stdout)
    assert report["software"]["torch"] == torch.__version__
    assert report["cpu"]["cores"] == os.cpu_count()
    assert 1 <= report["cpu"]["usable_cores"] <= report["cpu"]["cores"]
    assert report["memory"]["total_bytes"] >= (report["memory"]["available_bytes"] or 0)
    assert [op["op"] for op in report["ops"]] == [choice.op for choice in table()]
    assert len(report["devices"]) == 1 + torch.cuda.device_count() + torch.backends.mps.is_available()
    text = cli("doctor").stdout
    for choice in table():
        assert choice.op in text


def test_version_and_help(cli: Cli) -> None:
    from dfastllm import __version__

    assert cli("--version").stdout == f"dfastllm {__version__}\n"
    for command in ("generate", "chat", "serve", "train", "check", "doctor"):
        assert command in cli("--help").stdout
        assert cli(command, "--help").exit_code == 0
    assert cli("no-such-command").exit_code == 2
    assert cli("generate", "x", "--no-such-option").exit_code == 2


def test_train_writes_a_model_that_generates(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dfastllm.train import Recipe

    shape = {"hidden_size": 16, "intermediate_size": 32, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 8}
    recipe = Recipe("small", "llama", "causal", shape, steps=2, batch_tokens=256, warmup=1)
    file = tmp_path / "small.json"
    file.write_text(json.dumps(recipe.to_json()))
    result = cli("train", file, "--out", tmp_path / "out", "--runs", tmp_path / "runs", "--steps", 1)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(tmp_path / "out")
    assert cli("check", tmp_path / "out").exit_code == 0
    assert cli("generate", "hello", "--model", tmp_path / "out", "--max-tokens", 2).exit_code == 0
    again = cli("train", file, "--runs", tmp_path / "runs", "--fresh")
    assert again.exit_code == 2
    assert "earlier run" in again.stderr


def test_train_refuses(cli: Cli) -> None:
    assert "unknown recipe 'nope'" in cli("train", "nope").stderr
    assert cli("train", "demo-ar", "--device", "gpu").exit_code == 2
