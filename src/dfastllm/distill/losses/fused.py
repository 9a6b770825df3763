"""All that the losses ask of a row of logits, in one pass over chunks of rows: its divergence from the teacher, its
log-sum-exp and the logits of some ids. Cross entropies and probabilities of an ending follow from the last two.

The pass keeps nothing of size [rows, V]: backward computes each chunk again and writes its derivative straight into
the gradient. So beyond the inputs and their gradient it takes the memory of one chunk, whatever the number of rows. The
rows may be logits, or hidden rows with the head that would make logits of them (`Hidden`): then no [rows, V] array
exists at all, and the head's gradient is held twice, as the sum and as that of a chunk.

The idea is that of Cut Cross-Entropy (Wijmans et al. 2024, arXiv 2411.09009) and of Liger Kernel (Hsu et al. 2024,
arXiv 2410.10989); here it is for divergences too, with any head, in plain torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dfastllm.distill.losses.divergence import DIVERGENCES, Divergence, Teacher, as_teacher, take_rows
from dfastllm.errors import ValidationError
from dfastllm.models.decoder import Decoder
from dfastllm.models.parts import softcapped

__all__ = [
    "CHUNK",
    "Hidden",
    "RowTerms",
    "Student",
    "check_divergence",
    "check_positive",
    "divergence_from_rows",
    "end_logprobs",
    "lead_of",
    "row_terms",
    "token_divergence",
    "vocabulary_of",
    "wide_of",
]

CHUNK = 1 << 21  # logits in a chunk where nothing else is asked: 8 MB in float32, of which a pass holds about ten


@dataclass(frozen=True)
class Hidden:
    """Rows before the head. Wherever the losses take logits [..., V] they take this too.

    rows        [..., H], after the final norm.
    head        [n, H] -> logits [n, V]. Any differentiable function of a row alone.
    parameters  the tensors that `head` reads and that may want a gradient.
    vocabulary  V.
    """

    rows: Tensor
    head: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...]
    vocabulary: int

    @classmethod
    def of(cls, model: Decoder, rows: Tensor) -> Hidden:
        """Rows of `model.forward` [..., H] with the model's own head, tied or not, rounding (`distill.qat`) or not."""
        owned: tuple[Tensor, ...] = (model.embed.weight,)
        if not model.config.tied and model.lm_head is not None:  # one that rounds has no parameters where it is tied
            owned = tuple(model.lm_head.parameters())
        return cls(rows, model.head, owned, model.config.vocab_size)

    @classmethod
    def linear(cls, rows: Tensor, weight: Tensor, bias: Tensor | None = None, softcap: float = 0.0) -> Hidden:
        """A head of weight [V, H] and bias [V], its logits capped by softcap * tanh(x / softcap) where that is
        given."""
        owned = (weight,) if bias is None else (weight, bias)
        return cls(rows, lambda x: softcapped(F.linear(x, weight, bias), softcap), owned, weight.shape[0])

    @classmethod
    def module(cls, rows: Tensor, head: nn.Module) -> Hidden:
        """A head that is a module, such as the output embedding of a Hugging Face model. Runs it on a row of zeros to
        see its vocabulary."""
        with torch.no_grad():
            size = head(rows.new_zeros(1, rows.shape[-1])).shape[-1]
        return cls(rows, head, tuple(head.parameters()), size)


Student = Tensor | Hidden


def lead_of(student: Student) -> torch.Size:
    """The shape of its rows, [...]."""
    return _source(student).shape[:-1]


def vocabulary_of(student: Student) -> int:
    """V."""
    return student.vocabulary if isinstance(student, Hidden) else student.shape[-1]


def wide_of(student: Student) -> torch.dtype:
    """What is computed in: float32, and float64 for a student in float64."""
    return torch.float64 if _source(student).dtype == torch.float64 else torch.float32


def _source(student: Student) -> Tensor:
    return student.rows if isinstance(student, Hidden) else student


@dataclass(frozen=True)
class RowTerms:
    """What was found of n rows, differentiable, float32 (float64 for a student in float64).

    divergence  [n] nats, times the square of the temperature; zeros where there is no teacher.
    logsumexp   [n] of the logits, at temperature 1.
    picked      [n, J] the logits of the ids that were asked for, at temperature 1.
    """

    divergence: Tensor
    logsumexp: Tensor
    picked: Tensor


@dataclass(frozen=True)
class _Plan:
    """One pass. rows [n] int64 flat; picks [n, J] int64; temperature [n, 1] wide; chunk in rows."""

    rows: Tensor
    picks: Tensor
    teacher: Teacher | None
    temperature: Tensor
    kind: Divergence
    beta: float
    chunk: int
    head: Callable[[Tensor], Tensor] | None
    wide: torch.dtype

    def pieces(self) -> list[slice]:
        return [slice(at, at + self.chunk) for at in range(0, len(self.rows), self.chunk)]

    def slope(
        self, z: Tensor, at: slice, lse: Tensor, by: tuple[Tensor | None, Tensor | None, Tensor | None]
    ) -> Tensor:
        """The derivative [n, V] of the pass's results, weighted with `by`, by the logits z [n, V] of a piece."""
        by_divergence, by_lse, by_picked = by
        out = None
        if by_divergence is not None and self.teacher is not None:
            rows, temperature = self.rows[at], self.temperature[at]
            _, out = self.teacher.divergence(z, rows, temperature, self.kind, self.beta, True)
            assert out is not None  # asked for
            out.mul_(by_divergence[at, None])
        if by_lse is not None:
            soft = (z - lse[at, None]).exp_().mul_(by_lse[at, None])
            out = soft if out is None else out.add_(soft)
        if out is None:
            out = torch.zeros_like(z)
        return out if by_picked is None else out.scatter_add_(1, self.picks[at], by_picked[at])


class _Pass(torch.autograd.Function):
    """The pass itself. Forward keeps its inputs and the log-sum-exp of each row."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, source: Tensor, *owned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, wide = len(plan.rows), plan.wide
        divergence = source.new_zeros(n, dtype=wide)
        lse = source.new_zeros(n, dtype=wide)
        picked = source.new_zeros(plan.picks.shape, dtype=wide)
        for at in plan.pieces():
            z = take_rows(source, plan.rows[at])
            z = (z if plan.head is None else plan.head(z)).to(wide)
            lse[at] = z.logsumexp(-1)
            picked[at] = z.gather(1, plan.picks[at])
            if plan.teacher is not None:
                rows, temperature = plan.rows[at], plan.temperature[at]
                divergence[at] = plan.teacher.divergence(z, rows, temperature, plan.kind, plan.beta, False)[0]
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(source, lse, *owned)
        kind = source.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        return divergence, lse, picked

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, by_divergence: Tensor | None, by_lse: Tensor | None, by_picked: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        source, lse, *owned = ctx.saved_tensors
        wanted = [p for p, needed in zip(owned, ctx.needs_input_grad[2:], strict=True) if needed]
        # Sums over chunks in float32: in bfloat16 a hundred chunks would lose what they add.
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in wanted]
        grad = torch.zeros_like(source, memory_format=torch.contiguous_format) if ctx.needs_input_grad[1] else None
        by = (by_divergence, by_lse, by_picked)
        for at in plan.pieces():
            taken = take_rows(source, plan.rows[at])
            if plan.head is None:
                slope = plan.slope(taken.to(plan.wide), at, lse, by)
            else:
                slope = _through_head(plan, taken, at, lse, by, wanted, sums, ctx.autocast)
            if grad is not None:
                grad.view(-1, grad.shape[-1])[plan.rows[at]] = slope.to(grad.dtype)
        found = iter(sums)
        owned_grads = [
            next(found).to(p.dtype) if needed else None
            for p, needed in zip(owned, ctx.needs_input_grad[2:], strict=True)
        ]
        return None, grad, *owned_grads


def _through_head(
    plan: _Plan,
    taken: Tensor,
    at: slice,
    lse: Tensor,
    by: tuple[Tensor | None, Tensor | None, Tensor | None],
    wanted: list[Tensor],
    sums: list[Tensor],
    autocast: tuple[str, torch.dtype, bool],
) -> Tensor:
    """The derivative by the hidden rows of a piece [n, H]; those by the head's parameters are added to `sums`."""
    kind, dtype, enabled = autocast
    assert plan.head is not None
    with torch.enable_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
        taken = taken.detach().requires_grad_()
        logits = plan.head(taken)
    with torch.no_grad():
        slope = plan.slope(logits.detach().to(plan.wide), at, lse, by).to(logits.dtype)
    by_rows, *by_owned = torch.autograd.grad(logits, (taken, *wanted), slope, allow_unused=True)
    for total, one in zip(sums, by_owned, strict=True):
        if one is not None:
            total += one
    return by_rows


def row_terms(
    student: Student,
    *,
    rows: Tensor | None = None,
    picks: Tensor | None = None,
    teacher: Tensor | Teacher | None = None,
    temperature: float | Tensor = 1.0,
    kind: Divergence = "forward",
    beta: float = 0.5,
    chunk: int | None = None,
) -> RowTerms:
    """What the losses ask of n rows of a student, in one pass.

    student      logits [..., V], or `Hidden` rows.
    rows         [n] int64: which rows, flat indices into [...], each once; None: all.
    picks        [n, J] int64 ids whose logits are wanted; None: none.
    teacher      logits [..., V], `Dense` or `Sparse`, with the rows of the student.
    temperature  one, or [n]: of the divergence.
    kind, beta   which divergence, see `divergence`.
    chunk        rows at a time; None: about 2 million logits, and for hidden rows at least an eighth of their width,
                 since each chunk costs a pass over the head's gradient.

    Raises ValidationError for shapes that do not fit, ids outside the vocabulary, and a temperature, kind, beta or
    chunk out of range.
    """
    source = _source(student)
    vocabulary, wide = vocabulary_of(student), wide_of(student)
    if source.dim() < 2 or not source.is_floating_point():
        raise ValidationError(
            f"The student's rows must be floats of at least two dims, got {tuple(source.shape)} of {source.dtype}.",
            param="student_logits",
        )
    check_divergence(kind, beta)
    if rows is None:
        rows = torch.arange(math.prod(source.shape[:-1]), device=source.device)
    if picks is None:
        picks = rows.new_zeros((len(rows), 0))
    if picks.shape[:1] != rows.shape or picks.dim() != 2:
        raise ValidationError(f"picks must be [{len(rows)}, J], got {tuple(picks.shape)}.", param="picks")
    if picks.numel() and bool(((picks < 0) | (picks >= vocabulary)).any()):
        raise ValidationError(
            f"Target ids reach from {picks.min().item()} to {picks.max().item()}; the vocabulary has {vocabulary}.",
            param="targets",
            hint="Teacher, data and student need one tokenizer.",
        )
    found = None if teacher is None else as_teacher(teacher)
    if found is not None:
        found.check(source.shape[:-1], vocabulary)
    if chunk is None:
        chunk = max(1, CHUNK // vocabulary, source.shape[-1] // 8 if isinstance(student, Hidden) else 0)
    if chunk < 1:
        raise ValidationError(f"chunk must be at least 1, got {chunk}.", param="chunk")
    heat = _temperatures(temperature, rows, wide)
    head = student.head if isinstance(student, Hidden) else None
    owned = student.parameters if isinstance(student, Hidden) else ()
    plan = _Plan(rows, picks, found, heat, kind, beta, chunk, head, wide)
    return RowTerms(*_Pass.apply(plan, source, *owned))  # type: ignore[no-untyped-call]


def check_divergence(kind: str, beta: float) -> None:
    """Raises ValidationError for an unknown kind, or a beta that is not inside (0, 1) where kind is jsd."""
    if kind not in DIVERGENCES:
        raise ValidationError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {kind!r}.", param="divergence")
    if kind == "jsd" and not 0 < beta < 1:
        raise ValidationError(
            f"beta must be inside (0, 1), got {beta}.",
            param="beta",
            hint="At its ends the divergence is 0: take forward or reverse.",
        )


def check_positive(name: str, value: float, *, or_zero: bool = False) -> None:
    """Raises ValidationError unless it is a finite number above 0, or 0 where that is allowed."""
    if not math.isfinite(value) or value < 0 or (value == 0 and not or_zero):
        raise ValidationError(f"{name} must be {'at least' if or_zero else 'above'} 0, got {value}.", param=name)


def _temperatures(temperature: float | Tensor, rows: Tensor, wide: torch.dtype) -> Tensor:
    if not isinstance(temperature, Tensor):
        check_positive("temperature", temperature)
        return torch.full((len(rows), 1), temperature, dtype=wide, device=rows.device)
    if temperature.shape != rows.shape or not bool((temperature > 0).all() & temperature.isfinite().all()):
        raise ValidationError(
            f"temperature must be one number, or [{len(rows)}] numbers above 0, got {tuple(temperature.shape)}.",
            param="temperature",
        )
    return temperature.detach().to(wide)[:, None]


def token_divergence(
    student: Student,
    teacher: Tensor | Teacher,
    *,
    kind: Divergence = "forward",
    temperature: float | Tensor = 1.0,
    weights: Tensor | None = None,
    beta: float = 0.5,
    chunk: int | None = None,
) -> Tensor:
    """The divergence of rows, as one number: their sum under `weights` [...], or their mean where there are none. Rows
    of weight 0 are not looked at. Arguments and errors: see `row_terms`; a temperature may be [...]."""
    lead = lead_of(student)
    if weights is None:
        weights = torch.full(lead, 1 / max(math.prod(lead), 1), device=_source(student).device)
    if weights.shape != lead:
        raise ValidationError(f"weights must be {tuple(lead)}, got {tuple(weights.shape)}.", param="weights")
    flat = weights.detach().flatten().to(wide_of(student))
    rows = flat.nonzero()[:, 0]
    heat = temperature.flatten()[rows] if isinstance(temperature, Tensor) else temperature
    found = row_terms(student, rows=rows, teacher=teacher, temperature=heat, kind=kind, beta=beta, chunk=chunk)
    return (found.divergence * flat[rows]).sum()


def divergence_from_rows(
    hidden: Tensor,
    head: Tensor | nn.Module,
    teacher: Tensor | Teacher,
    *,
    kind: Divergence = "forward",
    temperature: float | Tensor = 1.0,
    weights: Tensor | None = None,
    beta: float = 0.5,
    chunk: int | None = None,
) -> Tensor:
    """`token_divergence` of hidden rows [..., H] and their head, a weight [V, H] or a module, without their logits."""
    rows = Hidden.linear(hidden, head) if isinstance(head, Tensor) else Hidden.module(hidden, head)
    return token_divergence(rows, teacher, kind=kind, temperature=temperature, weights=weights, beta=beta, chunk=chunk)


def end_logprobs(
    student: Student,
    eos_ids: Tensor | tuple[int, ...] | list[int],
    mask: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The log-probability that each row's next token ends the text [...], with gradient; for `length_aware_kd_loss`.

    eos_ids  every id that ends a text; their probabilities are summed.
    mask     [...]: 0 where a row is not wanted; its value is then 0. None: all rows.

    Raises ValidationError where there is no id, or one outside the vocabulary.
    """
    source = _source(student)
    ids = torch.unique(torch.as_tensor(eos_ids, device=source.device))
    if not len(ids):
        raise ValidationError("The length loss needs an id that ends a text, and there is none.", param="eos_ids")
    lead = lead_of(student)
    if mask is not None and mask.shape != lead:
        raise ValidationError(f"mask must be {tuple(lead)}, got {tuple(mask.shape)}.", param="mask")
    count = math.prod(lead)
    rows = torch.arange(count, device=source.device) if mask is None else mask.flatten().nonzero()[:, 0]
    found = row_terms(student, rows=rows, picks=ids.expand(len(rows), -1), chunk=chunk)
    values = found.picked.logsumexp(-1) - found.logsumexp
    return values.new_zeros(count).index_put((rows,), values).view(lead)
