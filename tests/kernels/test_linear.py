"""Products of prepared rows with packed weights: the kernels in use against float64 and against the twins, bit for bit
the same alone, among other rows and on any number of threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kit.isas import lesser
from tests.kit.weights import CASES, exact, random_qtensor

from dfastllm.errors import ValidationError
from dfastllm.kernels import linear_plain as plain
from dfastllm.kernels.activations import act_kind
from dfastllm.kernels.extension import native, set_threads, threads
from dfastllm.kernels.linear import linear, linear_gated, pack, prepare, weight_rows
from dfastllm.kernels.packed import FORMS, GROUP, Packed, QTensor, pack_panels

needs_native = pytest.mark.skipif(native() is None, reason="no native kernels")
formats = pytest.mark.parametrize(("format", "mins"), CASES)
ROUNDING = 4e-6  # of the sum of the terms' sizes: k up to 2,000 in float32


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = threads()
    yield
    set_threads(before)


@formats
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 300), st.integers(1, 600), st.integers(0, 2**31), st.booleans())
def test_against_float64(format: str, mins: bool, rows: int, n: int, k: int, seed: int, biased: bool) -> None:
    group = 1 if FORMS[format].together == 1 else 32
    k = max(group, k // group * group)
    draw = torch.Generator().manual_seed(seed)
    tensor, x = random_qtensor(format, n, k, mins=mins, seed=seed), torch.randn(rows, k, generator=draw)
    bias = torch.randn(n, generator=draw) if biased else None
    acts = prepare(x, act_kind(format))
    y = linear(acts, pack(tensor), bias)
    wanted, size = exact(acts.dequantise(), tensor, bias)
    assert y.shape == (rows, n)
    assert bool(((y - wanted).abs() <= size * ROUNDING).all())
    twin = plain.linear(acts, tensor, bias)
    assert bool(((y - twin).abs() <= size * 2 * ROUNDING).all())


@formats
@pytest.mark.parametrize("rows", [1, 6, 127, 129, 512, 1024])
def test_many_rows(format: str, mins: bool, rows: int) -> None:
    tensor, x = random_qtensor(format, 200, 256, mins=mins), torch.randn(rows, 256)
    acts = prepare(x, act_kind(format))
    wanted, size = exact(acts.dequantise(), tensor, None)
    assert bool(((linear(acts, pack(tensor)) - wanted).abs() <= size * ROUNDING).all())


@needs_native
@formats
def test_rows_and_threads_change_no_bit(format: str, mins: bool) -> None:
    weight, bias = pack(random_qtensor(format, 700, 320, mins=mins)), torch.randn(700)
    x = torch.randn(301, 320)
    set_threads(1)
    whole = linear(x, weight, bias)
    for first, count in [(0, 1), (300, 1), (17, 2), (5, 3), (9, 5), (100, 7), (40, 33), (3, 140)]:
        assert torch.equal(linear(x[first : first + count], weight, bias), whole[first : first + count])
    for count in (2, 3, 8):
        set_threads(count)
        assert torch.equal(linear(x, weight, bias), whole)
        assert torch.equal(linear(x[7:8], weight, bias), whole[7:8])


@needs_native
@formats
@pytest.mark.parametrize("rows", [8, 11, 12, 18, 40, 128])
def test_no_bit_depends_on_how_a_long_panel_is_walked(format: str, mins: bool, rows: int) -> None:
    """More inputs than one slice of a panel: one row alone reads it in one pass, many rows slice by slice."""
    k = 2080
    packed, x = pack(random_qtensor(format, 130, k, mins=mins, seed=2)), torch.randn(rows, k)
    together = linear(x, packed)
    for row in (0, rows // 2, rows - 1):
        assert torch.equal(together[row], linear(x[row : row + 1], packed)[0])


@formats
def test_accumulate_adds_in_place(format: str, mins: bool) -> None:
    weight, bias, x = pack(random_qtensor(format, 70, 64, mins=mins)), torch.randn(70), torch.randn(9, 64)
    before = torch.randn(9, 100)
    after = before.clone()
    target = after[:, 20:90]  # rows further apart than n, and nothing beside them may change
    assert linear(x, weight, bias, accumulate=target) is target
    assert torch.allclose(target, before[:, 20:90] + linear(x, weight, bias), rtol=1e-6, atol=1e-5)
    assert torch.equal(after[:, :20], before[:, :20])
    assert torch.equal(after[:, 90:], before[:, 90:])


@formats
@pytest.mark.parametrize("kind", ["f32", "bf16", "row8", "group8"])
def test_swiglu(format: str, mins: bool, kind: str) -> None:
    """As the products one by one: gate and up by `linear`, silu in float64, then the rule of `prepare`."""
    tensor, bias, x = random_qtensor(format, 192, 64, mins=mins), torch.randn(192) * 0.1, torch.randn(37, 64) * 0.1
    weight = pack(tensor)
    out = linear_gated(x, weight, bias, kind=kind)
    gate, up = linear(x, weight, bias).double().view(37, 3, 2, 32).unbind(dim=2)
    h = (gate / (1 + torch.exp(-gate)) * up).reshape(37, 96)
    scales = out.scales
    step = h.abs() * (2.0**-8 if kind == "bf16" else 2e-6)
    if scales is not None:
        step = step + 0.501 * (scales[:, None] if kind == "row8" else scales.repeat_interleave(32, dim=1))
    assert bool(((out.dequantise() - h).abs() <= step + 1e-30).all())
    set_threads(3)
    again = linear_gated(x[4:5], weight, bias, kind=kind)
    if native() is not None:
        assert torch.equal(again.data, out.data[4:5])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30, 0.0, 1e-42])
@formats
def test_extreme_inputs(format: str, mins: bool, value: float) -> None:
    weight, x = pack(random_qtensor(format, 100, 96, mins=mins)), torch.randn(8, 96)
    clean = linear(x, weight)
    x[3] = 0.0
    x[3, 40] = value
    y = linear(x, weight)
    others = [0, 1, 2, 4, 5, 6, 7]
    if native() is not None:
        assert torch.equal(y[others], clean[others])
    if value in (0.0, 1e-42):
        assert y[3].abs().max() < 1e-38
    else:
        assert bool(y[3].isfinite().all()) == (value == 1e30)


@pytest.mark.parametrize("format", ["w8", "w8g", "w4g", "w6g", "w4s"])
def test_extreme_codes_do_not_overflow(format: str) -> None:
    """The greatest sums there are: every code at its limit, all of one sign, over a long row."""
    limits = {"w8": (-127, 127), "w8g": (-128, 127), "w4g": (0, 15), "w6g": (0, 63), "w4s": (0, 15)}
    k, low, high = 8192, *limits[format]
    codes = torch.full((2, k), high, dtype=torch.int8 if format in ("w8", "w8g") else torch.uint8)
    codes[1] = low
    scales = torch.ones(2, k // GROUP[format]).half() if format in GROUP else torch.ones(2)
    steps = None if format != "w4s" else torch.full((2, k // 32), 0x8F, dtype=torch.uint8)  # 7 and -8 steps of 16
    tensor = QTensor(format, codes, scales, steps=steps)
    for value in (127.0, -127.0):  # their own codes
        x = torch.full((7, k), value)
        wanted = x.double() @ tensor.dequantise().double().T
        assert torch.allclose(linear(x, pack(tensor)).double(), wanted, rtol=1e-5)


@formats
@pytest.mark.parametrize(("n", "k"), [(1, 32), (64, 96), (130, 160), (200, 37)])
def test_pack_gives_the_same_bytes(format: str, mins: bool, n: int, k: int) -> None:
    if k % FORMS[format].together:
        pytest.skip("groups do not divide")
    tensor = random_qtensor(format, n, k, mins=mins, seed=n)
    ours, wanted = pack(tensor), pack_panels(tensor)
    for a, b in ((ours.data, wanted.data), (ours.scales, wanted.scales), (ours.mins, wanted.mins)):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    assert ours.data.data_ptr() % 64 == 0


@formats
def test_weight_rows_are_the_dequantised_rows(format: str, mins: bool) -> None:
    tensor = random_qtensor(format, 150, 96, mins=mins)
    ids = torch.tensor([149, 0, 63, 64, 64, 127, 128, 5])
    assert torch.equal(weight_rows(pack(tensor), ids), tensor.dequantise()[ids])
    assert torch.equal(weight_rows(tensor, ids), tensor.dequantise()[ids])
    assert weight_rows(pack(tensor), torch.zeros(0, dtype=torch.int64)).shape == (0, 96)


def test_small_float16_scales_are_read() -> None:
    """Denormal and negative scales, and infinity, of a file."""
    values = torch.tensor([6e-8, 6e-5, -0.5, 65504.0, torch.inf]).half()[:, None]
    tensor = QTensor("w8g", torch.ones(5, 32, dtype=torch.int8), values)
    got = weight_rows(pack(tensor), torch.arange(5))
    assert torch.equal(got, tensor.dequantise())
    y = linear(torch.full((1, 32), 127.0), pack(tensor))[0]
    assert torch.allclose(y[:4], values[:4, 0].float() * (32 * 127), rtol=1e-5)
    assert not y[4].isfinite()


SCRIPT = """
import json, sys, torch
from dfastllm.kernels import extension
from dfastllm.kernels.activations import act_kind
from dfastllm.kernels.linear import head_stats, linear, linear_gated, pack, prepare
from tests.kit.weights import CASES, random_qtensor
out, bits = {}, []
for format, mins in CASES:
    x = torch.randn(13, 160, generator=torch.Generator().manual_seed(5))
    norm = torch.linspace(0.5, 2, 160)
    weight = pack(random_qtensor(format, 192, 160, mins=mins))
    acts = prepare(x, act_kind(format), norm=norm, eps=1e-6)
    turned = prepare(x, act_kind(format), block=32)
    for rows in (acts, turned):
        bits.append([rows.data.double().tolist(), None if rows.scales is None else rows.scales.tolist()])
    y, h = linear(acts, weight), linear_gated(acts, weight, kind="f32")
    stats = head_stats(acts, weight, ban=(3,), entropy=True, topk=4)
    results = (y, h.data, stats.token, stats.norm, stats.entropy)
    out[format + str(mins)] = [part.tolist() for part in results]
json.dump([extension.describe(), bits, out], open(sys.argv[1], "w"))
"""


def run_with(tmp_path: Path, environments: dict[str, dict[str, str]]) -> dict[str, list]:
    """SCRIPT in a process per environment, side by side."""
    started = {
        name: subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / name)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, env in environments.items()
    }
    for process in started.values():
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    return {name: json.loads((tmp_path / name).read_text()) for name in started}


@needs_native
def test_instruction_sets_and_twins_agree(tmp_path: Path) -> None:
    """Preparation to the bit between instruction sets; products, silu and statistics to float rounding, also with the
    twins (whose norm may round a code the other way, so they take the test of their own above)."""
    best = native().isa()
    environments = {name: {"DFASTLLM_ISA": name} for name in (best, *lesser(best))}
    results = run_with(tmp_path, {**environments, "twins": {"DFASTLLM_NATIVE": "0"}})
    first = results[best]
    for name, (described, bits, out) in results.items():
        assert described.startswith(name) or (name == "twins" and "DFASTLLM_NATIVE=0" in described)
        assert name == "twins" or bits == first[1]
        for case, (y, h, token, norm, entropy) in out.items():
            loose = 0.02 if name == "twins" else 1e-5
            for got, wanted in ((y, first[2][case][0]), (h, first[2][case][1]), (norm, first[2][case][3])):
                a, b = torch.tensor(got), torch.tensor(wanted)
                assert (a - b).abs().max() <= loose * b.abs().max(), (name, case)
            assert torch.allclose(torch.tensor(entropy), torch.tensor(first[2][case][4]), atol=loose * 10), (name, case)
            assert name == "twins" or token == first[2][case][2]


def test_bad_input_is_named() -> None:
    tensor = random_qtensor("w8g", 70, 64)
    weight, x = pack(tensor), torch.randn(3, 64)
    with pytest.raises(ValidationError, match="must have 64 columns"):
        linear(torch.randn(3, 32), weight)
    with pytest.raises(ValidationError, match="must be float32"):
        linear(x.double(), weight)
    with pytest.raises(ValidationError, match="must be contiguous"):
        linear(torch.randn(64, 3).T, weight)
    with pytest.raises(ValidationError, match=r"bias must be contiguous float32 \[70\]"):
        linear(x, weight, torch.zeros(71))
    with pytest.raises(ValidationError, match="takes rows prepared as group8, got row8"):
        linear(prepare(x, "row8"), weight)
    with pytest.raises(ValidationError, match="takes rows prepared as group8, got group8 with 32"):
        linear(prepare(torch.randn(3, 32), "group8"), weight)
    with pytest.raises(ValidationError, match="must have the inputs' 3 rows, got 4"):
        linear(x, weight, accumulate=torch.zeros(4, 70))
    with pytest.raises(ValidationError, match="must alternate by 32"):
        linear_gated(x, weight, kind="f32")
    with pytest.raises(ValidationError, match="must alternate by 32"):
        linear_gated(x, pack(random_qtensor("w8g", 128, 64)), kind="f32", width=32)
    with pytest.raises(ValidationError, match="ids must be 0 to 69, got -1 to 3"):
        weight_rows(weight, torch.tensor([3, -1]))
    with pytest.raises(ValidationError, match="ids must be contiguous int64"):
        weight_rows(weight, torch.tensor([3], dtype=torch.int32))


@needs_native
def test_a_packed_weight_of_the_wrong_size_is_named() -> None:
    weight = pack(random_qtensor("w4g", 70, 64))
    short = Packed("w4g", 70, 64, weight.data[:-64], weight.scales)
    with pytest.raises(ValidationError, match=r"packed w4g weight \[70, 64\] must have 4096 elements"):
        linear(torch.randn(1, 64), short)
    with pytest.raises(ValidationError, match="must have"):
        linear(torch.randn(1, 64), Packed("w4g", 70, 64, weight.data))
