"""The runner of packed models: one native call per step, the head run lazily on the wanted rows.

What a row sees is two numbers, but for shadow rows, which have a mask. A row's result does not
depend on its neighbours, to the last bit, at any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfastllm.core import ModelInfo
from dfastllm.engine.runners.apart import stats_apart
from dfastllm.errors import UnsupportedError
from dfastllm.kernels import native
from dfastllm.kernels.halt import Halt
from dfastllm.kernels.kv import KvCache
from dfastllm.kernels.rows import Barred, DenseRows, Rows, RowStats
from dfastllm.kernels.step import BLOCK, Step
from dfastllm.models import PackedDecoder
from dfastllm.models.adapted import PackedAdapters

if TYPE_CHECKING:
    from dfastllm.lora import Adapter

__all__ = ["AdaptedHeadRows", "HeadRows", "NativeRunner"]


KV_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.int8: "int8"}


class NativeRunner:
    """Runs a packed model on the CPU. K,V: `slots` positions of `dtype`: float32, bfloat16 or int8."""

    block_size = BLOCK

    def __init__(self, model: PackedDecoder, slots: int, dtype: torch.dtype, page_size: int) -> None:
        if page_size % BLOCK:
            raise UnsupportedError(
                f"page_size must be a multiple of {BLOCK} for the native backend, got {page_size}.", param="page_size"
            )
        if dtype not in KV_TYPES:
            raise UnsupportedError(
                f"K,V of the native backend are float32, bfloat16 or int8, got {dtype}.", param="kv_cache_dtype"
            )
        self.model = model
        # The plain twins are torch products, which sum by their height.
        self.cut_free = self.own_threads = native() is not None
        info = model.info
        self.kv = KvCache(info.layers, -(-slots // BLOCK), info.kv_heads, info.head_dim, KV_TYPES[dtype])
        self._own = self._scratch(1)
        self.halt = Halt()
        self._adapters = PackedAdapters(model)

    @property
    def info(self) -> ModelInfo:
        return self.model.info

    @torch.inference_mode()
    def run(self, step: Step) -> Rows:
        """See `runners.Runner`. Raises ValidationError, Interrupted."""
        self.halt.begin()
        if step.own_keys > self._own.blocks * BLOCK:
            self._own = self._scratch(2 * step.own_keys // BLOCK)
        hidden = self.model.forward(step, self.kv, self._own, self.halt, self._adapters)
        if not step.adapter.any():
            return HeadRows(hidden, self.model)
        numbers = self._adapters.of_head(torch.from_numpy(step.adapter[step.want]).long())
        if not numbers.any():
            return HeadRows(hidden, self.model)
        return AdaptedHeadRows(hidden, self.model, self._adapters, numbers)

    def adapters(self, table: Sequence[Adapter | None]) -> None:
        """See `runners.Runner`. Raises ValidationError, UnsupportedError."""
        self._adapters.set(table)

    def check_adapter(self, adapter: Adapter) -> None:
        """See `runners.Runner`."""
        self._adapters.require(adapter)

    def _scratch(self, blocks: int) -> KvCache:
        """K,V of one pass and one layer, for rows that see each other but are not kept."""
        return KvCache(1, blocks, self.model.info.kv_heads, self.model.info.head_dim, self.kv.type)


class HeadRows(Rows):
    """Hidden rows float32 [count, hidden] and the packed head; logits exist only where someone asks for them."""

    def __init__(self, hidden: Tensor, model: PackedDecoder) -> None:
        super().__init__(len(hidden), model.info.vocab_size if model.shortlist is None else len(model.shortlist))
        self._hidden = hidden
        self._model = model

    def _logits(self) -> tuple[Tensor, NDArray[np.bool_]]:
        logits = self._model.logits(self._hidden)
        return logits, torch.isfinite(logits.sum(dim=-1)).numpy()

    def _stats(self, ban: tuple[int, ...], barred: Barred, norm: bool, spread: bool, top: int) -> RowStats:
        top = min(top, self.vocab)
        s = self._model.head_stats(self._hidden, ban=ban, barred=barred, entropy=spread, topk=top)
        none, no_ids = np.empty(0, dtype=np.float32), np.empty(0, dtype=np.int64)
        margin = np.exp(s.top - s.norm) - np.exp(s.second - s.norm) if spread else none
        return RowStats(
            token=np.where(s.choice < 0, 0, s.choice).astype(np.int64),
            best=s.choice_logit,
            finite=s.finite,
            norm=s.norm if norm or spread else none,
            entropy=s.entropy if spread else none,
            margin=margin,
            ids=s.top_ids.astype(np.int64) if top else no_ids,
            logits=s.top_values if top else none,
        )

    def _take(self, index: NDArray[np.int64]) -> Rows:
        return HeadRows(self._hidden[torch.from_numpy(index)], self._model)


class AdaptedHeadRows(HeadRows):
    """Rows some of whose adapters change the head: those go through their logits, the others as ever.

    numbers: int64 [count], the adapter of a row that changes the head, 0: none."""

    def __init__(self, hidden: Tensor, model: PackedDecoder, adapters: PackedAdapters, numbers: Tensor) -> None:
        super().__init__(hidden, model)
        self._adapters = adapters
        self._numbers = numbers

    def _logits(self) -> tuple[Tensor, NDArray[np.bool_]]:
        logits = self._model.logits(self._hidden, self._adapters, self._numbers)
        return logits, torch.isfinite(logits.sum(dim=-1)).numpy()

    def _stats(self, ban: tuple[int, ...], barred: Barred, norm: bool, spread: bool, top: int) -> RowStats:
        return stats_apart(
            (self._numbers != 0).numpy(),
            lambda index: HeadRows(self._hidden[torch.from_numpy(index)], self._model),
            lambda index: DenseRows(self._take(index).logits()),
            ban=ban,
            barred=barred,
            norm=norm,
            spread=spread,
            top=top,
        )

    def _take(self, index: NDArray[np.int64]) -> Rows:
        at = torch.from_numpy(index)
        return AdaptedHeadRows(self._hidden[at], self._model, self._adapters, self._numbers[at])
