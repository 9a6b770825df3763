"""Quantisation-aware training on the serving numerics: what is trained is, bit for bit, what is served.

`prepare_qat` makes a model ready, `QatRun` joins that with delayed start, stability checks and recovery for a training
loop, `Qat.export` writes the checkpoint that `dfastllm serve` runs. `python -m dfastllm.distill.qat.recover` shows what
rounding costs a model and how much of it a short run wins back. Names are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = [
    "Qat",
    "QatConfig",
    "QatRun",
    "Recovery",
    "check_qat_stability",
    "prepare_qat",
    "should_enable_qat",
]

_HOME = {
    "Qat": "model",
    "QatConfig": "schedule",
    "QatRun": "run",
    "Recovery": "stability",
    "check_qat_stability": "stability",
    "prepare_qat": "model",
    "should_enable_qat": "schedule",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dfastllm.distill.qat' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dfastllm.distill.qat.{_HOME[name]}"), name)
    globals()[name] = value
    return value
