"""Every example runs against a server and says what it should; each also checks its own output."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from clients.golden.server import Platform
from clients.golden.transcripts import ADMIN, KEY

from tests.kit.node import built_node_client
from tests.kit.source import ROOT

EXAMPLES = ROOT / "examples"
# What each must print, besides its own checks.
PRINTS: Mapping[str, str] = {
    "basic": r"answer: .*42",
    "streaming": r"still masked after each step:.* 0\b",
    "error_handling": r"not sent: No connection to",
    "multi_tenant": r"small used \d+ tokens of demo-ar",
    "lora": r"unloaded: .*example",
    "metrics": r"generation_tokens_total: \+16",
    "pipeline": r"second step_done[^$]*output: .*42",
    "model_registry": r"demo-diffusion: diffusion",
}


def test_there_is_one_of_each_in_both_languages() -> None:
    assert {path.stem for path in (EXAMPLES / "python").glob("*.py")} == set(PRINTS)
    assert {path.stem for path in (EXAMPLES / "node").glob("*.mjs")} == set(PRINTS)


def run(golden: Platform, command: list[str], folder: Path, name: str, **more: str) -> None:
    surroundings = {
        **os.environ,
        "DFASTLLM_URL": golden.live.url,
        "DFASTLLM_API_KEY": golden.keys[KEY],
        "DFASTLLM_ADMIN_KEY": golden.keys[ADMIN],
        "DFASTLLM_LORA": golden.adapter.name,
        **more,
    }
    ran = subprocess.run(command, cwd=folder, env=surroundings, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(PRINTS[name], ran.stdout), ran.stdout


@pytest.mark.parametrize("name", PRINTS)
def test_python(golden: Platform, name: str) -> None:
    path = str(ROOT / "clients" / "python" / "src")
    run(golden, [sys.executable, f"{name}.py"], EXAMPLES / "python", name, PYTHONPATH=path)


@pytest.mark.parametrize("name", PRINTS)
def test_node(golden: Platform, name: str, installed_examples: Path) -> None:
    run(golden, ["node", f"{name}.mjs"], installed_examples, name)


@pytest.fixture(scope="session")
def installed_examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The node examples in a folder where the client and ws are installed, as `npm install` would."""
    client, folder = built_node_client(), tmp_path_factory.mktemp("examples")
    for path in (EXAMPLES / "node").iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    modules = folder / "node_modules"
    (modules / "@dfastllm").mkdir(parents=True)
    (modules / "@dfastllm" / "client").symlink_to(client)
    (modules / "ws").symlink_to(client / "node_modules" / "ws")
    return folder
