"""The decoder: embedding, layers, final norm, head. One module tree for every wiring, made of its program.

It never knows what it serves: rows meet only in `attend`, which the caller gives. No cache, no mask, no sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfastllm.core import ModelInfo
from dfastllm.models.config import DecoderConfig
from dfastllm.models.family import find_family
from dfastllm.models.mixture import Mixture
from dfastllm.models.parts import ACTIVATIONS, Adapt, AttendFunction, Projection, RMSNorm, Rotary, rotate, softcapped
from dfastllm.models.program import Add, Attend, Experts, Gate, HeadNorm, Linear, Norm, Op, Rope

__all__ = ["Decoder", "Layer"]

Angles = Sequence[tuple[Tensor, Tensor]]  # cos, sin of every rotary table of the program


def _modules(op: Op) -> Iterator[tuple[str, nn.Module]]:
    """(name in its layer, module) of what an op has weights for."""
    match op:
        case Norm():
            yield op.name, RMSNorm(op.size, op.eps, op.offset)
        case Linear():
            for m in op.matrices:
                yield m.name, Projection(m.inputs, sum(m.outputs), bias=m.bias)
        case HeadNorm():
            yield from (*_modules(op.q), *_modules(op.k))
        case Experts():
            yield op.name, Mixture(op.hidden, op.config)


class Layer(nn.Module):
    """One layer's ops over the stream and its branches."""

    def __init__(self, ops: Sequence[Op], index: int) -> None:
        super().__init__()
        self.ops = tuple(ops)
        self.index = index
        for op in self.ops:
            for name, module in _modules(op):
                parent: nn.Module = self
                *path, leaf = name.split(".")
                for step in path:
                    if not hasattr(parent, step):
                        parent.add_module(step, nn.Module())
                    parent = getattr(parent, step)
                parent.add_module(leaf, module)

    def forward(self, x: Tensor, angles: Angles, attend: AttendFunction, adapt: Adapt | None = None) -> Tensor:
        """x [tokens, hidden] -> the same; a branch is one tensor, or several parts side by side (q, k, v)."""
        h: tuple[Tensor, ...] = (x,)
        at = self.get_submodule

        def linear(name: str, inputs: Tensor) -> Tensor:
            out: Tensor = at(name)(inputs)
            return out if adapt is None else adapt(f"layers.{self.index}.{name}", inputs, out)

        for op in self.ops:
            match op:
                case Norm():
                    h = (at(op.name)(h[0]),)
                case Linear():
                    h = tuple(
                        part for m in op.matrices for part in torch.split(linear(m.name, h[0]), list(m.outputs), dim=-1)
                    )
                case HeadNorm():
                    pairs = zip((op.q, op.k), h[:2], strict=True)
                    q, k = (at(n.name)(part.reshape(len(x), -1, n.size)).flatten(1) for n, part in pairs)
                    h = (q, k, *h[2:])
                case Rope():
                    q, k = (rotate(part.reshape(len(x), -1, op.dim), *angles[op.table]).flatten(1) for part in h[:2])
                    h = (q, k, *h[2:])
                case Attend():
                    q, k, v = (part.reshape(len(x), -1, op.dim) for part in h)
                    h = (attend(self.index, op, q, k, v).reshape(len(x), -1),)
                case Gate():
                    h = (ACTIVATIONS[op.activation](h[0]) * h[1],)
                case Experts():
                    h = (at(op.name)(h[0], adapt, f"layers.{self.index}.{op.name}"),)
                case Add():
                    x = x + (h[0] if op.factor == 1 else h[0] * op.factor)
                    h = (x,)
        return x


class Decoder(nn.Module):
    """A built model. Differentiable; training and serving share it. Made by `checkpoint.load` or `checkpoint.build`: on
    its own its weights are uninitialised memory.

    info: what it can do (ids, kind, shift ...); config: its shape; program: its wiring, by the family of `info`.
    `lm_head` is None when the head is tied to the embedding: the embedding's matrix is then used for both.
    """

    def __init__(self, config: DecoderConfig, info: ModelInfo) -> None:
        super().__init__()
        self.config = config
        self.info = info
        self.seed: int | None = None  # of random weights
        self.program = find_family(info.family).program(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary = nn.ModuleList(Rotary(table) for table in self.program.ropes)
        self.layers = nn.ModuleList(Layer(ops, i) for i, ops in enumerate(self.program.layers))
        norm = self.program.norm
        self.norm = RMSNorm(norm.size, norm.eps, norm.offset)
        self.lm_head = None if config.tied else Projection(config.hidden_size, config.vocab_size, bias=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def angles(self, positions: Tensor) -> Angles:
        """positions [tokens] int64 -> cos, sin [tokens, 1, rotary dim / 2] float32 of each table of the program."""
        return [table(positions) for table in self.rotary]

    def embedded(self, ids: Tensor, adapt: Adapt | None = None) -> Tensor:
        """ids [tokens] int64 -> the stream as the first layer gets it [tokens, hidden]."""
        x: Tensor = self.embed(ids)
        if adapt is not None:
            x = adapt.embed(ids, x)
        return x if self.program.embed_factor == 1 else x * self.program.embed_factor

    def forward(self, ids: Tensor, positions: Tensor, attend: AttendFunction, adapt: Adapt | None = None) -> Tensor:
        """ids, positions [tokens] int64 -> hidden [tokens, hidden] in the model's dtype, after the final norm. adapt:
        what adapters of the rows make of it."""
        x, angles = self.embedded(ids, adapt), self.angles(positions)
        for layer in self.layers:
            x = layer(x, angles, attend, adapt)
        return self.norm(x)  # type: ignore[no-any-return]

    def head(self, hidden: Tensor, adapt: Adapt | None = None, rows: Tensor | None = None) -> Tensor:
        """hidden [rows, hidden] (rows of `forward`; which ones, adapters are told) -> logits [rows, vocab] in the
        model's dtype."""
        logits = F.linear(hidden, self.embed.weight) if self.lm_head is None else self.lm_head(hidden)
        if adapt is not None and rows is not None:
            logits = adapt.head(hidden, logits, rows)
        if self.program.logits_factor != 1:
            logits = logits * self.program.logits_factor
        return softcapped(logits, self.program.logits_softcap)
