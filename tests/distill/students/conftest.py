"""A small target, a student of it, and prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dfastllm.distill.students.layers import make_student
from tests.kit.convert_models import write_tiny


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("target") / "target", layers=4)


@pytest.fixture(scope="module")
def draft(target: Path) -> Path:
    return make_student(target, target.parent / "draft", layers=2).path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Forty questions of two tasks, one of them twice, and a line that is none."""
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": [{"role": "user", "content": f"q{i}"}], "task": ("prose", "sums")[i % 2]} for i in (*range(40), 7)
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + "no JSON\n")
    return path
