"""The distillation loss of a batch: divergence from the teacher, and cross entropies with the teacher's tokens, the
true ones, and those of the spans that make a tool call (its name, its arguments, what of its result the answer
repeats).

All terms come from one pass over the rows that any of them needs (`fused`). Row-aligned: targets[b, t] is what row t of
the logits predicts; nothing is shifted here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from dfastllm.distill.losses.divergence import Divergence, Teacher, as_teacher
from dfastllm.distill.losses.fused import RowTerms, Student, lead_of, row_terms, wide_of
from dfastllm.errors import TrainingError, ValidationError

__all__ = ["TERMS", "OnMissing", "check_finite", "combined_kd_loss", "count_valid", "span_labels"]

OnMissing = Literal["skip", "error"]
# The cross entropies, each with the argument that names its targets.
_LABELS = {
    "ce_teacher": "teacher_targets",
    "tool_name": "tool_name_labels",
    "json_args": "json_args_labels",
    "integration": "integration_labels",
    "ce_ground_truth": "ground_truth_targets",
}
TERMS = ("kl_div", *_LABELS)


def combined_kd_loss(
    student_logits: Student,
    teacher_logits: Tensor | Teacher | None = None,
    teacher_targets: Tensor | None = None,
    ground_truth_targets: Tensor | None = None,
    tool_name_labels: Tensor | None = None,
    json_args_labels: Tensor | None = None,
    integration_labels: Tensor | None = None,
    *,
    kl_weight: float = 0.4,
    ce_teacher_weight: float = 0.2,
    w_tool: float = 0.15,
    w_args: float = 0.15,
    w_integr: float = 0.10,
    ce_ground_truth_weight: float = 0.2,
    temperature: float | Tensor = 2.0,
    ignore_index: int = -100,
    loss_mask: Tensor | None = None,
    divergence: Divergence = "forward",
    beta: float = 0.5,
    on_missing_logits: OnMissing = "skip",
    valid_tokens: float | Mapping[str, float] | None = None,
    finite: bool = True,
    chunk: int | None = None,
) -> dict[str, Tensor]:
    """The terms, as means over their tokens and without their weights, and `total`, the sum of weight times term.
    Float32 scalars (float64 for a student in float64) that carry gradient. A term whose weight is at most 0, or whose
    targets are None, is absent.

    student_logits        [B, T, V] logits, or `Hidden` rows [B, T, H]; any leading shape [...] in place of [B, T].
    teacher_logits        [B, T, V] logits, `Dense` or `Sparse`: of kl_div, the divergence named by `divergence` and
                          `beta` (see the module of that name), at `temperature` and times its square. Rows of the
                          response alone: those that `loss_mask` names, else those with a ground truth, else those with
                          a teacher's token, else all. A row of a sparse teacher that lists nothing does not count.
    teacher_targets       [B, T] int64, `ignore_index` where there is none: ce_teacher.
    ground_truth_targets  the same: ce_ground_truth.
    tool_name_labels      the same, `ignore_index` outside the span (`span_labels` makes them): tool_name, the name in
                          every tool call.
    json_args_labels      json_args, its arguments.
    integration_labels    integration, what an answer takes over from a tool's result.
    temperature           one, or [B, T] (`entropy_temperature`).
    loss_mask             [B, T] bool, or weights of at least 0: what a row counts in every term.
    on_missing_logits     what a kl_weight above 0 without a teacher's distribution is, of the batch or of one of its
                          rows: skip it, or an error.
    valid_tokens          what a term's sum is divided by. None: the weights of its own rows. A number: for the three
                          terms that run over whole responses. A mapping from names of terms: for those. With gradient
                          accumulation these are the counts of the whole window (the sums of `count_valid`), so that the
                          gradient does not depend on how the window is cut.
    finite                raise where the total is not finite; False leaves it to the caller.
    chunk                 rows at a time, see `row_terms`.

    Raises ValidationError for shapes that do not fit and values out of range, TrainingError for a total that is not
    finite, with the names of the terms.
    """
    weights = {
        "kl_div": kl_weight,
        "ce_teacher": ce_teacher_weight,
        "tool_name": w_tool,
        "json_args": w_args,
        "integration": w_integr,
        "ce_ground_truth": ce_ground_truth_weight,
    }
    targets = _targets(teacher_targets, tool_name_labels, json_args_labels, integration_labels, ground_truth_targets)
    lead, wide = lead_of(student_logits), wide_of(student_logits)
    if any(math.isnan(weight) for weight in weights.values()):
        raise ValidationError(f"A loss weight must be a number, got {weights}.", param="kd")
    teacher = _teacher(teacher_logits, lead, on_missing_logits) if kl_weight > 0 else None
    given = {name: one for name, one in targets.items() if weights[name] > 0}
    counted = _counted(lead, targets, given, teacher, loss_mask, ignore_index, on_missing_logits)
    rows = _rows(counted, lead, student_logits)
    picks = [given[name].flatten()[rows] for name in given]
    found = row_terms(
        student_logits,
        rows=rows,
        picks=torch.stack([p.masked_fill(p == ignore_index, 0) for p in picks], 1) if picks else None,
        teacher=teacher,
        temperature=temperature.expand(lead).flatten()[rows] if isinstance(temperature, Tensor) else temperature,
        kind=divergence,
        beta=beta,
        chunk=chunk,
    )
    values = _means(found, {name: one[rows].to(wide) for name, one in counted.items()}, list(given), valid_tokens)
    total = found.logsumexp[:0].sum()  # 0 that carries gradient, where there is no term
    for name, value in values.items():
        total = total + weights[name] * value
    values["total"] = total
    if finite:
        check_finite(values)
    return values


def count_valid(
    lead: torch.Size,
    teacher_logits: Tensor | Teacher | None = None,
    teacher_targets: Tensor | None = None,
    ground_truth_targets: Tensor | None = None,
    tool_name_labels: Tensor | None = None,
    json_args_labels: Tensor | None = None,
    integration_labels: Tensor | None = None,
    *,
    ignore_index: int = -100,
    loss_mask: Tensor | None = None,
) -> dict[str, float]:
    """How many tokens (or how much weight) each term of `combined_kd_loss` has in a batch of rows `lead`, by its name.
    Sums of these over the micro-batches of a window are what `valid_tokens` takes."""
    targets = _targets(teacher_targets, tool_name_labels, json_args_labels, integration_labels, ground_truth_targets)
    teacher = None if teacher_logits is None else as_teacher(teacher_logits)
    counted = _counted(lead, targets, targets, teacher, loss_mask, ignore_index, "skip")
    return {name: one.sum().item() for name, one in counted.items()}


def span_labels(targets: Tensor, mask: Tensor, ignore_index: int = -100) -> Tensor:
    """targets [B, T] int64 inside a span, mask [B, T] bool, and `ignore_index` outside. Raises ValidationError for
    another shape."""
    if targets.shape != mask.shape:
        raise ValidationError(
            f"The span's mask is {tuple(mask.shape)}, its targets are {tuple(targets.shape)}.", param="mask"
        )
    return targets.masked_fill(~mask.bool(), ignore_index)


def check_finite(losses: Mapping[str, Tensor]) -> None:
    """Raises TrainingError with the name and value of every loss that is not finite."""
    wrong = {name: value.item() for name, value in losses.items() if not bool(value.detach().isfinite().all())}
    if wrong:
        named = [name for name in wrong if name != "total"] or ["total"]
        raise TrainingError(
            f"The distillation loss is not finite: {', '.join(f'{name} is {wrong[name]}' for name in named)}.",
            param=named[0],
            hint="Look at the batch and at the teacher's numbers, or lower the learning rate.",
        )


def _targets(
    teacher: Tensor | None,
    tool_name: Tensor | None,
    json_args: Tensor | None,
    integration: Tensor | None,
    ground_truth: Tensor | None,
) -> dict[str, Tensor]:
    """The targets that are there, by their term."""
    named = (teacher, tool_name, json_args, integration, ground_truth)
    return {name: one for name, one in zip(_LABELS, named, strict=True) if one is not None}


def _teacher(given: Tensor | Teacher | None, lead: torch.Size, on_missing: str) -> Teacher | None:
    if on_missing not in ("skip", "error"):
        raise ValidationError(
            f"on_missing_logits must be skip or error, got {on_missing!r}.", param="kd.on_missing_logits"
        )
    if given is None and on_missing == "error":
        raise _missing(math.prod(lead))
    return None if given is None else as_teacher(given)


def _missing(rows: int) -> ValidationError:
    return ValidationError(
        f"kl_weight is above 0, and {rows} rows have no distribution of the teacher.",
        param="kd.on_missing_logits",
        hint="Collect the teacher's top log-probabilities, set kl_weight to 0, or on_missing_logits to skip.",
    )


def _counted(
    lead: torch.Size,
    targets: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    teacher: Teacher | None,
    loss_mask: Tensor | None,
    ignore_index: int,
    on_missing: str,
) -> dict[str, Tensor]:
    """What each row counts, flat [rows] float, for every term that is there. targets: all; given: those that count."""
    shaped = {_LABELS[name]: one for name, one in targets.items()}
    for name, one in (shaped if loss_mask is None else {**shaped, "loss_mask": loss_mask}).items():
        if one.shape != lead:
            raise ValidationError(
                f"{name} has the shape {tuple(one.shape)}, the student's rows have {tuple(lead)}.",
                param=name,
                hint="Targets and masks are row-aligned: entry [b, t] belongs to row t of the logits.",
            )
    mask = None if loss_mask is None else loss_mask.detach().flatten()
    if mask is not None and not bool((mask.isfinite() & (mask >= 0)).all()):
        raise ValidationError("loss_mask must be bool, or finite weights of at least 0.", param="loss_mask")
    counted = {}
    if teacher is not None:
        present = teacher.present(lead)
        response = torch.ones_like(present)
        for name in ("ce_teacher", "ce_ground_truth") if mask is None else ():  # the last that is there says
            response = targets[name].flatten() != ignore_index if name in targets else response
        wanted = response if mask is None else mask
        if on_missing == "error" and bool(((wanted != 0) & ~present).any()):
            raise _missing(int(((wanted != 0) & ~present).sum()))
        counted["kl_div"] = wanted.double() * present
    for name, one in given.items():
        there = (one.flatten() != ignore_index).double()
        counted[name] = there if mask is None else there * mask
    return counted


def _rows(counted: Mapping[str, Tensor], lead: torch.Size, student: Student) -> Tensor:
    """[n] int64: the rows that count anywhere."""
    if not counted:
        device = student.device if isinstance(student, Tensor) else student.rows.device
        return torch.zeros(0, dtype=torch.int64, device=device)
    return torch.stack(list(counted.values())).any(0).nonzero()[:, 0]


def _means(
    found: RowTerms,
    counted: Mapping[str, Tensor],
    picked: list[str],
    valid_tokens: float | Mapping[str, float] | None,
) -> dict[str, Tensor]:
    """The terms. counted [n] by name; picked: which term each column of `found.picked` is of."""
    values = {}
    for name in TERMS:
        if name not in counted:
            continue
        rows = found.divergence
        if name != "kl_div":
            rows = found.logsumexp - found.picked[:, picked.index(name)]
        weight = counted[name]
        # Rows that count elsewhere alone hold anything here, infinity too.
        summed = (torch.where(weight > 0, rows, 0) * weight).sum()
        values[name] = summed / _divisor(name, weight, valid_tokens)
    return values


def _divisor(name: str, weight: Tensor, valid_tokens: float | Mapping[str, float] | None) -> Tensor | float:
    given: float | None = None
    if isinstance(valid_tokens, Mapping):
        given = valid_tokens.get(name)
    elif name in ("kl_div", "ce_teacher", "ce_ground_truth"):
        given = valid_tokens
    if given is None:
        own = weight.sum()
        return torch.where(own > 0, own, 1)
    if not math.isfinite(given) or given < 0:
        raise ValidationError(f"valid_tokens of {name} must be at least 0, got {given}.", param="valid_tokens")
    return given or 1.0  # 0 of none is 0
