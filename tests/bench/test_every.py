"""All records one after another: each is a command that exists, what is done is passed over, what broke off goes on."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dfastllm.bench import every
from dfastllm.bench.__main__ import app
from dfastllm.bench.every import RECORDS, Journal, Record, chosen, run_all, source_hash

SAID: list[str] = []


def record(name: str, code: int = 0, **more: Any) -> Record:
    return Record(name, ("overhead", "--steps", str(code)), 1, **more)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], str]]:
    """Commands in place of benches, which end with the number after --steps; (arguments, DFASTLLM_ISA) of each."""
    calls: list[tuple[list[str], str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        assert command[:3] == [sys.executable, "-m", "dfastllm.bench"]
        calls.append((command[3:], options["env"].get("DFASTLLM_ISA", "")))
        options["stdout"].write(b"a table\n")
        return subprocess.CompletedProcess(command, int(command[5]))

    monkeypatch.setattr("dfastllm.bench.every.subprocess.run", run)
    return calls


@pytest.mark.parametrize("one", RECORDS, ids=lambda one: one.name)
def test_every_record_is_a_command_with_these_options(one: Record) -> None:
    """Its own --help is what it would parse: a word that no option is ends with 2."""
    done = CliRunner().invoke(app, [*one.arguments, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert done.exit_code == 0
    for word in one.arguments:
        if word.startswith("--"):
            assert f"{word} " in done.output, word
    assert one.resumes == ("--resume" in done.output)
    assert one.minutes > 0


def test_the_point_of_every_record() -> None:
    """Each record that README and benchmarks/ speak of is there, and fidelity comes before what shows it."""
    names = [one.name for one in RECORDS]
    assert len(set(names)) == len(names)
    assert names[0] == "fidelity"
    assert names[-1] == "report"
    commands = {one.arguments[1] if one.arguments[0] == "cpu" else one.arguments[0] for one in RECORDS}
    known = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    group = every.__name__.rpartition(".")[0] + ".cpu.commands"
    known |= {c.name or c.callback.__name__ for c in sys.modules[group].app.registered_commands}
    assert commands == known - {"all", "servers", "setup"}  # the suite against other servers has a record of its own


def test_what_is_chosen_and_left_out() -> None:
    assert [r.name for r in chosen(["llama.cpp"], ["llama.cpp A"])] == [
        "llama.cpp 0.5B",
        "llama.cpp 1.5B",
        "llama.cpp mixture",
    ]
    assert chosen([], []) == list(RECORDS)
    with pytest.raises(ValueError, match=r"no record begins with 'llama3'; there are fidelity,"):
        chosen([], ["llama3"])


def test_a_run_goes_on_where_it_was(tmp_path: Path, ran: list[tuple[list[str], str]]) -> None:
    journal = Journal(tmp_path / "deep" / "journal.json")
    some = [record("one"), record("two", 3, resumes=True), record("three", environment={"DFASTLLM_ISA": "avx2"})]
    assert [r.name for r in run_all(some, journal, "abc", SAID.append)] == ["two"]
    assert [isa for _, isa in ran] == ["", "", "avx2"]
    assert (tmp_path / "deep" / "two.log").read_text() == "a table\n"
    ran.clear()
    journal = Journal(tmp_path / "deep" / "journal.json")  # of another process
    assert [r.name for r in run_all(some, journal, "abc", SAID.append)] == ["two"]
    assert [arguments for arguments, _ in ran] == [["overhead", "--steps", "3", "--resume"]]
    ran.clear()
    assert [r.name for r in run_all(some, journal, "abd", SAID.append)] == ["two"]  # another source: all of it anew
    assert [arguments[3:] for arguments, _ in ran] == [[], [], []]
    rows = json.loads(journal.path.read_text())
    assert {name: (row["source"], row["ok"]) for name, row in rows.items()} == {
        "one": ("abd", True),
        "two": ("abd", False),
        "three": ("abd", True),
    }


def test_uncommitted_changes_are_never_done(tmp_path: Path, ran: list[tuple[list[str], str]]) -> None:
    journal = Journal(tmp_path / "journal.json")
    for _ in range(2):
        assert not list(run_all([record("one")], journal, "abc+", SAID.append))
    assert len(ran) == 2


def test_a_source_is_the_tree_of_src(tmp_path: Path) -> None:
    assert source_hash(tmp_path) == "unknown"

    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    git("init", "-q")
    git("config", "user.email", "a@example.org")
    git("config", "user.name", "a")
    for name in ("src/a.py", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1\n")
    git("add", "-A")
    git("commit", "-qm", "first")
    first = source_hash(tmp_path)
    (tmp_path / "README.md").write_text("2\n")  # documents and records may change between two records
    git("commit", "-qam", "second")
    assert source_hash(tmp_path) == first
    (tmp_path / "src/a.py").write_text("2\n")
    assert source_hash(tmp_path) == f"{first}+"
    git("commit", "-qam", "third")
    assert source_hash(tmp_path) not in (first, f"{first}+")


def test_the_list_says_what_is_left_and_how_long(tmp_path: Path) -> None:
    arguments = ["all", "--list", "--only", "llama.cpp AVX", "--journal", str(tmp_path / "j.json")]
    done = CliRunner().invoke(app, arguments, env={"TERM": "dumb"})
    assert done.exit_code == 0
    assert "2 of 2 records left, about 30 min" in done.output
    assert shlex.join(("python", "-m", "dfastllm.bench", *RECORDS[15].arguments)) in done.output
    assert CliRunner().invoke(app, ["all", "--skip", "x"]).exit_code == 2
