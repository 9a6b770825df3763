"""The torch runner: the plain model on any device, the reference that every other runner is held to.

No loop over spans inside a layer. Spans that are alike (the same numbers of rows and keys, each rounded up by the span
alone) make a group: one gather of their keys by block table, one masked product. How a span is rounded never depends on
its neighbours, so a row's bits do not either (with at least `min_rows` rows in the linear layers, whose products of
fewer rows sum in another order).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dfastllm.core import ModelInfo
from dfastllm.errors import UnsupportedError
from dfastllm.kernels.halt import Halt, Interrupted
from dfastllm.kernels.kv import SlotCache
from dfastllm.kernels.rows import DenseRows, Rows
from dfastllm.kernels.step import SPAN_WORDS
from dfastllm.models import Decoder
from dfastllm.models.adapted import AdaptedRows, on_device, placed_table, require_numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dfastllm.kernels.step import Step
    from dfastllm.lora import Adapter
    from dfastllm.models import Attend
    from dfastllm.models.parts import Adapt

    AttendFunction = Callable[[int, Attend, Tensor, Tensor, Tensor], Tensor]

__all__ = ["Runnable", "TorchRunner"]

Ints = NDArray[np.int64]


class Runnable(Protocol):
    """What the runner needs of a model; `dfastllm.models` builds these."""

    info: ModelInfo

    @property
    def dtype(self) -> torch.dtype: ...

    def __call__(self, ids: Tensor, positions: Tensor, attend: AttendFunction) -> Tensor: ...

    def head(self, hidden: Tensor) -> Tensor: ...


class Adaptable(Runnable, Protocol):
    """A model whose matrices adapters may change: `dfastllm.models.Decoder`."""

    def __call__(
        self, ids: Tensor, positions: Tensor, attend: AttendFunction, adapt: Adapt | None = None
    ) -> Tensor: ...

    def head(self, hidden: Tensor, adapt: Adapt | None = None, rows: Tensor | None = None) -> Tensor: ...


class TorchRunner:
    """Runs a torch model. K,V: `slots` positions of `dtype` on `device`.

    min_rows    a forward is padded to so many rows.
    block_size  positions of a block, those of a page.
    cut_free    False: matrix products of other heights sum in another order.
    """

    cut_free = False
    own_threads = False

    def __init__(
        self,
        model: Runnable,
        slots: int,
        dtype: torch.dtype,
        device: torch.device | str,
        min_rows: int = 1,
        block_size: int = 16,
    ) -> None:
        info = model.info
        self.model = model
        self.device = torch.device(device)
        self.min_rows = min_rows
        self.block_size = block_size
        self.kv = SlotCache(info.layers, slots, info.kv_heads, info.head_dim, dtype, self.device)
        self.halt = Halt()
        self._given: tuple[Adapter | None, ...] = (None,)
        self._table: list[Adapter | None] = [None]  # the same, on the device

    @property
    def info(self) -> ModelInfo:
        return self.model.info

    @torch.inference_mode()
    def run(self, step: Step) -> Rows:
        """See `runners.Runner`. Raises ValidationError, Interrupted."""
        step.check(-(-self.kv.slots // self.block_size), len(step.own_blocks))
        step.check_ids(self.info.vocab_size)
        self.halt.begin()
        plan = _Plan.of(step, self.device, self.min_rows)
        if step.adapter.any():
            require_numbers(step, self._table)
            return self._run_adapted(step, plan)
        hidden = self.model(plan.ids, plan.positions, self._attend(plan))
        wanted = len(step.want)
        if wanted == 0:
            return self._no_rows()
        return DenseRows(self.model.head(hidden[plan.want])[:wanted].float())

    def _no_rows(self) -> Rows:
        return DenseRows(torch.empty(0, self.model.info.vocab_size, device=self.device))

    def _run_adapted(self, step: Step, plan: _Plan) -> Rows:
        """The same with adapters. Rows without one get what the plain way gives: every product is the same."""
        numbers = F.pad(torch.from_numpy(step.adapter).long(), (0, len(plan.ids) - len(step)))
        model = cast("Adaptable", self.model)
        adapt = AdaptedRows(self._table, numbers.to(self.device), self.min_rows)
        hidden = model(plan.ids, plan.positions, self._attend(plan), adapt)
        wanted = len(step.want)
        if wanted == 0:
            return self._no_rows()
        logits = model.head(hidden[plan.want], adapt, plan.want)[:wanted].float()
        return DenseRows(adapt.never(logits, plan.want[:wanted]))

    def adapters(self, table: Sequence[Adapter | None]) -> None:
        """See `runners.Runner`. Raises ValidationError, UnsupportedError."""
        self._table = placed_table(table, self._given, self._table, self._placed)
        self._given = tuple(table)

    def _placed(self, adapter: Adapter) -> Adapter:
        self.check_adapter(adapter)
        return on_device(adapter, self.device)

    def check_adapter(self, adapter: Adapter) -> None:
        """See `runners.Runner`."""
        if not isinstance(self.model, Decoder):
            raise UnsupportedError(f"{self.info.name} takes no adapters: it is none of our models.", param="lora")

    def _attend(self, plan: _Plan) -> AttendFunction:
        all_k, all_v = self.kv.k, self.kv.v

        def attend(layer: int, op: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.halt.asked:
                raise Interrupted
            layer_k, layer_v = all_k[layer], all_v[layer]
            if len(plan.write_slots):
                layer_k[plan.write_slots] = _picked(k, plan.write_rows).to(layer_k.dtype)
                layer_v[plan.write_slots] = _picked(v, plan.write_rows).to(layer_v.dtype)
            parts = [group.attend(op, q, (layer_k, layer_v), (k, v)).flatten(0, 1) for group in plan.groups]
            return _picked(parts[0] if len(parts) == 1 else torch.cat(parts), plan.where)

        return attend


def _picked(x: Tensor, rows: Tensor | None) -> Tensor:
    """The rows [n] of x; None: all of them, in order, which most steps want."""
    return x if rows is None else x.index_select(0, rows)


@dataclass(slots=True)
class _Group:
    """Spans that are alike, each padded to `rows` rows, `cached` and `own` keys. B of them.

    rows       int64 [B, rows]: rows of the step; those past a span's last are its last again.
    slots      int64 [B, cached]: where their cached keys lie; past the last: any.
    own        int64 [B, own]: rows of the step whose K,V they see beside those; past the last: any.
    visible    bool [B, 1, rows, cached + own].
    positions  int64 [B, rows] of the rows, and [B, cached + own] of the keys.
    """

    rows: Tensor
    slots: Tensor
    own: Tensor
    visible: Tensor
    positions: tuple[Tensor, Tensor]
    _masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def attend(self, op: Attend, q: Tensor, cache: tuple[Tensor, Tensor], fresh: tuple[Tensor, Tensor]) -> Tensor:
        """q [rows, heads, dim]; cache: K, V [slots, kv_heads, dim]; fresh: K, V [rows, kv_heads, dim] of this forward.
        -> [B, rows, heads, dim], in which rows past a span's last are to be left out."""
        heads, kv_heads = q.shape[1], fresh[0].shape[1]
        k, v = (self._keys(old, new, q.dtype) for old, new in zip(cache, fresh, strict=True))
        # The query heads that share a K,V head are folded into the rows, so K and V are never expanded.
        group = heads // kv_heads
        count, height = self.rows.shape
        folded = q[self.rows].view(count, height, kv_heads, group, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)
        mask = self._mask(group, op.window)
        if op.softcap:
            out = _capped(folded, k, v, mask, op.scale, op.softcap)
        else:
            out = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=op.scale)
        return out.view(count, kv_heads, group, height, -1).permute(0, 3, 1, 2, 4).flatten(2, 3)

    def _keys(self, cache: Tensor, fresh: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, kv_heads, cached + own, dim]."""
        parts = []
        if self.slots.shape[1]:
            kept = cache[self.slots]
            parts.append(kept if kept.dtype == dtype else kept.to(dtype))
        if self.own.shape[1]:
            parts.append(fresh[self.own])
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).transpose(1, 2)

    def _mask(self, group: int, window: int) -> Tensor:
        """`visible` within a window of so many positions (0: no window), once for each query head of a K,V head."""
        if (group, window) not in self._masks:
            seen = self.visible
            if window:
                rows, keys = self.positions
                seen = seen & (keys[:, None, None, :] > rows[:, None, :, None] - window)
            self._masks[group, window] = seen.repeat(1, 1, group, 1) if group > 1 else seen
        return self._masks[group, window]


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    """Attention whose scores are softcap * tanh(score / softcap) (Gemma 2), softmax in float32."""
    scores = (q @ k.transpose(-1, -2)).float() * (scale / softcap)
    weights = (scores.tanh() * softcap).masked_fill(~mask, -torch.inf).softmax(-1)
    return weights.to(v.dtype) @ v


@dataclass(slots=True)
class _Plan:
    """What a step is on a device: int64 tensors.

    ids, positions  [rows and padding]; want [wanted and padding].
    write_rows, write_slots  [stored]: rows whose K,V are kept (None: all), and where.
    where           [rows and padding]: which of the groups' rows, end to end, a row is; padding is any. None: itself.
    """

    ids: Tensor
    positions: Tensor
    want: Tensor
    write_rows: Tensor | None
    write_slots: Tensor
    where: Tensor | None
    groups: list[_Group]

    @classmethod
    def of(cls, step: Step, device: torch.device, min_rows: int) -> _Plan:
        """One upload; everything else is made of it on the device."""
        shapes = _rounded(step)
        order = np.lexsort(shapes.T)
        first = np.flatnonzero(np.diff(shapes[order], axis=0, prepend=-1).any(axis=1))  # of each kind
        kinds, counts = shapes[order[first]], np.diff(first, append=len(order))
        written, places = np.flatnonzero(step.slot >= 0), _places(step, order, shapes)
        wanted = len(step.want)
        extra = (
            np.zeros(max(0, min_rows - len(step)), dtype=np.int32),  # padding
            np.full(max(0, min_rows - wanted) if wanted else 0, step.want[0] if wanted else 0, dtype=np.int32),
            written,
            order,
            places,
        )
        same = len(places) == max(min_rows, int(shapes[:, 0].sum())) and bool((places == np.arange(len(places))).all())
        flat = torch.from_numpy(np.concatenate([step.words, *extra], dtype=np.int32, casting="unsafe"))
        sizes = [len(step.words), *[len(part) for part in extra]]
        words, pad, again, write_rows, turns, where = torch.split(flat.to(device).long(), sizes)
        a = _on_device(step, words)
        groups, at = [], 0
        for (height, cached, own), count in zip(kinds.tolist(), counts.tolist(), strict=True):
            groups.append(_group(a, turns[at : at + count], height, cached, own, step))
            at += count
        return cls(
            torch.cat((a["ids"], pad)),
            torch.cat((a["positions"], pad)),
            torch.cat((a["want"], again)),
            write_rows if len(written) < len(step) or len(pad) else None,
            a["slot"][write_rows],
            None if same else torch.cat((where, pad)),
            groups,
        )


def _on_device(step: Step, words: Tensor) -> dict[str, Tensor]:
    """The step's arrays as views of its words on a device, without the mask; and `own_rows`, which row's K,V lie in an
    own slot."""
    arrays = step.arrays()
    del arrays["mask"]
    sizes = [array.size for array in arrays.values()]
    head = len(step.words) - sum(sizes) - len(step.mask) // 4
    _, *parts, _ = torch.split(words, [head, *sizes, len(step.mask) // 4])
    out = dict(zip(arrays, parts, strict=True))
    out["spans"] = out["spans"].view(-1, SPAN_WORDS)
    if step.own_keys:
        passing = out["own_slot"]
        out["own_rows"] = passing.new_zeros(step.own_keys + 1)  # the last place is for rows that have none
        out["own_rows"][passing] = torch.arange(len(passing), device=words.device)
    return out


def _group(a: dict[str, Tensor], spans: Tensor, height: int, cached: int, own: int, step: Step) -> _Group:
    """The group of these spans (numbers, int64 [B])."""
    device, size = spans.device, step.block_size
    row0, row1, held, mine, block0, own_block0, own_start, _ = a["spans"][spans].T[:, :, None]  # [B, 1] each
    rows = torch.minimum(row0 + torch.arange(height, device=device), row1 - 1)  # [B, rows]
    k = torch.arange(cached, device=device)
    o = torch.arange(own, device=device)
    slots = _slots(a["blocks"], block0, k, held, size)
    fresh = _slots(a["own_blocks"], own_block0, o, mine, size)
    if own:
        fresh = a["own_rows"][fresh]
    visible = torch.cat(
        (k < a["cached_limit"][rows][:, :, None], o < a["own_limit"][rows][:, :, None]), dim=2
    )  # [B, rows, cached + own]
    for number, mask in step.span_masks():
        turn = (spans == number).nonzero()
        if len(turn):
            seen = torch.from_numpy(mask != 0).to(device)
            keys = int(step.spans[number, 2])
            part = visible[turn[0, 0], : seen.shape[0]]
            part[:, :keys] &= seen[:, :keys]
            part[:, cached : cached + seen.shape[1] - keys] &= seen[:, keys:]
    visible[:, :, :1] |= ~visible.any(dim=2, keepdim=True)  # a row that sees nothing would give NaN
    places = torch.cat((k.expand(len(spans), cached), own_start + o), dim=1)
    return _Group(rows, slots, fresh, visible[:, None], (a["positions"][rows], places))


def _slots(blocks: Tensor, first: Tensor, keys: Tensor, count: Tensor, size: int) -> Tensor:
    """Where the keys [keys] of spans lie, int64 [B, keys]. first, count [B, 1]: where a span's entries of the block
    table begin, and its keys. Past the last one it is the last again: what lies elsewhere must not be read (another
    request's NaN counts even at weight 0)."""
    if not len(keys):
        return keys.expand(len(first), 0)
    keys = torch.minimum(keys, count - 1)
    return blocks[first + keys // size] * size + keys % size


def _rounded(step: Step) -> Ints:
    """int64 [spans, 3]: rows, cached and own keys of each span, rounded up to a quarter of the power of two below, keys
    to 16 at least: few groups, at most a quarter of padding."""
    spans = step.spans.astype(np.int64)
    sizes = np.stack((spans[:, 1] - spans[:, 0], spans[:, 2], spans[:, 3]), axis=1)
    unit = np.maximum(1 << np.maximum(np.log2(np.maximum(sizes, 1)).astype(np.int64) - 2, 0), (1, 16, 16))
    rounded: Ints = -(-sizes // unit) * unit
    return rounded


def _places(step: Step, order: Ints, shapes: Ints) -> Ints:
    """int64 [rows]: where each row lies among the groups' rows, group after group, span after span."""
    heights = shapes[order, 0]
    begin = np.empty(len(order), dtype=np.int64)
    begin[order] = np.cumsum(heights) - heights
    row0, row1 = step.spans[:, 0].astype(np.int64), step.spans[:, 1]
    where = np.zeros(len(step), dtype=np.int64)
    counts = row1 - row0
    rows = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    where[np.repeat(row0, counts) + rows] = np.repeat(begin, counts) + rows
    return where
