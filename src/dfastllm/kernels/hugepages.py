"""Memory for weights in huge pages. Batch-1 decoding reads all weights once a token, and with pages of 4 KB address
translation and prefetchers that stop at page ends cost a third of the bandwidth (measured: 20 against 32 GB/s a core).

Pieces are cut from mappings of 32 MB, because a huge page is 2 MB and most weights are not a multiple of it; a mapping
goes when its last piece does. Where huge pages are switched off or unknown this is ordinary memory.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from dfastllm.kernels.packed import aligned

__all__ = ["Memory", "aligned_size", "empty", "together"]

HUGE = 2 << 20
SLAB = 32 << 20
SMALL = 256 << 10  # below: the allocator's own memory, where a sanitizer also sees overruns
LINE = 64

_lock = threading.Lock()
_slab: weakref.ref[mmap.mmap] | None = None
_used = 0  # bytes of the slab


def aligned_size(tensor: Tensor) -> int:
    """Bytes that a tensor takes of a `Memory`."""
    return -(-tensor.nbytes // LINE) * LINE


class Memory:
    """So many bytes that belong together: they go when the last tensor of them does. They share no mapping with others,
    so that what is loaded and given up again and again leaves nothing behind."""

    def __init__(self, size: int) -> None:
        if size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory = aligned(size, torch.uint8)
        else:
            memory, start = _mapping(size)
            self._memory = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start)
        self._used = 0

    def put(self, tensor: Tensor) -> Tensor:
        """A contiguous copy on the next 64-byte boundary. Raises RuntimeError where there is no room."""
        piece = self._memory[self._used : self._used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self._used += aligned_size(tensor)
        return piece.copy_(tensor)


def empty(size: int) -> Tensor:
    """Uninitialised uint8 [size] on a 64-byte boundary."""
    if size < SMALL or not hasattr(mmap, "MADV_HUGEPAGE"):
        return aligned(size, torch.uint8)
    if size >= SLAB // 2:
        memory, start = _mapping(size)
        return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start)
    global _slab, _used
    with _lock:
        current = _slab() if _slab is not None else None
        if current is None or _used + size > len(current):
            current, _used = _mapping(SLAB)
            _slab = weakref.ref(current)
        piece = torch.frombuffer(current, dtype=torch.uint8, count=size, offset=_used)
        _used += -(-size // LINE) * LINE
    return piece


def together(parts: Sequence[tuple[int, torch.dtype]]) -> list[Tensor]:
    """Uninitialised tensors of so many elements, one behind the other, each on a 64-byte boundary: what is read
    together shares its huge pages, however small its parts are. Where all of it is small each has its own memory."""
    sizes = [count * dtype.itemsize for count, dtype in parts]
    lines = [-(-size // LINE) * LINE for size in sizes]
    if sum(lines) < SMALL:
        return [aligned(count, dtype) for count, dtype in parts]
    out: list[Tensor] = []
    memory, at = empty(sum(lines)), 0
    for size, line, (_, dtype) in zip(sizes, lines, parts, strict=True):
        out.append(memory[at : at + size].view(dtype))
        at += line
    return out


def _mapping(size: int) -> tuple[mmap.mmap, int]:
    """Private memory with `size` bytes from a huge page's start on, and where that is."""
    memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory, start
