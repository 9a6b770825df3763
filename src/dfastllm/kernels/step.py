"""One forward pass as the native kernels read it: flat arrays, no tensors, no padding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["BLOCK", "Step"]

BLOCK = 16  # positions of a K,V block


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """Rows of many spans packed end to end, and which keys each row sees. All arrays contiguous.

    ids, positions  int64 [rows].
    slot, own_slot  int32 [rows]: where a row's K,V go, block * 16 + offset; slot in the cache (kept), own_slot in the
                    memory of this pass only (rows that see each other but are not kept); -1: not there.
    spans           int32 [spans, 6]: row0, row1; cached: keys are the positions [0, cached) of the cache, then `own`
                    keys of this pass; where its entries begin in `blocks` and in `own_blocks`.
    blocks, own_blocks  int32: block numbers, ceil(cached / 16) and ceil(own / 16) per span.
    cached_limit, own_limit  int32 [rows]: a row sees the first so many cached and the first so many own keys.
    want            int64 [wanted]: rows whose hidden states are needed.
    mask, mask_at   uint8, nonzero: visible, [rows of the span, cached + own] of the spans that need one, end to end;
                    and int64 [spans], where a span's mask begins, -1: none. Both None when no span has one.
    """

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    slot: NDArray[np.int32]
    own_slot: NDArray[np.int32]
    spans: NDArray[np.int32]
    blocks: NDArray[np.int32]
    own_blocks: NDArray[np.int32]
    cached_limit: NDArray[np.int32]
    own_limit: NDArray[np.int32]
    want: NDArray[np.int64]
    mask: NDArray[np.uint8] | None = None
    mask_at: NDArray[np.int64] | None = None
    own_keys: int = 0  # slots of own_slot in use: blocks of this pass's memory, times 16
