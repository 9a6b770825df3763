"""An adapter: what a request adds to the base model's matrices, immutable, known by the hash of its content.

LoRA (Hu et al. 2021, arXiv 2106.09685) writes a change of a matrix W [out, in] as scale * B A of low rank; DoRA (Liu et
al. 2024, arXiv 2402.09353) scales the rows of W + scale * B A beside it. Both, and trained biases, are one rule:

    y = factor * (W x + bias + scale * B (A x)) + shift

The base itself is never changed, so rows of any adapters and of none share a forward pass.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dfastllm.core import value
from dfastllm.kernels.hugepages import Memory, aligned_size
from dfastllm.kernels.low_rank import pack_outputs, unpack_outputs

__all__ = ["EMBED", "HEAD", "Adapter", "Delta"]

EMBED, HEAD = "embed", "lm_head"  # own names of the two matrices that lie outside the layers


@value(frozen=True, slots=True)
class Delta:
    """What an adapter does to one matrix [out, in] of the base: the rule at the top of this file.

    a       float32, bfloat16 or float16 [rank, in], contiguous; None: no low-rank part. Of the embedding, `in` is the
            vocabulary, and A x is the column of the id.
    b       the same dtype, the published B as `kernels.low_rank.pack_outputs` lays it out: [ceil(out / 32), rank, 32].
    outputs  `out`, where there is a low-rank part, else 0.
    scale   of the low-rank part.
    factor  float32 [out], None: 1. DoRA's magnitude divided by the row norms of W + scale * B A.
    shift   float32 [out], None: 0. What takes the place of the base's bias, less `factor` times that one.
    full    [vocabulary, hidden] in a dtype of `a`, None: the base's own. Takes the place of W; of the embedding and the
            head alone. It may have fewer rows than the base, never more.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    outputs: int = 0
    scale: float = 1.0
    factor: Tensor | None = None
    shift: Tensor | None = None
    full: Tensor | None = None

    @classmethod
    def of(
        cls,
        a: Tensor | None,
        b: Tensor | None,
        scale: float = 1.0,
        factor: Tensor | None = None,
        shift: Tensor | None = None,
        full: Tensor | None = None,
    ) -> Delta:
        """A delta of a [rank, in] and b [rank, out], any strides, both or none."""
        if a is None or b is None:
            return cls(None, None, 0, scale, factor, shift, full)
        return cls(a.contiguous(), pack_outputs(b), b.shape[1], scale, factor, shift, full)

    @property
    def natural_b(self) -> Tensor | None:
        """[rank, out]."""
        return None if self.b is None else unpack_outputs(self.b, self.outputs)

    @property
    def rank(self) -> int:
        return 0 if self.a is None else len(self.a)

    @property
    def tensors(self) -> tuple[tuple[str, Tensor], ...]:
        """(name, tensor) of those there are, in a fixed order."""
        named = (("a", self.a), ("b", self.b), ("factor", self.factor), ("shift", self.shift), ("full", self.full))
        return tuple((name, tensor) for name, tensor in named if tensor is not None)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self.tensors)

    def moved(self, to: Callable[[Tensor], Tensor]) -> Delta:
        """The same with `to` of each tensor."""
        changed: dict[str, Any] = {name: to(tensor) for name, tensor in self.tensors}
        return dataclasses.replace(self, **changed)


@value(frozen=True, slots=True)
class Adapter:
    """One adapter of one base model. Two of the same hash compute the same; nobody writes its tensors.

    hash    16 bytes: BLAKE2b of what every delta holds, under its name.
    deltas  own matrix name without ".weight" ("layers.3.attn.q_proj", "embed", "lm_head") -> its delta.
    rank    the largest of its deltas.
    bytes   of all its tensors.
    notes   what a person should know of how it was read, a sentence each.
    """

    hash: bytes
    deltas: Mapping[str, Delta]
    rank: int
    bytes: int
    notes: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def of(cls, deltas: Mapping[str, Delta], notes: tuple[str, ...] = ()) -> Adapter:
        """An adapter of these deltas, whose hash, rank and bytes follow; its tensors in one memory of huge pages."""
        memory = Memory(sum(aligned_size(tensor) for delta in deltas.values() for _, tensor in delta.tensors))
        deltas = {name: delta.moved(memory.put) for name, delta in deltas.items()}
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(deltas):
            delta = deltas[name]
            digest.update(f"{name}\0{delta.outputs}\0{delta.scale.hex()}\0".encode())
            for part, tensor in delta.tensors:
                digest.update(f"{part}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
                digest.update(tensor.view(torch.uint8).numpy().data)
        return cls(
            digest.digest(),
            MappingProxyType(deltas),
            max((delta.rank for delta in deltas.values()), default=0),
            sum(delta.nbytes for delta in deltas.values()),
            notes,
        )
