"""What brings a bare machine with a card to a record."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.kit.source import ROOT

SCRIPT = ROOT / "scripts" / "gpu_missing.py"


def test_only_what_is_missing_is_installed(tmp_path: Path) -> None:
    for name in ("numpy-9.9-py3-none-any.whl", "no_such_package_here-1.0-py3-none-any.whl", "other.txt"):
        (tmp_path / name).write_bytes(b"")
    found = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["no_such_package_here"]


def test_an_unknown_part_is_named() -> None:
    found = subprocess.run(["sh", str(ROOT / "scripts" / "gpu-check"), "--part", "x"], capture_output=True, text=True)
    assert found.returncode == 2
    assert "--part tests|bench|interpreter" in found.stderr


def test_a_bench_without_a_card_says_so(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        return
    cells = ROOT / "benchmarks" / "gpu" / "cells.py"
    command = [sys.executable, str(cells), "--json", str(tmp_path / "out.json")]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 2
    assert "no CUDA card here" in found.stderr
