"""One rounding layer: its forward pass against the kernels, its gradients against autograd and brute force."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dfastllm.distill.qat.linear import QatEmbedding, QatHead, QatLinear, Rounding, Switch
from dfastllm.kernels import linear as kernels
from dfastllm.kernels import linear_plain as plain
from dfastllm.kernels.activations import act_kind
from dfastllm.kernels.packed import GROUP
from dfastllm.quant import FORMATS, quantise

N, K, ROWS = 70, 96, 9
OWN = [name for name, format in FORMATS.items() if not format.turned]  # others are not trained on


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounding(format: str, search: bool = True) -> Rounding:
    return Rounding(FORMATS[format], search=search, name="weight")


def layer(format: str, *, search: bool = True, on: bool = True, weight: Tensor | None = None) -> QatLinear:
    linear = nn.Linear(K, N)
    with torch.no_grad():
        linear.weight.copy_(seeded(N, K, seed=1) if weight is None else weight)
        linear.bias.copy_(seeded(N, seed=2))
    return QatLinear(linear, rounding(format, search), Switch(on))


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("format", OWN)
def test_forward_is_the_kernel(format: str, search: bool) -> None:
    """To the bit, on codes and scales of `quantise`; and the product itself within float32 of a float64 one."""
    module, x = layer(format, search=search), seeded(ROWS, K)
    weight = quantise(module.weight, format, search=search)
    acts = kernels.prepare(x, act_kind(weight.format))
    assert module(x).equal(kernels.linear(acts, kernels.pack(weight), module.bias.detach()))
    assert module(x.view(3, 3, K)).equal(module(x).view(3, 3, N))
    twin = plain.prepare(x, act_kind(weight.format))
    wanted = twin.dequantise().double() @ weight.dequantise().double().T + module.bias.double()
    assert (module(x) - wanted).abs().max() < 1e-4
    assert (module(x) - nn.functional.linear(x, module.weight, module.bias)).abs().max() > 1e-3  # it does round


@pytest.mark.parametrize("format", OWN)
def test_off_is_the_plain_layer(format: str) -> None:
    module, x = layer(format, on=False), seeded(ROWS, K)
    assert module(x).equal(nn.functional.linear(x, module.weight, module.bias))
    assert [name for name, _ in module.named_parameters()] == ["weight", "bias"]


@pytest.mark.parametrize("format", OWN)
def test_gradients_are_straight_through(format: str) -> None:
    """Against autograd over x + (rounded(x) - x).detach(), the textbook form, where nothing is clipped."""
    module, gradient = layer(format, search=False), seeded(ROWS, N, seed=3)
    x = seeded(ROWS, K).requires_grad_()
    module(x).backward(gradient)
    x2, w2, b2 = (t.detach().clone().requires_grad_() for t in (x, module.weight, module.bias))
    weight = quantise(w2, format, search=False)
    rows = plain.prepare(x2.detach(), act_kind(weight.format)).dequantise()
    shown = nn.functional.linear(x2 + (rows - x2).detach(), w2 + (weight.dequantise() - w2).detach(), b2)
    shown.backward(gradient)
    assert x.grad is not None
    assert module.weight.grad is not None
    assert module.bias.grad is not None
    assert torch.allclose(x.grad, x2.grad, atol=1e-5)
    assert torch.allclose(module.weight.grad, w2.grad, atol=1e-5)
    assert torch.allclose(module.bias.grad, b2.grad, atol=1e-6)


@pytest.mark.parametrize("format", ["w4", "w4m", "w8", "w8g"])
def test_clipped_weights_only_come_back(format: str) -> None:
    """By brute force over every weight: those beyond the range keep a gradient that leads inside, and only that."""
    weight = seeded(N, K, seed=4)  # the search clips where that pays
    module, gradient = layer(format, weight=weight), seeded(ROWS, N, seed=3)
    x = seeded(ROWS, K)
    module(x).backward(gradient)
    natural = quantise(weight, format)
    rows = plain.prepare(x, act_kind(natural.format)).dequantise()
    free = (gradient.T @ rows).tolist()
    assert natural.scales is not None
    assert module.weight.grad is not None
    group, scales = GROUP.get(natural.format, K), natural.scales.float().abs().view(N, -1).tolist()
    beyond, found = (weight - natural.dequantise()).tolist(), module.weight.grad.tolist()
    clipped = 0
    for i in range(N):
        for j in range(K):
            outside = abs(beyond[i][j]) > 0.502 * scales[i][j // group]
            outward = outside and beyond[i][j] * free[i][j] < 0
            clipped += outside
            assert found[i][j] == pytest.approx(0.0 if outward else free[i][j], abs=1e-5)
    assert clipped > 5


def test_zeros_can_be_trained() -> None:
    """A group of zeros has a scale of 0 and no range to be outside of."""
    module = layer("w4", weight=torch.full((N, K), 1e-12))
    module(seeded(ROWS, K)).backward(seeded(ROWS, N, seed=3))
    assert module.weight.grad is not None
    assert bool((module.weight.grad != 0).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_weight_shows_as_it_would(bad: float) -> None:
    weight = seeded(N, K, seed=1)
    weight[3, 5] = bad
    module, x = layer("w4", weight=weight), seeded(ROWS, K)
    found, wanted = module(x), nn.functional.linear(x, module.weight, module.bias)
    assert found.isnan().equal(wanted.isnan())
    assert not bool(found[:, 3].isfinite().any())
    assert bool(found[:, :3].isfinite().all())
    broken_input = seeded(ROWS, K)
    broken_input[2, 7] = bad
    assert bool(layer("w8g")(broken_input)[2].isnan().all())


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "muon": lambda p: torch.optim.Muon(p, lr=0.1, adjust_lr_fn="match_rms_adamw"),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_noticed(name: str) -> None:
    """What was rounded before the step is not used after it; without one, it is not made again."""
    module, x = layer("w4"), seeded(ROWS, K)
    first = module.rounding.of(module.weight)
    assert module.rounding.of(module.weight) is first
    module(x).sum().backward()
    OPTIMIZERS[name]([module.weight]).step()
    after = module.rounding.of(module.weight)
    assert after is not None
    assert first is not None
    assert not after.natural.codes.equal(first.natural.codes)
    assert after.natural.codes.equal(quantise(module.weight, "w4").codes)


def test_other_changes_are_noticed() -> None:
    module = layer("w8")
    other = seeded(N, K, seed=9)
    for change in (
        lambda: module.load_state_dict({"weight": other, "bias": torch.zeros(N)}),
        lambda: module.weight.detach().mul_(2),
        lambda: nn.init.zeros_(module.weight),
        lambda: setattr(module, "weight", nn.Parameter(other.clone())),
    ):
        module.rounding.of(module.weight)
        change()
        found = module.rounding.of(module.weight)
        assert found is not None
        assert found.natural.dequantise().equal(quantise(module.weight, "w8").dequantise())


@pytest.mark.parametrize("format", OWN)
@pytest.mark.parametrize("whole", [True, False])
def test_embedding_shows_the_rows_that_are_served(format: str, whole: bool) -> None:
    embed = nn.Embedding(50, K, _weight=seeded(50, K))
    module = QatEmbedding(embed, rounding(format), Switch(True), whole=whole)
    ids = torch.tensor([[4, 49, 4], [0, 7, 4]])
    found = module(ids)
    wanted = kernels.weight_rows(kernels.pack(quantise(embed.weight, format)), ids.flatten())
    assert found.equal(wanted.view(2, 3, K))
    found.sum().backward()
    assert embed.weight.grad is not None
    counts = torch.zeros(50).index_add_(0, ids.flatten(), torch.ones(6))
    assert embed.weight.grad.equal(counts[:, None].expand(50, K))
    module.switch.on = False
    assert module(ids).equal(embed.weight[ids])
    assert module(ids[:, :0]).shape == (2, 0, K)


def test_embedding_with_a_broken_row() -> None:
    weight = seeded(50, K)
    weight[7] = torch.nan
    for whole in (True, False):
        module = QatEmbedding(nn.Embedding(50, K, _weight=weight), rounding("w8g"), Switch(True), whole=whole)
        assert bool(module(torch.tensor([7])).isnan().all())
        assert bool(module(torch.tensor([3])).isfinite().all())


@pytest.mark.parametrize("factor", [1.0, 0.125, 3.7])
def test_head_rounds_what_the_engine_rounds(factor: float) -> None:
    """The engine multiplies the hidden rows by logits_factor before it rounds them, the model the logits after."""
    embed = nn.Embedding(N, K, _weight=seeded(N, K))
    switch = Switch(True)
    tied = QatHead(QatEmbedding(embed, rounding("w8g"), switch, whole=True), factor=factor)
    linear = nn.Linear(K, N, bias=False)
    linear.weight = embed.weight
    apart = QatLinear(linear, rounding("w8g"), switch, factor=factor)
    x = seeded(ROWS, K)
    served = kernels.linear(x * factor, kernels.pack(quantise(embed.weight, "w8g")))
    for head in (tied, apart):
        assert torch.allclose(head(x) * factor, served, rtol=3e-7, atol=0)
        assert factor != 1 or head(x).equal(served)
    assert list(tied.parameters()) == []
    switch.on = False
    assert tied(x).equal(nn.functional.linear(x, embed.weight))


def test_autocast_does_not_reach_inside() -> None:
    module, x = layer("w4"), seeded(ROWS, K).requires_grad_()
    gradient = seeded(ROWS, N, seed=3)
    module(x).backward(gradient)
    assert module.weight.grad is not None
    plain_gradient, module.weight.grad = module.weight.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        found = module(x)
        assert found.equal(layer("w4")(x))
        found.backward(gradient)
    assert module.weight.grad.equal(plain_gradient)


@pytest.mark.parametrize("format", OWN)
def test_without_native_kernels(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch form, which other devices use: the same codes and scales, sums in another order."""
    module, x = layer(format), seeded(ROWS, K)
    native = module(x)
    for place in ("dfastllm.distill.qat.linear.native", "dfastllm.kernels.linear.native"):
        monkeypatch.setattr(place, lambda: None)
    module.rounding.forget()
    found = module(x)
    assert torch.allclose(found, native, atol=2e-4)
    made = module.rounding.of(module.weight)
    assert made is not None
    assert made.read is made.natural
