"""A temperature for every row, by the teacher's entropy."""

from __future__ import annotations

import math

import pytest
import torch

from dfastllm.distill.losses import Sparse, entropy_temperature, teacher_entropy
from dfastllm.errors import ValidationError
from tests.kit import brute_losses


def entropy(p: list[float]) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


def test_entropies_are_their_definition() -> None:
    logits = torch.randn(2, 3, 8) * 2
    wanted = [entropy(brute_losses.softmax(row.double().numpy()).tolist()) for row in logits.view(-1, 8)]
    assert teacher_entropy(logits, chunk=4).flatten().tolist() == pytest.approx(wanted, abs=1e-5)
    log_p, ids = logits.log_softmax(-1).topk(2, -1)
    buckets = [[*row, 1 - sum(row)] for row in log_p.view(-1, 2).exp().double().tolist()]
    found = teacher_entropy(Sparse(ids, log_p), chunk=4)
    assert found.shape == (2, 3)
    assert found.flatten().tolist() == pytest.approx([entropy(row) for row in buckets], abs=1e-5)


def test_a_sure_teacher_is_smoothed_more() -> None:
    logits = torch.zeros(3, 64)
    logits[0, 0] = 1e4  # sure
    logits[1, :4] = 50.0  # one of four: log 4 nats
    found = entropy_temperature(logits, sure=3.0, unsure=1.0, ceiling=2.0)
    assert found.tolist() == pytest.approx([3.0, 3 - 2 * math.log(4) / 2, 1.0], abs=1e-4)
    turned = entropy_temperature(logits, sure=1.0, unsure=2.0, ceiling=2.0)
    assert turned.tolist() == pytest.approx([1.0, 1 + math.log(4) / 2, 2.0], abs=1e-4)


def test_a_row_of_which_nothing_is_known_and_one_that_is_never_said() -> None:
    nothing = Sparse(torch.zeros(1, 2, dtype=torch.int64), torch.full((1, 2), -torch.inf))
    assert teacher_entropy(nothing).item() == 0
    padded = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert teacher_entropy(padded).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("name", ["sure", "unsure", "ceiling"])
def test_numbers_out_of_range(name: str) -> None:
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ValidationError, match=name):
            entropy_temperature(torch.zeros(1, 4), **{name: wrong})
