"""The combined loss: every term against its definition in float64, what is absent, what is refused, how it adds up."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dfastllm.distill.losses import (
    TERMS,
    Dense,
    Hidden,
    Sparse,
    check_finite,
    combined_kd_loss,
    count_valid,
    entropy_temperature,
    span_labels,
)
from dfastllm.distill.losses.divergence import Teacher
from dfastllm.errors import TrainingError, ValidationError
from tests.kit import brute_losses

B, T, IDS = 2, 5, 8
WEIGHTS = {
    "kl_div": 0.4,
    "ce_teacher": 0.2,
    "tool_name": 0.15,
    "json_args": 0.15,
    "integration": 0.1,
    "ce_ground_truth": 0.2,
}
NAMES = {
    "teacher_targets": "ce_teacher",
    "tool_name_labels": "tool_name",
    "json_args_labels": "json_args",
    "integration_labels": "integration",
    "ground_truth_targets": "ce_ground_truth",
}


def logits() -> Tensor:
    return torch.randn(B, T, IDS, dtype=torch.float64).mul(2)


def batch() -> dict[str, Tensor]:
    """Targets by argument. The prompt is two rows of the first sample and three of the second."""
    truth = torch.randint(0, IDS, (B, T))
    truth[0, :2] = truth[1, :3] = -100
    teacher = torch.randint(0, IDS, (B, T)).masked_fill(truth == -100, -100)
    inside = torch.zeros(B, T, dtype=torch.bool)
    inside[0, 2:4] = True
    return {
        "teacher_targets": teacher,
        "ground_truth_targets": truth,
        "tool_name_labels": span_labels(truth, inside),
        "json_args_labels": span_labels(truth, inside.flip(1)),
        "integration_labels": torch.full((B, T), -100),
    }


def sparse() -> Sparse:
    log_p, ids = logits().log_softmax(-1).topk(3, -1)
    return Sparse(ids, log_p)


def brute(
    student: Tensor, teacher: Teacher, given: dict[str, Tensor], mask: Tensor | None, heat: float
) -> dict[str, Any]:
    rows = student.detach().view(-1, IDS).numpy()
    weight = torch.ones(B * T) if mask is None else mask.flatten()
    response = (given["ground_truth_targets"].flatten() != -100).double() if mask is None else weight
    found = {}
    if isinstance(teacher, Dense):
        theirs = teacher.logits.view(-1, IDS).numpy()
        each = [brute_losses.dense(a, b, "forward", heat) for a, b in zip(rows, theirs, strict=True)]
    else:
        lists = zip(teacher.ids.view(-1, 3).tolist(), teacher.logprobs.view(-1, 3).tolist(), strict=True)
        each = [
            brute_losses.sparse(a, ids, log_p, "forward", heat) for a, (ids, log_p) in zip(rows, lists, strict=True)
        ]
    found["kl_div"] = sum(a * b for a, b in zip(each, response.tolist(), strict=True)) / response.sum().item()
    for argument, name in NAMES.items():
        targets = given[argument].flatten()
        counts = ((targets != -100) * weight).tolist()
        summed = brute_losses.cross_entropy(rows, targets.clamp(min=0).tolist(), counts)
        found[name] = summed / (sum(counts) or 1)
    found["total"] = sum(WEIGHTS[name] * value for name, value in found.items())
    return found


@pytest.mark.parametrize("form", ["dense", "sparse"])
@pytest.mark.parametrize("masked", [False, True])
def test_every_term_is_its_definition(form: str, masked: bool) -> None:
    student, given = logits().requires_grad_(), batch()
    teacher: Teacher = Dense(logits()) if form == "dense" else sparse()
    mask = torch.tensor([[0.0, 0, 1, 0.5, 2], [1, 0, 0, 1, 1]]).double() if masked else None
    found = combined_kd_loss(student, teacher, **given, loss_mask=mask, chunk=3)  # type: ignore[arg-type]
    wanted = brute(student, teacher, given, mask, 2.0)
    assert set(found) == {*TERMS, "total"} == {*WEIGHTS, "total"}
    assert {name: one.item() for name, one in found.items()} == pytest.approx(wanted, abs=1e-12)
    assert found["integration"] == 0
    single = combined_kd_loss(student.float(), teacher, **given, loss_mask=mask)  # type: ignore[arg-type]
    assert single["total"].dtype == torch.float32
    assert single["total"].item() == pytest.approx(wanted["total"], abs=1e-5)
    if masked:
        return
    (slope,) = torch.autograd.grad(found["total"], student)
    assert torch.equal(slope[0, :2], torch.zeros(2, IDS)), "no gradient on the prompt"
    assert (slope[0, 2:].abs().sum(-1) > 0).all()


def test_its_gradient_is_finite_differences() -> None:
    given, teacher, listed = batch(), logits(), sparse()
    for kind in ("forward", "reverse", "jsd"):
        for one in (teacher, listed):

            def total(x: Tensor, one: Tensor | Sparse = one, kind: Any = kind) -> Tensor:
                return combined_kd_loss(x, one, **given, divergence=kind)["total"]

            assert torch.autograd.gradcheck(total, logits().requires_grad_(), fast_mode=True)


def test_from_hidden_rows() -> None:
    rows, weight = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((B, T, 4), (IDS, 4)))
    given, teacher = batch(), sparse()
    plain = combined_kd_loss(rows @ weight.T, teacher, **given)
    found = combined_kd_loss(Hidden.linear(rows, weight), teacher, **given, chunk=2)
    torch.testing.assert_close(found, plain)
    slopes = [torch.autograd.grad(one["total"], (rows, weight)) for one in (found, plain)]
    torch.testing.assert_close(slopes[0], slopes[1])


def test_no_weight_or_no_target_means_no_term() -> None:
    student, given, teacher = logits().requires_grad_(), batch(), logits()
    everything = combined_kd_loss(student, teacher, **given)
    off = {"kl_div": "kl_weight", "ce_teacher": "ce_teacher_weight", "tool_name": "w_tool", "json_args": "w_args"}
    off |= {"integration": "w_integr", "ce_ground_truth": "ce_ground_truth_weight"}
    for name, argument in off.items():
        for weight in (0.0, -1.0):
            found = combined_kd_loss(student, teacher, **given, **{argument: weight})  # type: ignore[arg-type]
            assert set(found) == {*TERMS, "total"} - {name}
            left = everything["total"] - WEIGHTS[name] * everything[name]
            torch.testing.assert_close(found["total"], left)
    for argument, name in NAMES.items():
        if argument != "ground_truth_targets":  # without that the response is what the teacher's tokens say
            found = combined_kd_loss(student, teacher, **{**given, argument: None})  # type: ignore[arg-type]
            assert set(found) == {*TERMS, "total"} - {name}
            torch.testing.assert_close(found["total"], everything["total"] - WEIGHTS[name] * everything[name])
    nothing = combined_kd_loss(student)
    assert set(nothing) == {"total"}
    nothing["total"].backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_which_rows_the_divergence_counts() -> None:
    student, given, teacher = logits(), batch(), logits()
    kl = {"kl_weight": 1.0, "ce_teacher_weight": 0.0, "ce_ground_truth_weight": 0.0}
    truth, said = given["ground_truth_targets"], given["teacher_targets"].clone()
    said[0, 3] = -100
    each = torch.tensor(
        [
            brute_losses.dense(a, b, "forward", 2.0)
            for a, b in zip(student.view(-1, IDS).numpy(), teacher.view(-1, IDS).numpy(), strict=True)
        ]
    ).view(B, T)

    def value(**more: Any) -> float:
        return combined_kd_loss(student, teacher, **kl, **more)["kl_div"].item()

    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[1, 1] = True
    assert value() == pytest.approx(each.mean().item())
    assert value(teacher_targets=said) == pytest.approx(each[said != -100].mean().item())
    assert value(teacher_targets=said, ground_truth_targets=truth) == pytest.approx(each[truth != -100].mean().item())
    assert value(ground_truth_targets=truth, loss_mask=mask) == pytest.approx(each[1, 1].item())


def test_without_the_teachers_distribution() -> None:
    student, given, listed = logits(), batch(), sparse()
    assert "kl_div" not in combined_kd_loss(student, None, **given)
    with pytest.raises(ValidationError, match="10 rows have no distribution") as error:
        combined_kd_loss(student, None, **given, on_missing_logits="error")
    assert error.value.param == "kd.on_missing_logits"
    assert "kl_div" not in combined_kd_loss(student, None, **given, on_missing_logits="error", kl_weight=0)
    holes = Sparse(listed.ids, listed.logprobs.clone())
    holes.logprobs[0, 3] = -torch.inf
    keep = given["ground_truth_targets"] != -100
    keep[0, 3] = False
    skipped = combined_kd_loss(student, holes, **given)["kl_div"]
    only = combined_kd_loss(student, listed, loss_mask=keep)["kl_div"]
    torch.testing.assert_close(skipped, only)
    with pytest.raises(ValidationError, match="1 rows have no distribution"):
        combined_kd_loss(student, holes, **given, on_missing_logits="error")
    holes.logprobs[0, 0] = -torch.inf  # of the prompt: nobody asks
    holes.logprobs[0, 3] = listed.logprobs[0, 3]
    combined_kd_loss(student, holes, **given, on_missing_logits="error")
    with pytest.raises(ValidationError, match="skip or error"):
        combined_kd_loss(student, listed, on_missing_logits="ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_a_window_of_micro_batches_is_one_batch(form: str) -> None:
    """Divided by the counts of the whole window, the parts add up to it, however unequal they are."""
    student, given = logits().requires_grad_(), batch()
    teacher: Teacher = Dense(logits()) if form == "dense" else sparse()
    whole = combined_kd_loss(student, teacher, **given)

    def part(at: int) -> dict[str, Any]:
        one = Dense(teacher.logits[at : at + 1]) if isinstance(teacher, Dense) else None
        if one is None:
            assert isinstance(teacher, Sparse)
            return {"teacher_logits": Sparse(teacher.ids[at : at + 1], teacher.logprobs[at : at + 1])} | cut(at)
        return {"teacher_logits": one} | cut(at)

    def cut(at: int) -> dict[str, Any]:
        return {name: one[at : at + 1] for name, one in given.items()}

    counts = [count_valid(torch.Size((1, T)), **part(at)) for at in range(B)]
    assert counts[0]["kl_div"] == 3
    assert counts[1]["kl_div"] == 2
    assert counts[1]["tool_name"] == 0
    window = {name: sum(count[name] for count in counts) for name in counts[0]}
    parts = [combined_kd_loss(student[at : at + 1], **part(at), valid_tokens=window) for at in range(B)]
    for name in whole:
        torch.testing.assert_close(sum(one[name] for one in parts), whole[name])
    slopes = [torch.autograd.grad(one, student)[0] for one in (whole["total"], parts[0]["total"] + parts[1]["total"])]
    torch.testing.assert_close(slopes[0], slopes[1])


def test_small_weights_are_means_too() -> None:
    student, given, teacher = logits(), batch(), logits()
    mask = torch.rand(B, T)
    whole = combined_kd_loss(student, teacher, **given, loss_mask=mask)
    tenth = combined_kd_loss(student, teacher, **given, loss_mask=mask / 100)
    torch.testing.assert_close(tenth, whole, rtol=1e-6, atol=1e-9)


def test_one_count_is_for_whole_responses() -> None:
    student, given, teacher = logits(), batch(), logits()
    own, ten = combined_kd_loss(student, teacher, **given), combined_kd_loss(student, teacher, **given, valid_tokens=10)
    for name in TERMS:
        share = 0.5 if name in ("kl_div", "ce_teacher", "ce_ground_truth") else 1.0
        torch.testing.assert_close(ten[name], own[name] * share)
    with pytest.raises(ValidationError, match="valid_tokens"):
        combined_kd_loss(student, teacher, **given, valid_tokens=-1)


def test_a_temperature_for_every_row() -> None:
    student, given, teacher = logits(), batch(), logits()
    heat = entropy_temperature(teacher)
    found = combined_kd_loss(student, teacher, **given, temperature=heat)["kl_div"].item()
    rows = (given["ground_truth_targets"] != -100).nonzero().tolist()
    each = [
        brute_losses.dense(student[b, t].numpy(), teacher[b, t].numpy(), "forward", heat[b, t].item()) for b, t in rows
    ]
    assert found == pytest.approx(sum(each) / len(each))
    assert found != pytest.approx(combined_kd_loss(student, teacher, **given)["kl_div"].item())


def test_shapes_that_do_not_fit() -> None:
    student, given, teacher = logits(), batch(), logits()
    for argument in given:
        with pytest.raises(ValidationError, match=rf"{argument} has the shape \(2, 4\)") as error:
            combined_kd_loss(student, teacher, **{**given, argument: given[argument][:, :-1]})
        assert error.value.param == argument
    with pytest.raises(ValidationError, match=r"loss_mask has the shape \(2, 6\)"):
        combined_kd_loss(student, teacher, **given, loss_mask=torch.ones(B, T + 1))
    for wrong in (torch.full((B, T), -1.0), torch.full((B, T), math.nan)):
        with pytest.raises(ValidationError, match="finite weights of at least 0"):
            combined_kd_loss(student, teacher, **given, loss_mask=wrong)
    with pytest.raises(ValidationError, match=r"teacher's rows have the shape \(2, 4\)"):
        combined_kd_loss(student, teacher[:, 1:], **given)
    with pytest.raises(ValidationError, match="vocabulary has 8"):
        combined_kd_loss(student, teacher, ground_truth_targets=torch.full((B, T), IDS))
    with pytest.raises(ValidationError, match="loss weight must be a number"):
        combined_kd_loss(student, teacher, kl_weight=math.nan)
    with pytest.raises(ValidationError, match="mask is"):
        span_labels(torch.zeros(2, 3), torch.ones(2, 2))


def test_what_is_not_finite_is_named() -> None:
    student, given, teacher = logits(), batch(), logits()
    student[0, 0] = math.nan  # of the prompt: nobody asks
    combined_kd_loss(student, teacher, **given)
    teacher[0, 3, 1] = math.nan
    with pytest.raises(TrainingError, match="not finite: kl_div is nan") as error:
        combined_kd_loss(student, teacher, **given)
    assert error.value.param == "kl_div"
    assert "ce_teacher" not in str(error.value)
    left = combined_kd_loss(student, teacher, **given, finite=False)
    assert left["total"].isnan()
    assert left["ce_teacher"].isfinite()
    student[0, 3] = math.inf
    with pytest.raises(TrainingError, match=r"kl_div is nan, ce_teacher is nan, .*ce_ground_truth is nan"):
        combined_kd_loss(student, teacher, **given)
    with pytest.raises(TrainingError, match="total is inf"):
        check_finite({"kl_div": torch.ones(()), "total": torch.tensor(math.inf)})


def test_rows_that_count_elsewhere_may_hold_anything() -> None:
    """An id that the student can never say is no target here, and is the filler of rows without one."""
    student, given, teacher = logits(), batch(), logits()
    student[..., 0] = -torch.inf
    given = {name: one.masked_fill(one == 0, 1) for name, one in given.items()}
    found = combined_kd_loss(student.requires_grad_(), teacher, **given, kl_weight=0)
    found["total"].backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert student.grad.isfinite().all()
