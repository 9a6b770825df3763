"""A hinge on how much longer a student answers than its teacher, for answers that lack what the task requires.

A length is a sum of survivals. S_k is the probability that the answer still goes on at its k-th token: S_1 = 1 and
S_{k+1} = S_k (1 - P(end at k)), so the expected length, the ending token counted, is the sum of all S_k. Its gradient
raises the probability of ending. A mask of ones and zeros is the case where nothing is left to chance.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dfastllm.distill.losses.fused import check_positive
from dfastllm.errors import ValidationError

__all__ = ["LengthMode", "expected_length", "length_aware_kd_loss", "survival"]

LengthMode = Literal["mask", "rollout", "survival"]
_MODES: tuple[LengthMode, ...] = ("mask", "rollout", "survival")
_EPSILON = 1e-6  # the least probability of ending that the tail divides by


def length_aware_kd_loss(
    student_mask: Tensor,
    teacher_mask: Tensor,
    required_fields_present: Tensor,
    hinge: float = 0.15,
    slope: float = 1.0,
    reduction: str = "mean",
    *,
    mode: LengthMode = "mask",
    end_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The penalty slope * max(0, r - hinge) of the answers that are longer than allowed and incomplete, with
    r = (Ls - Lt) / Lt, Ls the student's length and Lt the teacher's (at least 1); averaged or summed over all B. An
    answer with all its required fields is exempt. A scalar in the student's dtype, and diagnostics.

    student_mask             [B, Ts]: 1 on the tokens of the response, its EOS included, 0 elsewhere. Mode mask: Ls is
                             its sum; it may be a float tensor, and gradient flows through it.
    teacher_mask             [B, Tt]: the same of the teacher's response. No gradient flows through it.
    required_fields_present  [B] bool.
    hinge                    the excess that is free, at least 0.
    slope                    at least 0.
    reduction                mean or sum.
    mode                     rollout, survival or mask: what Ls is, see `expected_length`.
    end_logprobs             [B, Ts], log P(EOS) of the row that predicts each token (`end_logprobs` of `fused` makes
                             it); for the modes rollout and survival, where the gradient flows through it.

    Diagnostics: len_kd.frac_penalized, and the medians (the lower of two middles) of max(0, r),
    len_kd.median_rel_excess, and of the lengths, len_kd.median_len_student and len_kd.median_len_teacher.

    Raises ValidationError (a ValueError) for another reduction or mode, shapes that do not fit, and numbers out of
    range.
    """
    _check(student_mask, teacher_mask, required_fields_present, reduction, mode, end_logprobs)
    check_positive("hinge", hinge, or_zero=True)
    check_positive("slope", slope, or_zero=True)
    # float64 where there is one, so that 23 tokens for 20 are exactly at a hinge of 0.15.
    wide = torch.float32 if student_mask.device.type == "mps" else torch.float64
    teacher = teacher_mask.detach().to(wide).sum(-1).clamp(min=1)
    if end_logprobs is None:
        student = student_mask.to(wide).sum(-1)
    else:
        student = expected_length(end_logprobs.to(wide), student_mask, teacher if mode == "survival" else None)
    excess = (student - teacher) / teacher
    hit = (excess.detach() > hinge) & ~required_fields_present.bool()
    penalty = slope * (excess - hinge).clamp(min=0) * hit
    loss = penalty.mean() if reduction == "mean" else penalty.sum()
    kept = student_mask.dtype if student_mask.is_floating_point() else torch.float32
    return loss.to(kept if end_logprobs is None else end_logprobs.dtype), {
        "len_kd.frac_penalized": hit.double().mean().item(),
        "len_kd.median_rel_excess": excess.detach().clamp(min=0).median().item(),
        "len_kd.median_len_student": student.detach().median().item(),
        "len_kd.median_len_teacher": teacher.median().item(),
    }


def survival(end_logprobs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """S_k at every token of a response [B, T], 0 outside it, and S after its last token [B].

    end_logprobs  [B, T] log P(EOS) of the row that predicts each token.
    mask          [B, T]: not 0 on the tokens of the response.
    """
    inside = mask != 0
    going_on = torch.where(inside, -torch.expm1(end_logprobs.clamp(max=0)), 1)
    after = going_on.cumprod(-1)  # S behind each token
    at = torch.cat((torch.ones_like(after[:, :1]), after[:, :-1]), -1)
    return torch.where(inside, at, 0), after[:, -1]


def expected_length(end_logprobs: Tensor, mask: Tensor, most: Tensor | None = None) -> Tensor:
    """Expected number of tokens of each answer [B], its ending token counted.

    Without `most` (mode rollout) it is the sum of S_k over the tokens of the mask: the student's own rollout. Over
    rollouts drawn with the ending barred its mean is the expected length up to where they are cut, exactly; one that
    stopped at its own ending gives less.

    With `most` (mode survival) the tokens are the teacher's, and the student may go on after the last of them: S_{n+1}
    counts as well, and behind it an answer that ends at each token with the probability p_n of the last, of which
    (1 - p_n) / p_n more tokens are expected; at most `most` [B] of them. Exact where the probability of ending depends
    on the place alone and stays p_n.

    end_logprobs [B, T], mask [B, T]: see `survival`. An answer without tokens has length 0.
    """
    survivals, after = survival(end_logprobs, mask)
    total = survivals.sum(-1)
    if most is None:
        return total
    inside = mask != 0
    last = (inside * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(-1, keepdim=True)
    end = end_logprobs.gather(1, last)[:, 0].clamp(max=0).exp()
    tail = torch.minimum((1 - end) / end.clamp(min=_EPSILON), most.to(end.dtype))
    return torch.where(inside.any(-1), total + after * (1 + tail), 0)


def _check(
    student: Tensor, teacher: Tensor, required: Tensor, reduction: str, mode: str, end_logprobs: Tensor | None
) -> None:
    if reduction not in ("mean", "sum"):
        raise ValidationError(f"reduction must be mean or sum, got {reduction!r}.", param="reduction")
    if mode not in _MODES:
        raise ValidationError(f"mode must be one of {', '.join(_MODES)}, got {mode!r}.", param="mode")
    if (mode == "mask") != (end_logprobs is None):
        raise ValidationError(
            f"mode {mode} {'takes no' if mode == 'mask' else 'needs'} end_logprobs.",
            param="end_logprobs",
            hint="They are the log-probabilities of EOS that modes rollout and survival make lengths of.",
        )
    shapes = [tuple(one.shape) for one in (student, teacher, required)]
    fits = student.dim() == teacher.dim() == 2 and student.shape[:1] == teacher.shape[:1] == required.shape
    if not fits or not student.numel() or not teacher.numel():
        raise ValidationError(
            f"The masks must be [B, Ts], [B, Tt] and [B] none of them empty, got {', '.join(map(str, shapes))}.",
            param="student_mask",
        )
    if end_logprobs is not None and end_logprobs.shape != student.shape:
        raise ValidationError(
            f"end_logprobs must be {shapes[0]}, as the student's mask, got {tuple(end_logprobs.shape)}.",
            param="end_logprobs",
        )
