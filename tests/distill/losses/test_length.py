"""The length hinge: the published cases, expected lengths against every answer written out, gradients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dfastllm.distill.losses import end_logprobs, expected_length, length_aware_kd_loss, survival
from dfastllm.errors import ValidationError
from tests.kit import brute_losses


def mask(*lengths: int, width: int = 32) -> Tensor:
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).float()


def flags(*values: bool) -> Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("student", "teacher", "required", "loss", "fraction", "median"),
    [
        ((16,) * 4, (8,) * 4, (True, False, True, False), 0.425, 0.5, 1.0),
        ((8, 8), (16, 16), (False, False), 0.0, 0.0, 0.0),
        ((16, 16), (16, 16), (False, False), 0.0, 0.0, 0.0),
        ((19, 19), (16, 16), (False, False), 0.0375, 1.0, 0.1875),
        ((23, 23), (20, 20), (False, False), 0.0, 0.0, 0.15),
        ((25, 25), (20, 20), (False, False), 0.1, 1.0, 0.25),
        ((30, 30, 30), (10, 10, 10), (True, True, True), 0.0, 0.0, 2.0),
        ((30, 10, 12, 20), (10, 10, 10, 10), (False,) * 4, (1.85 + 0 + 0.05 + 0.85) / 4, 0.75, 0.2),
        ((3,), (0,), (False,), 1.85, 1.0, 2.0),
    ],
)
def test_cases(
    student: tuple[int, ...],
    teacher: tuple[int, ...],
    required: tuple[bool, ...],
    loss: float,
    fraction: float,
    median: float,
) -> None:
    found, diagnostics = length_aware_kd_loss(mask(*student), mask(*teacher), flags(*required))
    assert found.item() == pytest.approx(loss, abs=1e-7)
    assert loss or found.item() == 0.0, "exactly"
    assert diagnostics["len_kd.frac_penalized"] == fraction
    assert diagnostics["len_kd.median_rel_excess"] == pytest.approx(median)
    assert diagnostics["len_kd.median_len_student"] == sorted(student)[(len(student) - 1) // 2]
    assert diagnostics["len_kd.median_len_teacher"] == max(1, sorted(teacher)[(len(teacher) - 1) // 2])
    summed, _ = length_aware_kd_loss(mask(*student), mask(*teacher), flags(*required), reduction="sum")
    assert summed.item() == pytest.approx(len(student) * loss, abs=1e-6)


@pytest.mark.parametrize("hinge", [0.05, 0.1, 0.15, 0.2, 0.3, 0.35])
def test_at_the_hinge_nothing_is_paid(hinge: float) -> None:
    """At every length, in whatever dtype the masks are."""
    for teacher in (20, 40, 100, 120):
        student = round(teacher * (1 + hinge))
        for dtype in (torch.bool, torch.int64, torch.float32):
            loss, _ = length_aware_kd_loss(
                mask(student, width=200).to(dtype), mask(teacher, width=200).to(dtype), flags(False), hinge=hinge
            )
            assert loss.item() == 0.0
            assert loss.dtype == torch.float32


def test_slope_and_reduction() -> None:
    given = (mask(25, 40, width=64), mask(20, 20), flags(False, False))
    assert length_aware_kd_loss(*given, slope=3.0)[0].item() == pytest.approx(3 * (0.1 + 0.85) / 2)
    assert length_aware_kd_loss(*given, hinge=0.5)[0].item() == pytest.approx(0.25)
    with pytest.raises(ValueError, match="reduction must be mean or sum, got 'none'"):
        length_aware_kd_loss(*given, reduction="none")


def test_gradient_flows_through_a_float_mask() -> None:
    student = (torch.rand(3, 12, dtype=torch.float64) + 0.4).requires_grad_()
    teacher, required = mask(4, 5, 4, width=12), flags(False, False, True)
    assert torch.autograd.gradcheck(lambda x: length_aware_kd_loss(x, teacher, required)[0], student)
    loss, _ = length_aware_kd_loss(student, teacher, required)
    (slope,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(slope[0], torch.full((12,), 1 / 3 / 4, dtype=torch.float64))
    assert torch.equal(slope[2], torch.zeros(12)), "complete answers are exempt"


@pytest.mark.parametrize("mode", ["rollout", "survival"])
def test_gradient_of_expected_lengths_is_finite_differences(mode: Any) -> None:
    """From the logits on, and it raises the probability of ending wherever something is paid."""
    student, teacher = mask(9, 7, 8, width=10), mask(3, 2, 2, width=10)
    required = flags(False, False, True)

    def loss(x: Tensor) -> Tensor:
        return length_aware_kd_loss(student, teacher, required, mode=mode, end_logprobs=end_logprobs(x, (0, 4)))[0]

    x = torch.randn(3, 10, 5, dtype=torch.float64).sub(torch.tensor([2.0, 0, 0, 0, 2])).requires_grad_()
    assert loss(x).item() > 0.1
    assert torch.autograd.gradcheck(loss, x)
    (slope,) = torch.autograd.grad(loss(x), x)
    reached = slope[0, :8, [0, 4]] if mode == "rollout" else slope[0, :9, [0, 4]]
    assert (reached < 0).all(), "descending the gradient ends sooner"
    assert torch.equal(slope[2], torch.zeros(10, 5))
    assert torch.equal(slope[1, 7:], torch.zeros(3, 5)), "rows behind the response"


def model(seed: int, ids: int = 3, ending: float = 0.25) -> Any:
    """A little language model: random distributions of the next of `ids` tokens, the last of them ending the text."""
    known: dict[tuple[int, ...], Any] = {}

    def next_of(before: tuple[int, ...]) -> Any:
        if before not in known:
            draw = np.random.default_rng([seed, *[token + 1 for token in before]])
            end = draw.uniform(0.05, 2 * ending - 0.05)
            known[before] = np.array([*(draw.dirichlet(np.ones(ids - 1)) * (1 - end)), end])
        return known[before]

    return next_of


@pytest.mark.parametrize("most", [1, 2, 5])
def test_rollouts_give_the_expected_length(most: int) -> None:
    """The mean over all rollouts that are drawn with the ending barred is what writing out every answer gives."""
    next_of = model(most)
    wanted = brute_losses.expected_length(next_of, most)
    total = weight = 0.0
    for path in np.ndindex(*[2] * most):
        share, ends = 1.0, []
        for at in range(most):
            step = next_of(path[:at])
            share *= step[path[at]] / (1 - step[-1])
            ends.append(step[-1])
        total += share * expected_length(torch.tensor([ends]).log(), torch.ones(1, most)).item()
        weight += share
    assert weight == pytest.approx(1)
    assert total == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("teacher", [1, 3, 6])
def test_teacher_forced_survival_gives_the_expected_length(teacher: int) -> None:
    """Where the ending depends on the place alone and stays as it was at the teacher's last token, the tail is exact;
    answers are written out until nothing is left of them."""
    ends = [0.3, 0.55, 0.2, 0.4, 0.35, 0.8]
    last = 0.8
    ends = [*ends[: teacher - 1], last]

    def next_of(before: tuple[int, ...]) -> Any:
        end = ends[min(len(before), teacher - 1)]
        share = 0.25 if len(before) % 2 else 0.6
        return np.array([share * (1 - end), (1 - share) * (1 - end), end])

    wanted = brute_losses.expected_length(next_of, teacher + 9)
    logs, response = torch.tensor([ends]).double().log(), torch.ones(1, teacher)
    found = expected_length(logs, response, torch.tensor([50.0])).item()
    assert found == pytest.approx(wanted, abs=1e-5)


def test_a_constant_chance_of_ending() -> None:
    """Geometric: 1 / p tokens, from any number of the teacher's; and no more than the tail's limit allows."""
    for p in (0.9, 0.5, 0.05):
        for n in (1, 4, 30):
            logs = torch.full((1, n), p, dtype=torch.float64).log()
            found = expected_length(logs, torch.ones(1, n), torch.tensor([1e6])).item()
            assert found == pytest.approx(1 / p)
    n, p, most = 4, 0.01, 3.0
    logs = torch.full((1, n), p, dtype=torch.float64).log()
    found = expected_length(logs, torch.ones(1, n), torch.tensor([most])).item()
    assert found == pytest.approx(sum(0.99**k for k in range(n + 1)) + 0.99**n * most)


def test_a_certain_ending() -> None:
    """Probabilities of 0 and 1 give the mask's own length, and no gradient that is no number."""
    logs = torch.tensor([[-math.inf, -math.inf, 0.0, -1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    response = mask(3, width=5)
    for most in (None, torch.tensor([9.0])):
        found = expected_length(logs, response, most)
        assert found.item() == 3
        (slope,) = torch.autograd.grad(found.sum(), logs)
        assert slope.isfinite().all()
    assert expected_length(logs, mask(0, width=5), torch.tensor([9.0])).item() == 0


def test_survival_skips_what_is_no_response() -> None:
    """The prompt's rows and the padding's count for nothing, whatever stands there."""
    logs = torch.tensor([[0.0, -0.5, -1.0, -2.0, 0.0]], dtype=torch.float64)
    response = torch.tensor([[0, 1, 1, 1, 0]])
    inside, after = survival(logs, response)
    p, q, r = (math.exp(x) for x in (-0.5, -1.0, -2.0))
    assert inside[0].tolist() == pytest.approx([0, 1, 1 - p, (1 - p) * (1 - q), 0])
    assert after.item() == pytest.approx((1 - p) * (1 - q) * (1 - r))
    shifted, _ = survival(logs[:, 1:4], torch.ones(1, 3))
    torch.testing.assert_close(shifted, inside[:, 1:4])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mode": "sampled"}, "mode must be one of mask, rollout, survival"),
        ({"mode": "rollout"}, "mode rollout needs end_logprobs"),
        ({"end_logprobs": torch.zeros(2, 4)}, "mode mask takes no end_logprobs"),
        ({"mode": "rollout", "end_logprobs": torch.zeros(2, 5)}, r"end_logprobs must be \(2, 4\)"),
        ({"student_mask": torch.ones(4)}, r"The masks must be .* got \(4,\), \(2, 6\), \(2,\)"),
        ({"teacher_mask": torch.ones(3, 6)}, r"got \(2, 4\), \(3, 6\), \(2,\)"),
        ({"required_fields_present": torch.ones(2, 1)}, r"got \(2, 4\), \(2, 6\), \(2, 1\)"),
        ({"student_mask": torch.ones(2, 0)}, "none of them empty"),
        ({"hinge": -0.1}, "hinge must be at least 0"),
        ({"hinge": math.nan}, "hinge must be at least 0"),
        ({"slope": -1.0}, "slope must be at least 0"),
    ],
)
def test_what_is_refused(change: dict[str, Any], says: str) -> None:
    given = {
        "student_mask": torch.ones(2, 4),
        "teacher_mask": torch.ones(2, 6),
        "required_fields_present": torch.zeros(2, dtype=torch.bool),
    }
    with pytest.raises(ValidationError, match=says):
        length_aware_kd_loss(**{**given, **change})
