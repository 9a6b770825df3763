"""In which order a run sees its samples: micro-batches as a pure function of a position, so that it resumes exactly.

An epoch sees every sample once. Samples of similar length share a micro-batch (sorted within windows of a shuffled
order), so little of it is padding; with enumerated shapes a micro-batch is brought to the length its step draws.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from dfastllm.distill.data.collate import collate_kd_batch
from dfastllm.distill.data.dataset import KDDataset
from dfastllm.distill.shapes import fit_batch_to_shape, sample_enumerated_shape
from dfastllm.errors import DataError

__all__ = ["Batch", "Position", "Sampler", "Shapes"]

Batch = dict[str, Any]
Position = tuple[int, int, int]  # epoch, micro-batches of it that were read, micro-batches drawn in the run
WINDOW = 32  # micro-batches whose samples are sorted together


@dataclass(frozen=True)
class Shapes:
    """Enumerated shapes of a run; see `sample_enumerated_shape`."""

    lengths: tuple[int, ...]
    probs: tuple[float, ...] | None = None
    periodic_upweight_rare: bool = True

    def draw(self, step: int, seed: int) -> int:
        return sample_enumerated_shape(self.lengths, self.probs, step, self.periodic_upweight_rare, seed=seed)


@dataclass
class Sampler:
    """Micro-batches of a dataset.

    size        samples of a micro-batch; the last of an epoch may be smaller.
    accumulate  micro-batches of one optimizer step, which share its shape.
    dropped     samples whose response did not fit the shape they met, since the sampler was made.
    drawn       micro-batches of each shape, since the sampler was made.
    """

    dataset: KDDataset
    size: int
    seed: int = 0
    accumulate: int = 1
    shapes: Shapes | None = None
    dropped: int = 0
    drawn: dict[int, int] = field(default_factory=dict)

    @property
    def per_epoch(self) -> int:
        """Micro-batches of an epoch."""
        return -(-len(self.dataset) // self.size)

    def at(self, position: Sequence[int]) -> Iterator[tuple[Batch, Position]]:
        """Endless (batch of `collate_kd_batch`, position after it). Raises DataError where no sample of a whole epoch
        fits the shapes that were drawn."""
        epoch, begun, drawn = position
        empty = 0
        while True:
            order = _order(tuple(self.dataset.lengths()), self.size, self.seed, epoch)
            for at in range(begun, len(order)):
                after = (epoch, at + 1, drawn + 1) if at + 1 < len(order) else (epoch + 1, 0, drawn + 1)
                batch = self._batch(order[at], drawn // self.accumulate)
                drawn += 1
                if not len(batch["input_ids"]):
                    empty += 1
                    if empty > len(order):
                        raise DataError(
                            f"no response of a whole epoch ({len(self.dataset)} samples) fits the shapes drawn.",
                            param="train.seq_lengths",
                            hint="Use longer seq_lengths, or shorter answers.",
                        )
                    continue
                empty = 0
                yield batch, after
            epoch, begun = epoch + 1, 0

    def _batch(self, chosen: Sequence[int], step: int) -> Batch:
        batch = collate_kd_batch([self.dataset[i] for i in chosen], self.dataset.pad_id)
        if self.shapes is None:
            return batch
        length = self.shapes.draw(step, self.seed)
        self.drawn[length] = self.drawn.get(length, 0) + 1
        fitted, dropped = fit_batch_to_shape(batch, length, pad_id=self.dataset.pad_id)
        self.dropped += dropped
        return fitted


@lru_cache(maxsize=2)
def _order(lengths: tuple[int, ...], size: int, seed: int, epoch: int) -> list[list[int]]:
    """The micro-batches of an epoch, as indices into the dataset."""
    draw = random.Random(f"order/{seed}/{epoch}")
    shuffled = draw.sample(range(len(lengths)), len(lengths))
    batches = []
    for start in range(0, len(shuffled), size * WINDOW):
        window = sorted(shuffled[start : start + size * WINDOW], key=lambda i: lengths[i])
        batches += [window[at : at + size] for at in range(0, len(window), size)]
    draw.shuffle(batches)
    return batches
