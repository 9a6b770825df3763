"""The documents tell the truth: README's commands exist, its links lead somewhere, its models are shipped."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit.source import ROOT, modules

README = (ROOT / "README.md").read_text(encoding="utf-8")
SHIPPED = ROOT / "src" / "dfastllm" / "shipped"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def run_lines() -> list[list[str]]:
    """Every `./run ...` of README, in code blocks and in the table, as words."""
    found = re.findall(r"`(\./run [^`]+)`", README)
    found += [line for block in blocks("sh") for line in block.splitlines() if line.startswith("./run ")]
    return [shlex.split(line) for line in found]


def test_two_commands_do_all_set_up() -> None:
    """The commands that stand alone in a block, before anything else is asked for, are these two."""
    alone = [block.strip() for block in blocks("sh") if block.startswith("./run")]
    assert alone == ["./run serve", "./run test"]
    assert os.access(ROOT / "run", os.X_OK)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_run_explains_itself_without_installing() -> None:
    text = subprocess.run(["./run", "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for command in ("serve", "test", "lint", "setup"):
        assert f"./run {command}" in text


def test_run_lists_every_command() -> None:
    from dfastllm.cli import app

    text = subprocess.run(["./run"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    groups = [group.typer_instance.info.name for group in app.registered_groups]
    names = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    assert len(names) > 10
    assert [name for name in [*names, *groups] if f"./run {name}" not in text] == []


@pytest.mark.parametrize("words", run_lines(), ids=" ".join)
def test_commands_exist(words: list[str]) -> None:
    """A word after ./run is one of the script's own, or a dfastllm command that knows the options shown."""
    import typer

    from dfastllm.cli import app

    script = (ROOT / "run").read_text(encoding="utf-8")
    if re.search(rf"^{words[1]}\)$", script, flags=re.MULTILINE):
        return
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert words[1] in commands
    known = {name for parameter in commands[words[1]].params for name in parameter.opts} | {"--help"}
    assert {word for word in words[2:] if word.startswith("--")} <= known


def test_ci_runs_the_readme_command() -> None:
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert text.count("./run test") == 2, "once with the native kernels, once with their twins"
    assert "DFASTLLM_NATIVE=0" in text
    assert "./run lint" in text


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_links_lead_somewhere(link: str) -> None:
    assert link.startswith("http") or (ROOT / link).exists()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"demo-[a-z]+", README))))
def test_models_named_are_shipped(name: str) -> None:
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"):
        assert (SHIPPED / name / file).is_file(), f"{name}/{file}"
    size = sum(path.stat().st_size for path in (SHIPPED / name).iterdir())
    assert size <= 10_000_000, f"{name} weighs {size} bytes"


def test_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    [example] = blocks("python")
    names: dict[str, object] = {}
    exec(example, names)  # our own README, under test
    assert capsys.readouterr().out.strip()


def test_architecture_is_short_and_names_every_room() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    rooms = {module.room for module in modules()} - {""}
    assert {room for room in rooms if not re.search(rf"\b{room}\b", text)} == set()


def test_changelog_names_this_version() -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert version
    assert version.group(1) in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_ci_and_scripts_are_parsed_by_sh() -> None:
    for script in ("run", ".ci/run", ".ci/fresh"):
        subprocess.run(["sh", "-n", script], cwd=ROOT, check=True)


def test_house_tests_parse() -> None:
    """No test file holds two tests of one name: the second would hide the first."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        names = [n.name for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.FunctionDef)]
        doubles = {name for name in names if names.count(name) > 1}
        assert doubles == set(), path


def test_a_part_that_was_installed_brings_what_every_command_needs(tmp_path: Path) -> None:
    """Once `./run setup tenants`, then any command: nothing is installed a second time; another part is."""
    for name in ("run", "pyproject.toml", "constraints.txt", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    for folder in ("src/dfastllm/kernels/native", "tests/kernels/native_driver", "venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "src/dfastllm/kernels/native/a.cpp").touch()
    (tmp_path / "tests/kernels/native_driver/a.cpp").touch()
    log = tmp_path / "log"
    for name in ("python", "dfastllm"):
        program = tmp_path / "venv/bin" / name
        program.write_text(f'#!/bin/sh\necho {name} "$@" >>{shlex.quote(str(log))}\n')
        program.chmod(0o755)

    def installed(*words: str) -> list[str]:
        log.write_text("")
        environment = {**os.environ, "VENV": str(tmp_path / "venv"), "PYTHON": sys.executable}
        subprocess.run(["./run", *words], cwd=tmp_path, env=environment, check=True, capture_output=True)
        return [line.split()[-1] for line in log.read_text().splitlines() if "--editable" in line]

    assert installed("setup", "tenants") == [".[tenants]"]
    assert installed("tenants", "list") == installed("serve") == installed("setup", "tenants") == []
    assert log.read_text() == ""
    assert installed("setup", "sandbox") == [".[sandbox]"]
    assert installed("setup", "dev") == [".[dev]"]
    (tmp_path / "pyproject.toml").write_text("other")
    assert installed("serve") == ["."]
    assert installed("setup", "tenants") == [".[tenants]"]
