"""Statistics of rows of which some go through their logits and the others through a fused head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dfastllm.kernels.rows import Barred, Rows, RowStats

__all__ = ["stats_apart"]

Ints = NDArray[np.int64]


def stats_apart(
    dense: NDArray[np.bool_],
    fused: Callable[[Ints], Rows],
    whole: Callable[[Ints], Rows],
    *,
    ban: tuple[int, ...],
    barred: Barred,
    norm: bool,
    spread: bool,
    top: int,
) -> RowStats:
    """The statistics of rows in order, of those that are `dense` as `whole` of their numbers gives them, of the others
    as `fused` does. The rest: as `Rows.stats`."""
    parts = []
    for index, rows_of in ((np.flatnonzero(~dense), fused), (np.flatnonzero(dense), whole)):
        if len(index):
            some = None if barred is None else [barred[i] for i in index.tolist()]
            stats = rows_of(index).stats(ban=ban, barred=some, norm=norm, spread=spread, top=top)
            parts.append((index, stats))
    fields = {}
    for field in dataclasses.fields(RowStats):
        values = [getattr(stats, field.name) for _, stats in parts]
        joined = np.empty((len(dense), *values[0].shape[1:]), dtype=values[0].dtype) if len(values[0]) else values[0]
        for (index, _), value in zip(parts, values, strict=True):
            if len(value):
                joined[index] = value
        fields[field.name] = joined
    return RowStats(**fields)
