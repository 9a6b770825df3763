"""Single kernels: GFLOP/s and GB/s of each op and format over numbers of rows, beside what the processor can do at best
and beside torch, all in one run. Measures nothing of a model: `bench cpu` does."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfastllm.bench.cpu.ceilings import Ceilings
from dfastllm.bench.faithful import Faithfulness
from dfastllm.kernels import linear_plain as plain
from dfastllm.kernels.activations import act_kind
from dfastllm.kernels.linear import head_stats, linear, linear_gated, pack, prepare
from dfastllm.kernels.packed import FORMS, GROUP, Packed, QTensor
from dfastllm.metrics.records import spread

__all__ = ["FORMATS", "ROWS", "SHAPES", "Work", "measure", "shown", "works"]

ROWS = (1, 2, 3, 4, 6, 8, 32, 128, 512)
FORMATS = ("f32", "bf16", "w8", "w8g", "w4g", "w4m", "w6g", "w4s")  # w4m: w4g with minima
SHAPES = ((9728, 896), (896, 4864), (8960, 1536))  # [n, k]: gate and up, down (0.5B), up (1.5B)
VOCABULARY = (151_936, 896)
STREAMED = 96e6  # bytes of different weights a measurement goes through: three times the machine's last cache


@dataclass(frozen=True)
class Work:
    """One line of the record. flops and weight_bytes of one call; `ours` and `theirs` are called with a running number,
    which picks one of several equal weights; `against` says what `theirs` is."""

    op: str
    format: str
    rows: int
    shape: tuple[int, int]
    flops: float
    weight_bytes: float
    ours: Callable[[int], object]
    theirs: Callable[[int], object]
    against: str


def random_weight(format: str, n: int, k: int) -> QTensor:
    draw = torch.Generator().manual_seed(n + k)
    if format in ("f32", "bf16"):
        return QTensor(
            format, torch.randn(n, k, generator=draw).to(torch.float32 if format == "f32" else torch.bfloat16)
        )
    signed = format in ("w8", "w8g")
    kind = "w4g" if format == "w4m" else format
    low, high = (-127, 128) if signed else (0, 1 << FORMS[kind].bits)
    codes = torch.randint(low, high, (n, k), generator=draw, dtype=torch.int8 if signed else torch.uint8)
    scales = torch.full((n, k // GROUP[kind]), 0.01).half() if kind in GROUP else torch.full((n,), 0.01)
    stepped = FORMS[kind].stepped
    steps = torch.full((n, k // stepped), 0x87, dtype=torch.uint8) if stepped else None  # steps of 8 around code 8
    return QTensor(kind, codes, scales, torch.full_like(scales, 0.05) if format == "w4m" else None, steps=steps)


def copies(weight: QTensor) -> list[Packed]:
    """Packed as often as measurements need, each in memory as a model's weights are."""
    first = pack(weight)
    return [first, *(pack(weight) for _ in range(max(1, round(STREAMED / first.nbytes)) - 1))]


def torch_weights(format: str, n: int, k: int) -> tuple[list[Tensor], str]:
    """What torch multiplies with: f32 and bf16 themselves, int8 codes for w8, bfloat16 for the formats it has not."""
    kind = {"f32": torch.float32, "w8": torch.int8}.get(format, torch.bfloat16)
    first = torch.ones(n, k).to(kind)
    names = {"f32": "linear, float32", "w8": "_int_mm without scales", "bf16": "linear, bfloat16"}
    return [first.clone() for _ in range(max(1, round(STREAMED / first.nbytes)))], names.get(format, names["bf16"])


def torch_product(x: Tensor, weights: Sequence[Tensor]) -> Callable[[int], Tensor]:
    kind = weights[0].dtype
    if kind == torch.int8:
        codes = x.clamp(-3, 3).mul(40).to(torch.int8)
        return lambda i: torch._int_mm(codes, weights[i % len(weights)].T)
    cast = x.to(kind)
    return lambda i: F.linear(cast, weights[i % len(weights)])


def works(formats: Sequence[str] = FORMATS, rows: Sequence[int] = ROWS) -> Iterator[Work]:
    """Products of every format and shape; then, on the first shape, what surrounds them; then the head."""
    for format, (n, k) in itertools.product(formats, SHAPES):
        ours, (theirs, against) = copies(random_weight(format, n, k)), torch_weights(format, n, k)
        for m in rows:
            x = torch.randn(m, k)
            yield _product(format, x, ours, torch_product(x, theirs), against)
    for format in formats:
        yield from _glue(format, rows)
    for format in (f for f in formats if f in ("bf16", "w8g", "w4g")):
        yield from _head(format, [m for m in rows if m <= 32])


def _product(format: str, x: Tensor, weights: list[Packed], theirs: Callable[[int], object], against: str) -> Work:
    first = weights[0]
    m, n, k = x.shape[0], first.n, first.k
    acts = prepare(x, act_kind(first.format))

    def ours(i: int) -> object:
        return linear(acts, weights[i % len(weights)])

    return Work("linear", format, m, (n, k), 2.0 * m * n * k, first.nbytes, ours, theirs, against)


def _glue(format: str, rows: Sequence[int]) -> Iterator[Work]:
    n, k = SHAPES[0]
    norm = torch.rand(k)
    weights, (dense, against) = copies(random_weight(format, n, k)), torch_weights("bf16", n, k)
    kind = act_kind(weights[0].format)

    for m in rows:
        x = torch.randn(m, k)
        acts, product = prepare(x, kind), torch_product(x, dense)

        def prepared(i: int, x: Tensor = x) -> object:
            return prepare(x, kind, norm=norm, eps=1e-6)

        def plainly(i: int, x: Tensor = x) -> object:
            return plain.prepare(x, kind, norm=norm, eps=1e-6)

        def swiglu(i: int, acts: Any = acts) -> object:
            return linear_gated(acts, weights[i % len(weights)], kind=kind)

        def eager(i: int, product: Any = product) -> object:
            gate, up = product(i).chunk(2, dim=1)
            return plain.prepare((F.silu(gate) * up).float(), kind)

        yield Work("rms_norm + prepare", format, m, (0, k), 0.0, 0.0, prepared, plainly, "the twin")
        flops, size = 2.0 * m * n * k, weights[0].nbytes
        yield Work("linear + swiglu + prepare", format, m, (n, k), flops, size, swiglu, eager, f"{against}, then eager")


def _head(format: str, rows: Sequence[int]) -> Iterator[Work]:
    n, k = VOCABULARY
    weight, (dense, against) = pack(random_weight(format, n, k)), torch_weights("bf16", n, k)
    for m in rows:
        x = torch.randn(m, k)
        acts, product = prepare(x, act_kind(format)), torch_product(x, dense)

        def stats(i: int, acts: Any = acts) -> object:
            return head_stats(acts, weight, entropy=True)

        def eager(i: int, product: Any = product) -> object:
            logits = product(i).float()
            norm = torch.logsumexp(logits, dim=1)
            p = torch.exp(logits - norm[:, None])
            return logits.topk(2, dim=1), norm - (p * logits).sum(dim=1)

        yield Work(
            "head_stats", format, m, (n, k), 2.0 * m * n * k, weight.nbytes, stats, eager, f"{against}, then eager"
        )


def _burst(call: Callable[[int], object], seconds: float) -> list[float]:
    """Seconds of each call, at least 2. Before it: a pause, in which the other side's threads stop waiting for work and
    free their cores, and a call that is not counted and wakes this side's."""
    time.sleep(0.01)
    call(0)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 2:
        began = time.perf_counter()
        call(len(times) + 1)
        times.append(time.perf_counter() - began)
    return times


def measure(work: Work, ceilings: Ceilings, seconds: float) -> dict[str, Any]:
    """Ours and torch's in bursts, in turn, for `seconds` (at least 5 calls). `of_bound`: the share of the ceiling that
    bounds the op, memory or the format's arithmetic, at the median; `of_stream`: the share of memory's."""
    ours: list[float] = []
    theirs: list[float] = []
    with torch.inference_mode():
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(ours) < 5:
            ours += _burst(work.ours, seconds / 10)
            theirs += _burst(work.theirs, seconds / 10)
    mine, other = spread(ours), spread(theirs)
    peak = {"f32": ceilings.f32, "bf16": ceilings.bf16}.get(work.format, ceilings.int8)
    memory, compute = work.weight_bytes / ceilings.stream / 1e9, work.flops / peak / 1e9
    return {
        "op": work.op,
        "format": work.format,
        "rows": work.rows,
        "n": work.shape[0],
        "k": work.shape[1],
        "us": spread([t * 1e6 for t in ours]),
        "gflops": work.flops / mine.median / 1e9,
        "gbps": work.weight_bytes / mine.median / 1e9,
        "bound": "" if not work.flops else "memory" if memory > compute else "compute",
        "of_bound": max(memory, compute) / mine.median,
        "of_stream": memory / mine.median,
        "torch_us": spread([t * 1e6 for t in theirs]),
        "against": work.against,
        "times_torch": other.median / mine.median,
    }


def shown(rows: Sequence[Mapping[str, Any]], faithful: Faithfulness) -> list[dict[str, Any]]:
    """Rows of `measure` as they are printed: with the KL of their formats, and without a ratio to torch's where that is
    nearer to float."""

    def theirs(row: Mapping[str, Any]) -> str:
        what: str = row["against"].removesuffix(", then eager")
        return {"linear, bfloat16": "bf16", "linear, float32": "float32"}.get(what, what)

    return faithful.against(rows, "pytorch", theirs, ("times_torch",))
