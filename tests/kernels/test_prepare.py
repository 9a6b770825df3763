"""Preparing rows: norm and quantisation, of the kernels in use and of the twins, against the rule and float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kit.weights import INT_KINDS
from torch import Tensor

from dfastllm.errors import ValidationError
from dfastllm.kernels import linear_plain as plain
from dfastllm.kernels.activations import ACT_KINDS, Acts, act_kind
from dfastllm.kernels.extension import native, set_threads, threads
from dfastllm.kernels.linear import ACTIVATIONS, linear_gated, prepare
from dfastllm.kernels.packed import QTensor, pack_panels

needs_native = pytest.mark.skipif(native() is None, reason="no native kernels")


def rows_of(rows: int, k: int, seed: int, spread: int) -> Tensor:
    """Values over up to 10^(2 * spread), some of them zero."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=draw) * 10.0 ** (torch.rand(rows, k, generator=draw) * 2 * spread - spread)
    return torch.where(torch.rand(rows, k, generator=draw) < 0.1, 0.0, x)


def same(a: Acts, b: Acts) -> bool:
    parts = [(a.data, b.data), (a.scales, b.scales), (a.sums, b.sums)]
    return all((x is None) == (y is None) and (x is None or torch.equal(bits(x), bits(y))) for x, y in parts)  # type: ignore[arg-type]


def bits(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), torch.nan, x).contiguous().view(torch.uint8)  # one NaN is as good as another


@needs_native
@pytest.mark.parametrize("kind", ACT_KINDS)
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 300), st.integers(0, 2**31), st.sampled_from([0, 3, 20]))
def test_native_equals_twin(kind: str, rows: int, k: int, seed: int, spread: int) -> None:
    x = rows_of(rows, k, seed, spread)
    assert same(prepare(x, kind), plain.prepare(x, kind))


@pytest.mark.parametrize("kind", ACT_KINDS)
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 300), st.integers(0, 2**31), st.sampled_from([0, 3]), st.booleans())
def test_against_float64(kind: str, rows: int, k: int, seed: int, spread: int, normed: bool) -> None:
    x = rows_of(rows, k, seed, spread)
    norm = torch.rand(k, generator=torch.Generator().manual_seed(seed)) + 0.1 if normed else None
    out = prepare(x, kind, norm=norm, eps=1e-6)
    wide = x.double()
    if norm is not None:
        wide = wide / torch.sqrt((wide * wide).mean(dim=1, keepdim=True) + 1e-6) * norm.double()
    size = wide.abs()
    if kind in INT_KINDS:
        groups = torch.nn.functional.pad(size, (0, -k % 32)).view(rows, 1 if kind == "row8" else -(-k // 32), -1)
        amax = groups.amax(dim=-1, keepdim=True).expand_as(groups).reshape(rows, -1)[:, :k]
        step = amax / 127 * (1 if kind == "row8" else 1.25)  # at most the next of {1, 1.25, 1.5, 1.75} x 2^n
        bound = step * 0.5001 + size * 1e-6
    else:
        bound = size * (2.0**-8 if kind == "bf16" else 1e-6)
    assert bool(((out.dequantise().double() - wide).abs() <= bound + 1e-37).all())
    assert not out.data[:, k:].any()


@pytest.mark.parametrize("kind", INT_KINDS)
@pytest.mark.parametrize("rows", [1, 40])
def test_sums_and_codes(kind: str, rows: int) -> None:
    out = prepare(rows_of(rows, 1000, 1, 1), kind)
    assert out.scales is not None
    assert out.sums is not None
    group = out.data.shape[1] if kind == "row8" else 16
    sums = out.data.view(rows, -1, group).int().sum(dim=-1)
    assert torch.equal(sums.view(out.sums.shape), out.sums.long())
    assert out.data.min() >= -127
    if kind == "row8":
        assert out.data.abs().max() == 127  # the greatest magnitude of a row is 127 steps, never 128
    if kind == "group8":
        largest = out.data.view(rows, -1, 32).abs().amax(dim=-1)
        assert bool(((largest >= 101) | (largest == 0)).all())  # no wider than it must be
        assert set((torch.frexp(out.scales).mantissa[largest > 0] * 8).tolist()) <= {4.0, 5.0, 6.0, 7.0}


@pytest.mark.parametrize(
    ("largest", "scale"),
    [
        (127.0, 1.0),
        (127.01, 1.25),
        (158.75, 1.25),
        (159.0, 1.5),
        (191.0, 1.75),
        (223.0, 2.0),
        (254e-9, 1.25 * 2.0**-29),
    ],
)
def test_group_scales_are_the_least_that_will_do(largest: float, scale: float) -> None:
    x = torch.zeros(1, 32)
    x[0, 5] = -largest
    out = prepare(x, "group8")
    assert out.scales is not None
    assert out.scales.tolist() == [[scale]]
    assert out.data[0, 5] == round(-largest / scale)


def test_ties_round_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5] + [0.0] * 24])
    wanted = [127, 0, 2, 2, 0, -2, -2, 4]
    for kind in INT_KINDS:
        assert prepare(x, kind).data[0, :8].tolist() == wanted
    halves = torch.tensor([[1.00390625, 1.01171875, -1.00390625]])  # between two bf16 numbers
    assert prepare(halves, "bf16").data[0, :3].tolist() == [1.0, 1.015625, -1.0]


@pytest.mark.parametrize("kind", ACT_KINDS)
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e-31, 1e-29, 1e30, 3e38])
def test_extreme_sizes(kind: str, value: float) -> None:
    x = torch.full((2, 40), value)
    x[1, 3] = -value
    out = prepare(x, kind)
    assert same(out, plain.prepare(x, kind))
    tiny = kind in INT_KINDS and value < plain.LEAST_AMAX
    wanted = torch.zeros_like(x) if tiny else x
    assert torch.allclose(out.dequantise(), wanted, rtol=2.0**-7, atol=1e-40)


@pytest.mark.parametrize("kind", ACT_KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_is_noticed(kind: str, value: float) -> None:
    x = torch.ones(3, 100)
    x[1, 97] = value
    out = prepare(x, kind)
    assert same(out, plain.prepare(x, kind))
    finite = out.dequantise().isfinite()
    assert bool(finite[0].all() & finite[2].all())
    assert not finite[1, 97]
    normed = prepare(x, kind, norm=torch.ones(100), eps=1e-6).dequantise()
    assert not normed[1].isfinite().all()


@needs_native
@pytest.mark.parametrize("kind", ACT_KINDS)
def test_rows_stand_alone(kind: str) -> None:
    before, x, norm = threads(), rows_of(70, 300, 5, 1), torch.rand(300)
    whole = prepare(x, kind, norm=norm, eps=1e-5)
    try:
        for count in (2, 3, 8):
            set_threads(count)
            assert same(prepare(x, kind, norm=norm, eps=1e-5), whole)
    finally:
        set_threads(before)
    for row in (0, 33, 69):
        assert torch.equal(prepare(x[row : row + 1], kind, norm=norm, eps=1e-5).data[0], whole.data[row])
    wide = torch.zeros(70, 333)
    wide[:, :300] = x
    assert same(prepare(wide[:, :300], kind, norm=norm, eps=1e-5), whole)  # rows further apart than k


@pytest.mark.parametrize("kind", ACT_KINDS)
@pytest.mark.parametrize("width", [32, 96, 41])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_against_float64(kind: str, width: int, activation: str) -> None:
    """With the identity as its weight: the activation over all its range, to a few units in the last place (of what it
    multiplies, where the gate is negative: there gelu is the rest of a cancellation)."""
    columns = -(-width // 32) * 64
    gate, up = torch.linspace(-120, 120, 50 * width).view(50, width), rows_of(50, width, 2, 1)
    order = torch.arange(columns).view(-1, 2, 32)
    at_gate, at_up = order[:, 0].reshape(-1)[:width], order[:, 1].reshape(-1)[:width]
    x = torch.zeros(50, columns)
    x[:, at_gate], x[:, at_up] = gate, up
    identity = pack_panels(QTensor("f32", torch.eye(columns)))
    out = linear_gated(x, identity, kind=kind, width=width, activation=activation)
    assert (out.rows, out.k) == (50, width)
    function = F.silu if activation == "silu" else lambda g: F.gelu(g, approximate="tanh")
    exact = function(gate.double()) * up.double()
    slack = 0.0 if activation == "silu" else 2e-6 * up.abs().double()
    step, scales = 2.0**-8 if kind == "bf16" else 0.0, prepare(exact.float(), kind).scales
    if scales is not None:
        scales = scales[:, None] if kind == "row8" else scales.repeat_interleave(32, dim=1)[:, :width]
    quantum = 0.0 if scales is None else scales * 0.501
    bound = exact.abs() * (1e-6 + step) + quantum + slack + 2 * plain.LEAST_AMAX  # e^-x stops at e^88
    assert bool(((out.dequantise() - exact).abs() <= bound).all())
    assert not out.data[:, width:].any()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 32, dtype=torch.float64), "must be float32"),
        (torch.zeros(32), "must be float32"),
        (torch.zeros(32, 2).T, "must be contiguous"),
        (torch.zeros(1, 32).expand(3, 32), "must be contiguous"),
        (torch.zeros(3, 0), "at least one column"),
    ],
)
def test_bad_rows_are_named(x: Tensor, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        prepare(x, "f32")


def test_bad_options_are_named() -> None:
    x = torch.zeros(2, 32)
    with pytest.raises(ValidationError, match="kind must be one of"):
        prepare(x, "int4")
    with pytest.raises(ValidationError, match=r"norm must be contiguous float32 \[32\]"):
        prepare(x, "f32", norm=torch.ones(31))
    with pytest.raises(ValidationError, match="format must be one of"):
        act_kind("w5")
    assert prepare(torch.zeros(0, 32), "group8").data.shape == (0, 32)
