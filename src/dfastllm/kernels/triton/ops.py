"""Which implementation each op of a device uses, and why: Triton's where it is there, else the twin."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dfastllm.kernels import OpChoice
from dfastllm.kernels.triton import plain

__all__ = ["Ops", "ops_for", "triton_problem"]

# op -> the module of this room that has a kernel of the same name
KERNELS: dict[str, str] = {
    "add_low_rank": "low_rank",
    "add_norm": "rows",
    "attention": "attention",
    "experts": "experts",
    "gate": "rows",
    "head_stats": "head",
    "linear": "linear",
    "prepare": "rows",
    "rope_write": "rows",
}
TWINS: dict[str, Callable[..., Any]] = {name: getattr(plain, name) for name in plain.__all__}


@dataclass(frozen=True, eq=False)
class Ops:
    """One implementation of every op. choices: what `doctor` shows. captured: whether a graph can hold them all."""

    attention: Callable[..., Any]
    rope_write: Callable[..., Any]
    add_norm: Callable[..., Any]
    prepare: Callable[..., Any]
    gate: Callable[..., Any]
    linear: Callable[..., Any]
    experts: Callable[..., Any]
    head_stats: Callable[..., Any]
    add_low_rank: Callable[..., Any]
    choices: tuple[OpChoice, ...]
    captured: bool


def triton_problem(device: torch.device) -> str | None:
    """Why Triton cannot compute on a device, None: it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda":
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"triton does not compute on {device.type}" + (" but with TRITON_INTERPRET=1" * (device.type == "cpu"))


def ops_for(device: torch.device, *, twins: frozenset[str] | None = None) -> Ops:
    """The implementations for a device. twins: ops that use their twins whatever there is; None: what must."""
    problem = triton_problem(device)
    chosen: dict[str, Callable[..., Any]] = {}
    choices = []
    for name, twin in TWINS.items():
        why = problem
        if why is None and name not in KERNELS:
            why = "it has no kernel"
        if why is None and name in (twins or ()):
            why = "it was asked for"
        if why is None:
            chosen[name] = getattr(importlib.import_module(f"dfastllm.kernels.triton.{KERNELS[name]}"), name)
            where = "interpreted" if device.type == "cpu" else str(device)
            choices.append(OpChoice(name, f"triton: kernels.triton.{KERNELS[name]}", where))
        else:
            chosen[name] = twin
            choices.append(OpChoice(name, f"torch: kernels.triton.plain.{name}", why))
    captured = all(choice.implementation.startswith("triton") for choice in choices)
    return Ops(**chosen, choices=tuple(choices), captured=captured)
