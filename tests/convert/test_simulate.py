"""The torch simulation of quantised kernels, against its definition written out."""

from __future__ import annotations

import pytest
import torch

from dfastllm.convert.simulate import SimulatedLinear, round_activations, simulate
from dfastllm.errors import (
    ValidationError,
)
from dfastllm.models import tiny
from dfastllm.quant import quantise
from tests.kit.convert_models import SIZES


def test_activations_round_as_documented() -> None:
    x = torch.tensor([[1.0, -2.0, 0.5, *[0.0] * 29, 100.0, 7.0, *[0.0] * 30], [0.0] * 64])
    row, group = round_activations(x, "row"), round_activations(x, "group")
    step = 100 / 127
    assert row[0, :3].tolist() == pytest.approx([step, -3 * step, step])
    assert group[0, :3].tolist() == pytest.approx([x * 2 / 127 for x in (64, -127, 32)])
    assert row[1].tolist() == group[1].tolist() == [0.0] * 64
    assert round_activations(x, "none") is x
    with pytest.raises(ValidationError, match="do not divide 48"):
        round_activations(torch.zeros(2, 48), "group")


@pytest.mark.parametrize("tied", [False, True])
def test_simulation_rounds_every_matrix_product(tied: bool) -> None:
    model = tiny("qwen2", **{**SIZES, "tied": tied})
    named = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights = [(n, quantise(p, "w8g") if p.ndim == 2 else p) for n, p in named.items()]
    simulate(model, weights)
    kinds = {type(m) for n, m in model.named_modules() if n.endswith("_proj") or n == "lm_head"}
    assert kinds == {SimulatedLinear}
    attention = model.layers[0].attn
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    weight, bias = named["layers.0.attn.q_proj.weight"], named["layers.0.attn.q_proj.bias"]
    wanted = round_activations(x, "group") @ quantise(weight, "w8g").dequantise().T + bias
    assert torch.allclose(attention.q_proj(x), wanted, atol=1e-6)
    head = named["embed.weight" if tied else "lm_head.weight"]
    assert torch.allclose(
        model.head(x), round_activations(x, "group") @ quantise(head, "w8g").dequantise().T, atol=1e-6
    )
