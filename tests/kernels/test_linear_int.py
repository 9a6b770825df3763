"""The integer tiles to the last bit: inputs and weights are chosen so that every product, sum and scaled sum is exactly
representable in float32, so kernels (and twins) must give what integer arithmetic gives; and each row must have the
same bits beside any number of others, on every instruction set this machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kit.isas import lesser
from tests.kit.weights import CASES, exact, random_steps
from torch import Tensor

from dfastllm.kernels import linear_plain as plain
from dfastllm.kernels.activations import act_kind
from dfastllm.kernels.extension import native, set_threads, threads
from dfastllm.kernels.linear import linear, pack, prepare
from dfastllm.kernels.packed import GROUP, QTensor

INT_CASES = [(format, mins) for format, mins in CASES if format.startswith("w")]
needs_native = pytest.mark.skipif(native() is None, reason="no native kernels")
formats = pytest.mark.parametrize(("format", "mins"), INT_CASES)
RANGE = {"w8": (-127, 127), "w8g": (-128, 127), "w4g": (0, 15), "w6g": (0, 63), "w4s": (0, 15)}
K = 512  # 512 * 128 * 127 * 2 (halves) < 2^24: all sums are float32 numbers
PATTERNS = ("any", "low", "high", "either", "by_channel", "by_input")


def codes_of(format: str, n: int, k: int, pattern: str, draw: torch.Generator) -> Tensor:
    low, high = RANGE[format]
    if pattern == "any":
        codes = torch.randint(low, high + 1, (n, k), generator=draw)
    elif pattern == "either":
        codes = torch.where(torch.rand(n, k, generator=draw) < 0.5, low, high)
    elif pattern in ("low", "high"):
        codes = torch.full((n, k), low if pattern == "low" else high)
    else:
        odd = torch.arange(n)[:, None] % 2 if pattern == "by_channel" else torch.arange(k)[None] % 2
        codes = torch.where(odd == 1, low, high).expand(n, k)
    return codes.to(torch.int8 if format in ("w8", "w8g") else torch.uint8).contiguous()


def weight_of(format: str, n: int, k: int, *, mins: bool, pattern: str, seed: int) -> QTensor:
    """Scales 1/2 or 1, minima multiples of 1/2."""
    draw = torch.Generator().manual_seed(seed)
    codes = codes_of(format, n, k, pattern, draw)
    if format in ("w8", "w4s"):
        scale = torch.randint(1, 3, (n,), generator=draw).float() / 2
        codes, steps = random_steps(codes, draw) if format == "w4s" else (codes, None)
        return QTensor(format, codes, scale, steps=steps)
    shape = (n, k // GROUP[format])
    scales = (torch.randint(1, 3, shape, generator=draw).float() / 2).half()
    low = (torch.randint(-32, 33, shape, generator=draw).float() / 2).half() if mins else None
    return QTensor(format, codes, scales, low)


def inputs_of(rows: int, k: int, pattern: str, seed: int) -> Tensor:
    """Integers up to 127 that quantise to themselves: each 32 of them contain one of size 127, so the scale is 1."""
    draw = torch.Generator().manual_seed(seed + 1)
    if pattern == "any":
        x = torch.randint(-127, 128, (rows, k), generator=draw)
        at = torch.arange(0, k, 32)
        x[:, at] = torch.where(torch.rand(rows, len(at), generator=draw) < 0.5, -127, 127)
    elif pattern in ("low", "high"):
        x = torch.full((rows, k), -127 if pattern == "low" else 127)
    else:
        x = torch.where(torch.rand(rows, k, generator=draw) < 0.5, -127, 127)
    return x.float()


@formats
@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 45),
    st.integers(1, 140),
    st.integers(1, K),
    st.sampled_from(PATTERNS),
    st.sampled_from(PATTERNS[:4]),
    st.integers(0, 2**31),
)
def test_exactly_what_integers_give(
    format: str, mins: bool, rows: int, n: int, k: int, codes: str, inputs: str, seed: int
) -> None:
    if format != "w8":
        k = max(32, k // 32 * 32)
    tensor = weight_of(format, n, k, mins=mins, pattern=codes, seed=seed)
    x = inputs_of(rows, k, inputs, seed)
    acts = prepare(x, act_kind(format))
    assert torch.equal(acts.dequantise(), x)
    wanted = x.double() @ tensor.dequantise().double().T
    assert torch.equal(linear(acts, pack(tensor)).double(), wanted)


@needs_native
@formats
def test_every_number_of_rows_gives_the_same_bits(format: str, mins: bool) -> None:
    """Row blocks of every size and the paths for few and for many rows; a panel of one slice and a bit."""
    draw = torch.Generator().manual_seed(7)
    for k in (32, 352):
        tensor = weight_of(format, 130, k, mins=mins, pattern="any", seed=k)
        if tensor.scales is not None:  # scales that make every operation round
            tensor = QTensor(format, tensor.codes, tensor.scales * 0.7123, tensor.mins, tensor.steps)
        weight, x = pack(tensor), torch.randn(48, k, generator=draw)
        alone = torch.cat([linear(row[None], weight) for row in x])
        for count in range(1, 49):
            first = (5 * count) % (49 - count)
            assert torch.equal(linear(x[first : first + count], weight), alone[first : first + count]), (k, count)


@needs_native
@formats
def test_panels_that_go_together_give_the_same_bits(format: str, mins: bool) -> None:
    """Few rows walk two panels at once: any number of panels on any number of threads, with halves of w6g that share
    scales and minima in some slices of some panels."""
    before = threads()
    tensor = weight_of(format, 64 * 9 + 10, 352, mins=mins, pattern="any", seed=3)
    if tensor.scales is not None:
        tensor = replace(tensor, scales=tensor.scales * 0.7123)
    for side in (tensor.scales, tensor.mins):
        if format == "w6g" and side is not None:
            side[64:320, 1::2] = side[64:320, 0::2]
            side[450:, 1:8:2] = side[450:, 0:8:2]
    x = torch.randn(20, 352, generator=torch.Generator().manual_seed(4))
    many = linear(x, pack(tensor))
    try:
        for count in (1, 2, 3):
            set_threads(count)
            for n in (64, 70, 128, 192, 320, 64 * 9 + 10):
                parts = {name: getattr(tensor, name) for name in ("codes", "scales", "mins", "steps")}
                weight = pack(replace(tensor, **{name: t[:n] for name, t in parts.items() if t is not None}))
                for rows in (1, 2, 3, 4, 8):
                    assert torch.equal(linear(x[:rows], weight), many[:rows, :n]), (count, n, rows)
    finally:
        set_threads(before)


@formats
@pytest.mark.parametrize("size", [1e-30, 1e25])
@pytest.mark.parametrize("scale", [6e-8, 65504.0])
def test_smallest_and_largest_scales(format: str, mins: bool, size: float, scale: float) -> None:
    """float16's least and greatest scale, inputs far from 1: within float rounding of float64."""
    n, k = 70, 320
    codes = codes_of(format, n, k, "any", torch.Generator().manual_seed(3))
    if format in ("w8", "w4s"):
        codes, steps = random_steps(codes, torch.Generator().manual_seed(5)) if format == "w4s" else (codes, None)
        tensor = QTensor(format, codes, torch.full((n,), scale), steps=steps)
    else:
        full = torch.full((n, k // GROUP[format]), scale).half()
        tensor = QTensor(format, codes, full, full if mins else None)
    x = torch.randn(9, k, generator=torch.Generator().manual_seed(4)) * size
    acts = prepare(x, act_kind(format))
    wanted, terms = exact(acts.dequantise(), tensor, None)
    y = linear(acts, pack(tensor))
    assert bool(y.isfinite().all())
    assert bool(((y - wanted).abs() <= terms * 2e-6 + 1e-44).all())


@formats
def test_zero_rows_give_zero(format: str, mins: bool) -> None:
    """Also beside rows that are not zero, and groups of zeros within a row add nothing."""
    tensor = weight_of(format, 66, 96, mins=mins, pattern="any", seed=1)
    x = inputs_of(8, 96, "any", seed=2)
    x[2] = 0.0
    x[6] = 0.0
    x[5, 32:64] = 0.0
    y = linear(x, pack(tensor))
    assert bool((y[[2, 6]] == 0).all())
    if format != "w8":
        assert torch.equal(y[5].double(), tensor.dequantise().double() @ x[5].double())


@needs_native
@pytest.mark.skipif("DFASTLLM_ISA" in os.environ, reason="one instruction set was asked for")
def test_every_instruction_set() -> None:
    """This file again under each lesser instruction set that the machine has."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__]
    started = {
        name: subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DFASTLLM_ISA": name},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in lesser(native().isa())
    }
    for name, process in started.items():
        output, _ = process.communicate()
        assert process.returncode == 0, f"{name}: {output[-3000:]}"
        assert "1 skipped" in output, f"{name}: {output[-300:]}"  # this test alone: the kernels were there


@pytest.mark.parametrize("mins", [False, True])
def test_halves_that_share_their_scales(mins: bool) -> None:
    """w6g as types with groups of 32 become it: slices of a panel where all halves are alike take another path, which
    must be chosen for every number of rows alike. Channels 64 to 127 share them, of the others one does not."""
    tensor = weight_of("w6g", 140, 320, mins=mins, pattern="any", seed=5)
    assert tensor.scales is not None
    for side in (tensor.scales, tensor.mins):
        if side is not None:
            side[:, 1::2] = side[:, 0::2]
    tensor.scales[3, 7] = 2.0
    x = inputs_of(40, 320, "any", 5)
    wanted = x.double() @ tensor.dequantise().double().T
    assert torch.equal(linear(x, pack(tensor)).double(), wanted)
    weight = pack(QTensor("w6g", tensor.codes, tensor.scales * 0.7123, tensor.mins))
    x = torch.randn(40, 320, generator=torch.Generator().manual_seed(8))
    alone = torch.cat([linear(row[None], weight) for row in x])
    for count in (2, 3, 4, 5, 7, 13, 40):
        assert torch.equal(linear(x[:count], weight), alone[:count]), count
    assert torch.allclose(alone, plain.linear(prepare(x, "group8"), weight), rtol=1e-4, atol=1e-2)


def test_halves_that_share_their_scales_and_not_their_minima() -> None:
    """The path for halves that are alike needs both alike: minima of the first half must not serve the second."""
    tensor = weight_of("w6g", 140, 320, mins=True, pattern="any", seed=6)
    assert tensor.scales is not None
    tensor.scales[:, 1::2] = tensor.scales[:, 0::2]
    assert tensor.mins is not None
    assert not torch.equal(tensor.mins[:, 1::2], tensor.mins[:, 0::2])
    x = inputs_of(40, 320, "any", 6)
    wanted = x.double() @ tensor.dequantise().double().T
    for rows in (1, 4, 40):
        assert torch.equal(linear(x[:rows], pack(tensor)).double(), wanted[:rows]), rows
