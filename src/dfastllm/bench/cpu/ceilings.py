"""What the processor can do at best, measured in the same run: memory streaming and dense matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch

from dfastllm.kernels import hugepages

__all__ = ["Ceilings", "floor_seconds", "measure_ceilings"]


@dataclass(frozen=True, slots=True)
class Ceilings:
    """stream: GB/s of reading a buffer far larger than the caches. f32, bf16, int8: GFLOP/s (GOP/s) of large square
    products by torch (oneDNN). The best of several tries: a ceiling, not a typical value."""

    stream: float
    f32: float
    bf16: float
    int8: float

    def best(self, other: Ceilings) -> Ceilings:
        """The higher of both, each: other processes can only make a measurement of a ceiling too low."""
        mine, others = astuple(self), astuple(other)
        return Ceilings(*map(max, mine, others))

    @property
    def compute(self) -> float:
        return max(self.f32, self.bf16, self.int8)


def _best(work: Callable[[], object], tries: int) -> float:
    work()
    best = float("inf")
    for _ in range(tries):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best


def measure_ceilings(threads: int, *, megabytes: int = 512, size: int = 2048, tries: int = 4) -> Ceilings:
    """At `threads` of torch's. The buffer, in huge pages as weights are, is read as a sum and as a matrix times a
    vector; the faster counts."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        buffer = hugepages.empty(megabytes << 20).view(torch.float32).fill_(1)
        matrix, vector = buffer.view(-1, 4096), torch.ones(4096)
        read = min(_best(buffer.sum, tries), _best(lambda: torch.mv(matrix, vector), tries))
        draw = torch.Generator().manual_seed(0)
        a = torch.randn(size, size, generator=draw)
        half, byte = a.bfloat16(), (a * 40).clamp(-127, 127).to(torch.int8)
        work = 2 * size**3 / 1e9
        return Ceilings(
            stream=buffer.nbytes / read / 1e9,
            f32=work / _best(lambda: a @ a, tries),
            bf16=work / _best(lambda: half @ half, tries),
            int8=work / _best(lambda: torch._int_mm(byte, byte), tries),
        )
    finally:
        torch.set_num_threads(before)


def floor_seconds(ceilings: Ceilings, streamed: float, flops: float) -> tuple[float, str]:
    """The least a forward can take, and what bounds it: reading `streamed` weight bytes or computing `flops`."""
    memory, compute = streamed / ceilings.stream / 1e9, flops / ceilings.compute / 1e9
    return (memory, "memory") if memory > compute else (compute, "compute")
