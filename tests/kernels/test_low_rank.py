"""The grouped low-rank kernel against float64: any ranks, sizes, types and places, each row by itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfastllm.kernels import native, set_threads
from dfastllm.kernels.low_rank import LowRank, Place, add_low_rank, pack_outputs, unpack_outputs

needs_native = pytest.mark.skipif(native() is None, reason="no native kernels")
TYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield
    set_threads(1)


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(TYPES),
    st.integers(0, 70),
    st.integers(1, 200),
    st.integers(1, 40),
    st.sampled_from([(1,), (31,), (32, 33), (513,), (96, 96), (700, 5)]),
    st.sampled_from([32, 64]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_against_float64(
    dtype: torch.dtype, rank: int, k: int, rows: int, parts: tuple[int, ...], stride: int, dora: bool, seed: int
) -> None:
    """Parts side by side, or alternating by 32 channels; the rows in any order; then some of them alone and at other
    numbers of threads, which must give the same bits."""
    draw = torch.Generator().manual_seed(seed)
    n = sum(parts)
    places, first, column = [], 0, 0
    for i, size in enumerate(parts):
        places.append(Place(first, size, 32 * i if stride == 64 else column, stride))
        first, column = first + size, column + size
    width = 1 + max(int(place.columns.max()) for place in places)
    a = torch.randn(rank, k, generator=draw).to(dtype) if rank else None
    b = torch.randn(rank, n, generator=draw).to(dtype) if rank else None
    factor = torch.rand(n, generator=draw) + 0.5 if dora else None
    shift = torch.randn(n, generator=draw) if dora else None
    handle = native().Adapter(1)
    at = [(place.first, place.count, place.column, place.stride) for place in places]
    handle.add(0, n, a, None if b is None else pack_outputs(b), 0.7, factor, shift, at)

    x, y = torch.randn(rows, k, generator=draw), torch.randn(rows, width, generator=draw)
    index = torch.randperm(rows, generator=draw)[: max(1, rows - 3)].int()
    got = y.clone()
    native().low_rank(handle, 0, x, index, got)

    exact = y.double()
    columns = torch.cat([place.columns for place in places])
    low = 0.7 * (x.double() @ a.double().T) @ b.double() if a is not None and b is not None else torch.zeros(rows, n)
    changed = exact[:, columns] + low
    if factor is not None and shift is not None:
        changed = changed * factor + shift
    for row in index.tolist():
        exact[row, columns] = changed[row]
    terms = 0.7 * (x.abs() @ a.abs().float().T) @ b.abs().float() if a is not None and b is not None else low
    size = 1 + terms.max().item()  # rounding is in proportion to what is added up
    assert (got - exact).abs().max() <= 3e-6 * size
    untouched = torch.ones(width, dtype=torch.bool)
    untouched[columns] = False
    assert torch.equal(got[:, untouched], y[:, untouched])

    for tile_rows in (1, 7, rows):  # as a linear adds it to its tiles
        tiled = y.clone()
        native().low_rank(handle, 0, x, index.sort().values, tiled, tile_rows)
        assert torch.equal(tiled, got)

    part = LowRank(a, b, 0.7, factor, shift)
    assert (add_low_rank(y[:, columns], x, part)[index] - got[:, columns][index]).abs().max() <= 6e-6 * size
    for threads in (2, 3):
        set_threads(threads)
        few = y.clone()
        native().low_rank(handle, 0, x, index[:1], few)
        assert torch.equal(few[index[0]], got[index[0]])


@pytest.mark.parametrize("out", [1, 32, 45, 128])
def test_outputs_in_units(out: int) -> None:
    b = torch.arange(3.0 * out).view(3, out)
    packed = pack_outputs(b)
    assert packed.shape == (-(-out // 32), 3, 32)
    assert packed.is_contiguous()
    assert packed.sum() == b.sum()  # what pads is zero
    assert torch.equal(unpack_outputs(packed, out), b)


@needs_native
def test_what_does_not_fit_is_refused() -> None:
    handle = native().Adapter(2)
    a, b = torch.zeros(3, 8), torch.zeros(1, 3, 32)
    whole = [(0, 5, 0, 32)]
    for wrong in (
        (0, 5, a, b.bfloat16(), 1.0, None, None, whole),  # of two types
        (0, 5, a, b[:, :, ::2], 1.0, None, None, whole),  # not contiguous
        (0, 5, a, torch.zeros(1, 2, 32), 1.0, None, None, whole),  # of two ranks
        (0, 33, a, b, 1.0, None, None, [(0, 33, 0, 32)]),  # of fewer outputs
        (0, 5, a, None, 1.0, None, None, whole),  # without B
        (0, 5, a, b, 1.0, torch.zeros(4), None, whole),  # a factor of other channels
        (0, 5, a.double(), b.double(), 1.0, None, None, whole),
    ):
        with pytest.raises(ValueError, match=r"A|B|factor"):
            handle.add(*wrong)
    with pytest.raises(IndexError):
        handle.add(2, 5, a, b, 1.0, None, None, whole)
    handle.add(0, 5, a, b, 1.0, None, None, whole)
    with pytest.raises(ValueError, match="index"):
        native().low_rank(handle, 0, torch.zeros(2, 8), torch.tensor([2], dtype=torch.int32), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="inputs"):
        native().low_rank(handle, 0, torch.zeros(2, 9), torch.tensor([0], dtype=torch.int32), torch.zeros(2, 5))
