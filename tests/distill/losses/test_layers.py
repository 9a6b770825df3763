"""Intermediate layers against their definition, which layers meet, and projections."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dfastllm.distill.losses import even_layer_map, intermediate_layer_loss, make_projections
from dfastllm.errors import ValidationError


def rows(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64)


def brute(student: Tensor, teacher: Tensor) -> tuple[float, float]:
    """MSE and cosine distance of one row."""
    a, b = student.tolist(), teacher.tolist()
    inner, left, right = (
        sum(x * y for x, y in zip(one, other, strict=True)) for one, other in ((a, b), (a, a), (b, b))
    )
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a), 1 - inner / math.sqrt(left * right)


def test_it_is_its_definition() -> None:
    student, teacher = [rows(2, 3, 4) for _ in range(2)], [rows(2, 3, 4) for _ in range(5)]
    chosen = {0: 1, 1: 4}
    weight = torch.tensor([[0.0, 1, 1], [2, 0, 0.5]])
    found, diagnostics = intermediate_layer_loss(
        student, teacher, chosen, mask=weight, mse_weight=0.5, cosine_weight=2.0
    )
    mse = cosine = 0.0
    for ours, theirs in chosen.items():
        for b, t in weight.nonzero().tolist():
            a, c = brute(student[ours][b, t], teacher[theirs][b, t])
            mse += a * weight[b, t].item() / 4.5 / 2
            cosine += c * weight[b, t].item() / 4.5 / 2
    assert found.item() == pytest.approx(0.5 * mse + 2 * cosine)
    assert diagnostics == {"layers.mse": pytest.approx(mse), "layers.cosine": pytest.approx(cosine)}
    window, _ = intermediate_layer_loss(
        student, teacher, chosen, mask=weight, mse_weight=0.5, cosine_weight=2.0, valid_tokens=9
    )
    assert window.item() == pytest.approx(found.item() / 2)


def test_its_gradient_is_finite_differences_and_stays_out_of_the_teacher() -> None:
    chosen = {0: 1}
    projections = make_projections(chosen, 3, 5)
    assert projections is not None
    projections = projections.double()
    teacher = rows(2, 2, 5).requires_grad_()
    mask = torch.tensor([[True, False], [True, True]])

    def loss(student: Tensor, weight: Tensor) -> Tensor:
        return intermediate_layer_loss({0: student}, {1: teacher}, chosen, mask=mask, projections=projections)[0]

    weight = projections["0"].weight
    assert torch.autograd.gradcheck(loss, (rows(2, 2, 3).requires_grad_(), weight))
    assert torch.autograd.grad(loss(rows(2, 2, 3), weight), teacher, allow_unused=True) == (None,)


def test_equal_rows_cost_nothing_and_bfloat16_is_widened() -> None:
    same = rows(2, 3, 4).float()
    assert intermediate_layer_loss([same], [same], {0: 0})[0].item() == pytest.approx(0, abs=1e-6)
    half = intermediate_layer_loss([same.bfloat16()], [same.bfloat16()], {0: 0})[0]
    assert half.dtype == torch.float32
    nothing = intermediate_layer_loss([same], [same + 1], {0: 0}, mask=torch.zeros(2, 3))[0]
    assert nothing.item() == 0


def test_which_layers_meet() -> None:
    assert even_layer_map(3, 12) == {0: 3, 1: 7, 2: 11}
    assert even_layer_map(4, 4) == {0: 0, 1: 1, 2: 2, 3: 3}
    assert even_layer_map(4, 6) == {0: 0, 1: 2, 2: 3, 3: 5}
    for wrong in ((0, 4), (5, 4)):
        with pytest.raises(ValidationError, match="no even map"):
            even_layer_map(*wrong)


def test_projections() -> None:
    chosen = {0: 1, 3: 5}
    assert make_projections(chosen, 8, 8) is None
    first, again = make_projections(chosen, 64, 96, seed=3), make_projections(chosen, 64, 96, seed=3)
    assert first is not None
    assert again is not None
    assert list(first) == ["0", "3"]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    x = torch.randn(500, 64)
    assert first["0"](x).var().item() == pytest.approx(1, rel=0.2), "as large as what goes in"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layer_map": {}}, "names no layer"),
        ({"layer_map": {2: 0}}, "student gives no hidden rows of layer 2"),
        ({"layer_map": {0: -1}}, "teacher gives no hidden rows of layer -1"),
        ({"teacher_hidden": [torch.zeros(2, 3, 5)]}, r"gives \(2, 3, 4\), layer 0 of the teacher \(2, 3, 5\)"),
        ({"mask": torch.ones(2, 4)}, r"mask must be \(2, 3\)"),
        ({"mask": torch.full((2, 3), -1.0)}, "finite weights"),
        ({"projections": make_projections({1: 1}, 4, 5)}, "no projection for layer 0"),
        ({"mse_weight": -1.0}, "mse_weight"),
        ({"cosine_weight": math.inf}, "cosine_weight"),
        ({"valid_tokens": 0}, "valid_tokens"),
    ],
)
def test_what_is_refused(change: dict[str, Any], says: str) -> None:
    given: dict[str, Any] = {"student_hidden": [torch.zeros(2, 3, 4)], "teacher_hidden": [torch.zeros(2, 3, 4)]}
    with pytest.raises(ValidationError, match=says):
        intermediate_layer_loss(**{**given, "layer_map": {0: 0}, **change})
