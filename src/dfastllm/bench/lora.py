"""What LoRA adapters in a batch cost: decode steps of a real shape with random weights, each row its own sequence, rows
spread over so many different adapters, against the same steps without any.

`python -m dfastllm.bench lora` writes benchmarks/lora.json. Turns alternate between the numbers of adapters, so that a
machine whose speed changes changes it for all; the cost is the median of the ratios of neighbouring turns.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dfastllm.kernels.step import BLOCK, Step
from dfastllm.metrics.records import Spread, spread

if TYPE_CHECKING:
    from dfastllm.engine.runners.native import NativeRunner
    from dfastllm.lora import Adapter
    from dfastllm.models import PackedDecoder

__all__ = ["TARGETS", "Row", "measure", "random_adapter"]

TARGETS = {
    "q,k,v,o": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "all linears": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}


@dataclass(frozen=True)
class Row:
    """What so many adapters in a batch cost.

    targets           which linears they adapt.
    adapters          how many different ones the rows of a step have; 0: none.
    tokens_a_second   of all sequences.
    cost              seconds of a step with them, divided by those of one without in the same turn, less 1.
    base_bytes        of the model's weights, which are the same whatever is loaded.
    adapter_bytes     of all adapters that a step reads.
    resident_growth   what the process grew by when as many were loaded.
    gigabytes_a_second  adapter_bytes divided by what a step takes longer.
    """

    targets: str
    adapters: int
    tokens_a_second: Spread
    cost: Spread
    base_bytes: int
    adapter_bytes: int
    resident_growth: int
    gigabytes_a_second: float


def random_adapter(model: PackedDecoder, names: Sequence[str], rank: int, dtype: torch.dtype, seed: int) -> Adapter:
    """An adapter of random numbers for the matrices of these names in every layer."""
    from dfastllm.lora import Adapter, Delta
    from dfastllm.models import adapter_base

    draw = torch.Generator().manual_seed(seed)
    deltas = {}
    for name, shape in adapter_base(model).shapes.items():
        own = name.removesuffix(".weight")
        if name.endswith(".weight") and own.rpartition(".")[2] in names:
            out, inputs = shape
            a, b = (torch.randn(rank, size, generator=draw).mul_(0.02).to(dtype) for size in (inputs, out))
            deltas[own] = Delta.of(a, b, 2.0)
    return Adapter.of(deltas)


def decode_step(rows: int, kept: int, adapters: int) -> Step:
    """One token of each of `rows` sequences of `kept` positions, row i with adapter i % adapters + 1."""
    blocks = -(-(kept + 1) // BLOCK)
    return Step.of(
        {
            "ids": [1 + i for i in range(rows)],
            "positions": [kept] * rows,
            "slot": [i * blocks * BLOCK + kept for i in range(rows)],
            "cached_limit": [kept + 1] * rows,
            "adapter": [i % adapters + 1 if adapters else 0 for i in range(rows)],
            "want": list(range(rows)),
            "spans": [[i, i + 1, kept + 1, 0, i * blocks, 0, 0, -1] for i in range(rows)],
            "blocks": list(range(rows * blocks)),
        }
    )


def measure(
    model: PackedDecoder,
    *,
    counts: Sequence[int] = (1, 8, 64),
    rows: int = 16,
    rank: int = 16,
    kept: int = 128,
    steps: int = 8,
    turns: int = 9,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Row]:
    """One row for each target and number of adapters. counts above `rows` are loaded all the same: a step reads those
    of its rows."""
    from dfastllm.engine.runners.native import NativeRunner

    blocks = -(-(kept + 1) // BLOCK)
    for targets, names in TARGETS.items():
        runner = NativeRunner(model, rows * blocks * BLOCK, torch.bfloat16, BLOCK)
        runner.run(decode_step(rows, kept, 0)).stats()
        before = _resident()
        table: list[Any] = [None]
        growth = {}
        for count in sorted(counts):
            table += [random_adapter(model, names, rank, dtype, i) for i in range(len(table), count + 1)]
            runner.adapters(table)
            growth[count] = _resident() - before
        used = {count: min(count, rows) for count in (0, *counts)}
        seconds = _turns(runner, {count: decode_step(rows, kept, used[count]) for count in (0, *counts)}, steps, turns)
        for count in counts:
            with_them = seconds[count]
            ratios = [a / b - 1 for a, b in zip(with_them, seconds[0], strict=True)]
            read = sum(adapter.bytes for adapter in table[1 : used[count] + 1])
            longer = spread(with_them).median - spread(seconds[0]).median
            yield Row(
                targets,
                count,
                spread([rows / s for s in with_them]),
                spread(ratios),
                model.nbytes,
                read,
                growth[count],
                read / longer / 1e9 if longer > 0 else 0.0,
            )


def _turns(runner: NativeRunner, of: Mapping[int, Step], steps: int, turns: int) -> dict[int, list[float]]:
    """Seconds a step by number of adapters, one measurement a turn each."""
    found: dict[int, list[float]] = {count: [] for count in of}
    for turn in range(turns + 1):
        for count, step in of.items():
            begin = time.perf_counter()
            for _ in range(steps):
                runner.run(step).stats()
            if turn:  # the first is for warming up
                found[count].append((time.perf_counter() - begin) / steps)
    return found


def _resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))
    except (OSError, StopIteration):
        return 0
