"""Runners: what computes a step. Each owns the K,V of one model; nobody else writes them.

| runner | where | what |
|---|---|---|
| native | CPU | one native call over packed weights; without the compiled kernels their plain torch twins |
| triton | CUDA | one upload, one replayed graph, one copy back; under Triton's interpreter on a CPU, without graphs |
| torch | CPU, CUDA, MPS | the plain torch model: the reference, and what serves where no other runner does |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from dfastllm.core import ModelInfo
from dfastllm.engine.runners.native import NativeRunner
from dfastllm.engine.runners.record import recorded
from dfastllm.engine.runners.torch import Runnable, TorchRunner
from dfastllm.engine.runners.triton import TritonRunner
from dfastllm.errors import UnsupportedError
from dfastllm.models import DeviceDecoder, PackedDecoder

if TYPE_CHECKING:
    import torch as pytorch  # under its own name it would hide the module of this room

    from dfastllm.kernels.halt import Halt
    from dfastllm.kernels.rows import Rows
    from dfastllm.kernels.step import Step
    from dfastllm.lora import Adapter

__all__ = ["Runnable", "Runner", "runner_for"]


class Runner(Protocol):
    """Computes steps of one model.

    info        the model's capabilities.
    block_size  positions of a block of its K,V: what steps for it are packed with. Divides the page size.
    cut_free    whether a row's bits do not depend on how its sequence was cut into spans.
    own_threads whether it computes on threads of its own rather than on torch's.
    halt        by which another thread gives up the run that is under way.
    """

    @property
    def info(self) -> ModelInfo: ...

    block_size: int
    cut_free: bool
    own_threads: bool
    halt: Halt

    def run(self, step: Step) -> Rows:
        """Run one step: write K,V of the rows with a slot, and give back the wanted rows, in order. Raises
        ValidationError for a step that does not fit the model or its K,V, or a number without an adapter, and
        Interrupted where `halt` was asked."""
        ...

    def check_adapter(self, adapter: Adapter) -> None:
        """On any thread: raises UnsupportedError for an adapter of what the runner cannot compute."""
        ...

    def adapters(self, table: Sequence[Adapter | None]) -> None:
        """Between two steps: from now on number n of `step.adapter` is table[n], None: no row may have the number.
        table[0] is None: rows without an adapter. What an adapter needs to be computed with is made when it first
        appears in a table, and dropped when it is in none. Raises ValidationError, and what `check_adapter` raises."""
        ...


def runner_for(
    model: Runnable | PackedDecoder | DeviceDecoder,
    slots: int,
    dtype: pytorch.dtype,
    device: pytorch.device | str,
    min_rows: int,
    page_size: int,
    *,
    max_rows: int = 2048,
    max_spans: int = 256,
    max_len: int | None = None,
) -> Runner:
    """The runner of this kind of model, with K,V of `slots` positions. dtype: of the K,V; int8 only with packed models.
    min_rows: of a forward of the torch runner. max_rows, max_spans: of a step that the triton runner has a graph
    for; max_len: of its sequences, None: the model's own. Raises UnsupportedError."""
    runner: Any
    if isinstance(model, PackedDecoder):
        runner = NativeRunner(model, slots, dtype, page_size)
    elif isinstance(model, DeviceDecoder):
        runner = TritonRunner(model, slots, dtype, page_size, max_rows=max_rows, max_spans=max_spans, max_len=max_len)
    elif not dtype.is_floating_point:
        raise UnsupportedError(
            f"K,V of dtype {dtype} need the native backend.", param="kv_cache_dtype", hint="Use auto."
        )
    else:
        runner = TorchRunner(model, slots, dtype, device, min_rows, page_size)
    return recorded(runner, seed=getattr(model, "seed", None), slots=slots, kv=str(dtype).removeprefix("torch."))
