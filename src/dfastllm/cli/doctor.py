"""`dfastllm doctor`: what this machine has, and which implementation each operation uses on it and why."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from dfastllm.cli.output import console

__all__ = ["doctor"]

# Instruction sets that decide which kernel is fast, as the kernel names them; the rest of the flags is noise.
INSTRUCTION_SETS = (
    *"sse4_2 f16c fma avx avx2 avx_vnni avx512f avx512bw avx512vl avx512_vnni avx512_bf16 avx512_fp16".split(),
    *"amx_tile amx_int8 amx_bf16".split(),
    *"asimd asimddp asimdhp i8mm bf16 sve sve2".split(),  # of Arm
)
GIB = 1 << 30


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Show what this machine has and which implementation each operation uses."""
    report = {
        "cpu": cpu(),
        "memory": memory(),
        "software": software(),
        "devices": devices(),
        "ops": ops(),
        "gpu_ops": gpu_ops(),
        "prefix_caching": prefix_caching(),
    }
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(report)


def cpu() -> dict[str, Any]:
    """Model, instruction sets and cores. `usable_cores` is what this process may run on."""
    text = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    if text.is_file():
        pairs = (line.split(":", 1) for line in text.read_text(encoding="utf-8").splitlines() if ":" in line)
        for key, value in pairs:
            fields.setdefault(key.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "cores": os.cpu_count(),
        "usable_cores": usable,
    }


def memory() -> dict[str, int | None]:
    """Bytes of memory: in all, and free for use now (None where the system does not say)."""
    fields: dict[str, int] = {}
    text = Path("/proc/meminfo")
    if text.is_file():
        for line in text.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if value.strip().endswith("kB"):
                fields[key] = int(value.split()[0]) * 1024
    total = fields.get("MemTotal")
    if total is None and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"total_bytes": total, "available_bytes": fields.get("MemAvailable")}


def software() -> dict[str, Any]:
    from importlib.metadata import version

    import torch

    return {
        "dfastllm": version("dfastllm"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
    }


def devices() -> list[dict[str, Any]]:
    """Every device that `--device` takes here."""
    import torch

    found: list[dict[str, Any]] = [{"device": "cpu", "name": cpu()["model"], "memory_bytes": memory()["total_bytes"]}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append({"device": f"cuda:{index}", "name": properties.name, "memory_bytes": properties.total_memory})
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Apple GPU", "memory_bytes": None})
    return found


def ops() -> list[dict[str, str]]:
    from dfastllm.kernels import table

    return [dataclasses.asdict(choice) for choice in table()]


def gpu_ops() -> list[dict[str, str]]:
    """The same of a card: which implementation the triton runner uses there. Without a card: why there is none."""
    import torch

    from dfastllm.kernels import OpChoice
    from dfastllm.kernels.triton.ops import ops_for, triton_problem

    if torch.cuda.is_available():
        device = torch.device("cuda")
        problem = triton_problem(device)
        if problem is None:
            return [dataclasses.asdict(choice) for choice in ops_for(device).choices]
        return [dataclasses.asdict(OpChoice("all", "torch: the plain model", problem))]
    why = "torch was built without CUDA" if torch.version.cuda is None else "torch finds no CUDA card"
    return [dataclasses.asdict(OpChoice("all", "none", why))]


def prefix_caching() -> dict[str, str]:
    """Whether requests share the K,V of a common beginning, by kind of model."""
    from dfastllm.core import Kind
    from dfastllm.engine.prefix import refusal

    reasons = {kind: refusal(kind) for kind in get_args(Kind)}
    return {kind: "on" if reason is None else f"off, because {reason}" for kind, reason in reasons.items()}


def _size(count: int | None) -> str:
    return "unknown" if count is None else f"{count / GIB:.1f} GiB"


def _print(report: dict[str, Any]) -> None:
    from rich.table import Table

    machine = Table(title="This machine", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    processor, ram, installed = report["cpu"], report["memory"], report["software"]
    machine.add_row("CPU", f"{processor['model']} ({processor['architecture']})")
    machine.add_row("instruction sets", " ".join(processor["instruction_sets"]) or "unknown")
    machine.add_row("cores", f"{processor['cores']}, {processor['usable_cores']} usable by this process")
    machine.add_row("memory", f"{_size(ram['total_bytes'])}, {_size(ram['available_bytes'])} available")
    capability, threads = installed["torch_cpu_capability"], installed["torch_threads"]
    machine.add_row("torch", f"{installed['torch']} (CPU code path {capability}, {threads} threads)")
    machine.add_row("python", f"{installed['python']} on {installed['platform']}")
    machine.add_row("dfastllm", installed["dfastllm"])
    devices = Table("device", "name", "memory", title="Devices", title_justify="left")
    for device in report["devices"]:
        devices.add_row(device["device"], device["name"], _size(device["memory_bytes"]))
    choices = Table("op", "implementation", "reason", title="Operations", title_justify="left")
    for choice in report["ops"]:
        choices.add_row(choice["op"], choice["implementation"], choice["reason"])
    on_gpu = Table("op", "implementation", "reason", title="Operations on a GPU", title_justify="left")
    for choice in report["gpu_ops"]:
        on_gpu.add_row(choice["op"], choice["implementation"], choice["reason"])
    titles = ("kind of model", "requests share K,V")
    sharing = Table(*titles, title="Prefix caching, unless switched off", title_justify="left")
    for kind, state in report["prefix_caching"].items():
        sharing.add_row(kind, state)
    screen = console()
    for part in (machine, devices, choices, on_gpu, sharing):
        screen.print(part)
        screen.print()
