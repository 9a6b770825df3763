"""Dream's time grid (Ye et al., 2025): how many tokens each of its points commits, from t = 1 down to eps."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from dfastllm.decode.canvas.field import Floats, Ints

__all__ = ["grid_counts", "moments"]


@lru_cache(maxsize=256)
def shares(steps: int, eps: float) -> NDArray[np.float32]:
    """float32 [steps]: 1 - t[i+1] / t[i], in float32 as published: there a quota may be a token less than in exact
    numbers."""
    t = torch.linspace(1, eps, steps + 1).numpy()
    out: NDArray[np.float32] = np.float32(1) - t[1:] / t[:-1]
    return out


@lru_cache(maxsize=1024)
def grid_counts(size: int, steps: int, eps: float, at: int = 0) -> tuple[int, ...]:
    """How many of `size` masks the points of Dream's grid commit, from point `at` on, those that commit nothing left
    out."""
    left, out = size, []
    share = shares(steps, eps)[:-1]
    while left and at < len(share):
        due = (np.float32(left) * share[at:]).astype(np.int64)
        some = int((due > 0).argmax())
        if not due[some]:
            break
        out.append(min(left, int(due[some])))
        left -= out[-1]
        at += some + 1
    if left:
        out.append(left)
    return tuple(out)


def moments(noise: Floats, steps: int, eps: float) -> Ints:
    """The point of the grid, int [M] in [0, steps), at which each position is committed under ordering origin. That a
    mask goes at point i with probability 1 - t[i+1] / t[i], whatever the others do, says that it goes before time t
    with probability 1 - t (and at the last point for certain): its time is one uniform number."""
    out: Ints = np.clip(np.floor((1 - noise) / ((1 - eps) / steps)), 0, steps - 1).astype(np.int64)
    return out
