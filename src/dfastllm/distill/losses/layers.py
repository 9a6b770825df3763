"""Intermediate layers: the student's hidden rows drawn to those of the teacher's layers that they stand for.

Mean squared error, as in FitNets (Romero et al. 2015, arXiv 1412.6550) and TinyBERT (Jiao et al. 2020, arXiv
1909.10351), and the cosine distance of DistilBERT (Sanh et al. 2019, arXiv 1910.01108). Where the widths differ a
learnt projection brings the student's rows to the teacher's width; it is thrown away with the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfastllm.distill.losses.fused import check_positive
from dfastllm.errors import ValidationError

__all__ = ["even_layer_map", "intermediate_layer_loss", "make_projections"]


def even_layer_map(student_layers: int, teacher_layers: int) -> dict[int, int]:
    """Which teacher's layer each layer of the student stands for, counted from 0: the last of each equal share of the
    teacher's (TinyBERT's uniform strategy), so that last meets last. Raises ValidationError for a student with more
    layers, or none."""
    if not 0 < student_layers <= teacher_layers:
        raise ValidationError(
            f"A student of {student_layers} layers has no even map to a teacher of {teacher_layers}.",
            param="layer_map",
            hint="It needs at least one layer and at most the teacher's; give a map of your own.",
        )
    return {layer: (layer + 1) * teacher_layers // student_layers - 1 for layer in range(student_layers)}


def make_projections(
    layer_map: Mapping[int, int], student_size: int, teacher_size: int, seed: int = 0
) -> nn.ModuleDict | None:
    """A linear map without bias for each layer of the student in `layer_map`, under its number, or None where the
    widths are equal. float32 on the CPU; its start is drawn from `seed` alone."""
    if student_size == teacher_size:
        return None
    generator = torch.Generator().manual_seed(seed)
    made = nn.ModuleDict()
    for layer in layer_map:
        linear = nn.Linear(student_size, teacher_size, bias=False)
        with torch.no_grad():
            linear.weight.normal_(0, student_size**-0.5, generator=generator)
        made[str(layer)] = linear
    return made


def intermediate_layer_loss(
    student_hidden: Mapping[int, Tensor] | Sequence[Tensor],
    teacher_hidden: Mapping[int, Tensor] | Sequence[Tensor],
    layer_map: Mapping[int, int],
    *,
    mask: Tensor | None = None,
    projections: nn.ModuleDict | None = None,
    mse_weight: float = 1.0,
    cosine_weight: float = 1.0,
    valid_tokens: float | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """mse_weight * MSE + cosine_weight * (1 - cosine), a scalar with gradient: means over rows and over the
    pairs of layers; MSE also over the width. No gradient flows to the teacher.

    student_hidden  the rows of each layer [..., Hs], by its number.
    teacher_hidden  [..., Ht], with the same leading shape.
    layer_map       student's layer -> teacher's layer.
    mask            [...]: rows that count, bool or weights of at least 0; None: all.
    projections     by the student's layer (`make_projections`); None where the widths are equal.
    valid_tokens    what the sums over rows are divided by; None: what the mask counts.

    Diagnostics: layers.mse and layers.cosine, without their weights; where no row counts both are 0.

    Raises ValidationError for an empty map, layers that are not there, shapes that do not fit, and weights out of
    range.
    """
    check_positive("mse_weight", mse_weight, or_zero=True)
    check_positive("cosine_weight", cosine_weight, or_zero=True)
    if valid_tokens is not None:
        check_positive("valid_tokens", valid_tokens)
    if not layer_map:
        raise ValidationError("layer_map names no layer.", param="layer_map", hint="See even_layer_map.")
    mse: list[Tensor] = []
    cosine: list[Tensor] = []
    for ours, theirs in layer_map.items():
        student, teacher = _layer(student_hidden, ours, "student"), _layer(teacher_hidden, theirs, "teacher").detach()
        student = student.to(torch.promote_types(student.dtype, torch.float32))  # float64 stays
        student = student if projections is None else _projected(projections, ours, student)
        if student.shape != teacher.shape:
            raise ValidationError(
                f"Layer {ours} of the student gives {tuple(student.shape)}, layer {theirs} of the teacher "
                f"{tuple(teacher.shape)}.",
                param="projections",
                hint="make_projections(layer_map, student_size, teacher_size) brings one width to the other.",
            )
        weight = _weights(mask, student)
        count = weight.sum() if valid_tokens is None else torch.as_tensor(valid_tokens, device=weight.device)
        count = torch.where(count > 0, count, 1)
        wide = teacher.to(student.dtype)
        mse.append(((student - wide).square().mean(-1) * weight).sum() / count)
        cosine.append(((1 - F.cosine_similarity(student, wide, dim=-1)) * weight).sum() / count)
    mean_mse, mean_cosine = torch.stack(mse).mean(), torch.stack(cosine).mean()
    loss = mse_weight * mean_mse + cosine_weight * mean_cosine
    return loss, {"layers.mse": mean_mse.item(), "layers.cosine": mean_cosine.item()}


def _layer(hidden: Mapping[int, Tensor] | Sequence[Tensor], number: int, whose: str) -> Tensor:
    there = number in hidden if isinstance(hidden, Mapping) else 0 <= number < len(hidden)
    if not there:
        raise ValidationError(
            f"The {whose} gives no hidden rows of layer {number}, of {len(hidden)} layers that it gives.",
            param="layer_map",
            hint="Layers are counted from 0.",
        )
    return hidden[number]


def _projected(projections: nn.ModuleDict, layer: int, student: Tensor) -> Tensor:
    if str(layer) not in projections:
        raise ValidationError(f"There is no projection for layer {layer}.", param="projections")
    out: Tensor = projections[str(layer)](student)
    return out


def _weights(mask: Tensor | None, rows: Tensor) -> Tensor:
    lead = rows.shape[:-1]
    if mask is None:
        return torch.ones(lead, device=rows.device)
    if mask.shape != lead:
        raise ValidationError(f"mask must be {tuple(lead)}, got {tuple(mask.shape)}.", param="mask")
    weight = mask.detach().float()
    if not bool((weight.isfinite() & (weight >= 0)).all()):
        raise ValidationError("mask must be bool, or finite weights of at least 0.", param="mask")
    return weight
