"""The runner of models on a GPU: a step is one upload, one replayed graph and, when its rows are looked at, one copy
back.

A step goes into the smallest bucket that holds it (`kernels.triton.laid`): its arrays lie at the bucket's places, so
the graph that was captured for the bucket runs any mix of spans. Where there are no graphs (Triton's interpreter on a
CPU), the same ops run over the same buckets one by one. What no bucket holds, and rows with adapters, run without a
graph, in a layout of just their sizes.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfastllm.core import ModelInfo
from dfastllm.engine.runners.device_rows import AdaptedDeviceRows, DeviceRows, Held
from dfastllm.engine.runners.graphs import Buckets, Graphs
from dfastllm.errors import UnsupportedError
from dfastllm.kernels.halt import Halt
from dfastllm.kernels.rows import Rows
from dfastllm.kernels.step import BLOCK, Step
from dfastllm.kernels.triton.kv import DeviceKv, kv_bytes
from dfastllm.kernels.triton.laid import Bucket, Laid, lay, pieces_of, tail_words
from dfastllm.kernels.triton.memory import out_of_memory, room_for_kv
from dfastllm.kernels.triton.ops import Ops, ops_for
from dfastllm.kernels.triton.plain import WORDS
from dfastllm.lora import HEAD
from dfastllm.models.adapted import AdaptedRows, on_device, placed_table, require_numbers
from dfastllm.models.device import DeviceDecoder
from dfastllm.models.turned import require_turnable, turned_adapter

if TYPE_CHECKING:
    from dfastllm.lora import Adapter

__all__ = ["TritonRunner", "kv_tokens_that_fit"]

log = logging.getLogger("dfastllm.engine")

MOST_BANS = 64  # sets of banned ids that are kept on the device
BANS = 8  # banned ids are padded to a multiple of so many


class TritonRunner:
    """Runs a model on its device. K,V: `slots` positions of `dtype`.

    max_rows   of a step that runs in a bucket; max_spans: the same.
    graphs     whether buckets become graphs; None: where the device has them and all ops are kernels.
    ops        implementations; None: the best there are.
    counts     steps by how they ran: graph, bucket (the same without a graph), eager.
    uncaptured whether the last step had no graph, though others have.
    """

    block_size = BLOCK

    def __init__(
        self,
        model: DeviceDecoder,
        slots: int,
        dtype: torch.dtype,
        page_size: int,
        *,
        max_rows: int = 2048,
        max_spans: int = 256,
        max_len: int | None = None,
        graphs: bool | None = None,
        ops: Ops | None = None,
    ) -> None:
        if page_size % BLOCK:
            raise UnsupportedError(
                f"page_size must be a multiple of {BLOCK} for the triton runner, got {page_size}.", param="page_size"
            )
        info = model.info
        self.model = model
        self.device = model.device
        self.ops = ops or ops_for(model.device)
        self.cut_free = model.invariant and self.ops.captured
        self.own_threads = model.device.type != "cpu"
        blocks = -(-slots // BLOCK)
        with out_of_memory("making room for K,V"):
            self.kv = DeviceKv(info.layers, blocks * BLOCK, info.kv_heads, info.head_dim, dtype, model.device)
        self.halt = Halt()
        self.counts: Counter[str] = Counter()
        self.uncaptured = False
        self._given: tuple[Adapter | None, ...] = (None,)
        self._table: list[Adapter | None] = [None]  # the same, as they are computed with, on the device
        self._bans: dict[tuple[int, ...], Tensor] = {}
        group = model.config.heads // model.config.kv_heads
        self.buckets = Buckets(max_rows, max_spans, max_len or info.max_len, group, invariant=model.invariant)
        self._upload = _Upload(self.buckets.words, model.device)
        self._hidden = torch.zeros(self.buckets.most_rows, model.config.hidden_size, device=model.device)
        self._last: weakref.ref[Held] | None = None
        self._head = _HeadBuffers(self.buckets.most_rows, model.device)
        self.graphs: Graphs | None = None
        if graphs or (graphs is None and self.device.type == "cuda" and self.ops.captured):
            self.graphs = Graphs(self.device)
            self._capture(self.graphs)

    def there(self) -> AbstractContextManager[Any]:
        """Where kernels are launched: Triton asks for the thread's current card."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    @torch.inference_mode()
    def _capture(self, graphs: Graphs) -> None:
        """A graph of every bucket, and of the statistics of as many rows: all before the first step. Raises
        ModelLoadError where memory runs out."""
        with self.there():
            for bucket in self.buckets:
                laid = self._upload.idle(bucket)
                graphs.capture(bucket, lambda laid=laid: self._forward(laid))  # type: ignore[misc]
            for rows in reversed(self.buckets.sizes):
                graphs.capture(rows, lambda rows=rows: self._head_of(rows))  # type: ignore[misc]
        log.info("%s: %d graphs captured, %d not", self.info.name, len(graphs), len(graphs.failed))

    def _head_of(self, rows: int) -> None:
        """Statistics of the first rows of the last step, to where they always lie."""
        found = self.model.head_stats(self._hidden[:rows], self.ops, ban=self._head.ban, barred=None, which=None, top=0)
        self._head.out[:rows].copy_(found)

    @property
    def info(self) -> ModelInfo:
        return self.model.info

    @torch.inference_mode()
    def run(self, step: Step) -> Rows:
        """See `runners.Runner`. Raises ValidationError, Interrupted."""
        step.check(self.kv.slots // BLOCK, len(step.own_blocks))
        step.check_ids(self.model.embed.n)
        self.halt.begin()
        with self.there():
            return self._run(step)

    def _run(self, step: Step) -> Rows:
        self._keep_last()
        if step.adapter.any():
            require_numbers(step, self._table)
            return self._run_adapted(step)
        bucket = self.buckets.of(step)
        if bucket is None:
            self._count("eager")
            laid = self._upload.put(step, _exactly(step, self.buckets.tile_rows(len(step))))
            hidden = self.model.forward(laid, self.kv, self.ops, halt=self.halt)
        else:
            laid = self._upload.put(step, bucket)
            if self.graphs is not None and self.graphs.run(bucket):
                self._count("graph")
            else:
                self._count("bucket")
                self._forward(laid, self.halt)
            hidden = self._hidden
        return DeviceRows(self._held(hidden), len(step.want), self)

    def _count(self, way: str) -> None:
        self.counts[way] += 1
        self.uncaptured = way != "graph" and self.graphs is not None

    def _forward(self, laid: Laid, halt: Halt | None = None) -> None:
        """A bucket's forward; hidden states of its wanted rows go to where they always lie."""
        hidden = self.model.forward(laid, self.kv, self.ops, halt=halt)
        self._hidden[: len(hidden)].copy_(hidden)

    def _run_adapted(self, step: Step) -> Rows:
        self._count("eager")
        laid = self._upload.put(step, _exactly(step, self.buckets.tile_rows(len(step))))
        adapt = AdaptedRows(self._table, laid.adapter.long(), 16)
        hidden = self.model.forward(laid, self.kv, self.ops, adapt, self.halt)
        numbers = step.adapter[step.want].astype(np.int64)
        heads = np.array([adapter is not None and HEAD in adapter.deltas for adapter in self._given])
        numbers *= heads[numbers]
        held = self._held(hidden)
        if not numbers.any():
            return DeviceRows(held, len(step.want), self)
        return AdaptedDeviceRows(held, len(step.want), self, numbers, list(self._table))

    def _held(self, hidden: Tensor) -> Held:
        held = Held(hidden)
        self._last = weakref.ref(held)  # the hidden states of a bucket lie where the next one's will
        return held

    def _keep_last(self) -> None:
        """Rows of the last step that someone still has get hidden states of their own."""
        held = None if self._last is None else self._last()
        if held is not None:
            held.hidden = held.hidden.clone()
        self._last = None

    def adapters(self, table: Sequence[Adapter | None]) -> None:
        """See `runners.Runner`. Raises ValidationError, UnsupportedError."""
        self._table = placed_table(table, self._given, self._table, self._placed)
        self._given = tuple(table)

    def _placed(self, adapter: Adapter) -> Adapter:
        self.check_adapter(adapter)
        model = self.model
        held = adapter if model.basis is None else turned_adapter(adapter, model.basis, model.gains)
        return on_device(held, self.device)

    def check_adapter(self, adapter: Adapter) -> None:
        """See `runners.Runner`."""
        if self.model.basis is not None:
            require_turnable(adapter, self.model.basis)

    def stats(
        self, held: Held, rows: Tensor, ban: tuple[int, ...], sets: tuple[Tensor, Tensor] | None, top: int
    ) -> NDArray[np.int32]:
        """What `ops.head_stats` says of hidden rows, on the host: the one copy back of a step. held: what they are
        of."""
        whole = sets is None and not top and len(ban) <= BANS and rows.data_ptr() == self._hidden.data_ptr()
        if self.graphs is not None and whole and self._last is not None and self._last() is held:
            size = next(size for size in self.buckets.sizes if size >= len(rows))
            self._head.set_ban(ban)
            if self.graphs.run(size):
                return self._head.fetch(len(rows))
        if ban not in self._bans:
            if len(self._bans) == MOST_BANS:
                self._bans.clear()
            self._bans[ban] = torch.from_numpy(_padded(ban)).to(self.device)
        barred, which = (None, None) if sets is None else sets
        return self.fetch(
            self.model.head_stats(rows, self.ops, ban=self._bans[ban], barred=barred, which=which, top=top)
        )

    def fetch(self, values: Tensor) -> NDArray[np.int32]:
        """Values on the host, once they are there."""
        return values.cpu().numpy()


def _padded(ban: tuple[int, ...]) -> NDArray[np.int32]:
    padded = np.full(max(BANS, -(-len(ban) // BANS) * BANS), -1, dtype=np.int32)
    padded[: len(ban)] = ban
    return padded


class _HeadBuffers:
    """Where the captured statistics read the banned ids and write what they find, and its way to the host."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.ban = torch.full((BANS,), -1, dtype=torch.int32, device=device)
        self.out = torch.zeros(rows, WORDS, dtype=torch.int32, device=device)
        self._banned: tuple[int, ...] = ()
        self._host = torch.zeros(rows, WORDS, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = device

    def set_ban(self, ban: tuple[int, ...]) -> None:
        if ban != self._banned:
            self.ban.copy_(torch.from_numpy(_padded(ban)))
            self._banned = ban

    def fetch(self, rows: int) -> NDArray[np.int32]:
        self._host[:rows].copy_(self.out[:rows], non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return self._host[:rows].numpy().copy()


def _exactly(step: Step, tile_rows: int) -> Bucket:
    """A bucket of just a step's sizes."""
    spans = len(step.spans)
    return Bucket(max(1, len(step)), len(step.want), 2 * spans + 1, tile_rows, pieces_of(step))


class _Upload:
    """The buffer of steps on a device, and two on the host that take turns: a copy may still read the last one."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.device = device
        self.capacity = capacity
        self._words = torch.zeros(capacity, dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        self._host = [torch.zeros(capacity, dtype=torch.int32, pin_memory=pinned) for _ in range(2)]
        self._copied: list[torch.cuda.Event] = []
        if pinned:
            self._copied = [torch.cuda.Event(), torch.cuda.Event()]  # type: ignore[no-untyped-call]
        self._turn = 0
        self._views: dict[Bucket, Laid] = {}

    def put(self, step: Step, bucket: Bucket) -> Laid:
        """A step in the bucket's layout on the device, until the next one."""
        needed = bucket.head + tail_words(step)
        if needed > self.capacity:  # of a size that no bucket has
            words = np.empty(needed, dtype=np.int32)
            lay(step, bucket, words)
            return Laid.over(torch.from_numpy(words).to(self.device), bucket)
        self._turn = 1 - self._turn
        host = self._host[self._turn]
        if self._copied:
            self._copied[self._turn].synchronize()
        used = lay(step, bucket, host.numpy())
        self._words[:used].copy_(host[:used], non_blocking=True)
        if self._copied:
            self._copied[self._turn].record()
        return self.views(bucket)

    def idle(self, bucket: Bucket) -> Laid:
        """The bucket's layout of a step without rows."""
        return self.put(Step.blank(0, 0), bucket)

    def views(self, bucket: Bucket) -> Laid:
        found = self._views.get(bucket)
        if found is None:
            found = Laid.over(self._words, bucket)
            if len(self._views) < 256:  # those of steps that fit no bucket would never end
                self._views[bucket] = found
        return found


@torch.inference_mode()
def kv_tokens_that_fit(model: DeviceDecoder, dtype: torch.dtype, share: float, *, max_rows: int, max_spans: int) -> int:
    """K,V positions for which a share of the card's memory is left, beside the weights and the largest step, which runs
    once to tell what it needs. max_rows, max_spans: as of TritonRunner. Raises ModelLoadError, ValidationError."""
    info, device = model.info, model.device
    peak = 0
    if device.type == "cuda":
        with out_of_memory("running the largest step"):
            runner = TritonRunner(model, BLOCK, dtype, BLOCK, graphs=False, max_rows=max_rows, max_spans=max_spans)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            largest = next(iter(runner.buckets))
            with runner.there():
                runner._forward(runner._upload.idle(largest))
                runner._head_of(largest.rows)
            torch.cuda.synchronize(device)
            peak = torch.cuda.max_memory_allocated(device) - before
            del runner
        torch.cuda.empty_cache()
    return room_for_kv(device, share, kv_bytes(info.layers, info.kv_heads, info.head_dim, dtype), peak)
