"""Row kernels under Triton's interpreter: the twins' codes, and their floats to the last bits."""

from __future__ import annotations

import pytest
import torch
from tests.kit.interpreter import lent, needs_interpreter, step_of
from torch import Tensor

from dfastllm.kernels.activations import Acts
from dfastllm.kernels.triton import laid, plain
from dfastllm.kernels.triton.kv import DeviceKv

pytestmark = [needs_interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
rows = lent(pytest.importorskip("dfastllm.kernels.triton.rows"))

KINDS = ("f32", "bf16", "f16", "fp8", "row8", "group8")
ODD = (1, 100, 1056)  # columns


def inputs(count: int, k: int, seed: int = 0) -> Tensor:
    """Rows of several sizes, one of them zeros, one tiny."""
    x = torch.randn(count, k, generator=torch.Generator().manual_seed(seed))
    return x * torch.tensor([1.0, 1e-3, 50.0, 0.0, 1e-33])[:count, None]


def check(got: Acts, wanted: Acts) -> None:
    """The same codes and sums, scales to the last bit or two; codes of a float sum may lie one step apart."""
    assert (got.kind, got.rows, got.k, got.data.dtype) == (wanted.kind, wanted.rows, wanted.k, wanted.data.dtype)
    torch.testing.assert_close(got.data.float(), wanted.data.float(), rtol=2e-7 if got.kind == "f32" else 0, atol=1e-6)
    for mine, theirs in ((got.scales, wanted.scales), (got.sums, wanted.sums)):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=3e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", ODD)
def test_prepare(kind: str, k: int) -> None:
    x = inputs(5, k)
    check(rows.prepare(x, kind), plain.prepare(x, kind))


@pytest.mark.parametrize("kind", ["f32", "row8", "group8", "fp8"])
@pytest.mark.parametrize("block", [2, 32, 256])
def test_turned(kind: str, block: int) -> None:
    x = inputs(3, 512)
    check(rows.prepare(x, kind, block=block), plain.prepare(x, kind, block=block))


@pytest.mark.parametrize("kind", ["fp8", "row8"])
@pytest.mark.parametrize("block", [1, 32])
def test_rows_too_long_for_registers(kind: str, block: int) -> None:
    y = inputs(2, 2 * 8224)
    got, wanted = (made.gate(y, "silu", kind, block=block) for made in (rows, plain))
    assert got.data.shape == wanted.data.shape
    torch.testing.assert_close(got.scales, wanted.scales, rtol=1e-5, atol=0)
    assert (got.data.float() != wanted.data.float()).float().mean() < 1e-3
    check(rows.prepare(y, kind, block=block), plain.prepare(y, kind, block=block))


@pytest.mark.parametrize("kind", ["fp8", "row8", "group8"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_makes_the_scale_nan(kind: str, bad: float) -> None:
    x = inputs(3, 64)
    x[1, 40] = bad
    got = rows.prepare(x, kind)
    assert got.scales is not None
    nan = got.scales.isnan().view(3, -1)
    assert nan[1].any()
    assert not nan[[0, 2]].any()
    if kind != "fp8":
        check(got, plain.prepare(x, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k", "dtype", "factor"), [(64, torch.float32, 1.0), (100, torch.float16, 0.22)])
def test_add_norm(kind: str, k: int, dtype: torch.dtype, factor: float) -> None:
    x, y, weight = inputs(3, k), inputs(3, k, 1).to(dtype), torch.rand(k)
    mine, theirs = x.clone(), x.clone()
    got = rows.add_norm(mine, y, weight, 1e-6, factor=factor, kind=kind)
    wanted = plain.add_norm(theirs, y, weight, 1e-6, factor=factor, kind=kind)
    torch.testing.assert_close(mine, theirs, rtol=3e-7, atol=3e-7)
    if kind in ("f32", "f16", "bf16"):
        close = {"f32": 5e-7, "f16": 1e-3, "bf16": 8e-3}[kind]
        torch.testing.assert_close(got.data, wanted.data, rtol=close, atol=1e-6)
    else:  # a sum in another order may move a code by one step
        torch.testing.assert_close(plain.floats_of(got), plain.floats_of(wanted), rtol=0.07, atol=0.05)
        assert (got.data.float() != wanted.data.float()).float().mean() < 0.02


def test_add_and_norm_alone() -> None:
    x, y, weight = inputs(3, 48), inputs(3, 48, 1), torch.rand(48)
    mine = x.clone()
    assert torch.equal(rows.add_norm(mine, y, None, 0.0, kind="f32").data, x + y)
    assert torch.equal(mine, x + y)
    half = x.half()
    check(rows.add_norm(half, None, weight, 1e-5, kind="f32"), plain.add_norm(half, None, weight, 1e-5, kind="f32"))
    assert torch.equal(half, x.half())


def test_norm_of_what_is_added() -> None:
    x, y, weight, after = inputs(3, 48), inputs(3, 48, 1), torch.rand(48), torch.rand(48)
    mine = x.clone()
    got = rows.add_norm(mine, y, weight, 1e-6, factor=0.5, kind="f32", post=(after, 1e-3))
    wide = y.double()
    normed = wide / (wide.square().mean(1, keepdim=True) + 1e-3).sqrt() * after
    summed = x.double() + 0.5 * normed
    wanted = summed / (summed.square().mean(1, keepdim=True) + 1e-6).sqrt() * weight
    torch.testing.assert_close(mine.double(), summed, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.data.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("activation", "width", "block"), [("silu", 1056, 1), ("gelu_tanh", 96, 1), ("silu", 64, 32)])
def test_gate(kind: str, activation: str, width: int, block: int) -> None:
    y = inputs(3, 2 * width)
    y[2] /= 10  # its products fit into float16
    got, wanted = (made.gate(y, activation, kind, block=block) for made in (rows, plain))
    if kind in ("f32", "f16", "bf16"):
        close = {"f32": 1e-5, "f16": 1e-3, "bf16": 8e-3}[kind]
        torch.testing.assert_close(got.data, wanted.data, rtol=close, atol=1e-6)
    else:  # two libraries' exp may differ in the last bit
        torch.testing.assert_close(plain.floats_of(got), plain.floats_of(wanted), rtol=0.07, atol=0.05)
        assert (got.data.float() != wanted.data.float()).float().mean() < 0.02


@pytest.mark.parametrize("kv_type", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "half", "norms"),
    [
        (4, 2, 16, 8, "none"),  # of every dim
        (3, 1, 20, 6, "head"),  # of some dims, and no power of two
        (14, 2, 8, 4, "whole"),  # the whole projection is normed
        (9, 3, 12, 0, "head"),  # without rotation
        (2, 2, 12, 0, "none"),
    ],
)
def test_rope_write(kv_type: torch.dtype, heads: int, kv_heads: int, dim: int, half: int, norms: str) -> None:
    draw = torch.Generator().manual_seed(3)
    step = step_of([(3, 0, True), (2, 5, True), (2, 0, False)], seed=1)
    place = laid.on(torch.device("cpu"), step, 4)
    qkv = torch.randn(len(step), (heads + 2 * kv_heads) * dim, generator=draw) * 3
    qkv[1, heads * dim] = 5000.0  # beyond float8
    dtype = torch.float16 if kv_type == torch.float16 else torch.float32
    angles = torch.randn(2, len(step), half, generator=draw) if half else (None, None)
    whole = norms == "whole"
    weights = [torch.rand(count * dim if whole else dim) for count in (heads, kv_heads)]
    how = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "eps": 1e-5}
    how |= {} if norms == "none" else {"q_norm": weights[0], "k_norm": weights[1]}
    made = []
    for place_of in (rows, plain):
        caches = DeviceKv(1, 64, kv_heads, dim, kv_type, torch.device("cpu"))
        mine = qkv.to(dtype, copy=True)
        place_of.rope_write(mine, place, *angles, caches.layer(0), **how)
        made.append((mine, caches))
    (mine, caches), (theirs, wanted) = made
    torch.testing.assert_close(mine, theirs, rtol=1e-6 if dtype == torch.float32 else 2e-3, atol=2e-6)
    assert (wanted.k != 0).any()
    for got, want in ((caches.k, wanted.k), (caches.v, wanted.v)):
        steps = {torch.int8: 1.0, torch.float8_e4m3fn: 0.125}.get(kv_type, 0.0)
        close = 8e-3 if kv_type == torch.bfloat16 else 2e-3 if kv_type == torch.float16 else 1e-6
        torch.testing.assert_close(got.float(), want.float(), rtol=max(close, steps / 8), atol=max(steps, 1e-6))
    if caches.k_scales is not None:
        torch.testing.assert_close(caches.k_scales, wanted.k_scales, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(caches.v_scales, wanted.v_scales, rtol=0, atol=0)


def test_keys_that_are_not_finite_say_so() -> None:
    step = step_of([(2, 0, True)])
    qkv = torch.randn(2, 3 * 8)
    qkv[0, 8] = torch.nan
    kv = DeviceKv(1, 32, 1, 8, torch.int8, torch.device("cpu")).layer(0)
    rows.rope_write(qkv, laid.on(torch.device("cpu"), step, 4), None, None, kv, heads=1, kv_heads=1, dim=8)
    assert kv.k_scales is not None
    assert kv.v_scales is not None
    slots = step.slot.tolist()
    assert kv.k_scales[slots[0]].isnan().all()
    assert kv.k_scales[slots[1]].isfinite().all()
    assert kv.v_scales[slots].isfinite().all()
