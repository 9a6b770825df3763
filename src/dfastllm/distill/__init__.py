"""Distillation for speed: students that answer as their teacher does in fewer tokens, with an earlier tool call.

Losses, data, teachers, quantisation-aware training and evaluation, and `run_distillation`, which joins them. The loop
itself is `dfastllm.train.loop`; gates and speed metrics are `dfastllm.metrics`. Every name is loaded on first use:
importing the room brings no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = [
    "DistillWork",
    "KDDataset",
    "Qat",
    "Realignment",
    "aggregate_speed_metrics",
    "certainty_forcing",
    "check_qat_stability",
    "collate_kd_batch",
    "combined_kd_loss",
    "early_tool_call_loss",
    "evaluate_speed_gates",
    "fit_batch_to_shape",
    "is_valid_tool_json",
    "length_aware_kd_loss",
    "load_config",
    "make_student",
    "measure_drafts",
    "prepare_qat",
    "realign",
    "run_distillation",
    "sample_enumerated_shape",
    "should_enable_qat",
    "truncate_batch_to_shape",
]

# name -> (module, its name there)
_HOME: dict[str, tuple[str, str]] = {
    "DistillWork": ("distill.work", "DistillWork"),
    "KDDataset": ("distill.data.dataset", "KDDataset"),
    "Qat": ("distill.qat.model", "Qat"),
    "Realignment": ("distill.students.draft", "Realignment"),
    "aggregate_speed_metrics": ("metrics.timelines", "aggregate"),
    "certainty_forcing": ("distill.students.certainty", "certainty_forcing"),
    "check_qat_stability": ("distill.qat.stability", "check_qat_stability"),
    "collate_kd_batch": ("distill.data.collate", "collate_kd_batch"),
    "combined_kd_loss": ("distill.losses.combined", "combined_kd_loss"),
    "early_tool_call_loss": ("distill.losses.early_tool", "early_tool_call_loss"),
    "evaluate_speed_gates": ("metrics.gates", "evaluate_speed_gates"),
    "fit_batch_to_shape": ("distill.shapes", "fit_batch_to_shape"),
    "is_valid_tool_json": ("metrics.tool_schemas", "is_valid_tool_json"),
    "length_aware_kd_loss": ("distill.losses.length", "length_aware_kd_loss"),
    "load_config": ("distill.config", "load_config"),
    "make_student": ("distill.students.layers", "make_student"),
    "measure_drafts": ("distill.students.acceptance", "measure_drafts"),
    "prepare_qat": ("distill.qat.model", "prepare_qat"),
    "realign": ("distill.students.draft", "realign"),
    "run_distillation": ("distill.run", "run_distillation"),
    "sample_enumerated_shape": ("distill.shapes", "sample_enumerated_shape"),
    "should_enable_qat": ("distill.qat.schedule", "should_enable_qat"),
    "truncate_batch_to_shape": ("distill.shapes", "truncate_batch_to_shape"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dfastllm.distill' has no attribute {name!r}")
    module, attribute = _HOME[name]
    value = getattr(importlib.import_module(f"dfastllm.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
