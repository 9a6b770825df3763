"""SmolLM2-135M's file, for tests on real text: where `dfastllm pull` keeps it, or where the benchmarks keep
theirs ($BENCH_CACHE). Nothing is fetched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dfastllm.hub.names import PACKAGED
from dfastllm.hub.packages import kept

__all__ = ["real_file", "require_real"]

MODEL = PACKAGED["smollm2-135m"]


def real_file() -> Path | None:
    """None: it is not on this machine."""
    other = Path(os.environ.get("BENCH_CACHE", "/tmp/bench-cache")) / "models" / "smollm2" / MODEL.file.name
    return kept(MODEL) or (other if other.is_file() else None)


def require_real() -> Path:
    """Skips the test where the file is not on this machine."""
    path = real_file()
    if path is None:
        pytest.skip(f"{MODEL.name} is not on this machine: `dfastllm pull {MODEL.name}` fetches it")
    return path
