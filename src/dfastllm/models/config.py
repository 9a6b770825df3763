"""The shape of a decoder as frozen data. No torch, no checkpoint field names: those belong to the wirings."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from dfastllm.errors import ModelLoadError, ValidationError

__all__ = ["MOST_LAYERS", "DecoderConfig", "MoEConfig", "RopeScaling", "require_held"]


# Bounds far above any published model: a damaged or hostile config.json is refused before anything is allocated.
LARGEST = 2**31 - 1
MOST: dict[str, int] = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "heads": 1 << 14,
    "kv_heads": 1 << 14,
    "head_dim": 1 << 14,
    "max_len": LARGEST,
}
MOST_LAYERS = 1024
MOST_EXPERTS = 4096
MOST_EXPERTS_OF_ALL_LAYERS = 1 << 17


def _require(ok: bool, name: str, wanted: str, got: object) -> None:
    if not ok:
        raise ValidationError(f"{name} must be {wanted}, got {got!r:.200}.", param=name)


def require_held(config: DecoderConfig, held: int, where: str, files: str) -> None:
    """Raise ModelLoadError for a shape with more weights than `held` bytes can hold: no format has fewer than a bit a
    weight. where: what says the shape; files: what holds the bytes."""
    wanted = config.least_parameters()
    if wanted > 8 * held:
        sizes = f"hidden size {config.hidden_size}, {config.layers} layers, {config.heads} heads of {config.head_dim}"
        raise ModelLoadError(
            f"{where} describes {wanted:,} weights or more ({sizes}, vocabulary {config.vocab_size}); {files} has "
            f"{held:,} bytes.",
            hint="The description is damaged or of another model.",
        )


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Stretching of rotary frequencies beyond the trained length.

    kind linear: positions divided by `factor`. kind llama3: long wavelengths divided by `factor`, short ones kept,
    a smooth step between (Llama 3.1 release). kind yarn: Peng et al. 2023 (arXiv 2309.00071), NTK-by-parts between the
    rotations `beta_fast` and `beta_slow`, and cos, sin multiplied by `attention_factor` (None: 0.1 ln(factor) + 1).
    kind longrope: Ding et al. 2024 (arXiv 2402.13753), frequencies divided by `short`, or by `long` where the model's
    context is longer than it was trained for; attention_factor None: sqrt(1 + ln(factor) / ln(original_max_len)).
    """

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float
    original_max_len: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    short: tuple[float, ...] = ()  # [rotary dim / 2] each
    long: tuple[float, ...] = ()

    def stretched(self, max_len: int) -> int:
        """The context of a model whose file says max_len: yarn's recipe (Qwen's model cards) adds the scaling alone and
        leaves max_position_embeddings at the trained length, so the longer of the two counts, as in vLLM."""
        if self.kind != "yarn":
            return max_len
        return max(max_len, int(min(self.factor * self.original_max_len, LARGEST + 1)))

    def __post_init__(self) -> None:
        _require(self.factor > 0, "rope scaling factor", "greater than 0", self.factor)
        if self.kind != "linear":
            _require(self.original_max_len >= 1, "original_max_len", "at least 1", self.original_max_len)
        if self.kind == "llama3":
            ordered = 0 < self.low_freq_factor < self.high_freq_factor
            both = (self.low_freq_factor, self.high_freq_factor)
            _require(ordered, "low_freq_factor, high_freq_factor", "positive and ascending", both)
        if self.kind == "yarn":
            ordered = 0 < self.beta_slow < self.beta_fast
            _require(ordered, "beta_slow, beta_fast", "positive and ascending", (self.beta_slow, self.beta_fast))
        if self.kind == "longrope":
            sound = len(self.short) == len(self.long) and all(0 < f < math.inf for f in (*self.short, *self.long))
            _require(sound, "longrope factors", "two lists of positive numbers, of one length", (self.short, self.long))
            _require(self.original_max_len > 1, "original_max_len", "greater than 1", self.original_max_len)


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

    def __post_init__(self) -> None:
        _require(1 <= self.experts <= MOST_EXPERTS, "experts", f"in [1, {MOST_EXPERTS}]", self.experts)
        most = MOST["intermediate_size"]
        own, shared = self.intermediate_size, self.shared_size
        _require(1 <= own <= most, "expert intermediate size", f"in [1, {most}]", own)
        _require(0 <= shared <= most, "shared expert size", f"in [0, {most}]", shared)
        _require(1 <= self.groups_kept <= self.groups, "groups_kept", f"in [1, {self.groups}]", self.groups_kept)
        _require(self.experts % self.groups == 0, "experts", f"a multiple of {self.groups} groups", self.experts)
        reachable = self.experts // self.groups * self.groups_kept
        _require(1 <= self.top_k <= reachable, "top_k", f"in [1, {reachable}] (reachable experts)", self.top_k)


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Shape of a decoder and the numbers that its config.json gives: what a family's `program` is made of. `vocab_size`
    counts rows of the embedding and of the head. Raises ValidationError for a shape that no decoder can have.

    window: keys that a row of a windowed layer sees, itself counted; 0: none. windowed: which layers; empty: all.
    local_theta: of the rotary table of windowed layers, never scaled; 0: they use the other's.
    ropeless: which layers have no rotary positions; empty: none.
    attention_scale: of scores; 0: head_dim ** -0.5. attention_softcap, logits_softcap: c * tanh(x / c); 0: none.
    embed_factor, residual_factor, logits_factor: of the embedding's rows, of what layers add, of the logits.
    """

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
    tied: bool = False
    moe: MoEConfig | None = None
    window: int = 0
    windowed: tuple[bool, ...] = ()
    local_theta: float = 0.0
    ropeless: tuple[bool, ...] = ()
    attention_scale: float = 0.0
    attention_softcap: float = 0.0
    embed_factor: float = 1.0
    residual_factor: float = 1.0
    logits_factor: float = 1.0
    logits_softcap: float = 0.0

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            _require(1 <= getattr(self, name) <= most, name, f"in [1, {most}]", getattr(self, name))
        _require(1 <= self.layers <= MOST_LAYERS, "layers", f"in [1, {MOST_LAYERS}]", self.layers)
        _require(self.heads % self.kv_heads == 0, "heads", f"a multiple of kv_heads={self.kv_heads}", self.heads)
        wanted = f"even and in [2, head_dim={self.head_dim}]"
        _require(
            self.rotary_dim % 2 == 0 and 2 <= self.rotary_dim <= self.head_dim, "rope_dim", wanted, self.rotary_dim
        )
        _require(1 < self.rope_theta < math.inf, "rope_theta", "greater than 1 and finite", self.rope_theta)
        _require(0 < self.norm_eps < 1, "norm_eps", "in (0, 1)", self.norm_eps)
        marks = {"windowed": self.windowed, "ropeless": self.ropeless}
        if self.moe is not None:
            marks["moe.layers"] = self.moe.layers
        for name, layers in marks.items():
            _require(len(layers) in (0, self.layers), name, f"of length {self.layers}", layers)
        experts = self.moe.experts * self.layers if self.moe is not None else 0
        wanted = f"at most {MOST_EXPERTS_OF_ALL_LAYERS}"
        _require(experts <= MOST_EXPERTS_OF_ALL_LAYERS, "experts of all layers", wanted, experts)
        _require(0 <= self.window <= LARGEST, "window", f"in [1, {LARGEST}], or 0 for none", self.window)
        _require(self.local_theta == 0 or 1 < self.local_theta < math.inf, "local_theta", "above 1", self.local_theta)
        for name in ("attention_scale", "attention_softcap", "logits_softcap"):
            _require(0 <= getattr(self, name) < math.inf, name, "at least 0 and finite", getattr(self, name))
        for name in ("embed_factor", "residual_factor", "logits_factor"):
            _require(0 < getattr(self, name) < math.inf, name, "greater than 0 and finite", getattr(self, name))
        if self.rope_scaling is not None and self.rope_scaling.kind == "longrope":
            factors, half = len(self.rope_scaling.short), self.rotary_dim // 2
            _require(factors == half, "longrope factors", f"of length {half}", factors)

    def within(self, max_len: int | None) -> DecoderConfig:
        """The same for a context of at most this length. None: the model's own."""
        return self if max_len is None or max_len >= self.max_len else replace(self, max_len=max_len)

    def least_parameters(self) -> int:
        """A number of weights that every wiring of this shape has at least: the embedding, q projections, one matrix of
        each MLP."""
        mixtures = sum(self.is_mixture(layer) for layer in range(self.layers))
        rows = self.vocab_size + self.layers * self.heads * self.head_dim
        rows += (self.layers - mixtures) * self.intermediate_size
        if self.moe is not None:
            rows += mixtures * self.moe.experts * self.moe.intermediate_size
        return rows * self.hidden_size

    @property
    def rotary_dim(self) -> int:
        return self.rope_dim or self.head_dim

    def is_mixture(self, layer: int) -> bool:
        """Whether this layer's MLP is a mixture of experts."""
        return self.moe is not None and (not self.moe.layers or self.moe.layers[layer])

    def is_windowed(self, layer: int) -> bool:
        """Whether this layer's rows see only the last `window` keys."""
        return self.window > 0 and (not self.windowed or self.windowed[layer])

    def rotates(self, layer: int) -> bool:
        """Whether this layer has rotary positions."""
        return not self.ropeless or not self.ropeless[layer]
