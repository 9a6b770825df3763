"""What torchao's QATConfig would train a layer on, beside what is served. The comparison, not the path: skipped without
torchao, which nothing here needs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dfastllm.distill.qat.linear import QatLinear, Rounding, Switch
from dfastllm.kernels import linear as kernels
from dfastllm.quant import FORMATS, quantise


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_other_numbers_than_the_kernels() -> None:
    """int8 inputs and int4 weights in groups of 32, the nearest that it has to w4: asymmetric inputs, one scale per row
    instead of per 32, weight scales in float32 over 7.5 instead of float16 over 7. So it trains further from what is
    served than rounding itself takes a layer from float; ours is what is served."""
    pytest.importorskip("torchao")
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(128, 64, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(64, 128, generator=generator))
    x = torch.randn(16, 128, generator=generator)
    theirs = nn.Sequential(copy.deepcopy(linear))
    inputs = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weights = IntxFakeQuantizeConfig(torch.int4, group_size=32)
    quantize_(theirs, QATConfig(activation_config=inputs, weight_config=weights, step="prepare"))
    ours = QatLinear(linear, Rounding(FORMATS["w4"], search=False, name="weight"), Switch(True))
    with torch.no_grad():
        served = kernels.linear(x, kernels.pack(quantise(linear.weight, "w4", search=False)))
        assert ours(x).equal(served)
        cost = apart(served, linear(x))
        assert 0.03 < apart(theirs(x), linear(x)) < 0.15  # it rounds about as coarsely
        assert apart(theirs(x), served) > cost
