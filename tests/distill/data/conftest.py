from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dfastllm.llm import SHIPPED
from dfastllm.text import Tokenizer

Write = Callable[..., Path]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(SHIPPED / "demo-ar")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes lines (objects, texts or bytes) to a file and returns its path."""

    def written(*lines: Any, name: str = "set.jsonl") -> Path:
        path = tmp_path / name
        with path.open("wb") as file:
            for line in lines:
                file.write(
                    line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
                )
                file.write(b"\n")
        return path

    return written
