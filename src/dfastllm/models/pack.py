"""From a stream of parameters to a packed decoder: each layer's ops are joined and packed as soon as its weights are
there, and an expert as soon as its three matrices are, so that no more than about one layer is held in both forms.

What a matrix is packed into is a `Packing`: panels for the kernels of a CPU, or what `models.device` makes of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dfastllm.core import ModelInfo
from dfastllm.errors import CheckpointError
from dfastllm.kernels import linear
from dfastllm.kernels.activations import act_kind
from dfastllm.kernels.packed import PANEL, Packed, QTensor, unpack_panels
from dfastllm.models.basis import Basis
from dfastllm.models.config import DecoderConfig
from dfastllm.models.decoder import Decoder
from dfastllm.models.family import find_family
from dfastllm.models.packed import (
    FeedForward,
    Gated,
    Mix,
    Normalise,
    PackedDecoder,
    PackedOp,
    Project,
    Routed,
    ScaledNorm,
    Sum,
    Weights,
)
from dfastllm.models.program import Add, Attend, Experts, Gate, HeadNorm, Linear, Matrix, Norm, Op, Program, Rope

__all__ = ["PANELS", "Packing", "Parts", "pack_decoder", "pack_parts"]

EXPERT = re.compile(r"(.*\.(?:experts\.\d+|shared))\.(?:gate|up|down)_proj\.weight$")
HALF = PANEL // 2  # a panel of gate and up holds so many channels of each
Value = QTensor | Tensor
Ops = tuple[PackedOp, ...]


@dataclass(frozen=True, slots=True)
class Packing:
    """What matrices become.

    pack         a matrix of a layer as the kernels read it; natural: the inverse; outer: the embedding and the head.
    kind         how a format wants its input rows.
    alike        what must be the same of all experts of a mixture; where it is not, they become floats.
    interleaved  gate and up lie in a matrix by 32 channels in turn, padded to whole panels; else one after the other.
    vector       a norm, bias or router, float32, where the kernels read it.
    settle       a layer's ops once they are packed.
    """

    pack: Callable[[QTensor], Packed]
    outer: Callable[[QTensor], Packed]
    natural: Callable[[Packed], QTensor]
    kind: Callable[[str], str]
    alike: Callable[[FeedForward], Hashable]
    interleaved: bool
    vector: Callable[[Tensor], Tensor] = lambda value: value
    settle: Callable[[Ops], tuple[Any, ...]] = lambda ops: ops


PANELS = Packing(linear.pack, linear.pack, unpack_panels, act_kind, lambda block: block.kinds, True)


@dataclass(eq=False)
class Parts:
    """A packed decoder's weights. config: as they are, for a turned model has a head of its own."""

    config: DecoderConfig
    program: Program
    embed: Packed
    norm: ScaledNorm
    layers: tuple[tuple[Any, ...], ...]
    head: Packed | None
    gains: dict[str, Tensor] = field(default_factory=dict)


def pack_decoder(
    config: DecoderConfig,
    info: ModelInfo,
    parts: Iterable[tuple[str, Value]],
    dtype: torch.dtype,
    *,
    notes: list[str] | None = None,
    shortlist: Tensor | None = None,
    basis: Basis | None = None,
) -> PackedDecoder:
    """Build from a stream of (parameter name as in `Decoder`, matrix or vector). Floating-point matrices become float32
    or bfloat16 panels. shortlist: the only tokens that the head gets, int64 [n] ascending; None: all.
    basis: what the matrices were turned to (`Basis.turned`); norms come as they were, and a head of its own always.

    Raises CheckpointError for a missing, surplus or mis-shaped parameter or one that is not finite.
    """
    made = pack_parts(config, info, parts, PANELS, shortlist=shortlist, basis=basis)
    return PackedDecoder(
        config=made.config,
        info=info,
        program=made.program,
        dtype=dtype,
        embed=made.embed,
        norm=made.norm,
        layers=made.layers,
        head=made.head,
        notes=notes or [],
        shortlist=shortlist,
        basis=basis,
        gains=made.gains,
    )


def pack_parts(
    config: DecoderConfig,
    info: ModelInfo,
    parts: Iterable[tuple[str, Value]],
    packing: Packing,
    *,
    shortlist: Tensor | None = None,
    basis: Basis | None = None,
) -> Parts:
    """See `pack_decoder`, which packs into panels."""
    program = find_family(info.family).program(config)
    if basis is not None:
        config = replace(config, tied=False)
    wanted = _shapes(config, info)
    waiting: dict[int | None, dict[str, Value]] = {}
    experts: dict[int | None, dict[str, FeedForward]] = {}
    left = Counter(_place(name) for name in wanted)
    layers: dict[int, tuple[Any, ...]] = {}
    seen: set[str] = set()
    gains: dict[str, Tensor] = {}
    for name, value in parts:
        if name not in wanted or name in seen:
            raise CheckpointError(f"unexpected parameter {name}.")
        if tuple(value.shape) != wanted[name]:
            raise CheckpointError(f"{name} has shape {list(value.shape)}, wanted {list(wanted[name])}.")
        seen.add(name)
        place = _place(name)
        group = waiting.setdefault(place, {})
        inner = name.removeprefix(f"layers.{place}.")
        group[inner] = _finite(name, value)
        left[place] -= 1
        if expert := EXPERT.match(inner):
            _settle_expert(expert[1], group, experts.setdefault(place, {}), f"layers.{place}.", basis, packing)
        if place is not None and left[place] == 0:
            layer = _Layer(place, group, experts.pop(place, {}), basis, gains, packing)
            layers[place] = packing.settle(layer.ops(program.layers[place]))
            del waiting[place], group
    missing = sorted(wanted.keys() - seen)
    if missing:
        raise CheckpointError(f"missing parameter(s) {', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}.")
    outer = waiting[None]
    last = _norm(program.norm, outer, packing, None if basis is None else gains)
    return Parts(
        config=config,
        program=program,
        embed=packing.outer(_matrix(outer["embed.weight"])),
        norm=ScaledNorm(last.weight * program.logits_factor, last.eps),
        layers=tuple(layers[i] for i in range(config.layers)),
        head=_head(outer, config.tied, shortlist, packing),
        gains=gains,
    )


def _shapes(config: DecoderConfig, info: ModelInfo) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Decoder(config, info).named_parameters()}


def _place(name: str) -> int | None:
    """The layer a parameter belongs to, None: none."""
    found = re.match(r"layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def _finite(name: str, value: Value) -> Value:
    floats = [value] if isinstance(value, Tensor) else [value.scales, value.mins]
    if isinstance(value, QTensor) and value.scales is None:
        floats = [value.codes]
    if not all(bool(torch.isfinite(t).all()) for t in floats if t is not None):
        raise CheckpointError(
            f"{name} holds values that are not finite (NaN or infinity).", hint="The file is damaged."
        )
    return value


def _settle_expert(
    name: str,
    parts: dict[str, Value],
    experts: dict[str, FeedForward],
    prefix: str,
    basis: Basis | None,
    packing: Packing,
) -> None:
    """The matrices of an expert are packed as soon as all three are there: a layer may have hundreds of experts.
    prefix: of its layer."""
    matrices = [f"{name}.{part}_proj.weight" for part in ("gate", "up", "down")]
    if all(matrix in parts for matrix in matrices):
        gate, up, down = (_matrix(parts.pop(matrix)) for matrix in matrices)
        packed = _gate_and_up((gate, None), (up, None), packing)
        block = _block(basis, f"{prefix}{name}.down_proj")
        experts[name] = FeedForward(packed, Weights(packing.pack(down)), gate.shape[0], block)


def _block(basis: Basis | None, own: str) -> int:
    """How many inputs of this matrix the kernels turn together, 1: none."""
    turn = None if basis is None else basis.sides[own].inputs
    return 1 if turn is None else turn.power


class _Layer:
    """The ops of a layer joined into those of the kernels. experts: by their names in the layer. gains: where those go
    that a basis has folded into matrices."""

    def __init__(
        self,
        index: int,
        parts: Mapping[str, Value],
        experts: Mapping[str, FeedForward],
        basis: Basis | None,
        gains: dict[str, Tensor],
        packing: Packing,
    ) -> None:
        self._prefix, self._parts, self._experts = f"layers.{index}.", parts, experts
        self._basis, self._gains, self._packing = basis, gains, packing

    def ops(self, ops: Sequence[Op]) -> tuple[PackedOp, ...]:
        out: list[PackedOp] = []
        parts = self._parts
        norm: ScaledNorm | None = None  # read by the linear that follows
        heads: tuple[ScaledNorm | None, ScaledNorm | None] = (None, None)
        table: int | None = None
        for before, op, after in zip((None, *ops), ops, (*ops[1:], None), strict=False):
            match op, after:
                case Norm(), Linear() | Experts():
                    norm = self._norm(op)
                case Norm(), _:
                    out.append(Normalise(self._norm(op)))
                case Linear(), Gate():
                    follows = ops[ops.index(after) + 1]
                    assert isinstance(follows, Linear)
                    out.append(self._gated(op, after, follows.matrices[0], norm))
                    norm = None
                case Linear(), _:
                    onto = isinstance(after, Add) and after.factor == 1
                    out.append(Project(_side_by_side(_parts(op, parts), self._packing), op, norm, onto))
                    norm = None
                case Experts(), _:
                    onto = isinstance(after, Add) and after.factor == 1
                    out.append(_routed(op, parts, self._experts, norm, onto, self._packing))
                    norm = None
                case HeadNorm(), _:
                    heads = _norm(op.q, parts, self._packing), _norm(op.k, parts, self._packing)
                case Rope(), _:
                    table = op.table
                case Attend(), _:
                    out.append(Mix(op, *heads, table))
                    heads, table = (None, None), None
                case Add(), _ if not (isinstance(before, Linear | Experts) and op.factor == 1):
                    out.append(Sum(op.factor))
        return tuple(out)

    def _norm(self, op: Norm) -> ScaledNorm:
        folded = self._basis is not None and f"{self._prefix}{op.name}" in self._basis.norms
        return _norm(op, self._parts, self._packing, self._gains if folded else None, self._prefix)

    def _gated(self, op: Linear, gate: Gate, follows: Matrix, norm: ScaledNorm | None) -> Gated:
        """follows: the matrix that reads the products."""
        gate_up = _parts(op, self._parts)
        kind = self._packing.kind(_matrix(self._parts[f"{follows.name}.weight"]).format)
        block = _block(self._basis, f"{self._prefix}{follows.name}")
        first, second = gate_up
        both = _gate_and_up(first, second, self._packing)
        return Gated(both, op, gate.activation, first[0].shape[0], kind, norm, block)


def _routed(
    op: Experts,
    parts: Mapping[str, Value],
    experts: Mapping[str, FeedForward],
    norm: ScaledNorm | None,
    onto: bool,
    packing: Packing,
) -> Routed:
    router, bias = parts[f"{op.name}.router.weight"], parts.get(f"{op.name}.router.bias")
    found = tuple(experts[f"{op.name}.experts.{i}"] for i in range(op.config.experts))
    if len({packing.alike(block) for block in found}) > 1:  # no file has been seen that stores some in another way
        found = tuple(_as_floats(block, packing) for block in found)
    stored = router if isinstance(router, Tensor) else router.dequantise()
    return Routed(
        source=op,
        router=packing.vector(stored.contiguous()),
        bias=None if bias is None else packing.vector(_vector(bias)),
        experts=found,
        shared=experts.get(f"{op.name}.shared"),
        norm=norm,
        onto_stream=onto,
    )


def _as_floats(block: FeedForward, packing: Packing) -> FeedForward:
    gated, down = (
        Weights(packing.pack(QTensor("f32", packing.natural(w.packed).dequantise())), w.bias)
        for w in (block.gated, block.down)
    )
    return FeedForward(gated, down, block.width, block.block)


def _norm(
    op: Norm,
    parts: Mapping[str, Value],
    packing: Packing,
    gains: dict[str, Tensor] | None = None,
    prefix: str = "",
) -> ScaledNorm:
    """gains: where the weight goes, by own name, of a norm whose gain is folded into what follows; the norm itself then
    has ones."""
    weight = _vector(parts[f"{op.name}.weight"]) + op.offset
    if gains is not None:
        gains[f"{prefix}{op.name}"] = weight
        weight = torch.ones_like(weight)
    return ScaledNorm(packing.vector(weight), op.eps)


Part = tuple[QTensor, Tensor | None]  # rows of a matrix and of its bias


def _parts(op: Linear, parts: Mapping[str, Value]) -> list[Part]:
    """The parts of an op's matrices, those that share a matrix cut out of it."""
    found: list[Part] = []
    for m in op.matrices:
        matrix = _matrix(parts[f"{m.name}.weight"])
        bias = _vector(parts[f"{m.name}.bias"]) if m.bias else None
        start = 0
        for size in m.outputs:
            rows = slice(start, start + size)
            whole = len(m.outputs) == 1
            found.append((matrix if whole else matrix.rows(rows), bias if bias is None or whole else bias[rows]))
            start += size
    return found


def _side_by_side(parts: Sequence[Part], packing: Packing) -> tuple[Weights, ...]:
    if len({_kind(matrix) for matrix, _ in parts}) > 1:
        return tuple(
            Weights(packing.pack(matrix), None if bias is None else packing.vector(bias)) for matrix, bias in parts
        )
    whole = None
    if any(bias is not None for _, bias in parts):
        all_biases = [torch.zeros(matrix.shape[0]) if bias is None else bias for matrix, bias in parts]
        whole = packing.vector(torch.cat(all_biases))
    return (Weights(packing.pack(QTensor.stack([matrix for matrix, _ in parts])), whole),)


def _gate_and_up(gate: Part, up: Part, packing: Packing) -> Weights:
    """The two in one matrix."""
    if _kind(gate[0]) != _kind(up[0]):  # files mix formats by layer, hardly ever inside one MLP
        gate, up = ((QTensor("f32", m.dequantise()), bias) for m, bias in (gate, up))
    if packing.interleaved:
        return _interleaved(gate, up, packing)
    (both,) = _side_by_side((gate, up), packing)
    return both


def _interleaved(first: Part, second: Part, packing: Packing) -> Weights:
    """Panels of 32 gate channels and the same 32 of up; channels beyond the last are zero weights."""
    pair = (first, second)
    gate, up = first[0], second[0]
    n = gate.shape[0]
    panels = -(-n // HALF)
    both = QTensor.stack([gate.padded(panels * HALF), up.padded(panels * HALF)])
    order = torch.arange(2 * panels * HALF).view(2, panels, HALF).transpose(0, 1).reshape(-1)
    packed = packing.pack(both.rows(order))
    bias = None
    if any(b is not None for _, b in pair):
        full = torch.zeros(2, panels * HALF)
        for row, (_, b) in zip(full, pair, strict=True):
            if b is not None:
                row[:n] = b
        bias = packing.vector(full.view(-1)[order].contiguous())
    return Weights(packed, bias)


def _kind(matrix: QTensor) -> tuple[str, bool]:
    return matrix.format, matrix.mins is not None


def _vector(value: Value) -> Tensor:
    tensor = value if isinstance(value, Tensor) else value.dequantise()
    return tensor.float().cpu().contiguous()


def _matrix(value: Value) -> QTensor:
    if isinstance(value, QTensor):
        return value
    return QTensor("bf16", value) if value.dtype == torch.bfloat16 else QTensor("f32", value.float())


def _head(outer: Mapping[str, Value], tied: bool, shortlist: Tensor | None, packing: Packing) -> Packed | None:
    """None: the embedding is the head."""
    if shortlist is not None:
        return packing.outer(_matrix(outer["embed.weight" if tied else "lm_head.weight"]).rows(shortlist))
    return None if tied else packing.outer(_matrix(outer["lm_head.weight"]))
