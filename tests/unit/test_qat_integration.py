"""Quantisation-aware training as the distillation document lists it: when it starts, its keys, its stability check."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dfastllm.distill import check_qat_stability, should_enable_qat
from dfastllm.distill.qat import QatConfig, prepare_qat
from dfastllm.models import tiny
from tests.kit.convert_models import SIZES
from tests.kit.qat_students import texts


def test_qat_disabled() -> None:
    for config in ({}, None, {"enabled": False}, {"enabled": False, "start_fraction": 0.0}):
        assert not should_enable_qat(900, 1000, config)


def test_qat_enabled_at_start_fraction() -> None:
    config = {"enabled": True, "start_fraction": 0.8}
    assert not should_enable_qat(0, 1000, config)
    assert not should_enable_qat(799, 1000, config)
    assert should_enable_qat(800, 1000, config)
    assert should_enable_qat(999, 1000, config)


def test_qat_config_parameters() -> None:
    """The document's keys, and that they are used: bits choose the format of the weights that the model rounds to."""
    keys = {"enabled": True, "start_fraction": 0.8, "lr_multiplier": 0.1, "weight_bits": 4, "act_bits": 8}
    assert should_enable_qat(800, 1000, keys)
    config = QatConfig.of(keys)
    assert config.lr_multiplier == 0.1
    qat = prepare_qat(tiny("llama", **SIZES), config)
    assert {name: weight.format for name, weight in qat.convert().items() if name.startswith("layers.0.mlp")} == {
        f"layers.0.mlp.{part}_proj.weight": "w4g" for part in ("gate", "up", "down")
    }


class Broken(nn.Module):
    """A causal LM by its looks, whose logits are not finite, or whose forward pass fails."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error = error

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        logits = torch.zeros(*input_ids.shape, 10)
        logits[0, 0, 0] = torch.nan
        return logits


def batch() -> dict[str, Tensor]:
    ids = texts(0)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def test_stability_check_no_nan() -> None:
    model = tiny("llama", **SIZES).train()
    qat = prepare_qat(model, QatConfig(enabled=True))
    qat.enable()
    found = check_qat_stability(model, batch())
    assert found["has_nan"] == 0.0
    assert 0.98 < float(found["cosine_sim"]) < 1.0
    assert "error" not in found
    assert model.training


def test_stability_check_with_nan() -> None:
    model = Broken().train()
    assert check_qat_stability(model, batch())["has_nan"] == 1.0
    assert model.training


def test_stability_check_error_handling() -> None:
    model = Broken(RuntimeError("the device is gone")).train()
    found = check_qat_stability(model, batch())
    assert found["has_nan"] == 1.0
    assert found["error"] == "RuntimeError: the device is gone"
    assert model.training
