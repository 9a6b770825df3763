"""What ops of a program compute in torch: norm, rotary positions, activations, and a dense `attend` for training.

The only place where rows meet is `attend`, a callable given by the caller (paged K,V in the engine, a dense mask in
training). No cache, no sampling, no checkpoint names in this file.

Shapes: tokens = rows of all sequences packed end to end, without padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfastllm.errors import ValidationError
from dfastllm.kernels.attention_plain import masked_attention
from dfastllm.models.program import Activation, Attend, RopeTable

__all__ = [
    "ACTIVATIONS",
    "Adapt",
    "AttendFunction",
    "Expert",
    "Projection",
    "RMSNorm",
    "Rotary",
    "dense_attention",
    "gelu_tanh",
    "inverse_frequencies",
    "rotate",
    "silu",
    "softcapped",
]


class AttendFunction(Protocol):
    """Attention over whatever K,V the caller holds, as `op` says (scale, window, softcap). q [tokens, heads, dim] after
    rope and q/k norm, k, v [tokens, kv_heads, dim] of this forward's rows -> [tokens, heads, dim]."""

    def __call__(self, layer: int, op: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class Adapt(Protocol):
    """What adapters make of a forward's numbers, row by row; `adapted.AdaptedRows` is one."""

    def __call__(self, name: str, x: Tensor, y: Tensor, rows: Tensor | None = None) -> Tensor:
        """y [rows, out], what the matrix of this own name gives for x [rows, in], as the rows' adapters have it. rows:
        which rows of the forward these are, None: all in order; more of x and y than that are padding."""
        ...

    def embed(self, ids: Tensor, x: Tensor) -> Tensor:
        """The same of the embedding's rows x [rows, hidden] of ids [rows]."""
        ...

    def head(self, hidden: Tensor, logits: Tensor, rows: Tensor) -> Tensor:
        """The same of the head, before any factor or cap."""
        ...


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim; the mean square in float32 whatever the model's dtype. offset: what the
    stored weight is a distance from; the product is then float32 too."""

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))
        self.eps = eps
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.offset:
            return (wide * (self.offset + self.weight.float())).to(x.dtype)
        return self.weight * wide.to(x.dtype)


def inverse_frequencies(table: RopeTable) -> tuple[Tensor, float]:
    """Rotary frequencies [dim / 2] float32 (radians per position) and the factor on cos and sin."""
    dim, theta, scaling = table.dim, table.theta, table.scaling
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
    if scaling.kind == "longrope":
        beyond = table.max_len > scaling.original_max_len
        factor = scaling.attention_factor
        if factor is None:
            grown = max(scaling.factor, 1.0)
            factor = math.sqrt(1 + math.log(grown) / math.log(scaling.original_max_len))
        return inv / torch.tensor(scaling.long if beyond else scaling.short, device="cpu"), factor

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


class Rotary(nn.Module):
    """cos and sin of every row's position, float32 at any model dtype (bfloat16 angles lose whole positions)."""

    def __init__(self, table: RopeTable) -> None:
        super().__init__()
        # A plain attribute, not a buffer: casting a model to bfloat16 must not touch the frequencies.
        self._frequencies, self._factor = inverse_frequencies(table)
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


def gelu_tanh(x: Tensor) -> Tensor:
    """x / 2 * (1 + tanh(y)), y = sqrt(2 / pi) (x + 0.044715 x^3) (Hendrycks and Gimpel 2016, arXiv 1606.08415), that
    is x / (1 + exp(-2 y)). By exp and division for the reason of `silu`."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.requires_grad:
        return F.gelu(x, approximate="tanh")
    return x / ((x + 0.044715 * x * x * x) * (-2 * math.sqrt(2 / math.pi))).exp_().add_(1)


ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {"silu": silu, "gelu_tanh": gelu_tanh}


def softcapped(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap); x itself where cap is 0."""
    return cap * torch.tanh(x / cap) if cap else x


class Expert(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = Projection(hidden, intermediate, bias=False)
        self.up_proj = Projection(hidden, intermediate, bias=False)
        self.down_proj = Projection(intermediate, hidden, bias=False)

    def forward(self, x: Tensor, adapt: Adapt | None = None, name: str = "", rows: Tensor | None = None) -> Tensor:
        """name: its own. rows: which rows of the forward x are."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if adapt is not None:
            gate = adapt(f"{name}.gate_proj", x, gate, rows)
            up = adapt(f"{name}.up_proj", x, up, rows)
        h = silu(gate) * up
        out: Tensor = self.down_proj(h)
        return out if adapt is None else adapt(f"{name}.down_proj", h, out, rows)


def dense_attention(
    batch: int,
    length: int,
    kind: Literal["full", "causal", "block"] = "full",
    *,
    block: int = 0,
    mask: Tensor | None = None,
) -> AttendFunction:
    """An `attend` without cache for `batch` sequences of `length` rows each, flat as [batch * length]. Differentiable.

    kind: causal: keys at or before the row; block: keys before the end of the row's block, blocks of `block` rows
    aligned to row 0; full: all rows of the same sequence. `mask` (bool, broadcastable to [batch, 1, length, length],
    True = may attend) narrows it further; a row that may attend to nothing gives NaN. A window counts rows. Raises
    ValidationError.
    """
    if kind not in ("full", "causal", "block"):
        raise ValidationError(f"kind must be full, causal or block, got {kind!r}.", param="kind")
    if (kind == "block") != (block > 0):
        raise ValidationError(f"block must be > 0 exactly when kind is block, got kind={kind}, block={block}.")
    allowed = mask
    if kind == "block":
        row = torch.arange(length, device=None if mask is None else mask.device)
        pattern = row[None, :] < (row[:, None] // block + 1) * block  # [length, length]
        allowed = pattern if mask is None else mask & pattern

    def attend(layer: int, op: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads, dim = q.shape[1:]
        q4, k4, v4 = (t.view(batch, length, t.shape[1], dim).transpose(1, 2) for t in (q, k, v))
        seen = None if allowed is None else allowed.to(q.device)
        out = masked_attention(
            q4, k4, v4, seen, causal=kind == "causal", scale=op.scale, window=op.window, softcap=op.softcap
        )
        return out.transpose(1, 2).reshape(batch * length, heads, dim)

    return attend
