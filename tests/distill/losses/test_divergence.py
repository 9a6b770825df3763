"""Divergences against the definitions in float64, their gradients against finite differences, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dfastllm.distill.losses import DIVERGENCES, Dense, Sparse, row_terms, token_divergence
from dfastllm.distill.losses.divergence import Teacher
from dfastllm.errors import ValidationError
from tests.kit import brute_losses

ROWS, IDS = 6, 9
HEAT = (1.0, 2.0, 0.7)


def logits(scale: float = 2.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(ROWS, IDS, dtype=torch.float64).mul(scale).to(dtype)


def listed(k: int = 4) -> Sparse:
    """A teacher's k best ids, in no order; a row with fewer, and one with none."""
    log_p, ids = logits().log_softmax(-1).topk(k, -1)
    log_p[1, 2:] = -torch.inf
    log_p[2] = -torch.inf
    ids[1, 2:] = 0
    ids[2] = 0
    order = torch.randperm(k)
    return Sparse(ids[:, order], log_p[:, order])


def values(student: Tensor, teacher: Tensor | Teacher, **given: Any) -> list[float]:
    return row_terms(student, teacher=teacher, **given).divergence.tolist()


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("temperature", HEAT)
def test_dense_is_its_definition(kind: str, temperature: float) -> None:
    student, teacher = logits(), logits()
    for beta in (0.5, 0.1) if kind == "jsd" else (0.5,):
        wanted = [
            brute_losses.dense(a.numpy(), b.numpy(), kind, temperature, beta)
            for a, b in zip(student, teacher, strict=True)
        ]
        found = values(student, teacher, kind=kind, temperature=temperature, beta=beta)
        assert found == pytest.approx(wanted, abs=1e-12)
        single = values(student.float(), teacher.bfloat16().float(), kind=kind, temperature=temperature, beta=beta)
        half = values(student.float(), teacher.bfloat16(), kind=kind, temperature=temperature, beta=beta)
        assert single == half, "a teacher in bfloat16 is computed with in float32"
        assert single == pytest.approx(wanted, abs=0.1)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("temperature", HEAT)
def test_sparse_is_its_definition(kind: str, temperature: float) -> None:
    student, teacher = logits(), listed()
    wanted = [
        brute_losses.sparse(a.numpy(), ids.tolist(), log_p.tolist(), kind, temperature)
        for a, ids, log_p in zip(student, teacher.ids, teacher.logprobs, strict=True)
    ]
    found = values(student, teacher, kind=kind, temperature=temperature)
    assert found == pytest.approx(wanted, abs=1e-10)
    assert found[2] == 0
    assert min(found[:2] + found[3:]) > 1e-3
    single = Sparse(teacher.ids, teacher.logprobs.float())
    assert values(student.float(), single, kind=kind, temperature=temperature) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_gradients_are_finite_differences(kind: str, form: str) -> None:
    student = logits().requires_grad_()
    teacher: Teacher = Dense(logits()) if form == "dense" else listed()
    heat = torch.linspace(0.5, 2.5, ROWS, dtype=torch.float64)

    def one(x: Tensor) -> Tensor:
        return row_terms(x, teacher=teacher, kind=kind, temperature=heat, beta=0.3, chunk=4).divergence  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(one, student)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("temperature", HEAT)
def test_a_teacher_that_lists_everything_is_a_dense_one(kind: str, temperature: float) -> None:
    student, teacher = logits().requires_grad_(), logits()
    log_p = teacher.log_softmax(-1)
    everything = Sparse(torch.arange(IDS).expand(ROWS, IDS), log_p)
    results = []
    for one in (Dense(teacher), everything):
        found = row_terms(student, teacher=one, kind=kind, temperature=temperature).divergence  # type: ignore[arg-type]
        (slope,) = torch.autograd.grad(found.sum(), student)
        results.append((found.detach(), slope))
    torch.testing.assert_close(results[0], results[1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_it_is_zero_and_flat_where_both_agree(kind: str) -> None:
    student = logits().requires_grad_()
    log_p, ids = student.detach().log_softmax(-1).topk(3, -1)
    for teacher in (Dense(student.detach() + 5), Sparse(ids, log_p)):
        found = row_terms(student, teacher=teacher, kind=kind, temperature=2.0).divergence  # type: ignore[arg-type]
        (slope,) = torch.autograd.grad(found.sum(), student)
        assert found.abs().max() < 1e-12
        assert slope.abs().max() < 1e-12


def test_the_ends_of_the_jensen_shannon_divergence() -> None:
    """GKD, section 2: its limits are the two KLs, over beta and over 1 - beta; and it is at most log 2 at one half."""
    student, teacher = logits(20), logits(20)
    assert max(values(student, teacher, kind="jsd")) <= math.log(2)
    assert max(values(student, teacher, kind="forward")) > math.log(2)
    student, teacher = logits(1), logits(1)
    forward, reverse = (values(student, teacher, kind=kind) for kind in ("forward", "reverse"))
    low = [value / 1e-6 for value in values(student, teacher, kind="jsd", beta=1e-6)]
    high = [value / 1e-6 for value in values(student, teacher, kind="jsd", beta=1 - 1e-6)]
    assert low == pytest.approx(forward, rel=1e-3)
    assert high == pytest.approx(reverse, rel=1e-3)


def test_what_the_teacher_can_never_say() -> None:
    """Columns of padding are -inf in many teachers: no harm to forward, a large finite cost to reverse."""
    student, teacher = logits(), logits()
    teacher[:, -2:] = -torch.inf
    expected = [brute_losses.dense(a.numpy(), b.numpy(), "forward", 1) for a, b in zip(student, teacher, strict=True)]
    assert values(student, teacher) == pytest.approx(expected)
    for kind in DIVERGENCES:
        x = student.clone().requires_grad_()
        found = row_terms(x, teacher=teacher, kind=kind).divergence
        (slope,) = torch.autograd.grad(found.sum(), x)
        assert found.isfinite().all()
        assert slope.isfinite().all()
        assert kind == "forward" or bool((slope[:, -2:] > 0).all()), "less of what the teacher never says"
    both = student.clone()
    both[:, -2:] = -torch.inf
    cut = values(both[:, :-2].clone(), teacher[:, :-2].clone(), kind="reverse")
    assert values(both, teacher, kind="reverse") == pytest.approx(cut)


def test_what_the_teacher_hardly_ever_says_is_not_cut() -> None:
    student, teacher = logits(), logits()
    teacher[:, 0] = -500
    student[:, 1] = -500
    for kind in DIVERGENCES:
        wanted = [brute_losses.dense(a.numpy(), b.numpy(), kind, 1) for a, b in zip(student, teacher, strict=True)]
        assert kind == "jsd" or max(wanted) > 50
        assert values(student, teacher, kind=kind) == pytest.approx(wanted)


def test_a_tail_of_nothing_stays_finite() -> None:
    """Rounded probabilities of an API may sum to 1, or to a little more."""
    teacher = Sparse(torch.tensor([[3, 1]]), torch.tensor([[0.5, 0.50001]]).log())
    for kind in DIVERGENCES:
        x = torch.randn(1, IDS, requires_grad=True)
        found = token_divergence(x, teacher, kind=kind)
        found.backward()  # type: ignore[no-untyped-call]
        assert found.item() < -math.log(1e-7), "as for a tail of what float32 can just tell from nothing"
        assert x.grad is not None
        assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        (torch.zeros(ROWS, IDS + 1), "vocabulary of 10, the student's of 9"),
        (torch.zeros(ROWS + 1, IDS), r"\(7,\), the student's \(6,\)"),
        (Sparse(torch.zeros(ROWS, 2, dtype=torch.int64), torch.full((ROWS, 2), -3.0)), "twice"),
        (Sparse(torch.full((ROWS, 1), IDS), torch.full((ROWS, 1), -3.0)), "outside the student's vocabulary of 9"),
        (Sparse(torch.full((ROWS, 1), -1), torch.full((ROWS, 1), -3.0)), "outside the student's vocabulary of 9"),
        (Sparse(torch.zeros(ROWS, 1, dtype=torch.int64), torch.full((ROWS, 1), 0.1)), "sum to 1.105"),
        (Sparse(torch.zeros(ROWS, 1, dtype=torch.int64), torch.full((ROWS, 1), math.nan)), "sum to nan"),
        (Sparse(torch.zeros(ROWS, 1, dtype=torch.int64), torch.zeros(ROWS, 2)), "one shape"),
        (Sparse(torch.zeros(ROWS, 0, dtype=torch.int64), torch.zeros(ROWS, 0)), "K at least 1"),
        (Sparse(torch.zeros(2, 1, dtype=torch.int64), torch.full((2, 1), -1.0)), r"\(2,\), the student's \(6,\)"),
    ],
)
def test_a_teacher_that_does_not_fit(teacher: Tensor | Teacher, says: str) -> None:
    with pytest.raises(ValidationError, match=says) as error:
        token_divergence(torch.zeros(ROWS, IDS), teacher)
    assert error.value.param == "teacher_logits"


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"kind": "backward"}, "divergence"),
        ({"kind": "jsd", "beta": 0.0}, "beta"),
        ({"kind": "jsd", "beta": 1.0}, "beta"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": torch.ones(ROWS - 1)}, "temperature"),
        ({"temperature": torch.zeros(ROWS)}, "temperature"),
        ({"chunk": 0}, "chunk"),
        ({"picks": torch.full((ROWS, 1), IDS)}, "targets"),
        ({"picks": torch.full((ROWS, 1), -1)}, "targets"),
        ({"picks": torch.zeros(ROWS - 1, 1, dtype=torch.int64)}, "picks"),
    ],
)
def test_numbers_out_of_range(given: dict[str, Any], param: str) -> None:
    with pytest.raises(ValidationError) as error:
        row_terms(torch.zeros(ROWS, IDS), teacher=torch.zeros(ROWS, IDS), **given)
    assert error.value.param == param


def test_rows_that_are_no_rows() -> None:
    for wrong in (torch.zeros(IDS), torch.zeros(ROWS, IDS, dtype=torch.int64)):
        with pytest.raises(ValidationError, match="floats of at least two dims"):
            row_terms(wrong)
