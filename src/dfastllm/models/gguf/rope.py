"""Rotary scaling between DecoderConfig and GGUF: metadata for linear and yarn, the tensor rope_freqs.weight for llama3,
rope_factors_short.weight and rope_factors_long.weight for longrope.

llama.cpp divides frequency i by rope_freqs[i]. Llama 3's rule makes these factors from four numbers; read back, they
are tried by the published numbers, and factors that those do not make are held as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
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


def read_scaling(
    fields: Fields, arch: str, max_len: int, theta: float, factors: Mapping[str, Tensor]
) -> RopeScaling | None:
    """From `arch`.rope.scaling.* and the tensors of factors, by name. Raises ModelLoadError for more than one scaling,
    and as the parts do."""
    original = fields.get(f"{arch}.rope.scaling.original_context_length", int, max_len)
    if factors.keys() & {"rope_factors_long", "rope_factors_short"}:
        return _longrope(fields, arch, max_len, original, factors)
    said = _said(fields, arch, original)
    fitted = scaling_from_factors(factors["rope_freqs"], theta, original) if factors else None
    if said is not None and fitted is not None:
        raise ModelLoadError(f"{fields.where}: both rope_freqs.weight and {said.kind} scaling; one is supported.")
    return said or fitted


def _longrope(fields: Fields, arch: str, max_len: int, original: int, factors: Mapping[str, Tensor]) -> RopeScaling:
    """llama.cpp's converters say the factor on cos and sin, and leave the kind of scaling unsaid. Raises
    CheckpointError where one of the two tensors is missing, ModelLoadError for another kind or factors beside them."""
    prefix = f"{arch}.rope.scaling"
    fields.only(**{f"{prefix}.type": ("longrope", "none", "linear"), f"{prefix}.factor": (0.0, 1.0)})
    if factors.keys() != {"rope_factors_long", "rope_factors_short"}:
        raise CheckpointError(
            f"{fields.where}: longrope needs rope_factors_long.weight and rope_factors_short.weight, and no other "
            f"rotary factors; the file has {', '.join(sorted(factors))}."
        )
    # The shortest decimals of these float32, as metadata is read.
    short, long = (
        tuple(float(str(value)) for value in factors[f"rope_factors_{name}"].numpy()) for name in ("short", "long")
    )
    scaling = RopeScaling("longrope", max_len / max(original, 1), original, short=short, long=long)
    said = fields.get(f"{prefix}.attn_factor", float, 1.0)
    return scaling if abs(said - on_angles(scaling)) <= CLOSE / 100 else replace(scaling, attention_factor=said)


def on_angles(scaling: RopeScaling) -> float:
    """The factor on cos and sin."""
    return inverse_frequencies(RopeTable(2.0, 2 * len(scaling.short), scaling))[1]


def _said(fields: Fields, arch: str, original: int) -> RopeScaling | None:
    """Raises ModelLoadError for a kind other than none, linear, yarn, and for settings of yarn that this decoder does
    not compute."""
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
    if scaling is None or scaling.kind == "llama3":  # which is a tensor
        return {}
    if scaling.kind == "longrope":  # two tensors, and what llama.cpp's converters write beside them
        return {
            f"{prefix}.original_context_length": scaling.original_max_len,
            f"{prefix}.attn_factor": on_angles(scaling),
        }
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


def factors_of(config: DecoderConfig) -> dict[str, Tensor]:
    """Name -> factors [rotary_dim / 2] of a scaling that llama.cpp holds in tensors; of others none."""
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "longrope":
        pairs = {"long": scaling.long, "short": scaling.short}
        return {f"rope_factors_{name}": torch.tensor(values) for name, values in pairs.items()}
    if scaling is None or scaling.kind != "llama3":
        return {}
    return {"rope_freqs": _factors(config.rotary_dim, config.rope_theta, scaling)}


def _factors(dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    plain, _ = inverse_frequencies(RopeTable(theta, dim))
    return plain / inverse_frequencies(RopeTable(theta, dim, scaling))[0]


def scaling_from_factors(factors: Tensor, theta: float, original: int) -> RopeScaling | None:
    """The llama3 scaling whose factors are these, by the published numbers; else one that holds the factors as they are
    (of kind longrope, whatever the context). None when all are 1. Raises ValidationError for factors that are not
    positive numbers.

    original: the trained length, if known.
    """
    if bool((factors - 1).abs().max() <= CLOSE):
        return None
    factor = float(factors.max())
    for length in (original, 8192) if factor > 0 else ():
        scaling = RopeScaling("llama3", factor, length, 1.0, 4.0)
        made = _factors(2 * len(factors), theta, scaling)
        if bool(((made - factors).abs() <= CLOSE * factors.abs()).all()):
            return scaling
    held = tuple(factors.tolist())
    return RopeScaling("longrope", 1.0, max(original, 2), attention_factor=1.0, short=held, long=held)
