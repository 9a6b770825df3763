"""The shapes that are measured: real models' sizes with random weights."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["SHAPES", "Shape"]


class Shape(NamedTuple):
    """family: of our models. The rest are sizes; tied: the head is the embedding."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    dim: int
    inner: int
    vocab: int
    tied: bool = False

    @property
    def layer_weights(self) -> int:
        """Weights of the layers' matrices."""
        qkv = (self.heads + 2 * self.kv_heads) * self.dim
        return self.layers * self.hidden * (qkv + self.heads * self.dim + 3 * self.inner)

    @property
    def head_weights(self) -> int:
        return self.vocab * self.hidden


SHAPES = {
    "qwen2-0.5b": Shape("qwen2", 896, 24, 14, 2, 64, 4864, 151936, tied=True),
    "qwen2-7b": Shape("qwen2", 3584, 28, 28, 4, 128, 18944, 152064),
    "llada-8b": Shape("llada", 4096, 32, 32, 32, 128, 12288, 126464),
    "sdar-4b": Shape("sdar", 2560, 36, 32, 8, 128, 9728, 151936),
    "tiny": Shape("qwen2", 64, 2, 4, 2, 16, 128, 512),
}
