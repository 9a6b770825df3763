"""What every record carries: the machine, the commit, medians with their spread, and where it is written."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

__all__ = ["Spread", "machine", "spread", "write_record"]

SCHEMA = 1


@dataclass(frozen=True)
class Spread:
    """Median with the lowest and highest of `n` runs."""

    median: float
    low: float
    high: float
    n: int


def spread(values: Sequence[float]) -> Spread:
    ordered = sorted(values)
    n = len(ordered)
    middle = ordered[n // 2] if n % 2 else (ordered[n // 2 - 1] + ordered[n // 2]) / 2
    return Spread(middle, ordered[0], ordered[-1], n)


def machine() -> dict[str, Any]:
    """Processor, cores, memory, versions and commit; `commit` ends in "+" when the tree has uncommitted changes."""
    import torch

    import dfastllm

    model, flags = platform.processor() or platform.machine(), []
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields: dict[str, str] = {}
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
        model = fields.get("model name", model)
        known = set(fields.get("flags", "").split())
        flags = [f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if f in known]
    return {
        "cpu": model,
        "flags": flags,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dfastllm": dfastllm.__version__,
        "commit": _commit(),
    }


def _commit() -> str | None:
    here = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "..") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_record(path: Path, name: str, results: Any, **context: Any) -> None:
    """Write one benchmark's record as JSON: schema, name, time (UTC), machine, context, results."""

    def plain(value: Any) -> Any:
        return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)

    record = {
        "schema": SCHEMA,
        "name": name,
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(),
        **context,
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, default=plain) + "\n")
