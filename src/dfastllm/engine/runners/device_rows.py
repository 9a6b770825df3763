"""Rows of a model on a device: hidden states that lie there, and the head that runs when someone looks at them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dfastllm.engine.runners.apart import stats_apart
from dfastllm.kernels.rows import Barred, DenseRows, Rows, RowStats
from dfastllm.kernels.token_set import rows_by_set
from dfastllm.kernels.triton.plain import WORDS
from dfastllm.models.adapted import AdaptedRows

if TYPE_CHECKING:
    from dfastllm.engine.runners.triton import TritonRunner
    from dfastllm.lora import Adapter

__all__ = ["AdaptedDeviceRows", "DeviceRows", "Held"]


class Held:
    """Hidden states float32 [wanted or more, hidden] of a step, as long as someone has its rows."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class DeviceRows(Rows):
    """Hidden rows on a device and the head of their model; logits exist only where someone asks for them."""

    def __init__(self, held: Held, count: int, runner: TritonRunner, index: NDArray[np.int64] | None = None) -> None:
        model = runner.model
        super().__init__(count, model.info.vocab_size if model.shortlist is None else len(model.shortlist))
        self._held = held
        self._runner = runner
        self._index = index  # which of the step's wanted rows these are, None: all

    def _rows(self, index: NDArray[np.int64] | None = None) -> Tensor:
        """Hidden states of these rows, or of some of them."""
        mine = index if self._index is None else self._index if index is None else self._index[index]
        hidden = self._held.hidden
        if mine is None:
            return hidden[: self.count]
        return hidden.index_select(0, torch.from_numpy(mine).to(hidden.device, non_blocking=True))

    @torch.inference_mode()
    def _logits(self) -> tuple[Tensor, NDArray[np.bool_]]:
        with self._runner.there():
            logits = self._runner.model.logits(self._rows(), self._runner.ops)
            return logits, _finite(logits, self._runner)

    @torch.inference_mode()
    def _stats(self, ban: tuple[int, ...], barred: Barred, norm: bool, spread: bool, top: int) -> RowStats:
        if not self.count:
            return _no_stats(min(top, self.vocab))
        top = min(top, self.vocab)
        with self._runner.there():
            found = self._runner.stats(self._held, self._rows(), ban, self._sets(barred), top)
        floats = found.view(np.float32)
        none, no_ids = np.empty(0, dtype=np.float32), np.empty(0, dtype=np.int64)
        return RowStats(
            token=found[:, 0].astype(np.int64),
            best=floats[:, 1].copy(),
            finite=found[:, 2] != 0,
            norm=floats[:, 3].copy() if norm or spread else none,
            entropy=floats[:, 4].copy() if spread else none,
            margin=floats[:, 5].copy() if spread else none,
            ids=found[:, WORDS : WORDS + top].astype(np.int64) if top else no_ids,
            logits=floats[:, WORDS + top :].copy() if top else none,
        )

    def _sets(self, barred: Barred) -> tuple[Tensor, Tensor] | None:
        """The sets of barred ids as bits uint8 [sets, bytes], and the number of each row's, on the device."""
        if barred is None:
            return None
        found = rows_by_set(barred, self.count, self.vocab)
        if not found:
            return None
        which = np.full(self.count, -1, dtype=np.int32)
        for number, (_, rows) in enumerate(found):
            which[rows] = number
        bits = np.stack([closed.words.view(np.uint8)[: -(-self.vocab // 8)] for closed, _ in found])
        device = self._runner.device
        return torch.from_numpy(bits).to(device), torch.from_numpy(which).to(device)

    def _take(self, index: NDArray[np.int64]) -> Rows:
        mine = index if self._index is None else self._index[index]
        return DeviceRows(self._held, len(index), self._runner, mine)


class AdaptedDeviceRows(DeviceRows):
    """Rows some of whose adapters change the head: those go through their logits, the others as ever.

    numbers: int64 [count], the adapter of a row that changes the head, 0: none. table: adapters by number."""

    def __init__(
        self,
        held: Held,
        count: int,
        runner: TritonRunner,
        numbers: NDArray[np.int64],
        table: Sequence[Adapter | None],
        index: NDArray[np.int64] | None = None,
    ) -> None:
        super().__init__(held, count, runner, index)
        self._numbers = numbers
        self._table = table

    @torch.inference_mode()
    def _logits(self) -> tuple[Tensor, NDArray[np.bool_]]:
        numbers = torch.from_numpy(self._numbers).to(self._runner.device)
        adapt = AdaptedRows(self._table, numbers, 16)
        every = torch.arange(self.count, device=self._runner.device)
        with self._runner.there():
            logits = self._runner.model.logits(self._rows(), self._runner.ops, adapt, every)
            return logits, _finite(logits, self._runner)

    def _stats(self, ban: tuple[int, ...], barred: Barred, norm: bool, spread: bool, top: int) -> RowStats:
        return stats_apart(
            self._numbers != 0,
            lambda index: DeviceRows._take(self, index),
            lambda index: DenseRows(self._take(index).logits()),
            ban=ban,
            barred=barred,
            norm=norm,
            spread=spread,
            top=top,
        )

    def _take(self, index: NDArray[np.int64]) -> Rows:
        mine = index if self._index is None else self._index[index]
        return AdaptedDeviceRows(self._held, len(index), self._runner, self._numbers[index], self._table, mine)


def _finite(logits: Tensor, runner: TritonRunner) -> NDArray[np.bool_]:
    """bool [rows]: one NaN or infinity in a row shows in its sum."""
    finite: NDArray[np.bool_] = runner.fetch(torch.isfinite(logits.sum(dim=-1)).int()) != 0
    return finite


def _no_stats(top: int) -> RowStats:
    none, no_ids = np.empty(0, dtype=np.float32), np.empty(0, dtype=np.int64)
    return RowStats(
        no_ids,
        none,
        np.empty(0, dtype=np.bool_),
        none,
        none,
        none,
        np.empty((0, top), dtype=np.int64),
        np.empty((0, top), dtype=np.float32),
    )
