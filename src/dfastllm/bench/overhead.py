"""What the loop itself costs: the engine on a null model, whose forward takes no time worth measuring.

Two null forwards: one packs the step as a native runner does and answers from a fixed table of statistics, so that a
step's time is planning, scheduling, packing, deciding and emitting; the other goes through the torch runner, index
tensors, a copied table of logits and the plain twin's statistics included. Beside the times, what does not depend on
how busy the machine is: function calls, memory and tensor operations of a step.
"""

from __future__ import annotations

import sys
import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dfastllm.core import DecodeParams, ModelInfo, Request, SamplingParams, StepStats
from dfastllm.engine import Engine, EngineConfig
from dfastllm.kernels import native
from dfastllm.kernels.halt import Halt
from dfastllm.kernels.rows import Barred, Rows, RowStats
from dfastllm.kernels.step import BLOCK, Step
from dfastllm.metrics.records import Spread, spread

__all__ = ["NullModel", "NullRunner", "step_overhead"]

TABLE = 8192  # rows of the fixed answers
ROUNDS = 5  # engines whose steps make one record: a machine's speed changes from second to second
# operations that write values that are there already
COPIES = {"_to_copy", "cat", "clone", "copy_", "gather", "index", "index_put_", "index_select", "repeat", "stack"}


class NullModel:
    """Hidden states of zeros and one fixed table of logits: no arithmetic, so a step's time is the engine's own."""

    dtype = torch.float32

    def __init__(self, kind: Any, vocab: int = 1024) -> None:
        self.info = ModelInfo(
            name=f"null-{kind}",
            family="null",
            kind=kind,
            vocab_size=vocab,
            max_len=4096,
            layers=1,
            kv_heads=1,
            head_dim=1,
            eos_ids=(0,),
            mask_id=None if kind == "ar" else 1,
            block=4 if kind == "block" else 0,
        )
        generator = torch.Generator().manual_seed(0)
        self._logits = torch.randn(TABLE, vocab, generator=generator)
        self._logits[:, 0] = -50.0  # never EOS

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, attend: Any) -> torch.Tensor:
        return torch.zeros(ids.shape[0], 1)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._logits[: hidden.shape[0]].clone()


class NullRows(Rows):
    """Rows whose statistics are the first of a fixed table."""

    def __init__(self, count: int, vocab: int, table: RowStats) -> None:
        super().__init__(count, vocab)
        self._table = table

    def _logits(self) -> Any:
        raise NotImplementedError("the null forward serves greedy requests; they need no logits.")

    def _stats(self, ban: tuple[int, ...], barred: Barred, norm: bool, spread: bool, top: int) -> RowStats:
        t, n = self._table, self.count
        return RowStats(t.token[:n], t.best[:n], t.finite[:n], t.norm[:n])

    def _take(self, index: Any) -> Rows:
        return NullRows(len(index), self.vocab, self._table)


class NullRunner:
    """In place of a native runner: reads the step as that does, computes nothing."""

    block_size = BLOCK
    cut_free = True
    own_threads = True

    def __init__(self, vocab: int) -> None:
        random = np.random.default_rng(0)
        best, norm = random.normal(size=(2, TABLE)).astype(np.float32)
        self.halt = Halt()
        self._vocab = vocab
        self._table = RowStats(random.integers(2, vocab, TABLE), best, np.ones(TABLE, dtype=np.bool_), norm + 5)

    def run(self, step: Step) -> Rows:
        if native() is not None:
            step.native()
        return NullRows(len(step.want), self._vocab, self._table)


def step_overhead(kind: str, sequences: int, steps: int = 60) -> dict[str, Any]:
    """Microseconds per engine step at a steady number of sequences: decode steps of AR, dual-cache denoise steps of
    diffusion (32-token blocks), block steps of block diffusion: `steps` in each of several rounds. The first steps
    (prefill, warm-up) are left out.

    aim_us is 150 + 10 a sequence. calls: Python and C functions called in a step; peak_kib: memory a step takes for a
    while; kept_blocks: what it leaves behind (tokens, events); torch_*: of the step through the torch runner.
    """
    native: list[StepStats] = []
    plain: list[StepStats] = []
    for _ in range(ROUNDS):
        native += _times(kind, sequences, steps, null=True)
        plain += _times(kind, sequences, steps, null=False)
    outside: Spread = spread([(s.seconds - s.run_seconds) * 1e6 for s in native])
    step = spread([s.seconds * 1e6 for s in native])
    return {
        "kind": kind,
        "sequences": sequences,
        "rows_per_step": native[0].rows,
        "step_us": step,
        "aim_us": 150 + 10 * sequences,
        "outside_forward_us": outside,
        "per_sequence_us": step.median / sequences,
        "torch_step_us": spread([s.seconds * 1e6 for s in plain]),
        **_counts(kind, sequences),
    }


def _engine(kind: str, sequences: int, null: bool) -> tuple[Engine, list[StepStats]]:
    """An engine in its steady state, and the list its further steps are reported to."""
    config = EngineConfig(max_batch_rows=1 << 20, max_sequences=sequences, kv_tokens=1 << 18)
    engine = Engine(NullModel(kind), config=config)
    if null:
        engine.runner = NullRunner(engine.info.vocab_size)  # type: ignore[assignment]
    stats: list[StepStats] = []
    engine.subscribe(stats.append)
    decode = DecodeParams(cache="dual", block_length=32, steps=256) if kind == "diffusion" else None
    for i in range(sequences):
        sampling = SamplingParams(temperature=0, max_tokens=2048 if kind == "ar" else 256)
        engine.add(Request(f"r{i}", tuple(range(2, 66)), sampling, decode))
    for _ in range(10):
        engine.step()
    stats.clear()
    return engine, stats


def _times(kind: str, sequences: int, steps: int, null: bool) -> list[StepStats]:
    engine, stats = _engine(kind, sequences, null)
    for _ in range(steps):
        engine.step()
    return [s for s in stats if s.sequences == sequences]


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts tensor operations by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def _counts(kind: str, sequences: int) -> dict[str, Any]:
    """Of one steady step."""
    engine, _ = _engine(kind, sequences, null=True)
    calls = 0

    def note(frame: Any, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        engine.step()
    finally:
        sys.setprofile(None)
    tracemalloc.start()
    try:
        engine.step()  # fills what is made once
        blocks, before = sys.getallocatedblocks(), tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        engine.step()
        kept, peak = sys.getallocatedblocks() - blocks, tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    plain, _ = _engine(kind, sequences, null=False)
    with _Operations() as operations:
        plain.step()
    seen = operations.seen
    return {
        "calls": calls,
        "peak_kib": peak / 1024,
        "kept_blocks": kept,
        "torch_operations": sum(seen.values()),
        "torch_copies": sum(n for name, n in seen.items() if name in COPIES),
    }
