"""From a stream of parameters to a PackedDecoder: each layer's ops are joined and packed as soon as its weights are
there, and an expert as soon as its three matrices are, so that no more than about one layer is held in both forms."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

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
from dfastllm.models.program import Add, Attend, Experts, Gate, HeadNorm, Linear, Matrix, Norm, Op, Rope

__all__ = ["pack_decoder"]

EXPERT = re.compile(r"(.*\.(?:experts\.\d+|shared))\.(?:gate|up|down)_proj\.weight$")
HALF = PANEL // 2  # a panel of gate and up holds so many channels of each
Value = QTensor | Tensor


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
    program = find_family(info.family).program(config)
    if basis is not None:
        config = replace(config, tied=False)
    wanted = _shapes(config, info)
    waiting: dict[int | None, dict[str, Value]] = {}
    experts: dict[int | None, dict[str, FeedForward]] = {}
    left = Counter(_place(name) for name in wanted)
    layers: dict[int, tuple[PackedOp, ...]] = {}
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
            _settle_expert(expert[1], group, experts.setdefault(place, {}), f"layers.{place}.", basis)
        if place is not None and left[place] == 0:
            layer = _Layer(place, group, experts.pop(place, {}), basis, gains)
            layers[place] = layer.ops(program.layers[place])
            del waiting[place], group
    missing = sorted(wanted.keys() - seen)
    if missing:
        raise CheckpointError(f"missing parameter(s) {', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}.")
    outer = waiting[None]
    last = _norm(program.norm, outer, None if basis is None else gains)
    return PackedDecoder(
        config=config,
        info=info,
        program=program,
        dtype=dtype,
        embed=_pack(outer["embed.weight"]),
        norm=ScaledNorm(last.weight * program.logits_factor, last.eps),
        layers=tuple(layers[i] for i in range(config.layers)),
        head=_head(outer, config.tied, shortlist),
        notes=notes or [],
        shortlist=shortlist,
        basis=basis,
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
    name: str, parts: dict[str, Value], experts: dict[str, FeedForward], prefix: str, basis: Basis | None
) -> None:
    """The matrices of an expert become panels as soon as all three are there: a layer may have hundreds of experts.
    prefix: of its layer."""
    matrices = [f"{name}.{part}_proj.weight" for part in ("gate", "up", "down")]
    if all(matrix in parts for matrix in matrices):
        gate, up, down = (_matrix(parts.pop(matrix)) for matrix in matrices)
        packed = _interleaved((gate, None), (up, None))
        block = _block(basis, f"{prefix}{name}.down_proj")
        experts[name] = FeedForward(packed, Weights(linear.pack(down)), gate.shape[0], block)


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
    ) -> None:
        self._prefix, self._parts, self._experts = f"layers.{index}.", parts, experts
        self._basis, self._gains = basis, gains

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
                    out.append(Project(_side_by_side(_parts(op, parts)), op, norm, onto))
                    norm = None
                case Experts(), _:
                    onto = isinstance(after, Add) and after.factor == 1
                    out.append(_routed(op, parts, self._experts, norm, onto))
                    norm = None
                case HeadNorm(), _:
                    heads = _norm(op.q, parts), _norm(op.k, parts)
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
        return _norm(op, self._parts, self._gains if folded else None, self._prefix)

    def _gated(self, op: Linear, gate: Gate, follows: Matrix, norm: ScaledNorm | None) -> Gated:
        """follows: the matrix that reads the products."""
        gate_up = _parts(op, self._parts)
        kind = act_kind(_matrix(self._parts[f"{follows.name}.weight"]).format)
        block = _block(self._basis, f"{self._prefix}{follows.name}")
        return Gated(_interleaved(*gate_up), op, gate.activation, gate_up[0][0].shape[0], kind, norm, block)


def _routed(
    op: Experts, parts: Mapping[str, Value], experts: Mapping[str, FeedForward], norm: ScaledNorm | None, onto: bool
) -> Routed:
    router, bias = parts[f"{op.name}.router.weight"], parts.get(f"{op.name}.router.bias")
    found = tuple(experts[f"{op.name}.experts.{i}"] for i in range(op.config.experts))
    if len({block.kinds for block in found}) > 1:  # no file has been seen that stores some experts in another way
        found = tuple(_as_floats(block) for block in found)
    return Routed(
        source=op,
        router=(router if isinstance(router, Tensor) else router.dequantise()).contiguous(),
        bias=None if bias is None else _vector(bias),
        experts=found,
        shared=experts.get(f"{op.name}.shared"),
        norm=norm,
        onto_stream=onto,
    )


def _as_floats(block: FeedForward) -> FeedForward:
    gated, down = (
        Weights(linear.pack(QTensor("f32", unpack_panels(w.packed).dequantise())), w.bias)
        for w in (block.gated, block.down)
    )
    return FeedForward(gated, down, block.width, block.block)


def _norm(op: Norm, parts: Mapping[str, Value], gains: dict[str, Tensor] | None = None, prefix: str = "") -> ScaledNorm:
    """gains: where the weight goes, by own name, of a norm whose gain is folded into what follows; the norm itself then
    has ones."""
    weight = _vector(parts[f"{op.name}.weight"]) + op.offset
    if gains is not None:
        gains[f"{prefix}{op.name}"] = weight
        weight = torch.ones_like(weight)
    return ScaledNorm(weight, op.eps)


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


def _side_by_side(parts: Sequence[Part]) -> tuple[Weights, ...]:
    if len({_kind(matrix) for matrix, _ in parts}) > 1:
        return tuple(Weights(linear.pack(matrix), bias) for matrix, bias in parts)
    whole = None
    if any(bias is not None for _, bias in parts):
        whole = torch.cat([torch.zeros(matrix.shape[0]) if bias is None else bias for matrix, bias in parts])
    return (Weights(linear.pack(QTensor.stack([matrix for matrix, _ in parts])), whole),)


def _interleaved(*pair: Part) -> Weights:
    """Panels of 32 gate channels and the same 32 of up; channels beyond the last are zero weights."""
    gate, up = (matrix for matrix, _ in pair)
    if _kind(gate) != _kind(up):  # files mix formats by layer, hardly ever inside one MLP
        gate, up = (QTensor("f32", m.dequantise()) for m in (gate, up))
    n = gate.shape[0]
    panels = -(-n // HALF)
    both = QTensor.stack([gate.padded(panels * HALF), up.padded(panels * HALF)])
    order = torch.arange(2 * panels * HALF).view(2, panels, HALF).transpose(0, 1).reshape(-1)
    packed = linear.pack(both.rows(order))
    bias = None
    if any(b is not None for _, b in pair):
        full = torch.zeros(2, panels * HALF)
        for row, (_, b) in zip(full, pair, strict=True):
            if b is not None:
                row[:n] = b
        bias = full.view(-1)[order].contiguous()
    return Weights(packed, bias)


def _kind(matrix: QTensor) -> tuple[str, bool]:
    return matrix.format, matrix.mins is not None


def _vector(value: Value) -> Tensor:
    tensor = value if isinstance(value, Tensor) else value.dequantise()
    return tensor.float().contiguous()


def _matrix(value: Value) -> QTensor:
    if isinstance(value, QTensor):
        return value
    return QTensor("bf16", value) if value.dtype == torch.bfloat16 else QTensor("f32", value.float())


def _head(outer: Mapping[str, Value], tied: bool, shortlist: Tensor | None) -> Packed | None:
    """None: the embedding is the head."""
    if shortlist is not None:
        return linear.pack(_matrix(outer["embed.weight" if tied else "lm_head.weight"]).rows(shortlist))
    return None if tied else _pack(outer["lm_head.weight"])


def _pack(value: Value) -> Packed:
    return linear.pack(_matrix(value))
