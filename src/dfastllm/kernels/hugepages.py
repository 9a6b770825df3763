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

import torch
from torch import Tensor

from dfastllm.kernels.packed import aligned

__all__ = ["empty"]

HUGE = 2 << 20
SLAB = 32 << 20
SMALL = 256 << 10  # below: the allocator's own memory, where a sanitizer also sees overruns
LINE = 64

_lock = threading.Lock()
_slab: weakref.ref[mmap.mmap] | None = None
_used = 0  # bytes of the slab


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


def _mapping(size: int) -> tuple[mmap.mmap, int]:
    """Private memory with `size` bytes from a huge page's start on, and where that is."""
    memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory, start
