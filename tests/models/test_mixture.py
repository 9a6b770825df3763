"""Mixtures of experts in packed form: who goes where in the odd cases, shapes that fill no panel, rows that are not
finite, more rows than are summed at once, and lists that do not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dfastllm import assemble, models
from dfastllm.core import Span
from dfastllm.engine.batch import pack
from dfastllm.engine.pages import Pages, PageTable
from dfastllm.engine.runners.native import NativeRunner
from dfastllm.kernels import linear, native, set_threads
from dfastllm.kernels.packed import QTensor, unpack_panels
from dfastllm.models.packed import PackedDecoder, Routed
from tests.kit.convert_models import grouped
from tests.kit.without_native import without_native
from tests.models.test_program import native_logits, torch_logits

SHAPE: dict[str, Any] = {"hidden_size": 64, "heads": 4, "kv_heads": 2, "vocab_size": 96}
MIXTURES = ("qwen3_moe", "llada_moe", "llada2_moe", "sdar_moe")
IDS = torch.randint(1, 90, (40,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield
    set_threads(1)


@pytest.fixture(params=["native", "twin"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both forms of the packed forward."""
    if request.param == "twin":
        without_native(monkeypatch)
    elif native() is None:
        pytest.skip("no native kernels")
    return str(request.param)


def routers(model: models.Decoder) -> list[Any]:
    return [m for name, m in model.named_modules() if name.endswith("router")]


def close(model: models.Decoder, ids: Tensor = IDS) -> None:
    wanted = torch_logits(model, ids, torch.arange(len(ids)))
    assert (native_logits(assemble.pack(model), ids) - wanted).abs().max() <= 1e-4


@pytest.mark.parametrize("family", MIXTURES)
def test_equal_experts_are_chosen_by_their_number(family: str, kernels: str) -> None:
    """A router that tells nothing apart: every row goes to the same few, all others get no rows."""
    model = models.tiny(family, seed=4, **SHAPE).requires_grad_(False)
    for router in routers(model):
        router.weight.zero_()
        weights, chosen = router(torch.randn(3, 64))
        assert chosen.tolist() == [list(range(router.config.top_k))] * 3
        assert weights.std(dim=1).max() == 0
    close(model)
    before = native_logits(assemble.pack(model), IDS)
    last = [p for name, p in model.named_parameters() if ".experts.7." in name]
    assert last
    for parameter in last:
        parameter.add_(1.0)
    assert torch.equal(native_logits(assemble.pack(model), IDS), before)


@pytest.mark.parametrize(
    ("experts", "top_k", "groups", "kept"), [(1, 1, 1, 1), (5, 5, 1, 1), (12, 3, 4, 1), (12, 2, 12, 5), (100, 7, 10, 2)]
)
def test_routers_of_all_shapes(experts: int, top_k: int, groups: int, kept: int, kernels: str) -> None:
    """As many as there are, one a group, counts that fill no task of the pool; with biases that decide."""
    moe = models.tiny_config("llada2_moe").moe
    assert moe is not None
    moe = replace(moe, experts=experts, top_k=top_k, groups=groups, groups_kept=kept, intermediate_size=8)
    model = models.tiny("llada2_moe", seed=4, moe=moe, **SHAPE).requires_grad_(False)
    for router in routers(model):
        router.bias.copy_(torch.randn(experts, generator=torch.Generator().manual_seed(1)))
    close(model)


@pytest.mark.parametrize("weights", [None, "w8"])
@pytest.mark.parametrize(("hidden", "inner", "shared"), [(40, 33, 0), (72, 5, 10), (32, 97, 97)])
def test_sizes_that_fill_no_panel(hidden: int, inner: int, shared: int, weights: str | None) -> None:
    """Against the twin, on float weights and on those that are quantised by row."""
    moe = models.tiny_config("llada2_moe").moe
    assert moe is not None
    moe = replace(moe, intermediate_size=inner, shared_size=shared)
    heads = {"heads": 2, "kv_heads": 1, "head_dim": 8, "rope_dim": 4}
    shape = {**SHAPE, **heads, "hidden_size": hidden, "intermediate_size": 50, "moe": moe}
    packed = assemble.pack(models.tiny("llada2_moe", seed=4, **shape), weights)
    table = PageTable(Pages(8, 16))
    table.grow(40)
    step = pack([(Span(0, tuple(IDS.tolist()), "full", "none", want=tuple(range(40))), table, 0)])
    runner = NativeRunner(packed, 128, torch.float32, 16)
    twin = packed.logits(packed._run_plain(step, runner.kv, runner._scratch(3), None, None))
    assert (runner.run(step).logits() - twin).abs().max() <= 1e-4


def spans(many: list[list[int]]) -> list[tuple[Span, PageTable, int]]:
    pool = Pages(sum(-(-len(ids) // 16) for ids in many), 16)
    out = []
    for ids in many:
        table = PageTable(pool)
        table.grow(len(ids))
        out.append((Span(0, tuple(ids), "full", "none", want=tuple(range(len(ids)))), table, 0))
    return out


def packed_of(family: str, weights: str | None) -> PackedDecoder:
    return assemble.pack(models.tiny(family, seed=4, **{**grouped(family), **SHAPE}), weights)


@pytest.mark.parametrize("weights", [None, "w8", "w8g"])
@pytest.mark.parametrize("family", ["llada_moe", "llada2_moe"])
def test_a_row_that_is_not_finite_harms_no_other(family: str, weights: str | None, kernels: str) -> None:
    packed = packed_of(family, weights)
    table = unpack_panels(packed.embed).dequantise()
    table[7] = torch.nan
    table[8, 3] = torch.inf
    packed.embed, packed.head = linear.pack(QTensor("f32", table)), packed.head_weights
    runner = NativeRunner(packed, 256, torch.float32, 16)
    good = [[5, 9, 31, 44], [12, 3] * 5]
    wanted = [runner.run(pack(spans([ids]))).logits().clone() for ids in good]
    got = runner.run(pack(spans([good[0], [20, 7, 21], [8], good[1]]))).logits()
    assert torch.equal(got[:4], wanted[0])
    assert torch.equal(got[8:], wanted[1])
    assert got[4:8].isnan().any(dim=1).all()


def test_more_rows_than_are_summed_at_once() -> None:
    """8,192 outputs of experts are held at once; further rows take their turn."""
    packed = packed_of("llada_moe", "w8g")
    many = [torch.randint(1, 90, (60,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(75)]
    runner = NativeRunner(packed, 16, torch.float32, 16)
    assert 60 * 75 * 2 > 8192 > 60 * 74
    whole = runner.run(pack(spans(many))).logits()
    for i in (0, 67, 68, 74):
        alone = runner.run(pack(spans([many[i]]))).logits()
        assert torch.equal(whole[60 * i : 60 * i + 60], alone)


@pytest.mark.skipif(native() is None, reason="no native kernels")
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("fewer", "a router of 8 experts that chooses 2 in 1 of 1 groups, and experts: 7"),
        ("other", "do not fit each other"),
        ("format", "the same kind of rows"),
        ("router", r"a router must be contiguous .* \[any, 64\]"),
        ("type", "a router must be float32, bfloat16 or float16"),
        ("bias", r"a router's bias must be contiguous float32 \[8\]"),
    ],
)
def test_a_mixture_that_does_not_fit(wrong: str, said: str) -> None:
    """What the native forward checks, whoever made the list."""
    packed = packed_of("llada_moe", None)
    *ops, op = packed.layers[1]
    assert isinstance(op, Routed)
    coarse = packed_of("llada_moe", "w8").layers[1][-1]
    assert isinstance(coarse, Routed)
    changed: dict[str, Any] = {
        "fewer": {"experts": op.experts[1:]},
        "other": {"experts": (replace(op.experts[0], down=op.experts[0].gated), *op.experts[1:])},
        "format": {"experts": (*op.experts[1:], coarse.experts[0])},
        "router": {"router": op.router[:, 1:].contiguous()},
        "type": {"router": op.router.double()},
        "bias": {"bias": torch.zeros(7)},
    }[wrong]
    packed.layers = (packed.layers[0], (*ops, replace(op, **changed)))
    with pytest.raises(ValueError, match=said):
        NativeRunner(packed, 64, torch.float32, 16).model._compile(NativeRunner(packed, 64, torch.float32, 16).kv)
