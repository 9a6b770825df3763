"""Real shapes with random weights, and what a forward of them costs in weight bytes and floating-point operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dfastllm.errors import ValidationError

if TYPE_CHECKING:
    from dfastllm.core import ModelInfo
    from dfastllm.models import DecoderConfig

__all__ = ["SHAPES", "Shape", "find_shape"]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder. family: of dfastllm.models. experts: of each layer, `chosen` of them for a row, each of width
    `inner`; 0: none."""

    name: str
    family: Literal["qwen2", "llada", "qwen3_moe"]
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int
    tied: bool
    theta: float
    experts: int = 0
    chosen: int = 0

    def read(self, experts: float) -> float:
        """Weights of the layers' matrices, of so many experts of each."""
        kv = self.hidden // self.heads * self.kv_heads
        mlp = self.experts + 3 * self.inner * experts if self.experts else 3 * self.inner
        return self.layers * self.hidden * (2 * self.hidden + 2 * kv + mlp)

    @property
    def body(self) -> int:
        """Weights of the layers' matrices."""
        return round(self.read(self.experts))

    def busy(self, rows: int) -> float:
        """Experts of a layer that `rows` rows are expected to choose, were the choices of rows independent and even."""
        return self.experts * (1 - (1 - self.chosen / self.experts) ** rows) if self.experts else 0

    @property
    def head(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        return self.body + self.head * (1 if self.tied else 2)

    def flops(self, rows: int, head_rows: int, keys: int) -> int:
        """Of one forward: two per weight and row (the head's for head_rows) and four per row, key and channel."""
        active = round(self.read(self.chosen))
        return 2 * active * rows + 2 * self.head * head_rows + 4 * self.layers * self.hidden * rows * keys

    def streamed(self, file_bytes: int, rows: int = 1) -> int:
        """Weight bytes one forward of so many rows reads of a checkpoint of `file_bytes`: all of a tied one; the
        embedding of an untied one is looked up, not read; of experts those that are expected to be chosen."""
        return round(file_bytes * (self.read(self.busy(rows)) + self.head) / self.parameters)

    def published(self) -> dict[str, Any]:
        """config.json fields as Hugging Face spells them."""
        experts = {
            "num_experts": self.experts,
            "num_experts_per_tok": self.chosen,
            "moe_intermediate_size": self.inner,
        }
        return {
            **(experts if self.experts else {}),
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.inner,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 4096,
            "rope_theta": self.theta,
            "rms_norm_eps": 1e-6,
        }

    def own(self) -> tuple[DecoderConfig, ModelInfo]:
        """Config and capabilities for dfastllm.models; EOS and mask are the last ids of the vocabulary."""
        from dfastllm.models import DecoderConfig, MoEConfig
        from dfastllm.models.family import Ids, describe

        config = DecoderConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.hidden // self.heads,
            max_len=4096,
            rope_theta=self.theta,
            qkv_bias=self.family == "qwen2",
            tied=self.tied,
            qk_norm=self.experts > 0,
            moe=MoEConfig(self.experts, self.chosen, self.inner, normalise=True) if self.experts else None,
        )
        mask = self.vocab - 1 if self.family == "llada" else None
        return config, describe(self.family, config, Ids(eos=(self.vocab - 2,), mask=mask), name=self.name)


SHAPES: Mapping[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("qwen2.5-0.5b", "qwen2", 896, 24, 14, 2, 4864, 151936, True, 1e6),
        Shape("qwen2.5-1.5b", "qwen2", 1536, 28, 12, 2, 8960, 151936, True, 1e6),
        # LLaDA-8B's proportions (multi-head attention, MLP three times as wide, untied head) at other widths.
        Shape("llada-0.5b", "llada", 1024, 18, 16, 16, 3072, 126464, False, 5e5),
        Shape("llada-1b", "llada", 1536, 20, 12, 12, 4608, 126464, False, 5e5),
        # 4 of the 16 layers of a mixture of 7 billion weights of which 1 is active, the sizes of OLMoE's experts.
        Shape("moe-a1b-4l", "qwen3_moe", 2048, 4, 16, 4, 1024, 50304, False, 1e6, experts=64, chosen=8),
    )
}


def find_shape(name: str, family: str | None = None) -> Shape:
    """By name, of `family` if given. Raises ValidationError naming the shapes there are."""
    known = [s.name for s in SHAPES.values() if family in (None, s.family)]
    if name not in known:
        raise ValidationError(f"unknown shape {name!r}; known: {', '.join(known)}.", param="shape")
    return SHAPES[name]
