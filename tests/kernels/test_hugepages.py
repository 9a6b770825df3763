"""Weight memory: pieces are aligned, apart from one another, and given back."""

from __future__ import annotations

import gc
import itertools
import mmap
import weakref

import pytest
import torch

from dfastllm.kernels import hugepages

sizes = pytest.mark.parametrize(
    "size", [0, 1, 100, hugepages.SMALL, 3_000_001, hugepages.SLAB // 2, hugepages.SLAB + 5]
)


@sizes
def test_a_piece_is_aligned_and_writable(size: int) -> None:
    piece = hugepages.empty(size)
    assert piece.dtype == torch.uint8
    assert piece.shape == (size,)
    assert piece.data_ptr() % 64 == 0 or size == 0
    piece.fill_(7)
    assert bool((piece == 7).all())


def test_pieces_do_not_overlap() -> None:
    draw = torch.Generator().manual_seed(0)
    counts = torch.randint(hugepages.SMALL, 6 << 20, (30,), generator=draw).tolist()
    pieces = [hugepages.empty(count).fill_(i) for i, count in enumerate(counts)]
    for i, (piece, count) in enumerate(zip(pieces, counts, strict=True)):
        assert piece.shape == (count,)
        assert bool((piece == i).all())
    spans = sorted((p.data_ptr(), p.data_ptr() + p.numel()) for p in pieces)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_parts_of_one_thing_lie_together() -> None:
    parts = [(hugepages.SMALL + 3, torch.uint8), (1000, torch.float16), (0, torch.float32), (5, torch.float32)]
    tensors = hugepages.together(parts)
    assert [(t.numel(), t.dtype) for t in tensors] == parts
    for i, tensor in enumerate(tensors):
        tensor.fill_(i + 1)
    assert all(bool((tensor == i + 1).all()) for i, tensor in enumerate(tensors))
    starts = [t.data_ptr() for t in tensors if t.numel()]
    assert all(at % 64 == 0 for at in starts)
    assert starts == [starts[0], starts[0] + hugepages.SMALL + 64, starts[0] + hugepages.SMALL + 64 + 2048]


def test_small_parts_have_memory_of_their_own() -> None:
    """So that a sanitizer sees who runs past one of them."""
    first, second = hugepages.together([(1000, torch.uint8), (1000, torch.float16)])
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages here")
def test_a_mapping_goes_with_its_last_piece() -> None:
    hugepages._slab = None
    first, second = hugepages.empty(hugepages.SMALL), hugepages.empty(hugepages.SMALL)
    assert second.data_ptr() - first.data_ptr() == hugepages.SMALL
    slab = hugepages._slab
    assert isinstance(slab, weakref.ref)
    view = second.view(torch.int32)[:100].fill_(5)
    del first, second
    gc.collect()
    assert slab() is not None
    assert bool((view == 5).all())
    del view
    gc.collect()
    assert slab() is None
    assert hugepages.empty(hugepages.SMALL).fill_(1).sum() == hugepages.SMALL  # a new one


def test_without_huge_pages_it_is_ordinary_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    piece = hugepages.empty(hugepages.SLAB)
    assert piece.data_ptr() % 64 == 0
    assert piece.fill_(3).sum(dtype=torch.int64) == 3 * hugepages.SLAB


@pytest.mark.parametrize("rows", [3, 300_000])
def test_tensors_in_one_memory(rows: int) -> None:
    """Of ordinary and of huge pages: each on its boundary, none over another."""
    given = [torch.randn(rows, 3).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    memory = hugepages.Memory(sum(hugepages.aligned_size(tensor) for tensor in given))
    kept = [memory.put(tensor.T) for tensor in given]
    assert all(
        torch.equal(a, b.T) and a.dtype == b.dtype and a.is_contiguous() for a, b in zip(kept, given, strict=True)
    )
    assert all(tensor.data_ptr() % 64 == 0 for tensor in kept)
    with pytest.raises(RuntimeError):
        memory.put(given[0])
