"""The kernels compile without a GPU (scripts/gpu_compile.py); all of them take minutes, so here it is one family."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.kit.interpreter import needs_interpreter

ROOT = Path(__file__).parents[3]


@needs_interpreter
def test_adapters_compile(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "scripts.gpu_compile", "--only", "adapters"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "_shrink" in lines[1]
    assert "_expand" in lines[2]
    assert lines[-1] == "0 wrong"
