"""The only caller of a model: packs spans, runs one forward, returns the wanted rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from dfastllm.core import ModelInfo, Span
from dfastllm.engine.batch import Packed, pack
from dfastllm.engine.pages import KVStore, PageTable
from dfastllm.errors import UnsupportedError
from dfastllm.kernels.attention import span_attention
from dfastllm.kernels.rows import DenseRows, Rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from dfastllm.engine.runners.native import NativeRunner
    from dfastllm.models import PackedDecoder

    Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

__all__ = ["Runnable", "Runner", "runner_for"]


class Runnable(Protocol):
    """What the runner needs of a model; `dfastllm.models` builds these."""

    info: ModelInfo

    @property
    def dtype(self) -> torch.dtype: ...

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor: ...

    def head(self, hidden: torch.Tensor) -> torch.Tensor: ...


class Runner:
    """Owns the K,V tensors of one model. `run` writes them; nobody else does.

    cut_free: whether a row's bits do not depend on how its sequence was cut into spans."""

    cut_free = False

    def __init__(
        self, model: Runnable, slots: int, dtype: torch.dtype, device: torch.device | str, min_rows: int = 1
    ) -> None:
        info = model.info
        self.model = model
        self.device = torch.device(device)
        self.min_rows = min_rows
        self.kv = KVStore(info.layers, slots, info.kv_heads, info.head_dim, dtype, self.device)

    @torch.inference_mode()
    def run(self, items: Sequence[tuple[Span, PageTable, int]]) -> Rows:
        """Rows, sum of `span.wanted`, in the order of items.

        Writes K,V of the spans that keep or replace. items: (span, pages, kv_len before the step)."""
        packed = pack(items, self.device, self.min_rows)
        hidden = self.model(packed.ids, packed.positions, self._attend(packed))
        if packed.wanted == 0:
            return DenseRows(torch.empty(0, self.model.info.vocab_size, device=self.device))
        return DenseRows(self.model.head(hidden[packed.want])[: packed.wanted].float())

    def _attend(self, packed: Packed) -> Attend:
        all_k, all_v = self.kv.k, self.kv.v

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            layer_k, layer_v = all_k[layer], all_v[layer]
            if packed.write_rows.numel():
                layer_k[packed.write_slots] = k[packed.write_rows].to(layer_k.dtype)
                layer_v[packed.write_slots] = v[packed.write_rows].to(layer_v.dtype)
            out = []
            for s in packed.spans:
                own = slice(s.row0 + s.own0, s.row1)
                if s.cached is None:
                    keys, values = k[own], v[own]
                else:
                    keys, values = layer_k[s.cached], layer_v[s.cached]
                    if keys.dtype != k.dtype:
                        keys, values = keys.to(k.dtype), values.to(v.dtype)
                    if own.start < own.stop:
                        keys, values = torch.cat([keys, k[own]]), torch.cat([values, v[own]])
                out.append(span_attention(q[s.row0 : s.row1], keys, values, s.mask))
            out.append(torch.zeros_like(q[packed.spans[-1].row1 :]))  # padding rows
            return torch.cat(out)

        return attend


def runner_for(
    model: Runnable | PackedDecoder,
    slots: int,
    dtype: torch.dtype,
    device: torch.device | str,
    min_rows: int,
    page_size: int,
) -> Runner | NativeRunner:
    """The runner of this kind of model. dtype: of the K,V; int8 only with packed models. Raises UnsupportedError."""
    from dfastllm.engine.runners.native import NativeRunner
    from dfastllm.models import PackedDecoder

    if isinstance(model, PackedDecoder):
        return NativeRunner(model, slots, dtype, page_size)
    if not dtype.is_floating_point:
        raise UnsupportedError(
            f"K,V of dtype {dtype} need the native backend.", param="kv_cache_dtype", hint="Use auto."
        )
    return Runner(model, slots, dtype, device, min_rows)
