from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dfastllm.cli import app


@pytest.fixture(scope="session")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.kit.cli_models import write_model

    return write_model(tmp_path_factory.mktemp("models") / "canvas", "llada")


@pytest.fixture(scope="session")
def ar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.kit.cli_models import write_model

    return write_model(tmp_path_factory.mktemp("models") / "causal", "llama")


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command as a user would, with no terminal: cli("generate", "hello", input="...")."""
    monkeypatch.setenv("COLUMNS", "120")
    runner = CliRunner()

    def run(*arguments: object, input: str | None = None) -> Result:
        return runner.invoke(app, [str(a) for a in arguments], input=input)

    return run
