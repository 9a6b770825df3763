"""The record of a card: the triton runner beside what the card reaches by itself, cell by cell in order of worth.

usage: PYTHONPATH=src python benchmarks/gpu/cells.py --json OUT [--seconds 230] [--only TEXT] [--dry]

Each cell is written to OUT as soon as it is measured. Cells that do not fit into the card's memory, and those for which
no time is left, are there by name with the reason. --dry: the same code at a tiny shape on a CPU (TRITON_INTERPRET=1),
to see that it runs; its times mean nothing.

    ceilings   copies and products of the card
    plain      a simple loop under one graph (ceilings.py); prototype: prototype.py
    step       a whole Engine.step, Python included: its median once every request is past its prompt
    run        the runner alone: a step and its statistics, over K,V that hold anything
    linear     one product of a weight format, its weights not in the cache
    attention  one paged attention over cold K,V
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shapes import SHAPES

from dfastllm.core import DecodeParams, Request, SamplingParams, Span
from dfastllm.engine import Engine, EngineConfig
from dfastllm.engine.batch import pack
from dfastllm.engine.pages import Pages, PageTable
from dfastllm.engine.runners.triton import TritonRunner
from dfastllm.kernels.triton.kv import DeviceKv
from dfastllm.kernels.triton.laid import on
from dfastllm.kernels.triton.ops import ops_for
from dfastllm.kernels.triton.weight import kind_of
from dfastllm.models import DecoderConfig, DeviceDecoder, Ids, describe
from dfastllm.models.device_random import random_decoder

BITS = {None: 16, "fp8": 8, "w8": 8, "w4": 4.5}
BLOCKS = {"llada": 32, "sdar": 4}  # rows of a step, of a family that is not autoregressive


@dataclass(frozen=True)
class Cell:
    """kind: see the head of this file. form: of the weights, None: bfloat16. invariant: --batch-invariant."""

    kind: str
    shape: str = ""
    sequences: int = 1
    rows: int = 1
    context: int = 320
    form: str | None = None
    invariant: bool = False

    @property
    def name(self) -> str:
        form = (self.form or "bf16") + ("-invariant" if self.invariant else "")
        return f"{self.kind} {self.shape} {self.sequences}x{self.rows} at {self.context} {form}"

    @property
    def bytes(self) -> int:
        """Memory that it needs, about: weights, K,V, activations."""
        if not self.shape:
            return 4 << 30
        shape = SHAPES[self.shape]
        bits = 16 if self.kind in ("plain", "prototype") else BITS[self.form]
        weights = int(shape.layer_weights * bits / 8) + 2 * shape.head_weights * (1 if shape.tied else 2)
        room = self.sequences * (self.context + 256) * shape.layers * shape.kv_heads * shape.dim * 4
        return weights + room + (2 << 30)


def cells() -> Iterator[Cell]:
    """In order of worth."""
    yield Cell("ceilings")
    for shape, sequences, rows in (("qwen2-7b", 1, 1), ("llada-8b", 1, 32), ("qwen2-0.5b", 1, 1), ("sdar-4b", 1, 4)):
        for kind in ("prototype", "plain"):
            yield Cell(kind, shape, sequences, rows)
    for shape, counts in (("qwen2-7b", (1, 16, 64)), ("llada-8b", (1, 4))):
        for count in counts:
            yield Cell("step", shape, count, BLOCKS.get(SHAPES[shape].family, 1))
    yield Cell("run", "llada-8b", 1, 2048, 2048)
    for count in (1, 4):
        yield Cell("step", "llada-8b", count, 32, form="w8")
    for count in (1, 8):
        yield Cell("run", "qwen2-7b", count, 1, form="w4")
        yield Cell("run", "qwen2-7b", count, 1)
    for count in (1, 16, 64):
        yield Cell("step", "qwen2-0.5b", count, 1)
    for count in (1, 16, 64):
        yield Cell("step", "sdar-4b", count, 4)
    yield Cell("attention", "qwen2-7b", 64, 1, 8192)
    for form in ("w8", "w4", "fp8", None):
        yield Cell("linear", "qwen2-7b", form=form)
    for count in (1, 64):
        yield Cell("run", "qwen2-7b", count, 1, invariant=True)
        yield Cell("run", "qwen2-7b", count, 1)
    for count in (1, 16, 64):
        yield Cell("run", "qwen2-7b", count, 1, 8192)
    yield Cell("run", "qwen2-7b", 1, 2048, 2048)
    for shape, sequences, rows in (
        ("qwen2-7b", 64, 1),
        ("llada-8b", 4, 32),
        ("llada-8b", 16, 32),
        ("qwen2-0.5b", 64, 1),
        ("sdar-4b", 64, 4),
    ):
        yield Cell("prototype", shape, sequences, rows)
    yield Cell("step", "llada-8b", 16, 32)
    for form in ("w8", "fp8"):
        yield Cell("run", "llada-8b", 16, 32, form=form)
        yield Cell("run", "qwen2-7b", 64, 1, form=form)
    for shape in ("qwen2-0.5b", "qwen2-7b"):
        yield Cell("step", shape, 256, 1)


class Bench:
    """Holds the last model that was built: cells of one model come together."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rates: dict[str, float] = {}
        self._held: tuple[object, DeviceDecoder] | None = None

    def model(self, cell: Cell) -> DeviceDecoder:
        key = cell.shape, cell.form, cell.invariant
        if self._held is None or self._held[0] != key:
            self.drop()
            s = SHAPES[cell.shape]
            config = DecoderConfig(
                vocab_size=s.vocab,
                hidden_size=s.hidden,
                intermediate_size=s.inner,
                layers=s.layers,
                heads=s.heads,
                kv_heads=s.kv_heads,
                head_dim=s.dim,
                max_len=16384,
                rope_theta=1e6,
                qkv_bias=s.family == "qwen2",
                qk_norm=s.family == "sdar",
                tied=s.tied,
            )
            mask = None if s.family == "qwen2" else s.vocab - 1
            block = 4 if s.family == "sdar" else None
            info = describe(s.family, config, Ids(eos=(s.vocab - 2,), mask=mask), name=cell.shape, block=block)
            dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
            made = random_decoder(config, info, self.device, dtype, quantization=cell.form, invariant=cell.invariant)
            self._held = key, made
        return self._held[1]

    def drop(self) -> None:
        self._held = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def timed(self, work: Callable[[], object], repeats: int) -> float:
        """Milliseconds on the host, until the device is done: the median."""
        for _ in range(min(3, repeats)):
            work()
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return statistics.median(times) * 1e3

    def measure(self, cell: Cell) -> dict[str, Any]:
        found: dict[str, Any] = getattr(self, f"_{cell.kind}")(cell)
        return found

    def _ceilings(self, cell: Cell) -> dict[str, Any]:
        from ceilings import copy_rate, product_rate

        self.rates = {"copy": copy_rate(), "product": product_rate()}
        return {"copy_GBps": round(self.rates["copy"] / 1e9), "product_TFLOPps": round(self.rates["product"] / 1e12)}

    def _plain(self, cell: Cell) -> dict[str, Any]:
        from ceilings import plain_forward

        self.drop()
        return {"ms": plain_forward(cell.shape, cell.sequences, cell.rows, cell.context)}

    def _prototype(self, cell: Cell) -> dict[str, Any]:
        from prototype import prototype_forward

        self.drop()
        ms, size = prototype_forward(cell.shape, cell.sequences, cell.rows, cell.context)
        return {"ms": ms, **self._shares(size, ms)}

    def _shares(self, size: int, ms: float, operations: int = 0) -> dict[str, Any]:
        """Rates, and as shares of what the card reaches."""
        found: dict[str, Any] = {"GBps": round(size / ms / 1e6)}
        if self.rates:
            found["of_copy"] = round(size / ms * 1e3 / self.rates["copy"], 3)
        if operations:
            found["TFLOPps"] = round(operations / ms / 1e9, 1)
            if self.rates:
                found["of_product"] = round(operations / ms * 1e3 / self.rates["product"], 3)
        return found

    def _weights(self, cell: Cell, model: DeviceDecoder) -> tuple[int, int]:
        """Bytes of weights that a step reads, and operations of its products."""
        s = SHAPES[cell.shape]
        size = model.nbytes if s.tied else model.nbytes - model.embed.nbytes
        return size, 2 * cell.sequences * cell.rows * s.layer_weights

    def _step(self, cell: Cell) -> dict[str, Any]:
        model, s = self.model(cell), SHAPES[cell.shape]
        new = 64 if self.device.type == "cuda" else 8
        most = max(512, cell.sequences * cell.rows)
        config = EngineConfig(
            max_sequences=cell.sequences,
            max_batch_rows=most,
            max_len=cell.context + 64,
            kv_tokens=cell.sequences * (cell.context + 128) + 1024,
            prefix_caching=False,
        )
        began = time.perf_counter()
        engine = Engine(model, config=config, device=self.device)
        ready = time.perf_counter() - began
        decode = {
            "llada": DecodeParams(rule="schedule", cache="dual", block_length=32, steps=new // 2, early_stop=False),
            "sdar": DecodeParams(rule="threshold", threshold=0.9, early_stop=False),
        }.get(s.family)
        draw = np.random.default_rng(0)
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        for i in range(cell.sequences):
            prompt = tuple(draw.integers(0, s.vocab - 3, cell.context - new).tolist())
            engine.add(Request(f"r{i}", prompt, sampling, decode))
        times, rows, tokens = [], [], 0
        engine.subscribe(lambda stats: rows.append(stats.rows))
        while engine.has_work:
            begin = time.perf_counter()
            events = engine.step()
            times.append((time.perf_counter() - begin) * 1e3)
            tokens += sum(len(event.token_ids) for event in events)
        usual = [ms for ms, count in zip(times, rows, strict=True) if count == cell.sequences * cell.rows]
        if not usual:
            raise RuntimeError(f"no step of {cell.sequences * cell.rows} rows; there were {sorted(set(rows))}")
        ms = statistics.median(usual)
        runner = engine.runner
        size, _ = self._weights(cell, model)
        counts = dict(runner.counts) if isinstance(runner, TritonRunner) else {}
        out = {"ms": ms, "steps": len(usual), "forwards_per_second": round(1e3 / ms, 1), "tokens": tokens}
        return {**out, **self._shares(size, ms), "ready_s": round(ready, 1), "ran": counts}

    def _run(self, cell: Cell) -> dict[str, Any]:
        model, s = self.model(cell), SHAPES[cell.shape]
        total = cell.sequences * cell.rows
        slots = cell.sequences * (cell.context + 32)
        runner = TritonRunner(
            model, slots, model.dtype, 16, max_rows=total, max_spans=cell.sequences, max_len=cell.context
        )
        pool, draw, items = Pages(-(-slots // 16), 16), np.random.default_rng(0), []
        causal = s.family == "qwen2"
        for _ in range(cell.sequences):
            table = PageTable(pool)
            table.grow(cell.context)
            ids = tuple(draw.integers(0, s.vocab - 3, cell.rows).tolist())
            start = cell.context - cell.rows
            if causal:
                span = Span(start, ids, "causal", "keep", want=(cell.rows - 1,))
            else:
                want = tuple(range(cell.rows if cell.rows <= 64 else 1))
                span = Span(start, ids, "full", "scratch" if start else "none", want=want)
            items.append((span, table, start))
        step = pack(items)

        def work() -> None:
            runner.run(step).stats(norm=True)

        ms = self.timed(work, 20 if self.device.type == "cuda" else 2)
        size, operations = self._weights(cell, model)
        return {"ms": ms, **self._shares(size, ms, operations), "ran": dict(runner.counts)}

    def _linear(self, cell: Cell) -> dict[str, Any]:
        """Microseconds by rows: a gate and up, the largest matrix; its layers take turns."""
        model, ops = self.model(cell), ops_for(self.device)
        weights = [op.weights.packed for layer in model.layers for op in layer if type(op).__name__ == "Gated"]
        found: dict[str, Any] = {}
        for rows in (1, 8, 16, 32, 64, 128, 512) if self.device.type == "cuda" else (1,):
            x = torch.randn(rows, weights[0].k, device=self.device, dtype=model.dtype)
            acts, turn = ops.prepare(x, kind_of(weights[0].format)), [0]

            def work(acts: Any = acts, turn: list[int] = turn) -> None:
                turn[0] = (turn[0] + 1) % len(weights)
                ops.linear(acts, weights[turn[0]], out=model.dtype)

            if self.device.type == "cuda":
                from ceilings import median_ms

                ms = median_ms(work, 20)
            else:
                ms = self.timed(work, 2)
            found[str(rows)] = round(ms * 1e3, 1)
        floor = weights[0].nbytes / self.rates["copy"] * 1e6 if self.rates else None
        return {"us": found, "format": weights[0].format, "floor_us": floor and round(floor, 1)}

    def _attention(self, cell: Cell) -> dict[str, Any]:
        """One attention of each layer in turn over all K,V, which no cache holds."""
        s, ops = SHAPES[cell.shape], ops_for(self.device)
        self.drop()
        slots = cell.sequences * cell.context
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        kv = DeviceKv(2, slots, s.kv_heads, s.dim, dtype, self.device)
        pool, items = Pages(slots // 16, 16), []
        for _ in range(cell.sequences):
            table = PageTable(pool)
            table.grow(cell.context)
            items.append((Span(cell.context - 1, (1,), "causal", "keep", want=(0,)), table, cell.context - 1))
        laid = on(self.device, pack(items), max(1, 16 // (s.heads // s.kv_heads)))
        width = (s.heads + 2 * s.kv_heads) * s.dim
        qkv, turn = torch.randn(cell.sequences, width, device=self.device, dtype=dtype), [0]

        def work() -> None:
            turn[0] = 1 - turn[0]
            ops.attention(
                qkv,
                kv.layer(turn[0]),
                laid,
                heads=s.heads,
                kv_heads=s.kv_heads,
                dim=s.dim,
                scale=s.dim**-0.5,
            )

        if self.device.type == "cuda":
            from ceilings import median_ms

            ms = median_ms(work, 20)
        else:
            ms = self.timed(work, 1)
        return {"ms": ms, "MB": round(kv.nbytes / 2 / 1e6), **self._shares(kv.nbytes // 2, ms)}


def dry_cells() -> Iterator[Cell]:
    """One of each kind that needs no card."""
    for kind, sequences, rows, context, form in (
        ("step", 2, 1, 24, None),
        ("run", 2, 1, 24, "w8"),
        ("run", 1, 8, 8, "w4"),
        ("linear", 1, 1, 24, "w8"),
        ("attention", 1, 1, 32, None),
    ):
        yield Cell(kind, "tiny", sequences, rows, context, form)


def about(device: torch.device) -> dict[str, Any]:
    """The machine."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
    if device.type == "cuda":
        import triton

        properties = torch.cuda.get_device_properties(device)
        found |= {
            "card": properties.name,
            "GiB": round(properties.total_memory / (1 << 30), 1),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the triton runner on this machine's card.")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the record goes")
    parser.add_argument("--seconds", type=float, default=230.0, help="when no cell is begun any more")
    parser.add_argument("--only", default="", metavar="TEXT", help="cells whose names hold it")
    parser.add_argument("--dry", action="store_true", help="a tiny shape on a CPU: whether it runs")
    given = parser.parse_args()
    if not given.dry and not torch.cuda.is_available():
        print("no CUDA card here; --dry shows that the cells run", file=sys.stderr)
        return 2
    device = torch.device("cpu" if given.dry else "cuda")
    began, bench = time.monotonic(), Bench(device)
    record: dict[str, Any] = {"about": about(device), "cells": []}
    failed = 0
    for cell in dry_cells() if given.dry else cells():
        if given.only and given.only not in cell.name and cell.kind != "ceilings":
            continue
        entry: dict[str, Any] = {"cell": cell.name}
        if time.monotonic() - began > given.seconds:
            entry["skipped"] = "no time was left"
        elif device.type == "cuda" and cell.bytes > torch.cuda.get_device_properties(device).total_memory:
            entry["skipped"] = f"needs {cell.bytes / (1 << 30):.0f} GiB"
        else:
            try:
                entry |= bench.measure(cell)
            except Exception as error:  # the other cells are worth having all the same
                failed += 1
                entry["failed"] = f"{type(error).__name__}: {error}"[:400]
                bench.drop()
        record["cells"].append(entry)
        record["seconds"] = round(time.monotonic() - began, 1)
        given.json.write_text(json.dumps(record, indent=1) + "\n")
        print(json.dumps(entry), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
