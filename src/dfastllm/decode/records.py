"""Records of committed tokens: their log probability and the best tokens beside it."""

from __future__ import annotations

import numpy as np

from dfastllm.core import TokenLogprob
from dfastllm.kernels.rows import RowStats

__all__ = ["token_logprob"]


def token_logprob(stats: RowStats, row: int, token: int, logit: float, top: int) -> TokenLogprob:
    """The record of a token drawn at a row, with the `top` best, of the distribution of `stats` (which holds the norm
    and at least `top` ids). logit: that of the token there."""
    norm = stats.norm[row]
    best: tuple[tuple[int, float], ...] = ()
    if top:
        pairs = zip(stats.ids[row, :top].tolist(), (stats.logits[row, :top] - norm).tolist(), strict=True)
        best = tuple((i, v) for i, v in pairs if v != float("-inf"))
    return TokenLogprob(token, float(np.float32(logit) - norm), best)
