"""The decoder: embedding, layers, final norm, head. One module tree for every wiring, shaped by its config.

It never knows what it serves: rows meet only in `attend`, which the caller gives. No cache, no mask, no sampling.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfastllm.core import ModelInfo
from dfastllm.models.config import DecoderConfig
from dfastllm.models.mixture import Mixture
from dfastllm.models.parts import Attend, Projection, RMSNorm, RotaryTables, SelfAttention, SwiGLU

__all__ = ["Decoder"]


class Layer(nn.Module):
    """Pre-norm residual block: attention, then the MLP (dense or a mixture)."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = SelfAttention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp: nn.Module
        if config.moe is not None and config.is_mixture(layer):
            self.mlp = Mixture(config.hidden_size, config.moe)
        else:
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, config.mlp_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.attn(self.attn_norm(x), cos, sin, attend)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """A built model: embedding, layers, final norm, head. Differentiable; training and serving share it. Made by
    `checkpoint.load` or `checkpoint.build`: on its own its weights are uninitialised memory.

    info: what it can do (ids, kind, shift ...); config: its shape. `lm_head` is None when the head is tied to the
    embedding: the embedding's matrix is then used for both.
    """

    def __init__(self, config: DecoderConfig, info: ModelInfo) -> None:
        super().__init__()
        self.config = config
        self.info = info
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary = RotaryTables(config)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = None if config.tied else Projection(config.hidden_size, config.vocab_size, bias=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """ids, positions [tokens] int64 -> hidden [tokens, hidden] in the model's dtype, after the final norm."""
        x = self.embed(ids)
        cos, sin = self.rotary(positions)
        for layer in self.layers:
            x = layer(x, cos, sin, attend)
        return self.norm(x)  # type: ignore[no-any-return]

    def head(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden] (rows of `forward`) -> logits [rows, vocab] in the model's dtype."""
        if self.lm_head is not None:
            return self.lm_head(hidden)  # type: ignore[no-any-return]
        return F.linear(hidden, self.embed.weight)
