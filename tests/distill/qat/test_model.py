"""A whole model made ready: names, bits with rounding off, what is refused, state."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from dfastllm.distill.qat import QatConfig, prepare_qat
from dfastllm.distill.qat.linear import QatEmbedding, QatHead, QatLinear
from dfastllm.errors import CheckpointError, UnsupportedError, ValidationError
from dfastllm.models import FAMILIES, tiny
from dfastllm.models.checkpoint import quantisable
from dfastllm.quant import quantise
from tests.kit.convert_models import SIZES, grouped
from tests.kit.qat_students import logits, texts, trained


@pytest.mark.parametrize("family", FAMILIES)
def test_off_is_the_plain_model_to_the_bit(family: str) -> None:
    """The same parameters under the same names, and the same logits and gradients, until it is switched on and after it
    is switched off again."""
    model, plain = tiny(family, **grouped(family)), tiny(family, **grouped(family))
    model.requires_grad_(True)
    before = dict(model.named_parameters())
    ids = texts(0)
    plain.requires_grad_(True)
    wanted = logits(plain, ids)
    wanted.square().mean().backward()
    qat = prepare_qat(model, QatConfig(enabled=True, format="w4"))
    assert not qat.enabled
    after = dict(model.named_parameters())
    assert list(after) == list(before) == list(model.state_dict())
    assert all(after[name] is before[name] for name in before)
    assert sorted(quantisable(model)) == sorted(quantisable(plain))
    assert set(qat.roundings) == set(quantisable(plain))
    qat.enable()
    assert not logits(model, ids).equal(wanted)
    qat.disable()
    found = logits(model, ids)
    assert found.equal(wanted)
    found.square().mean().backward()
    for name, parameter in plain.named_parameters():
        gradient = after[name].grad
        if gradient is None or parameter.grad is None:  # of experts that no row chose; a bias steers the choice
            assert gradient is parameter.grad
            assert ".experts." in name or name.endswith("router.bias")
        else:
            assert gradient.equal(parameter.grad), name


@pytest.mark.parametrize("head", ["", "float", "w8"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_rounds(tied: bool, head: str) -> None:
    """All matrices of layers; embedding and head in their own format, or not at all; norms never."""
    qat = trained("w4", "qwen3", tied=tied, head=head, steps=1)
    model = qat.model
    rounds = {name for name, m in model.named_modules() if isinstance(m, QatLinear | QatEmbedding | QatHead)}
    layers = {name for name, m in model.named_modules() if name.startswith("layers.") and isinstance(m, nn.Linear)}
    outer = set() if head == "float" else {"embed", "lm_head"}
    assert rounds == layers | outer
    assert len(layers) == 14
    kinds = {name: weight.format for name, weight in qat.convert().items()}
    assert {kinds[f"{name}.weight"] for name in layers} == {"w4g"}
    names = set() if head == "float" else {"embed.weight"} | (set() if tied else {"lm_head.weight"})
    assert {name: kinds[name] for name in kinds if not name.startswith("layers.")} == dict.fromkeys(
        names, head or "w8g"
    )


def test_gradients_reach_every_parameter() -> None:
    qat = trained("w4", "qwen2", tied=True, steps=0)
    logits(qat.model, texts(1)).square().mean().backward()
    for name, parameter in qat.model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all())
        assert parameter.grad.abs().sum() > 0, name


def test_training_mode_is_kept() -> None:
    model = tiny("llama", **SIZES, tied=True).eval()
    prepare_qat(model, QatConfig(enabled=True))
    assert not any(module.training for module in model.modules())


def test_what_is_refused() -> None:
    config = QatConfig(enabled=True, format="w4")
    model = tiny("llama", **SIZES)
    prepare_qat(model, config)
    with pytest.raises(ValidationError, match="already"):
        prepare_qat(model, config)
    odd = tiny("llama", **{**SIZES, "intermediate_size": 48})
    kinds = {name: type(module) for name, module in odd.named_modules()}
    with pytest.raises(UnsupportedError, match=r"down_proj.weight has 48 inputs.*Use w8"):
        prepare_qat(odd, config)
    assert {name: type(module) for name, module in odd.named_modules()} == kinds
    prepare_qat(odd, QatConfig(enabled=True, format="w8"))


def test_conversion_names_a_broken_weight() -> None:
    qat = trained("w8", steps=0)
    with torch.no_grad():
        qat.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight holds 1 NaN"):
        qat.convert()


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("format", ["w8", "w8g", "w4"])
def test_conversion_is_what_was_trained_on(format: str, search: bool) -> None:
    """The very codes and scales of the last forward pass, which are those that the quantiser makes of the weights."""
    qat = trained(format, search=search)
    logits(qat.model, texts(3))
    for name, weight in qat.convert().items():
        parameter = qat.model.get_parameter(name)
        wanted = quantise(parameter, qat.roundings[name].format, search=search)
        used = qat.roundings[name].of(parameter)
        assert used is not None
        for other in (wanted, used.natural):
            assert weight.codes.equal(other.codes), name
            assert weight.scales is not None
            assert other.scales is not None
            assert weight.scales.equal(other.scales), name


def test_state() -> None:
    qat, other = trained("w4", steps=0), trained("w4", steps=0)
    state = json.loads(json.dumps(qat.state()))
    other.disable()
    other.load_state(state)
    assert other.enabled
    other.load_state({**state, "enabled": False})
    assert not other.enabled
    wrong: list[dict[str, Any]] = [{}, {**state, "enabled": 1}, {**state, "more": 1}]
    for bad in wrong:
        with pytest.raises(CheckpointError, match="unreadable"):
            other.load_state(bad)
    for name, value in (("format", "w8"), ("head", "float"), ("search", False)):
        with pytest.raises(CheckpointError, match=f"trained with {name}"):
            other.load_state({**state, name: value})


def test_a_copy_is_whole() -> None:
    """A deep copy rounds and switches on its own, its tied head following its own embedding."""
    qat = trained("w4", tied=True, steps=1)
    ids = texts(5)
    wanted = logits(qat.model, ids)
    twin = copy.deepcopy(qat)
    assert logits(twin.model, ids).equal(wanted)
    with torch.no_grad():
        twin.model.embed.weight.mul_(2)
    assert not logits(twin.model, ids).equal(wanted)
    twin.disable()
    assert logits(qat.model, ids).equal(wanted)
