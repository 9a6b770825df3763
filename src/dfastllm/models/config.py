"""The shape of a decoder as frozen data. No torch, no checkpoint field names: those belong to the wirings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dfastllm.errors import ValidationError

__all__ = ["DecoderConfig", "MoEConfig", "RopeScaling"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Stretching of rotary frequencies beyond the trained length.

    kind linear: positions divided by `factor`. kind llama3: long wavelengths divided by `factor`, short ones kept,
    a smooth step between (Llama 3.1 release). kind yarn: Peng et al. 2023 (arXiv 2309.00071), NTK-by-parts between the
    rotations `beta_fast` and `beta_slow`, and cos, sin multiplied by `attention_factor` (None: 0.1 ln(factor) + 1).
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_len: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """Mixture of experts. Layers below `first_dense` and those with `layers[i]` False keep a dense MLP.

    router softmax: probabilities over all experts, the `top_k` best; `normalise` rescales them to sum to 1.
    router sigmoid: float32 sigmoid scores; selection by score + bias inside the `groups_kept` best of `groups` groups
    (a group scores the sum of its two best); weights are the unbiased scores of the selected, normalised, times
    `scale`.
    """

    experts: int
    top_k: int
    intermediate_size: int
    router: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = False
    scale: float = 1.0
    groups: int = 1
    groups_kept: int = 1
    shared_size: int = 0  # hidden width of the shared expert, 0: none
    layers: tuple[bool, ...] = ()  # which layers are mixtures; empty: all


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Shape of a decoder. `vocab_size` counts rows of the embedding and of the head."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_len: int
    rope_theta: float = 10000.0
    rope_dim: int = 0  # leading dims of a head that rotate; 0: all of them
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    fused_qkv: bool = False
    tied: bool = False
    moe: MoEConfig | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "head_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValidationError(f"{name} must be an integer of at least 1, got {value!r}.", param=name)
        if self.max_len < 1:
            raise ValidationError(f"max_len must be at least 1, got {self.max_len}.", param="max_len")
        if self.heads % self.kv_heads:
            raise ValidationError(
                f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}.", param="kv_heads"
            )
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValidationError(
                f"rotary dims must be even and at most head_dim={self.head_dim}, got {self.rotary_dim}.",
                param="rope_dim",
            )

    @property
    def rotary_dim(self) -> int:
        return self.rope_dim or self.head_dim

    def is_mixture(self, layer: int) -> bool:
        """Whether this layer's MLP is a mixture of experts."""
        return self.moe is not None and (not self.moe.layers or self.moe.layers[layer])
