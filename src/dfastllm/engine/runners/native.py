"""The runner of packed models: one native call per step, the head run lazily on the wanted rows.

Nothing is padded and no mask is built but for shadow rows: what a row sees is two numbers. A row's result does not
depend on its neighbours, to the last bit, at any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfastllm.core import Span
from dfastllm.engine.batch import PackedRows, pack_rows
from dfastllm.engine.pages import PageTable
from dfastllm.errors import UnsupportedError
from dfastllm.kernels import linear, native
from dfastllm.kernels.activations import Acts, act_kind
from dfastllm.kernels.kv import KvCache
from dfastllm.kernels.rows import Rows, RowStats
from dfastllm.kernels.step import BLOCK, Step
from dfastllm.models import PackedDecoder

__all__ = ["HeadRows", "NativeRunner", "step_of"]


KV_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.int8: "int8"}


class NativeRunner:
    """Owns the K,V of one packed model. `run` writes them; nobody else does."""

    def __init__(self, model: PackedDecoder, slots: int, dtype: torch.dtype, page_size: int) -> None:
        if page_size % BLOCK:
            raise UnsupportedError(
                f"page_size must be a multiple of {BLOCK} for the native backend, got {page_size}.", param="page_size"
            )
        info = model.info
        self.model = model
        self.device = torch.device("cpu")
        if dtype not in KV_TYPES:
            raise UnsupportedError(
                f"K,V of the native backend are float32, bfloat16 or int8, got {dtype}.", param="kv_cache_dtype"
            )
        self.cut_free = native() is not None  # the plain twins are torch products, which sum by their height
        self.kv = KvCache(info.layers, -(-slots // BLOCK), info.kv_heads, info.head_dim, KV_TYPES[dtype])
        self._own = self._scratch(1)

    @torch.inference_mode()
    def run(self, items: Sequence[tuple[Span, PageTable, int]]) -> Rows:
        """Rows, sum of `span.wanted`, in the order of items. Writes K,V of the spans that keep or replace.
        items: (span, pages, kv_len before the step)."""
        step = step_of(pack_rows(items))
        if step.own_keys > self._own.blocks * BLOCK:
            self._own = self._scratch(2 * step.own_keys // BLOCK)
        hidden = self.model.forward(step, self.kv, self._own)
        return HeadRows(hidden, self.model)

    def _scratch(self, blocks: int) -> KvCache:
        """K,V of one pass and one layer, for rows that see each other but are not kept."""
        return KvCache(1, blocks, self.model.info.kv_heads, self.model.info.head_dim, self.kv.type)


class HeadRows(Rows):
    """Hidden rows float32 [count, hidden] and the packed head; logits exist only where someone asks for them."""

    def __init__(self, hidden: Tensor, model: PackedDecoder) -> None:
        super().__init__(len(hidden), model.info.vocab_size)
        self._hidden = hidden
        self._model = model

    def _prepared(self) -> Acts:
        return linear.prepare(self._hidden, act_kind(self._model.head_weights.format))

    def _logits(self) -> tuple[Tensor, NDArray[np.bool_]]:
        head = self._model.head_weights
        logits = linear.linear(self._prepared(), head)
        return logits, torch.isfinite(logits.sum(dim=-1)).numpy()

    def _stats(self, ban: tuple[int, ...], norm: bool, spread: bool, top: int) -> RowStats:
        head = self._model.head_weights
        top = min(top, self.vocab)
        s = linear.head_stats(self._prepared(), head, ban=ban, entropy=spread, topk=top)
        none, no_ids = np.empty(0, dtype=np.float32), np.empty(0, dtype=np.int64)
        margin = np.exp(s.top - s.norm) - np.exp(s.second - s.norm) if spread else none
        return RowStats(
            token=np.where(s.token < 0, 0, s.token).astype(np.int64),
            best=s.top,
            finite=s.finite,
            norm=s.norm if norm or spread else none,
            entropy=s.entropy if spread else none,
            margin=margin,
            ids=s.top_ids.astype(np.int64) if top else no_ids,
            logits=s.top_values if top else none,
        )

    def _take(self, index: NDArray[np.int64]) -> Rows:
        return HeadRows(self._hidden[torch.from_numpy(index)], self._model)


def step_of(packed: PackedRows) -> Step:
    """The arrays of one native call. Keys of this pass alone lie in blocks of their own, span after span."""
    row0, row1, cached, own0, page0 = packed.spans.T
    own = row1 - row0 - own0
    own_blocks = -(-own // BLOCK)  # per span
    total = int(own_blocks.sum())
    own_first = np.cumsum(own_blocks) - own_blocks
    per_page = packed.page_size // BLOCK
    blocks = packed.pages
    if per_page > 1:
        blocks = (blocks[:, None] * per_page + np.arange(per_page)).ravel()
    spans = np.empty((len(own), 6), dtype=np.int32)
    spans[:, :3] = packed.spans[:, :3]
    spans[:, 3], spans[:, 4], spans[:, 5] = own, page0 * per_page, own_first
    if total:
        count, row = row1 - row0, np.arange(len(packed.ids))
        own_slot = row - (row0 + own0 - own_first * BLOCK).repeat(count)
        own_slot[row < (row0 + own0).repeat(count)] = -1
        cached_limit = np.minimum(packed.limits, cached.repeat(count))
        own_limit = packed.limits - cached_limit
    else:  # every key is a cached one
        own_slot, cached_limit = np.full(len(packed.ids), -1), packed.limits
        own_limit = np.zeros(len(packed.ids), dtype=np.int32)
    mask_at = mask = None
    if packed.masks:
        mask_at, parts, end = np.full(len(own), -1, dtype=np.int64), [], 0
        for number, seen in packed.masks.items():
            mask_at[number], end = end, end + seen.size
            parts.append(seen.astype(np.uint8).ravel())
            rows = slice(int(row0[number]), int(row1[number]))
            cached_limit[rows], own_limit[rows] = cached[number], own[number]
        mask = np.concatenate(parts)
    return Step(
        ids=packed.ids,
        positions=packed.positions,
        slot=packed.slots.astype(np.int32),
        own_slot=own_slot.astype(np.int32),
        spans=spans,
        blocks=blocks.astype(np.int32),
        own_blocks=np.arange(total, dtype=np.int32),
        cached_limit=cached_limit.astype(np.int32),
        own_limit=own_limit.astype(np.int32),
        want=packed.want,
        mask=mask,
        mask_at=mask_at,
        own_keys=total * BLOCK,
    )
