"""A small autoregressive model as the second opinion of rule `apd`.

One causal forward over all the tokens a call, no K,V kept: pure, and cheap only for a model much smaller than the one
it judges. Any built model of kind "ar" will do; its vocabulary must be that of the diffusion model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dfastllm.core import ModelInfo
from dfastllm.errors import UnsupportedError
from dfastllm.kernels.attention_plain import masked_attention

__all__ = ["ModelScorer"]


class _Attend(Protocol):
    """What a layer says of its attention; see `dfastllm.models.program.Attend`."""

    @property
    def scale(self) -> float: ...

    @property
    def window(self) -> int: ...

    @property
    def softcap(self) -> float: ...


class _Model(Protocol):
    """What a scorer needs of a model; `dfastllm.models` builds these."""

    @property
    def info(self) -> ModelInfo: ...

    def __call__(
        self, ids: Tensor, positions: Tensor, attend: Callable[[int, _Attend, Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor: ...

    def head(self, hidden: Tensor) -> Tensor: ...


class ModelScorer:
    """Scores with `model`. Raises UnsupportedError when it is not autoregressive."""

    def __init__(self, model: _Model, device: torch.device | str = "cpu") -> None:
        if model.info.kind != "ar":
            raise UnsupportedError(
                f"a scorer must be autoregressive; {model.info.name} is of kind {model.info.kind!r}.", param="model"
            )
        self.model = model
        self.device = torch.device(device)
        self.vocab_size = model.info.vocab_size

    @torch.inference_mode()
    def score(self, tokens: Sequence[int], count: int) -> Tensor:
        """Log-probabilities float32 [count, vocab_size] of the last `count` of `tokens`, each given all before it.
        Needs at least one token before them."""
        ids = torch.tensor(tokens[:-1], dtype=torch.long, device=self.device)
        hidden = self.model(ids, torch.arange(len(ids), device=self.device), _causal)
        return torch.log_softmax(self.model.head(hidden[len(ids) - count :]).float(), dim=-1)


def _causal(layer: int, op: _Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [tokens, heads, dim], k, v [tokens, kv_heads, dim] -> [tokens, heads, dim]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = masked_attention(q, k, v, causal=True, scale=op.scale, window=op.window, softcap=op.softcap)
    return out[0].transpose(0, 1)
