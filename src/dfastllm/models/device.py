"""The decoder on a device: the packed decoder's ops over weights that lie on a GPU, walked op by op.

Ops come from a table (`kernels.triton.ops`), so the same walk (`models.device_walk`) runs on Triton's kernels, inside a
graph, and on their plain twins.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dfastllm.core import ModelInfo
from dfastllm.kernels.halt import Halt
from dfastllm.kernels.packed import FORMS, Packed, QTensor
from dfastllm.kernels.triton.weight import FLOATS, kind_of, natural, one_of, pack, stack
from dfastllm.models.basis import Basis
from dfastllm.models.config import DecoderConfig
from dfastllm.models.device_walk import DeviceOp, Mixture, Walk
from dfastllm.models.pack import Packing, pack_parts
from dfastllm.models.packed import (
    Gated,
    PackedOp,
    Project,
    Routed,
    ScaledNorm,
    Weights,
)
from dfastllm.models.parts import inverse_frequencies, softcapped
from dfastllm.models.program import Program

if TYPE_CHECKING:
    from dfastllm.kernels.triton.kv import DeviceKv
    from dfastllm.kernels.triton.laid import Laid
    from dfastllm.kernels.triton.ops import Ops
    from dfastllm.models.adapted import AdaptedRows

__all__ = ["DeviceDecoder", "Mixture", "device_decoder", "held_value"]


@dataclass(eq=False)
class DeviceDecoder:
    """A model ready to serve on a device. Made by `device_decoder`. Fields as of `PackedDecoder`; its tensors lie on
    `device`. dtype: of activations, and so the default of the K,V pages. invariant: a row's bits do not depend on the
    rows beside it; so it is by itself where all matrices have an integer format and there is no mixture, whose router
    is a product of floats."""

    config: DecoderConfig
    info: ModelInfo
    program: Program
    dtype: torch.dtype
    device: torch.device
    embed: Packed
    norm: ScaledNorm
    layers: tuple[tuple[DeviceOp, ...], ...]
    head: Packed | None = None
    notes: list[str] = field(default_factory=list)
    seed: int | None = None
    shortlist: Tensor | None = None
    basis: Basis | None = None
    gains: dict[str, Tensor] = field(default_factory=dict, repr=False)
    invariant: bool = False

    def __post_init__(self) -> None:
        tables = (inverse_frequencies(table) for table in self.program.ropes)
        self._ropes = [(frequencies.to(self.device), factor) for frequencies, factor in tables]
        exact = all(form in FORMS and FORMS[form].quantised for form in self.formats)
        self.invariant = self.invariant or (exact and self.config.moe is None)

    @property
    def head_weights(self) -> Packed:
        return self.head or self.embed

    def _weights(self) -> Iterable[Packed]:
        yield self.embed
        if self.head is not None:
            yield self.head
        for op in (op for layer in self.layers for op in layer):
            match op:
                case Project():
                    yield from (w.packed for w in op.weights)
                case Gated():
                    yield op.weights.packed
                case Mixture():
                    yield from (op.gated, op.down)
                    if op.routed.shared is not None:
                        yield from (op.routed.shared.gated.packed, op.routed.shared.down.packed)

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices."""
        return sum(weight.nbytes for weight in self._weights())

    @property
    def formats(self) -> dict[str, int]:
        """Format -> how many matrices are held in it."""
        found = [weight.format for weight in self._weights()]
        return {name: found.count(name) for name in sorted(set(found))}

    def angles(self, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """positions int32 [rows] -> cos, sin float32 [rows, half] of each table of the program."""
        found = []
        for frequencies, factor in self._ropes:
            angles = positions.float()[:, None] * frequencies
            found.append((angles.cos() * factor, angles.sin() * factor))
        return found

    def forward(
        self, laid: Laid, kv: DeviceKv, ops: Ops, adapt: AdaptedRows | None = None, halt: Halt | None = None
    ) -> Tensor:
        """Hidden float32 [wanted, hidden] after the final norm; writes K, V of rows with a slot. Raises Interrupted
        where `halt` was asked to give it up."""
        return Walk(self, laid, kv, ops, adapt, halt).run()

    def logits(self, hidden: Tensor, ops: Ops, adapt: AdaptedRows | None = None, rows: Tensor | None = None) -> Tensor:
        """hidden float32 [rows, hidden] of `forward` -> float32 [rows, tokens of the head]. rows: int64 [rows], which
        rows of the forward they are, for adapters."""
        head = self.head_weights
        acts = ops.prepare(hidden, kind_of(head.format))
        logits: Tensor = ops.linear(acts, head, out=torch.float32, invariant=self.invariant)
        if adapt is None or rows is None:
            return softcapped(logits, self.program.logits_softcap)
        logits = softcapped(adapt.head(hidden, logits, rows), self.program.logits_softcap)
        return adapt.never(logits, rows)

    def head_stats(
        self, hidden: Tensor, ops: Ops, *, ban: Tensor, barred: Tensor | None, which: Tensor | None, top: int
    ) -> Tensor:
        """Statistics of the rows' logits as `ops.head_stats` gives them."""
        head = self.head_weights
        found: Tensor = ops.head_stats(
            ops.prepare(hidden, kind_of(head.format)),
            head,
            cap=self.program.logits_softcap,
            ban=ban,
            barred=barred,
            which=which,
            top=top,
            invariant=self.invariant,
        )
        return found


def device_decoder(
    config: DecoderConfig,
    info: ModelInfo,
    parts: Iterable[tuple[str, QTensor | Tensor]],
    dtype: torch.dtype,
    device: torch.device,
    *,
    fp8: bool = False,
    notes: list[str] | None = None,
    shortlist: Tensor | None = None,
    basis: Basis | None = None,
    invariant: bool = False,
) -> DeviceDecoder:
    """Build on a device from a stream of (parameter name as in `Decoder`, matrix or vector), see `pack_decoder`. dtype:
    of floating-point matrices and of activations; fp8: floating-point matrices of the layers become float8_e4m3fn,
    embedding and head stay.

    Raises CheckpointError as `pack_decoder` does.
    """
    packing = Packing(
        pack=lambda matrix: pack(matrix, device, dtype, fp8=fp8),
        outer=lambda matrix: pack(matrix, device, dtype),
        natural=natural,
        kind=kind_of,
        alike=lambda block: tuple((w.packed.format, w.packed.mins is None) for w in (block.gated, block.down)),
        interleaved=False,
        vector=lambda value: value.float().to(device),
        settle=_settled,
    )
    made = pack_parts(config, info, parts, packing, shortlist=shortlist, basis=basis)
    return DeviceDecoder(
        config=made.config,
        info=info,
        program=made.program,
        dtype=dtype,
        device=device,
        embed=made.embed,
        norm=made.norm,
        layers=made.layers,
        head=made.head,
        notes=notes or [],
        shortlist=shortlist,
        basis=basis,
        gains=made.gains,
        invariant=invariant,
    )


def _settled(ops: tuple[PackedOp, ...]) -> tuple[DeviceOp, ...]:
    """A layer's ops: the experts of a mixture stacked, a gate's products of the kind that the next linear reads."""
    out: list[DeviceOp] = []
    for op, after in zip(ops, (*ops[1:], None), strict=True):
        match op, after:
            case Routed(), _:
                out.append(_stacked(op))
            case Gated(), Project():
                kind = kind_of(after.weights[0].packed.format)
                out.append(replace(op, kind=kind, weights=_with_bias(op.weights)))
            case Project(), _:
                out.append(replace(op, weights=tuple(_with_bias(weights) for weights in op.weights)))
            case _:
                out.append(op)
    return tuple(out)


def _with_bias(weights: Weights) -> Weights:
    """The bias beside a matrix of floats in their dtype: so the product adds it itself."""
    dtype = weights.packed.data.dtype
    if weights.bias is None or weights.packed.format not in FLOATS.values():
        return weights
    return replace(weights, bias=weights.bias.to(dtype))


def _stacked(op: Routed) -> Mixture:
    gated = stack([block.gated.packed for block in op.experts])
    down = stack([block.down.packed for block in op.experts])
    return Mixture(replace(op, experts=()), gated, down, op.experts[0].block)


def held_value(model: DeviceDecoder, own: str) -> Tensor:
    """A matrix or bias by its own name, float32 on the CPU, as it is held. Raises KeyError."""
    module, _, leaf = own.rpartition(".")
    if module in ("embed", "lm_head"):
        return natural(model.embed if module == "embed" else model.head_weights).dequantise().cpu()
    for i, layer in enumerate(model.layers):
        prefix = f"layers.{i}."
        if not module.startswith(prefix):
            continue
        inner = module.removeprefix(prefix)
        for op in layer:
            if isinstance(op, Mixture) and inner.startswith(f"{op.routed.source.name}."):
                return _of_mixture(op, inner.removeprefix(f"{op.routed.source.name}."), leaf).cpu()
            if isinstance(op, Project | Gated):
                found = _of_linear(op, inner, leaf)
                if found is not None:
                    return found.cpu()
    raise KeyError(own)


def _of_linear(op: Project | Gated, name: str, leaf: str) -> Tensor | None:
    """A matrix or bias of an op's matrices, None: it is not among them."""
    every = op.weights if isinstance(op, Project) else (op.weights,)
    column = 0
    for matrix in op.source.matrices:
        size = sum(matrix.outputs)
        if matrix.name == name:
            if leaf == "bias":
                device = every[0].packed.data.device
                parts = [torch.zeros(w.packed.n, device=device) if w.bias is None else w.bias for w in every]
            else:
                parts = [natural(w.packed).dequantise() for w in every]
            return torch.cat([part.float() for part in parts])[column : column + size]
        column += size
    return None


def _of_mixture(op: Mixture, name: str, leaf: str) -> Tensor:
    """router, experts.N.gate_proj, shared.down_proj and so on."""
    if name == "router":
        assert leaf == "weight"
        return op.routed.router.float()
    where, _, part = name.rpartition(".")
    if where == "shared":
        assert op.routed.shared is not None
        gated, down = op.routed.shared.gated.packed, op.routed.shared.down.packed
    else:
        number = int(where.removeprefix("experts."))
        gated, down = one_of(op.gated, number), one_of(op.down, number)
    if part == "down_proj":
        return natural(down).dequantise()
    first, up = natural(gated).dequantise().chunk(2)
    return first if part == "gate_proj" else up
