"""The parts of every decoder: norm, rotary positions, attention, the dense MLP, and a dense `attend` for training.

The only place where rows meet is `attend`, a callable given by the caller (paged K,V in the engine, a dense mask in
training). No cache, no sampling, no checkpoint names in this file.

Shapes: tokens = rows of all sequences packed end to end, without padding.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfastllm.errors import ValidationError
from dfastllm.models.config import DecoderConfig, RopeScaling

__all__ = [
    "Attend",
    "Projection",
    "RMSNorm",
    "RotaryTables",
    "SelfAttention",
    "SwiGLU",
    "dense_attention",
    "rotate",
    "silu",
]


class Attend(Protocol):
    """Attention over whatever K,V the caller holds. q [tokens, heads, dim] (after rope and q/k norm), k, v
    [tokens, kv_heads, dim] of this forward's rows -> [tokens, heads, dim]; scores are scaled by dim ** -0.5."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim; the mean square in float32 whatever the model's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def inverse_frequencies(dim: int, theta: float, scaling: RopeScaling | None) -> tuple[Tensor, float]:
    """Rotary frequencies [dim / 2] float32 (radians per position) and the factor on cos and sin."""
    inv = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim))
    if scaling is None:
        return inv, 1.0
    if scaling.kind == "linear":
        return inv / scaling.factor, 1.0
    if scaling.kind == "llama3":
        wavelength = 2 * math.pi / inv
        turns = scaling.original_max_len / wavelength  # rotations within the trained length
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: stretched, 1: kept
        return (1 - keep) * inv / scaling.factor + keep * inv, 1.0

    def dim_of(rotations: float) -> float:
        """The (fractional) dim whose frequency makes this many rotations over the trained length."""
        return dim * math.log(scaling.original_max_len / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    start, stop = dim_of(scaling.beta_fast), dim_of(scaling.beta_slow)
    if scaling.truncate:
        start, stop = math.floor(start), math.ceil(stop)
    start, stop = max(start, 0), min(stop, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - start) / max(stop - start, 1e-3)
    stretched = ramp.clamp(0, 1)
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return inv / scaling.factor * stretched + inv * (1 - stretched), factor


class RotaryTables(nn.Module):
    """cos and sin of every row's position, float32 at any model dtype (bfloat16 angles lose whole positions)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        # A plain attribute, not a buffer: casting a model to bfloat16 must not touch the frequencies.
        self._frequencies, self._factor = inverse_frequencies(config.rotary_dim, config.rope_theta, config.rope_scaling)
        self._placed: dict[torch.device, Tensor] = {}

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [tokens] int64 -> cos, sin [tokens, 1, rotary_dim / 2] float32."""
        device = positions.device
        if device not in self._placed:
            self._placed[device] = self._frequencies.to(device)
        angles = (positions.float()[:, None] * self._placed[device])[:, None, :]
        return angles.cos() * self._factor, angles.sin() * self._factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [tokens, heads, dim], pairs (i, i + rotary_dim / 2); dims past rotary_dim pass unchanged.
    Computed in float32, returned in x's dtype."""
    half = cos.shape[-1]
    wide = x.float()
    a, b, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1).to(x.dtype)


class SelfAttention(nn.Module):
    """Projections, q/k norm and rope around the caller's `attend`. Grouped queries: head h reads K,V head
    h * kv_heads // heads. Fused: one matrix, rows ordered all q heads, all k heads, all v heads."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.dim = config.head_dim
        self.split = (config.heads, config.kv_heads, config.kv_heads)
        q_size, kv_size = config.heads * self.dim, config.kv_heads * self.dim
        if config.fused_qkv:
            self.qkv_proj: Projection | None = Projection(
                config.hidden_size, q_size + 2 * kv_size, bias=config.qkv_bias
            )
        else:
            self.qkv_proj = None
            self.q_proj = Projection(config.hidden_size, q_size, bias=config.qkv_bias)
            self.k_proj = Projection(config.hidden_size, kv_size, bias=config.qkv_bias)
            self.v_proj = Projection(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.q_norm = RMSNorm(self.dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.dim, config.norm_eps) if config.qk_norm else None
        self.o_proj = Projection(q_size, config.hidden_size, bias=config.out_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        if self.qkv_proj is not None:
            q, k, v = self.qkv_proj(x).view(-1, sum(self.split), self.dim).split(self.split, dim=1)
        else:
            q = self.q_proj(x).view(-1, self.split[0], self.dim)  # [tokens, heads, dim]
            k = self.k_proj(x).view(-1, self.split[1], self.dim)  # [tokens, kv_heads, dim]
            v = self.v_proj(x).view(-1, self.split[2], self.dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out = attend(self.layer, rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.o_proj(out.reshape(len(x), -1))  # type: ignore[no-any-return]


class Projection(nn.Linear):
    """nn.Linear without its own random start, which takes seconds over the thousands of experts of a mixture: weights
    come from a file or from `build`."""

    def reset_parameters(self) -> None:
        pass


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x). On CPU in float32, torch's own gives other last bits at the ragged end of a tensor (scalar code
    after the vectors), so a row would depend on how many rows follow it; exp and division do not."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.requires_grad:
        return F.silu(x)
    below = x.neg().exp_().add_(1)
    return torch.div(x, below, out=below)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, hidden: int, intermediate: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Projection(hidden, intermediate, bias=bias)
        self.up_proj = Projection(hidden, intermediate, bias=bias)
        self.down_proj = Projection(intermediate, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


def dense_attention(
    batch: int,
    length: int,
    kind: Literal["full", "causal", "block"] = "full",
    *,
    block: int = 0,
    mask: Tensor | None = None,
) -> Attend:
    """An `attend` without cache for `batch` sequences of `length` rows each, flat as [batch * length]. Differentiable.

    kind: causal: keys at or before the row; block: keys before the end of the row's block, blocks of `block` rows
    aligned to row 0; full: all rows of the same sequence. `mask` (bool, broadcastable to [batch, 1, length, length],
    True = may attend) narrows it further; a row that may attend to nothing gives NaN. Raises ValidationError.
    """
    if kind not in ("full", "causal", "block"):
        raise ValidationError(f"kind must be full, causal or block, got {kind!r}.", param="kind")
    if (kind == "block") != (block > 0):
        raise ValidationError(f"block must be > 0 exactly when kind is block, got kind={kind}, block={block}.")
    allowed: Tensor | None = mask
    if kind != "full" and (mask is not None or kind == "block"):
        device = mask.device if mask is not None else None
        row = torch.arange(length, device=device)
        stop = row + 1 if kind == "causal" else (row // block + 1) * block
        pattern = row[None, :] < stop[:, None]  # [length, length]
        allowed = pattern if mask is None else mask & pattern

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads, dim = q.shape[1:]
        q4, k4, v4 = (t.view(batch, length, t.shape[1], dim).transpose(1, 2) for t in (q, k, v))
        bias = None if allowed is None else allowed.to(q.device)
        out = F.scaled_dot_product_attention(
            q4, k4, v4, attn_mask=bias, is_causal=kind == "causal" and bias is None, enable_gqa=heads != k.shape[1]
        )
        return out.transpose(1, 2).reshape(batch * length, heads, dim)

    return attend
