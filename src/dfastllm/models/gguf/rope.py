"""Rotary scaling between DecoderConfig and GGUF: metadata for linear and yarn, the tensor rope_freqs.weight for llama3.

llama.cpp divides frequency i by rope_freqs[i]. Llama 3's rule makes these factors from four numbers; read back, any
numbers that make the same factors will do, so they are fitted and the fit is checked.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dfastllm.errors import CheckpointError, ModelLoadError, ValidationError
from dfastllm.models.config import DecoderConfig, RopeScaling
from dfastllm.models.family import Fields
from dfastllm.models.parts import inverse_frequencies
from dfastllm.models.program import RopeTable

__all__ = ["factors_of", "read_scaling", "scaling_from_factors", "write_scaling"]

CLOSE = 1e-4  # relative: factors are float32 of a formula that is evaluated in other orders


def read_scaling(fields: Fields, arch: str, max_len: int) -> RopeScaling | None:
    """From `arch`.rope.scaling.*. Raises ModelLoadError for a kind other than none, linear, yarn, and for settings of
    yarn that this decoder does not compute."""
    prefix = f"{arch}.rope.scaling"
    factor = fields.get(f"{prefix}.factor|{arch}.rope.scale_linear", float, 1.0)
    kind = fields.get(f"{prefix}.type", str, "linear")
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    if kind == "linear":
        return RopeScaling("linear", factor)
    if kind != "yarn":
        raise ModelLoadError(
            f"{fields.where}: {prefix}.type {kind!r} is not supported; supported: none, linear, yarn.",
            param=f"{prefix}.type",
        )
    fields.only(**{f"{prefix}.yarn_ext_factor": (1.0, -1.0), f"{prefix}.yarn_log_multiplier": 0.0})
    original = fields.get(f"{prefix}.original_context_length", int, max_len)
    # llama.cpp cancels its own yarn factor and leaves 0.1 ln(factor) + 1, times attn_factor.
    extra = fields.get(f"{prefix}.attn_factor", float, 1.0)
    attention = None if extra == 1.0 else extra * (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    return RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=fields.get(f"{prefix}.yarn_beta_fast", float, 32.0),
        beta_slow=fields.get(f"{prefix}.yarn_beta_slow", float, 1.0),
        attention_factor=attention,
    )


def write_scaling(config: DecoderConfig, arch: str) -> dict[str, Any]:
    """The inverse of `read_scaling` for linear and yarn; nothing for the kinds that are tensors. Raises ValidationError
    for what llama.cpp cannot compute."""
    scaling, prefix = config.rope_scaling, f"{arch}.rope.scaling"
    if scaling is None or scaling.kind in ("llama3", "longrope"):  # which are tensors
        return {}
    fields: dict[str, Any] = {f"{prefix}.type": scaling.kind, f"{prefix}.factor": float(scaling.factor)}
    if scaling.kind == "linear":
        return fields
    if not scaling.truncate:
        raise ValidationError("GGUF cannot say yarn with truncate=False.", param="rope_scaling")
    fields |= {
        f"{prefix}.original_context_length": scaling.original_max_len,
        f"{prefix}.yarn_beta_fast": float(scaling.beta_fast),
        f"{prefix}.yarn_beta_slow": float(scaling.beta_slow),
    }
    if scaling.attention_factor is not None:
        own = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
        fields[f"{prefix}.attn_factor"] = scaling.attention_factor / own
    return fields


def factors_of(config: DecoderConfig) -> Tensor | None:
    """rope_freqs [rotary_dim / 2] of a llama3 scaling, None for others."""
    if config.rope_scaling is None or config.rope_scaling.kind != "llama3":
        return None
    return _factors(config.rotary_dim, config.rope_theta, config.rope_scaling)


def _factors(dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    plain, _ = inverse_frequencies(RopeTable(theta, dim))
    return plain / inverse_frequencies(RopeTable(theta, dim, scaling))[0]


def scaling_from_factors(factors: Tensor, theta: float, original: int) -> RopeScaling | None:
    """A llama3 scaling whose factors are these, None when all are 1. Raises CheckpointError when there is none.

    original: the trained length, if known; it only chooses between equal descriptions.
    """
    if bool((factors - 1).abs().max() <= CLOSE):
        return None
    factor = float(factors.max())
    dim = 2 * len(factors)
    plain, _ = inverse_frequencies(RopeTable(theta, dim))
    candidates = [RopeScaling("llama3", factor, length, 1.0, 4.0) for length in (original, 8192)]
    fitted = _fit(factors, plain, factor, original)
    for scaling in candidates if fitted is None else [*candidates, fitted]:
        made = _factors(dim, theta, scaling)
        if bool(((made - factors).abs() <= CLOSE * factors.abs()).all()):
            return scaling
    raise CheckpointError(
        "tensor 'rope_freqs.weight' holds frequency factors that follow no llama3 scaling.",
        hint="Only linear, yarn and llama3 scaling of rotary positions are supported.",
    )


def _fit(factors: Tensor, plain: Tensor, factor: float, original: int) -> RopeScaling | None:
    """From the dims between kept and stretched, where 1 / f = (1 - s) / factor + s and s is linear in the frequency."""
    smooth = (1 / factors.double() - 1 / factor) / (1 - 1 / factor)
    inside = (smooth > CLOSE) & (smooth < 1 - CLOSE)
    if factor <= 1 or int(inside.sum()) < 2:
        return None
    turns = original * plain.double()[inside] / (2 * math.pi)
    rows = torch.stack([turns, torch.ones_like(turns)], dim=1)
    slope, shift = (float(v) for v in torch.linalg.lstsq(rows, smooth[inside][:, None]).solution.flatten())
    if not slope > 0 or not shift < 0:
        return None
    width = 1 / slope  # high - low
    low = -shift * width
    return RopeScaling("llama3", factor, original, low_freq_factor=low, high_freq_factor=low + width)
