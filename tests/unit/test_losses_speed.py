"""The distillation document's tests of the latency-aware losses, under its names: the functions themselves, with a real
tokenizer, and the exact values of the specification."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dfastllm
from dfastllm.distill import early_tool_call_loss, length_aware_kd_loss
from dfastllm.distill.losses import early_tool_ramp, envelope_ids
from dfastllm.text import Tokenizer

B, T = 2, 8


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(Path(dfastllm.__file__).parent / "shipped" / "demo-ar")


def mask(length: int, batch: int = B, width: int = 32) -> Tensor:
    return (torch.arange(width) < length).float().expand(batch, width)


def early(
    tokenizer: Tokenizer, should: tuple[bool, bool], prefix: Tensor | None, ramp_t: float = 1.0
) -> tuple[Tensor, dict[str, float], Tensor]:
    torch.manual_seed(3)
    logits = torch.randn(B, T, tokenizer.vocab_size, requires_grad=True)
    loss, found = early_tool_call_loss(
        logits, torch.zeros(B, T, dtype=torch.long), torch.tensor(should), tokenizer, prefix, N=4, ramp_t=ramp_t
    )
    return loss, found, logits


def test_length_kd_completeness_exemption() -> None:
    """16 tokens for 8, of four answers of which two are complete: half are penalised; none where all are complete."""
    required = torch.tensor([True, False, True, False])
    loss, found = length_aware_kd_loss(mask(16, 4), mask(8, 4), required)
    assert found["len_kd.frac_penalized"] == 0.5
    assert loss.item() == pytest.approx(0.5 * 0.85)
    assert length_aware_kd_loss(mask(16, 4), mask(8, 4), torch.ones(4, dtype=torch.bool))[0].item() == 0.0


def test_length_kd_no_excess() -> None:
    """A student as long as its teacher, or shorter, pays nothing."""
    required = torch.tensor([False, False])
    loss, found = length_aware_kd_loss(mask(16), mask(16), required)
    assert loss.item() == 0.0
    assert found["len_kd.median_rel_excess"] == 0.0
    loss, found = length_aware_kd_loss(mask(8), mask(16), required)
    assert loss.item() == 0.0
    assert found["len_kd.median_rel_excess"] == 0.0


def test_length_kd_hinge() -> None:
    required = torch.tensor([False, False])
    loss, found = length_aware_kd_loss(mask(19), mask(16), required)
    assert loss.item() > 0
    assert found["len_kd.median_rel_excess"] > 0.15
    assert length_aware_kd_loss(mask(23), mask(20), required)[0].item() == 0.0
    loss, _ = length_aware_kd_loss(mask(25), mask(20), required)
    assert loss.item() == pytest.approx(0.1)
    summed, _ = length_aware_kd_loss(mask(25), mask(20), required, reduction="sum")
    assert summed.item() == pytest.approx(B * loss.item())
    with pytest.raises(ValueError):
        length_aware_kd_loss(mask(25), mask(20), required, reduction="none")


def test_early_tool_ce_only_when_needed(tokenizer: Tokenizer) -> None:
    prefix = torch.full((B, 4), -100)
    prefix[0] = torch.tensor([1, 2, 3, 4])
    loss, found, logits = early(tokenizer, (True, False), prefix)
    assert found["early_tool.frac_should_use"] == 0.5
    assert found["early_tool.frac_target_available"] == 1.0
    wanted = -logits[0, :4].double().log_softmax(-1)[torch.arange(4), prefix[0]].mean()
    assert loss.item() == pytest.approx(0.2 * wanted.item(), rel=1e-5)
    (slope,) = torch.autograd.grad(loss, logits)
    assert slope[0, :4].abs().sum() > 0
    assert slope[1].abs().sum() == 0


def test_early_tool_json_prior_fallback(tokenizer: Tokenizer) -> None:
    loss, found, logits = early(tokenizer, (True, False), None)
    assert found["early_tool.frac_target_available"] == 0.0
    masses = logits[0, 0].double().softmax(-1)[envelope_ids(tokenizer)]
    wanted = -math.log(masses.sum().item())
    assert found["early_tool.mean_json_prior_nll0"] == pytest.approx(wanted, rel=1e-5)
    assert loss.item() == pytest.approx(0.02 * wanted, rel=1e-5)


def test_early_tool_masked_when_not_needed(tokenizer: Tokenizer) -> None:
    for prefix in (None, torch.ones(B, 4, dtype=torch.long)):
        loss, found, _ = early(tokenizer, (False, False), prefix)
        assert loss.item() == 0.0
        assert loss.requires_grad
        assert found["early_tool.frac_should_use"] == 0.0


def test_early_tool_ramp(tokenizer: Tokenizer) -> None:
    prefix = torch.tensor([[1, 2, 3, 4]] * B)
    steps = (0, 25, 50, 75, 100, 500)
    values = [early(tokenizer, (True, True), prefix, early_tool_ramp(step, 100))[0].item() for step in steps]
    assert values[0] == 0.0
    assert values == sorted(values)
    assert values[2] == pytest.approx(values[4] / 2)
    assert values[5] == values[4] > 0
