"""The losses of distillation: pure functions of tensors, each with its gradient, its shapes and its source.

They never shift: row t of the logits and entry t of targets and masks belong together. They know no model, no data and
no loop; where they take logits they take hidden rows and a head too (`Hidden`), and then make no logits of all rows.
`python -m dfastllm.distill.losses` measures the memory that they take.
"""

from dfastllm.distill.losses.combined import TERMS, check_finite, combined_kd_loss, count_valid, span_labels
from dfastllm.distill.losses.divergence import DIVERGENCES, Dense, Divergence, Sparse, Teacher
from dfastllm.distill.losses.early_tool import early_tool_call_loss, early_tool_ramp, envelope_ids, warmup_steps
from dfastllm.distill.losses.fused import (
    Hidden,
    RowTerms,
    Student,
    divergence_from_rows,
    end_logprobs,
    row_terms,
    token_divergence,
)
from dfastllm.distill.losses.layers import even_layer_map, intermediate_layer_loss, make_projections
from dfastllm.distill.losses.length import LengthMode, expected_length, length_aware_kd_loss, survival
from dfastllm.distill.losses.temperature import entropy_temperature, teacher_entropy

__all__ = [
    "DIVERGENCES",
    "TERMS",
    "Dense",
    "Divergence",
    "Hidden",
    "LengthMode",
    "RowTerms",
    "Sparse",
    "Student",
    "Teacher",
    "check_finite",
    "combined_kd_loss",
    "count_valid",
    "divergence_from_rows",
    "early_tool_call_loss",
    "early_tool_ramp",
    "end_logprobs",
    "entropy_temperature",
    "envelope_ids",
    "even_layer_map",
    "expected_length",
    "intermediate_layer_loss",
    "length_aware_kd_loss",
    "make_projections",
    "row_terms",
    "span_labels",
    "survival",
    "teacher_entropy",
    "token_divergence",
    "warmup_steps",
]
