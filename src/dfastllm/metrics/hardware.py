"""The machine as far as speed goes, and a key that says whether two records came from the same kind of it.

Two machines of one kind (processor, cores, memory, GPUs, operating system) share a key. A machine whose processor or
size cannot be read gets a key of its own, "unknown-...", which no other machine has: it is never taken for a default.
Versions and commits are no hardware; they stand in a record's fingerprints (`fingerprints`).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dfastllm.metrics.records import machine

__all__ = ["fingerprints", "hardware", "hardware_profile_key"]

ESSENTIAL = ("cpu", "cores", "memory_gib")
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "sve")


def hardware() -> dict[str, Any]:
    """system, machine, cpu (name, family, model and stepping where Linux tells), flags that kernels care about, cores
    this process may use, memory_gib (to even numbers), gpus (name and memory). What cannot be read is None."""
    return {
        "system": platform.system() or None,
        "machine": platform.machine() or None,
        "cpu": _cpu(),
        "flags": _flags(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "gpus": _gpus(),
    }


def hardware_profile_key(profile: Mapping[str, Any] | None = None) -> str:
    """A readable key ending in a hash of the whole profile (default: this machine's)."""
    found = hardware() if profile is None else dict(profile)
    if any(not found.get(name) for name in ESSENTIAL):
        # The node's own number (its network address) keeps two machines of which nothing is known apart.
        return f"unknown-{_digest({**found, 'node': uuid.getnode()})}"
    gpus = f"-{len(found['gpus'])}x{found['gpus'][0]['name']}" if found.get("gpus") else ""
    words = f"{found.get('machine')}-{found['cpu']}-{found['cores']}c-{found['memory_gib']}g{gpus}"
    return f"{re.sub(r'[^a-z0-9]+', '-', words.lower()).strip('-')}-{_digest(found)}"


def fingerprints(**more: Any) -> dict[str, Any]:
    """What else a speed depends on: versions, commit, kernels, threads, and what the caller adds (model, workload)."""
    from dfastllm.kernels.extension import describe, threads

    about = machine()
    kept = {name: about[name] for name in ("dfastllm", "commit", "python", "torch")}
    return {**kept, "kernels": describe().partition(":")[0], "threads": threads(), **more}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _cpu() -> str | None:
    found = _cpuinfo()
    if name := found.get("model name"):
        numbers = [found[field] for field in ("cpu family", "model", "stepping") if field in found]
        return " ".join([name, *numbers])
    if part := found.get("CPU part"):  # Arm tells numbers only
        return f"implementer {found.get('CPU implementer')} part {part}"
    return platform.processor() or None


def _flags() -> list[str]:
    found = _cpuinfo()
    known = set(found.get("flags", found.get("Features", "")).split())
    return [flag for flag in FLAGS if flag in known]


def _memory_gib() -> int | None:
    try:
        gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        return None
    return max(1, 2 * round(gib / 2))  # a few MiB that another kernel keeps to itself make no other machine


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    seen = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30)} for gpu in seen]
