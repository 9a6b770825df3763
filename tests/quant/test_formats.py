"""Formats against float64 and exact optima: what rounding may cost, and what it must refuse."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dfastllm.errors import CheckpointError, UnsupportedError, ValidationError
from dfastllm.kernels.packed import QTensor
from dfastllm.quant.formats import FORMATS, Format, find_format, quantise

HALF_TINY = 2.0**-24


def draw(seed: int, n: int = 8, k: int = 64) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def groups_of(weight: Tensor, format: Format) -> Tensor:
    return weight.double().reshape(-1, format.group or weight.shape[1])


def group_errors(weight: Tensor, found: QTensor, format: Format) -> Tensor:
    """Sum of squared errors of every group, float64."""
    return (groups_of(found.dequantise(), format) - groups_of(weight, format)).square().sum(-1)


def plain_bound(weight: Tensor, format: Format) -> Tensor:
    """What rounding to nearest without clipping may cost in every group: half a step for each weight. The step is the
    range over the number of codes, rounded up to the next float16 (by up to 2^-10 of it, or the smallest float16); of a
    stepped format that of all its groups, up to the next whole step, and a whole one where a byte ends."""
    if format.stepped:
        parts = torch.cat([weight, torch.zeros(len(weight), 1)], dim=1).double()  # ranges include zero
        widest, far = parts.amax(-1) - parts.amin(-1), parts.abs().amax(-1) / 127
        each = (widest / 15 + torch.maximum(widest / 15 / 16, far)) * (1 + 1e-3) + 2.0**-126
        return weight.shape[1] * each.square() + 1e-300
    groups = groups_of(weight, format)
    if format.grid.minimum:
        low, high = groups.amin(-1), groups.amax(-1)
        moved = low.abs() * 2.0**-11 + HALF_TINY  # by rounding the minimum to float16
        step = ((high - low + moved) / 15 * (1 + 2.0**-9)).clamp(min=HALF_TINY)
        each = step / 2 + moved
    else:
        largest = groups.abs().amax(-1)
        tiny = HALF_TINY if format.group else 2.0**-126
        each = (largest / format.grid.high * (1 + 2.0**-9) + tiny) / 2
    return groups.shape[-1] * each.square() * (1 + 1e-4) + 1e-300


def extremes(largest: float) -> st.SearchStrategy[Tensor]:
    """[2, 64] with magnitudes of very different size beside one another: zeros, denormals, one huge outlier."""
    plain = st.floats(-2, 2, width=32)
    special = st.sampled_from(
        [0.0, -0.0, 1e-45, -1e-40, 1e-30, 6e-8, -3e-8, 1e-5, 1.0, -100.0, 0.25 * largest, -largest]
    )
    one = st.one_of(plain, special)
    return st.one_of(
        st.lists(one, min_size=128, max_size=128).map(lambda v: torch.tensor(v).view(2, 64)),
        st.tuples(special, special).map(lambda v: torch.tensor(v)[:, None].repeat(1, 64)),  # all equal
        st.tuples(st.integers(0, 127), special).map(lambda v: _outlier(*v)),
    )


def _outlier(at: int, value: float) -> Tensor:
    weight = draw(at, 2, 64) * 1e-3
    weight.view(-1)[at] = value
    return weight


@pytest.mark.parametrize("name", FORMATS)
def test_search_is_never_worse_than_rounding_to_nearest(name: str) -> None:
    format = FORMATS[name]

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(extremes(1e4))
    def check(weight: Tensor) -> None:
        found, plain = quantise(weight, name), quantise(weight, name, search=False)
        assert found.shape == weight.shape
        assert bool(found.dequantise().isfinite().all())
        errors = group_errors(weight, found, format)
        assert bool((errors <= plain_bound(weight, format)).all())
        assert bool((errors <= group_errors(weight, plain, format) * (1 + 1e-4) + 1e-30).all())

    check()


@pytest.mark.parametrize("name", FORMATS)
def test_random_weights(name: str) -> None:
    """Relative error of normal weights is near the known distortion of a uniform quantiser of so many bits, and the
    search gains over rounding to nearest."""
    weight = draw(1, 64, 512)
    error = float((quantise(weight, name).dequantise() - weight).norm() / weight.norm())
    plain = float((quantise(weight, name, search=False).dequantise() - weight).norm() / weight.norm())
    kind = name.removesuffix("r") if name.startswith("w8") else name
    most = {"w8": 0.0085, "w8g": 0.0055, "w6": 0.0175, "w4m": 0.071, "w4": 0.084, "w4r": 0.0795}[kind]
    assert error < most
    assert error < plain * {"w8": 1.0, "w8g": 0.98, "w6": 0.92, "w4m": 0.92, "w4": 0.88, "w4r": 0.94}[kind]


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_format_holds_exactly_comes_back_exactly(name: str) -> None:
    format = FORMATS[name]
    if format.stepped:
        check_exact_steps(name)
        return
    size = format.group or 64
    draws = torch.Generator().manual_seed(3)
    low = 0 if format.grid.minimum else format.grid.low
    codes = torch.randint(low, format.grid.high + 1, (6, 64), generator=draws).float()
    codes.view(-1, size)[:, 0] = format.grid.high
    codes.view(-1, size)[:, 1] = low
    step = torch.rand(6, 64 // size, generator=draws).add(0.5).half().float().repeat_interleave(size, 1)
    minimum = torch.randint(-8, 8, (6, 64 // size), generator=draws).float().repeat_interleave(size, 1)
    weight = codes * step - minimum if format.grid.minimum else codes * step
    if format.grid.minimum:  # steps of powers of two: sums in float32 are exact
        weight = codes * 0.25 - minimum
    assert torch.allclose(quantise(weight, name).dequantise(), weight, rtol=1e-6, atol=1e-6)


def check_exact_steps(name: str) -> None:
    """Groups that use all codes, the widest of them with the widest step that a byte holds."""
    draws = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (6, 4, 32), generator=draws).float()
    codes[..., 0], codes[..., 1] = 0.0, 15.0
    steps, zeros = torch.randint(1, 9, (6, 4, 1), generator=draws), torch.randint(0, 16, (6, 4, 1), generator=draws)
    steps[:, 2], zeros[:, 2] = 16, 8
    scale = torch.rand(6, 1, generator=draws) + 0.5
    weight = ((codes - zeros) * steps).view(6, 128) * scale
    found = quantise(weight, name)
    assert torch.allclose(found.dequantise(), weight, rtol=1e-6, atol=1e-6)
    assert found.steps is not None
    assert found.steps.equal((steps - 1 + 16 * zeros).view(6, 4).to(torch.uint8))


def test_steps_that_a_byte_does_not_hold_are_not_chosen() -> None:
    """Weights all above (below) zero reach to 15 steps, those around it to 8: codes of w8 say that nothing wrapped."""
    weight = torch.cat([draw(9, 4, 128).abs() + 2, -draw(10, 4, 128).abs() - 2, draw(11, 4, 128)])
    for search in (False, True):
        found = quantise(weight, "w4r", search=search)
        assert found.scales is not None
        whole = found.whole_codes().float() * found.scales[:, None]
        assert float((whole - weight).norm() / weight.norm()) < 0.06
        assert found.dequantise().equal(whole)


def best_symmetric(group: Tensor, low: int, high: int) -> float:
    """Least squared error over every real step, exactly: between two neighbouring points where some code changes, the
    codes are constant and the best step follows from them."""
    w = group.double()
    best = float(w.square().sum())
    for sign in (1.0, -1.0):
        changes = torch.cat([w.abs() / (j + 0.5) for j in range(max(-low, high))]).sort().values
        steps = sign * torch.cat([(changes[1:] + changes[:-1]) / 2, changes[-1:] * 1.1, changes[:1] * 0.9])
        codes = (w / steps[:, None]).round().clamp(low, high)
        gain = (codes * w).sum(1).square() / codes.square().sum(1).clamp(min=1e-30)
        best = min(best, float((w.square().sum() - gain).min()))
    return best


@pytest.mark.parametrize("heavy", [False, True])
def test_symmetric_search_finds_nearly_the_optimum(heavy: bool) -> None:
    draws = torch.Generator().manual_seed(7)
    weight = torch.randn(200, 32, generator=draws)
    if heavy:
        weight = weight / torch.randn(200, 32, generator=draws).abs().clamp(min=0.05)
    found = group_errors(weight, quantise(weight, "w4"), FORMATS["w4"])
    best = torch.tensor([best_symmetric(row, -8, 7) for row in weight], dtype=torch.float64)
    assert bool((found >= best * (1 - 1e-3)).all()), "better than the optimum: the optimum is wrong"
    assert float(found.sum() / best.sum()) < 1.01
    assert float((found / best).max()) < 1.4


@pytest.mark.parametrize("name", ["w8", "w8g"])
def test_steps_of_eight_bits_are_nearly_the_best_for_their_codes(name: str) -> None:
    """One more round of least squares, in float64, gains less than 0.5% of the squared error (0.2% for whole rows).
    First guesses at 8 bits are far apart: without their refinement it would be more."""
    format = FORMATS[name]
    for seed in (1, 2):
        weight = draw(seed, 64, 512)
        found = quantise(weight, name)
        groups, codes = groups_of(weight, format), groups_of(found.codes, format)
        step = ((codes * groups).sum(-1) / codes.square().sum(-1))[:, None]
        again = (groups / step).round().clamp(format.grid.low, format.grid.high)
        error, best = group_errors(weight, found, format), (again * step - groups).square().sum(-1)
        assert float(error.sum()) < {"w8": 1.002, "w8g": 1.005}[name] * float(torch.minimum(error, best).sum())


def test_affine_search_against_a_fine_grid() -> None:
    weight = draw(11, 40, 32)
    found = group_errors(weight, quantise(weight, "w4m"), FORMATS["w4m"])
    low, width = weight.amin(1), weight.amax(1) - weight.amin(1)
    best = torch.full((40,), math.inf, dtype=torch.float64)
    for shrink in torch.linspace(0.7, 1.05, 36):
        for shift in torch.linspace(-0.05, 0.3, 36):
            step, base = (width * shrink / 15)[:, None], (low + width * shift)[:, None]
            codes = ((weight - base) / step).round().clamp(0, 15)
            best = torch.minimum(best, (codes * step + base - weight).double().square().sum(1))
    assert float(found.sum() / best.sum()) < 1.03


def test_importance_moves_the_error_away_from_what_matters() -> None:
    weight = draw(2, 32, 128)
    importance = torch.ones(128)
    importance[::7] = 100.0
    plain, aware = quantise(weight, "w4"), quantise(weight, "w4", importance=importance)

    def weighted(found: QTensor) -> float:
        return float(((found.dequantise() - weight).square() * importance).sum())

    assert weighted(aware) < 0.8 * weighted(plain)
    assert quantise(weight, "w4", importance=torch.zeros(128)).codes.equal(plain.codes)  # nothing was ever seen
    assert quantise(weight, "w4", importance=torch.full((128,), 5.0)).codes.equal(
        quantise(weight, "w4", importance=torch.ones(128)).codes
    )


@pytest.mark.parametrize(
    "bad", [torch.ones(64), torch.full((128,), math.nan), torch.full((128,), math.inf), -torch.ones(128)]
)
def test_bad_importance(bad: Tensor) -> None:
    with pytest.raises(ValidationError, match=r"layers\.0: importance must be 128 finite numbers"):
        quantise(draw(0, 4, 128), "w4", importance=bad, name="layers.0")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers(name: str, value: float) -> None:
    weight = draw(0)
    weight[5, 7] = value
    kind = "NaN" if math.isnan(value) else "infinite"
    with pytest.raises(CheckpointError, match=rf"model\.q_proj holds 1 {kind} of 512 weights"):
        quantise(weight, name, name="model.q_proj")


@pytest.mark.parametrize("name", FORMATS)
def test_group_that_does_not_divide(name: str) -> None:
    weight = draw(0, 4, 48)
    if not FORMATS[name].group and not FORMATS[name].stepped:
        assert quantise(weight, name).shape == (4, 48)
        return
    with pytest.raises(UnsupportedError, match=r"model\.q_proj has 48 inputs.*Use w8"):
        quantise(weight, name, name="model.q_proj")


def test_unknown_format_and_shape() -> None:
    with pytest.raises(ValidationError, match="format must be w8, w8r, w8g, w8gr, w6, w4m, w4, w4r, got 'w3'"):
        find_format("w3")
    with pytest.raises(CheckpointError, match=r"bias has shape \[64\]"):
        quantise(torch.zeros(64), "w8", name="bias")


@pytest.mark.parametrize("name", ["w8g", "w6", "w4", "w4m"])
def test_beyond_float16(name: str) -> None:
    """The largest weight a scale reaches is held to its relative step; a hair more is refused by name."""
    reach = 65504.0 * (1 if name == "w4m" else FORMATS[name].grid.high)
    weight = torch.zeros(1, 32)
    weight[0, 3] = reach
    found = quantise(weight, name)
    assert float(found.dequantise()[0, 3]) == pytest.approx(reach, rel=1e-3)
    with pytest.raises(UnsupportedError, match=r"blk holds .* beyond .*Use w8"):
        quantise(weight * 1.01, name, name="blk")


def test_w8_reaches_all_of_float32() -> None:
    most = torch.finfo(torch.float32).max
    weight = torch.tensor(
        [[most, -most, most / 2, 0.0], [1e-38, -1e-40, 0.0, 0.0], [0.0] * 4, [1e30, 1e-30, 1.0, -1e30]]
    )
    found = quantise(weight, "w8").dequantise()
    assert bool(found.isfinite().all())
    assert torch.allclose(found[0], weight[0], rtol=1e-5, atol=most / 100)
    assert float((found[1] - weight[1]).abs().max()) <= 2.0**-126
    assert found[2].tolist() == [0.0] * 4
    assert float(found[3, 0]) == pytest.approx(1e30, rel=1e-5)


@pytest.mark.parametrize("name", ["w8g", "w6", "w4", "w4m"])
@pytest.mark.parametrize("size", [1e-45, 1e-30, 2.0**-26, 2.0**-24, 1e-7, 1e-6, 1e-5])
def test_below_float16(name: str, size: float) -> None:
    """Weights near and below the smallest float16: never further off than half the smallest step there can be."""
    weight = draw(4, 4, 64)
    weight = weight / weight.abs().max() * size
    found = quantise(weight, name).dequantise()
    assert bool(found.isfinite().all())
    bound = plain_bound(weight, FORMATS[name])
    assert bool((group_errors(weight, quantise(weight, name), FORMATS[name]) <= bound).all())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_views(name: str, dtype: torch.dtype) -> None:
    """Any float dtype, contiguous or not, gives the codes of the same numbers in float32."""
    weight = draw(9, 64, 64).to(dtype).T
    found = quantise(weight, name)
    again = quantise(weight.float().contiguous(), name)
    assert found.codes.equal(again.codes)
    assert found.scales is not None
    assert again.scales is not None
    assert found.scales.equal(again.scales)


@pytest.mark.parametrize("name", FORMATS)
def test_rows_do_not_depend_on_one_another(name: str) -> None:
    """Also across the chunks that the search works in."""
    weight = draw(5, 5000, 64)
    found = quantise(weight, name)
    for row in (0, 2047, 2048, 4999):
        assert quantise(weight[row : row + 1], name).codes.equal(found.codes[row : row + 1])


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_counted(name: str) -> None:
    format = FORMATS[name]
    kind = name.removesuffix("r") if name.startswith("w8") else name
    bits = {"w8": 8 + 32 / 64, "w8g": 8.5, "w6": 7.0, "w4m": 5.0, "w4": 4.5, "w4r": 4.25 + 32 / 64}[kind]
    assert format.nbytes(10, 64) == 10 * 64 * bits / 8


@pytest.mark.parametrize("name", [name for name, format in FORMATS.items() if format.grid.minimum])
@pytest.mark.parametrize("factor", [1, 15, -1])
def test_equal_weights_come_back(name: str, factor: int) -> None:
    """A group of one value: `factor` times a float16 is a code times a step, or a minimum, that the format holds. The
    search compares errors in float32, so the last bit of one that is as good may differ."""
    halves = torch.rand(40, generator=torch.Generator().manual_seed(5)).add(0.01).half().float()
    weight = (factor * halves)[:, None].repeat(1, 64)
    assert torch.allclose(quantise(weight, name).dequantise(), weight, rtol=2e-7, atol=0)


@pytest.mark.parametrize(("name", "most"), [("w4", 1.0001), ("w6", 1.0003), ("w4m", 1.0005)])
def test_stored_scales_are_the_best_for_their_codes(name: str, most: float) -> None:
    """Against the closed form in float64: the step (and minimum) that least squares gives for the codes that are
    stored. The search ends where codes and scales agree, so little can be left to gain."""
    format = FORMATS[name]
    weight = draw(9, 200, 64)
    found = quantise(weight, name)
    groups = groups_of(weight, format)
    codes = (found.codes.double() - (0 if format.grid.minimum else format.zero)).reshape(groups.shape)
    columns = [codes, torch.ones_like(codes)] if format.grid.minimum else [codes]
    basis = torch.stack(columns, dim=-1)
    solved = (basis @ torch.linalg.lstsq(basis, groups[..., None]).solution)[..., 0]
    best = (solved - groups).square().sum(-1)
    assert 1 <= float(group_errors(weight, found, format).sum() / best.sum()) < most
