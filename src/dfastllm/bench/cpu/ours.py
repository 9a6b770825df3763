"""Our side of a comparison: the engine's own runner on the same forwards a peer is asked for."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from dfastllm.bench.cpu.cases import Case
from dfastllm.core import Span
from dfastllm.engine import EngineConfig
from dfastllm.engine.batch import Items, pack
from dfastllm.engine.pages import Pages, PageTable
from dfastllm.engine.runners import runner_for
from dfastllm.kernels.extension import set_threads
from dfastllm.kernels.rows import Rows

if TYPE_CHECKING:
    from dfastllm.models import Decoder, DeviceDecoder, PackedDecoder

__all__ = ["Answer", "Ours"]

Answer = Literal["stats", "logits"]


class Ours:
    """A built model at `threads` threads. answer "stats": each wanted row's token and confidence, which is what a
    greedy policy needs; "logits": the whole float32 [rows, vocab] array, which is what the peers make."""

    def __init__(
        self,
        model: Decoder | PackedDecoder | DeviceDecoder,
        threads: int,
        name: str = "dfastllm",
        positions: int = 8192,
    ) -> None:
        set_threads(threads)
        config = EngineConfig()
        self.name = name
        self.pids = (os.getpid(),)
        self.vocab = model.info.vocab_size
        self._pages = Pages(positions // config.page_size, config.page_size)
        slots = self._pages.count * config.page_size
        self._runner = runner_for(model, slots, model.dtype, "cpu", max(16, 8 * threads), config.page_size)
        self._prompts: dict[tuple[int, int], list[PageTable]] = {}

    def _ids(self, seed: int, count: int) -> tuple[int, ...]:
        return tuple(np.random.default_rng(seed).integers(0, self.vocab - 2, count).tolist())

    def _cached(self, sequences: int, length: int, room: int) -> list[PageTable]:
        """Tables of `sequences` prompts whose first `length` positions hold K,V, with pages for `room` more."""
        tables = self._prompts.get((sequences, length))
        if tables is None:
            for old in self._prompts.values():
                for table in old:
                    table.free()
            self._prompts.clear()
            tables = [PageTable(self._pages) for _ in range(sequences)]
            for i, table in enumerate(tables):
                table.grow(length + room)
                if length:
                    self._run([(Span(0, self._ids(i, length), "causal", "keep"), table, 0)])
            self._prompts[sequences, length] = tables
        for table in tables:
            table.grow(length + room)
        return tables

    def measure(self, case: Case, repeats: int, answer: Answer = "stats") -> list[float]:
        """Seconds of each of `repeats` forwards."""
        tables = self._cached(case.sequences, case.cached, case.rows * (repeats if case.grow else 1))
        tokens = [list(self._ids(1000 + i, case.rows)) for i in range(case.sequences)]
        want = tuple(range(case.rows)) if case.every_row else (case.rows - 1,)
        start, seconds = case.cached, []
        for _ in range(repeats):
            began = time.perf_counter()
            spans = [self._span(case, start, ids, want) for ids in tokens]
            chosen = self._answer([(s, t, start) for s, t in zip(spans, tables, strict=True)], case, answer)
            seconds.append(time.perf_counter() - began)
            if case.grow:
                start += case.rows
                tokens = [[token] * case.rows for token in chosen[:: len(want)]]
        return seconds

    def _span(self, case: Case, start: int, ids: Sequence[int], want: tuple[int, ...]) -> Span:
        if case.grow or not case.cached:
            return Span(start, tuple(ids), "causal", "keep", want)
        return Span(start, tuple(ids), "full", "scratch", want)

    def _run(self, items: Items) -> Rows:
        return self._runner.run(pack(items, self._runner.block_size))

    @torch.inference_mode()
    def _answer(self, items: list[tuple[Span, PageTable, int]], case: Case, answer: Answer) -> list[int]:
        """The best token of every wanted row."""
        rows = self._run(items)
        if answer == "logits":
            logits = rows.logits()
            return [int(token) for token in logits.argmax(dim=-1)] if case.grow else [0] * len(logits)
        return [int(token) for token in rows.stats(norm=not case.grow).token]
