"""A model in another orthogonal basis: the same function, with residual streams and heads that have no outlier
channels, so that one scale a row of int8 inputs is enough (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456).

The gain of a norm is folded into the linear that reads it; what is left of the norm commutes with any orthogonal matrix
Q. So Q goes into the embedding, into both sides of every layer and into the head, and each stream vector x becomes x Q.
A Hadamard matrix per head goes into the outputs of v and the inputs of o. Both cost nothing at run time. What a gate
makes cannot be turned by weights alone: the kernels turn it, in stretches of a power of two, before the linear that
reads it.

    Turn     one orthogonal matrix, applied without ever being written out
    Side     how one matrix of the program stands in these bases
    Basis    the sides of all of them; `basis_of` is the pass over a program, and refuses one that does not allow it
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from dfastllm.errors import UnsupportedError
from dfastllm.kernels.packed import QTensor
from dfastllm.models.program import Add, Attend, Experts, Gate, Linear, Norm, Op, Program
from dfastllm.quant.formats import EIGHT_BITS, FORMATS, require_format

__all__ = ["BLOCK", "Basis", "Side", "Turn", "basis_of", "format_for"]

BLOCK = 256  # the most products of a gate that are turned together: longer stretches gain nothing that can be measured
WIDEST = 64  # order of the Hadamard factors that are multiplied with at once
CHUNK = 1 << 20  # numbers turned at once


@dataclass(frozen=True, slots=True)
class Turn:
    """x [..., size] -> x Q of stretches of odd * power numbers: signs first, then Hartley's matrix of order `odd` over
    the parts of a stretch, and Hadamard's (Sylvester) of order `power`, a power of two, inside each.

    Both are symmetric and orthogonal for their order whatever it is, and have a closed form, so a file need only name
    the seed. seed: of the signs (bits of SHAKE-128 of it); None: no signs.
    """

    size: int
    power: int
    odd: int = 1
    seed: int | None = None

    @classmethod
    def whole(cls, size: int, seed: int | None = None) -> Turn:
        """Of all `size` numbers together."""
        power = size & -size
        return cls(size, power, size // power, seed)

    def apply(self, x: Tensor) -> Tensor:
        """x Q in x's dtype."""
        return self._spread(x if self.seed is None else x * _signs(self.size, self.seed).to(x.dtype))

    def undo(self, x: Tensor) -> Tensor:
        """x Q^T in x's dtype."""
        x = self._spread(x)
        return x if self.seed is None else x * _signs(self.size, self.seed).to(x.dtype)

    def _spread(self, x: Tensor) -> Tensor:
        shape, done = x.shape, 1
        while done < self.power:  # Sylvester's matrix is a Kronecker product of smaller ones
            order = min(WIDEST, self.power // done)
            x = _along(_hadamard(order, x.dtype), x, done)
            done *= order
        if self.odd > 1:
            x = _along(_hartley(self.odd, x.dtype), x, self.power)
        return x.reshape(shape)


def _along(matrix: Tensor, x: Tensor, inner: int) -> Tensor:
    """x viewed as [..., order, inner], times a symmetric matrix along the middle."""
    order = len(matrix)
    if inner == 1:
        return x.reshape(-1, order) @ matrix
    return torch.matmul(matrix, x.reshape(-1, order, inner))


@lru_cache(maxsize=16)
def _hadamard(order: int, dtype: torch.dtype) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / math.sqrt(order)).to(dtype)


@lru_cache(maxsize=16)
def _hartley(order: int, dtype: torch.dtype) -> Tensor:
    """cos + sin of 2 pi i j / order, over sqrt(order) (Hartley 1942)."""
    index = torch.arange(order, dtype=torch.float64)
    angles = (index[:, None] * index[None, :]) % order * (2 * math.pi / order)
    return ((angles.cos() + angles.sin()) / math.sqrt(order)).to(dtype)


@lru_cache(maxsize=16)
def _signs(size: int, seed: int) -> Tensor:
    drawn = hashlib.shake_128(f"dfastllm basis {seed}".encode()).digest(-(-size // 8))
    bits = [byte >> i & 1 for byte in drawn for i in range(8)]
    return torch.tensor(bits[:size], dtype=torch.float64) * -2 + 1


@dataclass(frozen=True, slots=True)
class Side:
    """How a matrix [sum of its parts, inputs] stands.

    gain    own name of the norm whose gain is folded into its inputs; None: no norm.
    inputs  the basis of its inputs; None: as they were.
    late    the kernels turn the inputs just before the product: everybody else sees them as they were.
    parts   (outputs, their basis) of each part of its outputs; empty: all as they were.
    """

    gain: str | None = None
    inputs: Turn | None = None
    late: bool = False
    parts: tuple[tuple[int, Turn | None], ...] = ()

    @property
    def turns_outputs(self) -> bool:
        return any(turn is not None for _, turn in self.parts)

    def outputs(self, y: Tensor, *, back: bool = False) -> Tensor:
        """y [..., outputs] of the old bases in the new ones; back: the other way."""
        if not self.turns_outputs:
            return y
        cut = torch.split(y, [size for size, _ in self.parts], dim=-1)
        done = [
            part if turn is None else turn.undo(part) if back else turn.apply(part)
            for part, (_, turn) in zip(cut, self.parts, strict=True)
        ]
        return torch.cat(done, dim=-1)


@dataclass(frozen=True, slots=True)
class Basis:
    """The bases of a whole model.

    seed, block  as `basis_of` takes them; a file that names them names the basis.
    tied         whether head and embedding were one matrix before: now they are two.
    sides        own matrix name without ".weight" -> Side, of all matrices.
    norms        own name of each norm whose gain is folded -> its offset.
    """

    seed: int
    block: int
    tied: bool
    sides: Mapping[str, Side]
    norms: Mapping[str, float]

    def forth(self, own: str, value: Tensor, gain: Tensor | None) -> Tensor:
        """A weight [n, k] or bias [n] of any float dtype, by own parameter name, as the turned model has it, float32.
        gain: float32 [k] of the norm that the side names, its offset added; None where it names none."""
        side = self.sides[own.rpartition(".")[0]]

        def rows(part: Tensor) -> Tensor:
            part = part if gain is None else part * gain.double()
            return part if side.inputs is None else side.inputs.apply(part)

        return _moved(value, rows, side.outputs)

    def back(self, own: str, value: Tensor, gain: Tensor | None) -> Tensor:
        """The inverse of `forth`. An input that the gain multiplied by zero comes back as zero."""
        side = self.sides[own.rpartition(".")[0]]

        def rows(part: Tensor) -> Tensor:
            part = part if side.inputs is None else side.inputs.undo(part)
            return part if gain is None else torch.where(gain == 0, 0.0, part / gain.double())

        return _moved(value, rows, partial(side.outputs, back=True))

    def turned(self, parts: Iterable[tuple[str, QTensor | Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """A model's parameters by own name -> those of the turned one, matrices and biases float32. Norms pass as they
        are: what is folded of them stays known. A tied embedding is also the head, under a name of its own."""
        return self._moved(parts, self.forth, split=self.tied)

    def undone(self, parts: Iterable[tuple[str, QTensor | Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The inverse of `turned`; a head that was tied is left out where the caller leaves it out of `parts`."""
        return self._moved(parts, self.back, split=False)

    def _moved(
        self, parts: Iterable[tuple[str, QTensor | Tensor]], move: Move, split: bool
    ) -> Iterator[tuple[str, Tensor]]:
        gains: dict[str, Tensor] = {}
        waiting: list[tuple[str, QTensor | Tensor]] = []  # for the gain of a norm that is still to come
        for own, value in parts:
            module = own.rpartition(".")[0]
            if module in self.norms:
                gains[module] = _floats(value).float() + self.norms[module]
            if module not in self.sides:
                yield own, _floats(value)
            else:
                waiting.append((own, value))
                if split and own == "embed.weight":
                    waiting.append(("lm_head.weight", value))
            still = []
            for held, it in waiting:
                name = self.sides[held.rpartition(".")[0]].gain
                if name is None or name in gains:
                    yield held, move(held, _floats(it), None if name is None else gains[name])
                else:
                    still.append((held, it))
            waiting = still


Move = Callable[[str, Tensor, Tensor | None], Tensor]


def _floats(value: QTensor | Tensor) -> Tensor:
    return value.dequantise() if isinstance(value, QTensor) else value


def _moved(value: Tensor, rows: Callable[[Tensor], Tensor], outputs: Callable[[Tensor], Tensor]) -> Tensor:
    """Both sides of a matrix, or the outputs of a vector: float32, computed in float64, some rows (columns) at a
    time."""
    if value.ndim == 1:
        return outputs(value.double()).float()
    n, k = value.shape
    out = torch.empty(n, k)
    step = max(1, CHUNK // max(k, 1))
    for at in range(0, n, step):
        out[at : at + step] = rows(value[at : at + step].double())
    step = max(1, CHUNK // max(n, 1))
    for at in range(0, k, step):
        columns = out[:, at : at + step]
        columns.copy_(outputs(columns.T.double()).T)
    return out


def basis_of(program: Program, name: str, *, tied: bool, seed: int = 0, block: int = BLOCK) -> Basis:
    """The pass over a program. name: of the model, for messages. block: the most products of a gate that are turned
    together. Raises UnsupportedError listing what in the program keeps the stream from being turned."""
    stream = Turn.whole(program.norm.size, seed)
    sides = {"embed": Side(inputs=stream), "lm_head": Side(program.norm.name, stream)}
    norms = {program.norm.name: program.norm.offset}
    reasons: list[str] = []
    for i, ops in enumerate(program.layers):
        walk = _Walk(f"layers.{i}.", stream, block)
        for at, op in enumerate(ops):
            walk.take(op, ops[at + 1 :])
        sides |= walk.sides
        norms |= walk.norms
        reasons += [reason for reason in walk.reasons if reason not in reasons]
    if reasons:
        raise UnsupportedError(
            f"{name}: its residual stream cannot be held in another basis: {'; '.join(reasons)}.",
            param="format",
            hint="Use w8g.",
        )
    return Basis(seed, block, tied, sides, norms)


def format_for(name: str, program: Program, model: str) -> str:
    """A format by the name that a user gives: EIGHT_BITS is w8r where a program can be turned, else w8g. model: its
    name. Raises ValidationError for an unknown one."""
    require_format(name, (*FORMATS, EIGHT_BITS), "quantization")
    if name != EIGHT_BITS:
        return name
    try:
        basis_of(program, model, tied=False)
    except UnsupportedError:
        return "w8g"
    return "w8r"


class _Walk:
    """The ops of one layer, one by one."""

    def __init__(self, prefix: str, stream: Turn, block: int) -> None:
        self.sides: dict[str, Side] = {}
        self.norms: dict[str, float] = {}
        self.reasons: list[str] = []
        self._prefix, self._stream, self._block = prefix, stream, block
        self._fresh = True  # the branch is still the stream
        self._before = Side(inputs=stream)  # how the next linear finds its inputs
        self._width = 0  # of a gate's products

    def take(self, op: Op, after: Sequence[Op]) -> None:
        match op:
            case Norm() if self._fresh and after and isinstance(after[0], Linear | Experts):
                own = f"{self._prefix}{op.name}"
                self._before = Side(own, self._stream)
                self.norms[own] = op.offset
            case Norm():
                self.reasons.append(f"a norm of what a layer adds ({op.name}) scales its channels one by one")
            case Linear():
                self._linear(op, _turns(op, after, self._stream))
            case Attend():
                self._before = Side(inputs=_heads(op.heads, op.dim))
            case Gate():
                self._before = self._products(self._width)
            case Experts():
                self._experts(op)
            case Add():
                self._fresh, self._before = True, Side(inputs=self._stream)

    def _experts(self, op: Experts) -> None:
        moe = op.config
        name = f"{self._prefix}{op.name}"
        self.sides[f"{name}.router"] = self._before
        blocks = {f"experts.{i}": moe.intermediate_size for i in range(moe.experts)}
        for block, width in ({**blocks, "shared": moe.shared_size} if moe.shared_size else blocks).items():
            for part in ("gate", "up"):
                self.sides[f"{name}.{block}.{part}_proj"] = replace(self._before, parts=((width, None),))
            inputs = self._products(width)
            self.sides[f"{name}.{block}.down_proj"] = replace(inputs, parts=((op.hidden, self._stream),))
        self._fresh, self._before = False, Side()

    def _products(self, width: int) -> Side:
        """Of a gate."""
        return Side(inputs=Turn(width, min(self._block, width & -width)), late=True)

    def _linear(self, op: Linear, turns: list[Turn | None]) -> None:
        for matrix in op.matrices:
            parts = tuple((size, turns.pop(0)) for size in matrix.outputs)
            self.sides[f"{self._prefix}{matrix.name}"] = replace(self._before, parts=parts)
            self._width = matrix.outputs[-1]
        self._fresh, self._before = False, Side()


def _heads(count: int, dim: int) -> Turn:
    power = dim & -dim
    return Turn(count * dim, power, dim // power)


def _turns(op: Linear, after: Sequence[Op], stream: Turn) -> list[Turn | None]:
    """The basis of each part of a linear's outputs, by what follows it."""
    count = sum(len(matrix.outputs) for matrix in op.matrices)
    if after and isinstance(after[0], Gate):
        return [None] * count
    for later in after:
        if isinstance(later, Attend):
            return [None, None, _heads(later.kv_heads, later.dim)]
        if isinstance(later, Add):
            break
    return [stream] * count
