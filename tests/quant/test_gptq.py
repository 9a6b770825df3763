"""GPTQ against rounding to nearest on correlated inputs, and against the exact optimum where that can be listed."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfastllm.errors import CheckpointError, UnsupportedError, ValidationError
from dfastllm.kernels.packed import QTensor
from dfastllm.quant import gptq, quantise
from dfastllm.quant.calibrate import InputStatistics, recording
from dfastllm.quant.formats import FORMATS


def correlated(k: int = 128, rows: int = 1000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(weight [48, k], inputs [rows, k]) whose inputs share 16 directions."""
    draws = torch.Generator().manual_seed(seed)
    mixing = torch.randn(16, k, generator=draws) * torch.linspace(2, 0.2, 16)[:, None]
    inputs = torch.randn(rows, 16, generator=draws) @ mixing + 0.2 * torch.randn(rows, k, generator=draws)
    return torch.randn(48, k, generator=draws), inputs


def output_error(found: QTensor, weight: Tensor, inputs: Tensor) -> float:
    """|(W - Q) X| / |W X|, float64."""
    wide, x = weight.double(), inputs.double().T
    return float(((found.dequantise().double() - wide) @ x).norm() / (wide @ x).norm())


@pytest.mark.parametrize("name", [name for name, format in FORMATS.items() if not format.stepped])
@pytest.mark.parametrize("act_order", [False, True])
def test_beats_rounding_to_nearest(name: str, act_order: bool) -> None:
    weight, inputs = correlated()
    held_out = correlated(rows=400, seed=0)[1][:200]
    found = gptq(weight, name, inputs.T @ inputs, act_order=act_order)
    nearest = quantise(weight, name, search=False)
    aware = quantise(weight, name, importance=inputs.square().mean(0))
    for x in (inputs, held_out):
        assert output_error(found, weight, x) < 0.5 * output_error(nearest, weight, x)
        assert output_error(found, weight, x) < 0.6 * output_error(aware, weight, x)


def test_steps_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="weight: GPTQ does not round to w4r"):
        gptq(torch.zeros(4, 64), "w4r", torch.eye(64))


def test_without_correlation_it_is_rounding() -> None:
    """A diagonal gram matrix spreads nothing: codes are those of the weighted search itself."""
    weight, _ = correlated(64)
    gram = torch.eye(64) * 7
    assert gptq(weight, "w4", gram).codes.equal(quantise(weight, "w4", importance=torch.ones(64)).codes)
    assert gptq(weight, "w8", gram, act_order=True).codes.equal(quantise(weight, "w8", importance=torch.ones(64)).codes)


def test_near_the_optimum_of_all_roundings() -> None:
    """4 inputs in a w8 row with a coarse scale: every choice of floor or ceiling, and GPTQ among the best of them."""
    draws = torch.Generator().manual_seed(1)
    ratios, nearest = [], []
    for _ in range(30):
        k = 5
        weight = torch.randn(1, k, generator=draws)
        weight[0, -1] = 60.0  # makes the step about 0.47, the others round coarsely
        x = torch.randn(50, 2, generator=draws) @ torch.randn(2, k, generator=draws)
        x = x + 0.05 * torch.randn(50, k, generator=draws)
        found = gptq(weight, "w8", x.T @ x)
        assert found.scales is not None
        step = float(found.scales[0])
        best = math.inf
        for up in itertools.product((0, 1), repeat=k):
            codes = (weight[0] / step).floor() + torch.tensor(up)
            best = min(best, float(((codes * step - weight[0]) @ x.T).norm()))

        ratios.append(float(((found.dequantise() - weight) @ x.T).norm()) / best)
        nearest.append(float((((weight / step).round() * step - weight) @ x.T).norm()) / best)
    assert min(nearest) >= 1 - 1e-5, "better than the best of all roundings"
    assert sum(ratios) / len(ratios) < 0.75 * sum(nearest) / len(nearest)
    assert sum(ratio < 1.05 for ratio in ratios) > sum(ratio < 1.05 for ratio in nearest)


def test_dead_and_dominant_inputs() -> None:
    """Inputs that are always zero, or a million times the others, neither fail nor spoil the rest."""
    weight, inputs = correlated(64)
    inputs[:, 3] = 0
    inputs[:, 10] *= 1e6
    for act_order in (False, True):
        found = gptq(weight, "w4", inputs.T @ inputs, act_order=act_order)
        assert bool(found.dequantise().isfinite().all())
        assert output_error(found, weight, inputs) < 0.15


def test_a_dead_input_needs_no_damping() -> None:
    """An input that was always zero says nothing of its weights, and does not keep the others from being exact."""
    weight, inputs = correlated(64)
    inputs[:, 3] = 0
    found = gptq(weight, "w4", inputs.T @ inputs, damping=0.0)
    assert bool(found.dequantise().isfinite().all())
    assert output_error(found, weight, inputs) < 0.5 * output_error(quantise(weight, "w4"), weight, inputs)


def test_fewer_rows_than_inputs() -> None:
    weight, inputs = correlated(128, rows=20)
    found = gptq(weight, "w4m", inputs.T @ inputs)
    assert output_error(found, weight, inputs) < 0.5 * output_error(quantise(weight, "w4m"), weight, inputs)


def test_bad_input() -> None:
    weight, inputs = correlated(64)
    gram = inputs.T @ inputs
    with pytest.raises(ValidationError, match=r"q_proj: gram must be finite \[64, 64\], got \[32, 32\]"):
        gptq(weight, "w4", gram[:32, :32], name="q_proj")
    with pytest.raises(ValidationError, match="gram must be finite"):
        gptq(weight, "w4", gram * math.nan)
    with pytest.raises(ValidationError, match="no sum of outer products"):
        gptq(weight, "w4", torch.ones(64, 64) - 1e9 * torch.eye(64).flip(0))
    with pytest.raises(CheckpointError, match="q_proj holds"):
        gptq(weight * math.inf, "w4", gram, name="q_proj")
    with pytest.raises(UnsupportedError, match="has 48 inputs"):
        gptq(weight[:, :48], "w4", gram[:48, :48])


class Pair(nn.Module):
    """Two layers that read the same rows, one that reads others, one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)
        self.c, self.d = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) * self.b(x))  # type: ignore[no-any-return]


def test_recording() -> None:
    torch.manual_seed(0)
    model = Pair()
    batches = [torch.randn(5, 8), torch.randn(2, 3, 8)]
    inner = []
    with recording(dict(model.named_children()), gram=True) as found:  # type: ignore[arg-type]
        for x in batches:
            model(x)
            plain = [F.linear(x, layer.weight, layer.bias) for layer in (model.a, model.b)]
            inner.append((plain[0] * plain[1]).reshape(-1, 4))
    x = torch.cat([b.reshape(-1, 8) for b in batches]).double()
    assert set(found) == {"a", "b", "c"}
    for name in ("a", "b"):
        assert found[name].rows == 11
        assert found[name].gram is not None
        assert torch.allclose(found[name].gram.double(), x.T @ x, rtol=1e-4)
        assert torch.allclose(found[name].importance, x.square().mean(0).float(), rtol=1e-5)  # type: ignore[arg-type]
    y = torch.cat(inner).double()
    assert torch.allclose(found["c"].importance, y.square().mean(0).float(), rtol=1e-4)  # type: ignore[arg-type]
    assert InputStatistics.empty(4, gram=False).importance is None
    before = found["a"].rows
    model(batches[0])
    assert found["a"].rows == before, "the hooks stayed"


def test_layers_that_read_the_same_rows_share_their_statistics() -> None:
    model = Pair()
    with recording({"a": model.a, "b": model.b}, gram=True) as found:
        for _ in range(3):
            model(torch.randn(5, 8))
    assert found["a"] is found["b"]
    assert found["a"].rows == 15
