"""`dfastllm eval`: a file of each kind, a grid, resuming, JSON, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Cli = Callable[..., Result]
FAST = ("--max-tokens", 16, "--block-length", 8)
ROWS = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(5)]


@pytest.fixture
def gsm(tmp_path: Path) -> Path:
    file = tmp_path / "gsm.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def test_a_grid_on_a_file(cli: Cli, diffusion: Path, gsm: Path, tmp_path: Path) -> None:
    arguments = ("eval", gsm, "--model", diffusion, *FAST, "--use-cache", "--use-dual-cache", "--threshold", "0.7,0.9")
    result = cli(*arguments, "--out", tmp_path / "out", "--batch", 2)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == f"canvas: 5 questions of {gsm}, 16 tokens"
    assert [line.split()[0] for line in lines[3:7]] == [
        f"{cache}-t{threshold}-b8" for cache in ("prefix", "dual") for threshold in (0.7, 0.9)
    ]
    assert max(map(len, lines[1:8])) <= 80
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 1 + 20
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["n"] for row in found["settings"]] == [5] * 4
    assert found["settings"][3]["options"] == {"cache": "dual", "threshold": 0.9, "block_length": 8}
    again = json.loads(cli(*arguments, "--out", tmp_path / "out", "--batch", 2, "--json").stdout)
    assert again == found  # nothing was asked again: times are the same


def test_programs_say_how_they_ran(cli: Cli, ar: Path, tmp_path: Path) -> None:
    file = tmp_path / "mbpp.jsonl"
    file.write_text(json.dumps({"task_id": 1, "text": "Double.", "test_list": ["assert double(2) == 4"]}))
    result = cli("eval", file, "--model", ar, "--max-tokens", 8, "--out", tmp_path / "out", "--code-seconds", 3)
    assert result.exit_code == 0, result.output
    assert "0.0% (0-79)" in result.stdout
    assert "programs ran with: 3 s, 1024 MiB of memory" in " ".join(result.stdout.split())
    assert max(map(len, result.stdout.splitlines()[1:])) <= 80  # the first names the file


def test_the_mix_and_other_names(cli: Cli, ar: Path, tmp_path: Path) -> None:
    result = cli("eval", "--model", ar, "--quick-test", "--max-tokens", 8, "--out", tmp_path / "mix")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("causal: 10 questions of mix, 8 tokens")
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"q": "1 + 1?", "a": "2"}))
    named = ("--task", "gsm8k", "--field", "question=q", "--field", "answer=a", "--raw")
    result = cli("eval", file, "--model", ar, "--max-tokens", 8, *named, "--out", tmp_path / "own")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--threshold", "0.9,x"), "threshold is a list of numbers"),
        (("--threshold", "1.5"), "threshold must be"),
        (("--limit", "0"), "limit must be at least 1"),
        (("--task", "gsm8k"), "--task and --field are of a file"),
        (("none.jsonl",), "none.jsonl cannot be read"),
        (("--code-memory", "0"), "code_memory must be at least 1"),
        (("--max-tokens", "16", "--temperature", "-1"), "temperature"),
    ],
)
def test_what_is_refused(cli: Cli, diffusion: Path, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    result = cli("eval", *arguments, "--model", diffusion, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_an_autoregressive_model_has_no_cache_to_choose(cli: Cli, ar: Path) -> None:
    result = cli("eval", "--model", ar, "--use-cache")
    assert result.exit_code == 2
    assert "dfastllm bench --model" in result.stderr


def test_a_run_that_is_killed_goes_on(diffusion: Path, gsm: Path, tmp_path: Path) -> None:
    """By SIGKILL, between two answers or in the middle of one."""
    gsm.write_text("".join(json.dumps({"question": f"{i} + 1?", "answer": i + 1}) + "\n" for i in range(60)))
    out = tmp_path / "out"
    command = [sys.executable, "-c", "from dfastllm.cli import main; main()", "eval", str(gsm)]
    command += ["--model", str(diffusion), "--max-tokens", "4", "--batch", "1", "--out", str(out)]
    answers = out / "answers.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (answers.exists() and answers.stat().st_size > 1000):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    kept = [line for line in answers.read_text().splitlines()[1:] if line.endswith("}")]
    assert 0 < len(kept) < 60
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    after = answers.read_text().splitlines()[1:]
    assert after[: len(kept)] == kept
    assert len({json.loads(line)["id"] for line in after}) == len(after) == 60
