"""Numbers of rows of logits, in torch on any device: the plain form of what a native head computes in one pass.

A row's numbers do not depend on how many rows are reduced together."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["best_of", "best_tokens", "log_normaliser", "on_capable_device", "row_chunks", "spread"]


def row_chunks(like: Tensor) -> Iterator[slice]:
    """Slices of rows small enough that a temporary of them stays in a CPU's cache, or in 256 MiB of a GPU's memory. A
    row's result never depends on its chunk."""
    rows, width = like.shape
    step = max(1, (1 << 17 if like.device.type == "cpu" else 1 << 26) // max(1, width))
    return (slice(at, min(rows, at + step)) for at in range(0, rows, step))


def on_capable_device(logits: Tensor) -> Tensor:
    """The same logits where float64 exists: MPS has none, so its rows go to the CPU."""
    return logits.cpu() if logits.device.type == "mps" else logits


def best_tokens(logits: Tensor) -> Tensor:
    """int64 [rows]: the first of a row's largest logits, so the lowest id of a tie. numpy's argmax is vectorised on CPU
    where torch's is not (13 times as fast at [1116, 2048])."""
    if logits.device.type == "cpu" and logits.shape[0]:
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def log_normaliser(logits: Tensor) -> Tensor:
    """logsumexp per row, float32 [rows], from logits float32 [rows, vocab].

    Summed in float64, so the value does not depend on how many rows are reduced together; rows go in chunks, so the
    temporary stays small.
    """
    out = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    for rows in row_chunks(logits):
        top = logits[rows].amax(dim=-1, keepdim=True)
        total = (logits[rows] - top).exp_().sum(dim=-1, dtype=torch.float64)
        out[rows] = (total.log() + top[:, 0]).float()
    return out


def spread(logits: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy in nats and margin p1 - p2 per row, float32 [rows] each. logits [rows, vocab], norm [rows]."""
    entropy, margin = torch.empty_like(norm), torch.empty_like(norm)
    for rows in row_chunks(logits):
        logp = logits[rows] - norm[rows, None]
        best = logp.topk(min(2, logp.shape[1]), dim=-1).values.exp()
        margin[rows] = best[:, 0] - (best[:, 1] if best.shape[1] > 1 else 0)
        p = logp.exp()
        terms = p.mul_(logp.clamp_(min=-200.0))  # p of -inf is 0, and 0 * -200 is too
        entropy[rows] = -terms.sum(dim=-1, dtype=torch.float64).float()
    return entropy, margin


def best_of(values: Tensor, count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(int64, float32) [rows, count]: the best of each row, the lowest id of a tie first. Of a row that is not finite
    some ids of the vocabulary."""
    rows = values.shape[0]
    clean = torch.nan_to_num(values, nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    least = clean.topk(count, dim=-1).values[:, -1:]
    at, ids = (x.cpu().numpy() for x in (clean >= least).nonzero(as_tuple=True))
    found = clean[at, ids].cpu().numpy()
    order = np.lexsort((ids, -found, at))
    first = np.searchsorted(at, np.arange(rows))  # each row has at least `count` candidates
    pick = order[first[:, None] + np.arange(count)]
    return ids[pick], found[pick]
