"""The decoder over packed weights: what serves on a CPU, quantised or not.

A program whose ops the kernels know becomes a list of fewer, larger ones (`pack`): a norm is part of the linear that
reads it, gate and up lie in one matrix, an add is part of the linear before it. The twin here and the native forward
walk that list, each over the same packed weights, a float32 stream, and K,V that the kernels write and read themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dfastllm.core import ModelInfo
from dfastllm.errors import ValidationError
from dfastllm.kernels import attention, linear
from dfastllm.kernels.activations import Acts, HeadStats, act_kind
from dfastllm.kernels.extension import native
from dfastllm.kernels.halt import Halt, Interrupted
from dfastllm.kernels.kv import KV_TYPES, KvCache
from dfastllm.kernels.linear_plain import gate_product
from dfastllm.kernels.packed import Packed
from dfastllm.kernels.step import Step
from dfastllm.models.config import DecoderConfig
from dfastllm.models.parts import inverse_frequencies
from dfastllm.models.program import Activation, Attend, Experts, Linear, Program
from dfastllm.models.routed import routed

if TYPE_CHECKING:
    from dfastllm.models.adapted import PackedAdapters
    from dfastllm.models.basis import Basis

__all__ = [
    "FeedForward",
    "Gated",
    "Mix",
    "Normalise",
    "PackedDecoder",
    "PackedOp",
    "Project",
    "Routed",
    "ScaledNorm",
    "Sum",
    "Weights",
]


@dataclass(frozen=True, eq=False)
class Weights:
    """A linear layer: packed matrix and float32 bias (of gate and up: in panel order, padded to whole panels)."""

    packed: Packed
    bias: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + (0 if self.bias is None else self.bias.nbytes)


@dataclass(frozen=True, eq=False)
class ScaledNorm:
    """RMSNorm; weight float32 [size], with its offset added."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, eq=False)
class Project:
    """h <- norm(h) W^T of matrices side by side (several where their formats differ). onto_stream: x += it, and the
    next branch begins. source: the program's linear that it is."""

    weights: tuple[Weights, ...]
    source: Linear
    norm: ScaledNorm | None = None
    onto_stream: bool = False


@dataclass(frozen=True, eq=False)
class Gated:
    """h <- activation(gate) * up of norm(h), `width` channels, prepared as `kind` for the linear that follows. The
    matrix holds 32 channels of gate and the same 32 of up in turn. source: the program's linear that it is. block above
    1: the products are turned in stretches of so many (`models.basis`)."""

    weights: Weights
    source: Linear
    activation: Activation
    width: int
    kind: str
    norm: ScaledNorm | None = None
    block: int = 1


@dataclass(frozen=True, eq=False)
class Mix:
    """h = (q, k, v) <- attention: norms of q and k over their weights' size, rotation by a table (None: none), K and V
    stored, then `op`."""

    op: Attend
    q_norm: ScaledNorm | None = None
    k_norm: ScaledNorm | None = None
    table: int | None = None


@dataclass(frozen=True, eq=False)
class Normalise:
    """h <- norm(h)"""

    norm: ScaledNorm


@dataclass(frozen=True, eq=False)
class FeedForward:
    """An expert: down(silu(gate) * up) of `width` channels. gated: 32 channels of gate and the same 32 of up in turn.
    block above 1: the products are turned in stretches of so many before down, as those of a Gated."""

    gated: Weights
    down: Weights
    width: int
    block: int = 1

    @property
    def kinds(self) -> tuple[str, str]:
        """How the two want their rows."""
        return act_kind(self.gated.packed.format), act_kind(self.down.packed.format)


@dataclass(frozen=True, eq=False)
class Routed:
    """h <- the sum of the chosen experts' outputs for norm(h) times their weights, and the shared expert's.

    source       the program's op that it is.
    router       [experts, hidden] as stored.
    bias         float32 [experts] of a sigmoid router.
    experts      all of the same `kinds`.
    onto_stream  x += the sum, and the next branch begins.
    """

    source: Experts
    router: Tensor
    bias: Tensor | None
    experts: tuple[FeedForward, ...]
    shared: FeedForward | None = None
    norm: ScaledNorm | None = None
    onto_stream: bool = False

    @property
    def blocks(self) -> tuple[FeedForward, ...]:
        """The experts, then the shared one."""
        return self.experts if self.shared is None else (*self.experts, self.shared)


@dataclass(frozen=True, eq=False)
class Sum:
    """x <- x + factor * h, and the next branch begins."""

    factor: float


PackedOp = Project | Gated | Mix | Normalise | Routed | Sum


@dataclass(eq=False)
class PackedDecoder:
    """A model ready to serve on the CPU. Made by `pack.pack_decoder`.

    head is None when it is tied to the embedding: `embed` is then used for both. norm: the final one, times the
    program's logits_factor. shortlist: the tokens that the head has, int64 [n] ascending, where it has not all of them
    (see `models.shortlist`); its logits have as many columns. dtype: what the floating-point weights were stored in,
    and so the default of the K,V pages.
    notes: what was converted at load, for people.
    basis: what its matrices were turned to; gains: of the norms that are folded into them, float32 by own name.
    """

    config: DecoderConfig
    info: ModelInfo
    program: Program
    dtype: torch.dtype
    embed: Packed
    norm: ScaledNorm
    layers: tuple[tuple[PackedOp, ...], ...]
    head: Packed | None = None
    notes: list[str] = field(default_factory=list)
    seed: int | None = None  # of random weights
    shortlist: Tensor | None = None
    basis: Basis | None = None
    gains: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _native: dict[str, Any] = field(default_factory=dict, repr=False)
    _tables: dict[str, list[Any]] = field(default_factory=dict, repr=False)  # of adapters, that `_native` have

    def __post_init__(self) -> None:
        self._ropes = [inverse_frequencies(table) for table in self.program.ropes]

    @property
    def head_weights(self) -> Packed:
        return self.head or self.embed

    def _linears(self) -> Iterator[Weights]:
        for op in (op for layer in self.layers for op in layer):
            if isinstance(op, Project):
                yield from op.weights
            elif isinstance(op, Gated):
                yield op.weights
            elif isinstance(op, Routed):
                yield from (weights for block in op.blocks for weights in (block.gated, block.down))

    def _routers(self) -> Iterator[Tensor]:
        for op in (op for layer in self.layers for op in layer):
            if isinstance(op, Routed):
                yield op.router
                if op.bias is not None:
                    yield op.bias

    def _norms(self) -> Iterator[ScaledNorm]:
        for op in (op for layer in self.layers for op in layer):
            norms = (op.q_norm, op.k_norm) if isinstance(op, Mix) else () if isinstance(op, Sum) else (op.norm,)
            yield from (norm for norm in norms if norm is not None)
        yield self.norm

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        matrices = self.embed.nbytes + (self.head.nbytes if self.head else 0) + sum(w.nbytes for w in self._linears())
        return matrices + sum(t.nbytes for t in (*self._routers(), *(norm.weight for norm in self._norms())))

    @property
    def formats(self) -> dict[str, int]:
        """Format -> how many matrices are held in it."""
        matrices = [self.embed, *([self.head] if self.head else []), *(w.packed for w in self._linears())]
        return {f: sum(m.format == f for m in matrices) for f in sorted({m.format for m in matrices})}

    def forward(
        self,
        step: Step,
        cache: KvCache,
        own: KvCache,
        halt: Halt | None = None,
        adapters: PackedAdapters | None = None,
    ) -> Tensor:
        """Hidden float32 [wanted, hidden] after the final norm. Writes the K,V of `step.slot` into `cache` (all layers)
        and those of `step.own_slot` into `own` (one layer, used by each in turn). adapters: what the numbers of
        `step.adapter` stand for. Raises ValidationError for a step that does not fit, Interrupted where `halt` was
        asked to give it up."""
        if native() is None:
            return self._run_plain(step, cache, own, halt, adapters)
        if cache.type not in self._native:
            self._native[cache.type] = self._compile(cache)
        table = [None] if adapters is None else adapters.handles
        if self._tables.get(cache.type) is not table and step.adapter.any():
            self._native[cache.type].set_adapters(table)
            self._tables[cache.type] = table
        out = torch.empty(len(step.want), self.config.hidden_size)
        try:
            words = None if halt is None else halt.words
            done = self._native[cache.type].run(step.native(), cache.native(), own.native(), out.numpy(), words)
        except ValueError as error:
            raise ValidationError(str(error), param="step") from error
        if not done:
            raise Interrupted
        return out

    def logits(self, hidden: Tensor, adapters: PackedAdapters | None = None, numbers: Tensor | None = None) -> Tensor:
        """hidden float32 [rows, hidden] of `forward` -> float32 [rows, tokens of the head]. numbers: int64 [rows], the
        adapter of each row that changes the head, 0: none."""
        logits = linear.linear(self._head_in(hidden), self.head_weights)
        if adapters is None or numbers is None:
            return linear.softcap(logits, self.program.logits_softcap)
        adapters.logits(hidden, logits, numbers)
        return adapters.never(linear.softcap(logits, self.program.logits_softcap), numbers)

    def head_stats(self, hidden: Tensor, **asked: Any) -> HeadStats:
        """Statistics of the rows' logits: what is `asked` of `linear.head_stats`."""
        return linear.head_stats(self._head_in(hidden), self.head_weights, cap=self.program.logits_softcap, **asked)

    def _head_in(self, hidden: Tensor) -> Acts:
        return linear.prepare(hidden, act_kind(self.head_weights.format))

    def _run_plain(
        self, step: Step, cache: KvCache, own: KvCache, halt: Halt | None, adapters: PackedAdapters | None
    ) -> Tensor:
        step.check_ids(self.embed.n)
        x = linear.weight_rows(self.embed, torch.from_numpy(step.ids).long())
        adapted = None if adapters is None else adapters.rows_of(step)
        if adapted is not None:
            adapted.embed(x)
        x = x * self.program.embed_factor
        positions, want = torch.from_numpy(step.positions).float(), torch.from_numpy(step.want).long()
        tables = []
        for frequencies, factor in self._ropes:
            angles = positions[:, None] * frequencies
            tables.append((angles.cos() * factor, angles.sin() * factor))
        nowhere = torch.empty(len(step), 0)
        for i, layer in enumerate(self.layers):
            if halt is not None and halt.asked:
                raise Interrupted
            h: Tensor | Acts = x
            for op in layer:
                match op:
                    case Normalise():
                        h = _prepared(h, "f32", op.norm).dequantise()
                    case Project():
                        out = x if op.onto_stream and adapted is None else None
                        parts = [
                            linear.linear(
                                _prepared(h, act_kind(w.packed.format), op.norm), w.packed, w.bias, accumulate=out
                            )
                            for w in op.weights
                        ]
                        made = x if out is not None else torch.cat(parts, dim=1)
                        if adapted is not None:
                            adapted.add(made, _floats(h, op.norm))
                            made = x.add_(made) if op.onto_stream else made
                        h = made
                    case Gated():
                        w = op.weights
                        rows = _prepared(h, act_kind(w.packed.format), op.norm)
                        if adapted is None:
                            h = linear.linear_gated(
                                rows,
                                w.packed,
                                w.bias,
                                kind=op.kind,
                                width=op.width,
                                activation=op.activation,
                                block=op.block,
                            )
                        else:
                            both = adapted.add(linear.linear(rows, w.packed, w.bias), _floats(h, op.norm))
                            product = adapted.keep_product(gate_product(both, op.width, op.activation))
                            h = linear.prepare(product, op.kind, block=op.block)
                    case Mix():
                        assert isinstance(h, Tensor)
                        h = self._mix(
                            op, h, (nowhere, nowhere) if op.table is None else tables[op.table], step, cache, own, i
                        )
                        if layer is self.layers[-1]:  # what follows is only looked at in the wanted rows
                            x, h = x[want], h[want]
                            if adapted is not None:
                                adapted.take(want)
                    case Routed():
                        assert isinstance(h, Tensor)
                        made = routed(op, h, adapted)
                        h = x.add_(made) if op.onto_stream else made
                    case Sum():
                        assert isinstance(h, Tensor)
                        x = x.add_(h, alpha=op.factor)
                        h = x
        return linear.prepare(x, "f32", norm=self.norm.weight, eps=self.norm.eps).dequantise()

    def _mix(
        self, op: Mix, qkv: Tensor, table: tuple[Tensor, Tensor], step: Step, cache: KvCache, own: KvCache, layer: int
    ) -> Tensor:
        kv, heads = (cache.layer(layer), own.layer(0)), op.op.heads
        q_norm, k_norm = (None if norm is None else norm.weight for norm in (op.q_norm, op.k_norm))
        eps = 0.0 if op.q_norm is None else op.q_norm.eps
        attention.rope_store(qkv, *table, step, *kv, heads=heads, q_norm=q_norm, k_norm=k_norm, eps=eps)
        return attention.attention(
            qkv, step, *kv, heads=heads, scale=op.op.scale, window=op.op.window, softcap=op.op.softcap
        )

    def _compile(self, cache: KvCache) -> Any:
        """The native forward over these weights: the same list, for C++."""
        made = native().Forward(
            hidden=self.config.hidden_size,
            heads=self.config.heads,
            kv_heads=self.config.kv_heads,
            dim=self.config.head_dim,
            kv_type=list(KV_TYPES).index(cache.type),
            embed=linear.bound(self.embed),
            embed_factor=self.program.embed_factor,
            norm=self.norm.weight,
            eps=self.norm.eps,
        )
        for frequencies, factor in self._ropes:
            made.add_rope(frequencies, factor)
        for layer in self.layers:
            made.begin_layer()
            for op in layer:
                _emit(made, op)
        return made


def _prepared(h: Tensor | Acts, kind: str, norm: ScaledNorm | None) -> Acts:
    if isinstance(h, Acts):  # of a Gated, for this linear
        return h
    if norm is None:
        return linear.prepare(h, kind)
    return linear.prepare(h, kind, norm=norm.weight, eps=norm.eps)


def _floats(h: Tensor | Acts, norm: ScaledNorm | None) -> Tensor | None:
    """What adapters get of the inputs of a linear, not quantised; None: what a gate made."""
    return None if isinstance(h, Acts) else _prepared(h, "f32", norm).dequantise()


def _emit(made: Any, op: PackedOp) -> None:
    """One op for C++, see native/bind_forward.cpp."""

    def norm(found: ScaledNorm | None) -> dict[str, Any]:
        return {"norm": None, "eps": 0.0} if found is None else {"norm": found.weight, "eps": found.eps}

    match op:
        case Project():
            linears = [linear.bound(w.packed, w.bias) for w in op.weights]
            made.project(linears, onto_stream=op.onto_stream, **norm(op.norm))
        case Gated():
            bound = linear.bound(op.weights.packed, op.weights.bias)
            how = {"activation": op.activation, "width": op.width, "kind": op.kind, "block": op.block}
            made.gated(bound, **how, **norm(op.norm))
        case Mix():
            norms = [None if n is None else n.weight for n in (op.q_norm, op.k_norm)]
            eps = 0.0 if op.q_norm is None else op.q_norm.eps
            table = -1 if op.table is None else op.table
            made.mix(*norms, eps=eps, table=table, scale=op.op.scale, window=op.op.window, softcap=op.op.softcap)
        case Normalise():
            made.normalise(**norm(op.norm))
        case Routed():
            moe = op.source.config

            def bound(blocks: Sequence[FeedForward]) -> list[Any]:
                return [linear.bound(w.packed, w.bias) for block in blocks for w in (block.gated, block.down)]

            made.experts(
                router=op.router,
                bias=op.bias,
                top_k=moe.top_k,
                groups=moe.groups,
                groups_kept=moe.groups_kept,
                normalise=moe.normalise,
                scale=moe.scale,
                experts=bound(op.experts),
                width=op.experts[0].width,
                block=op.experts[0].block,
                shared=bound(op.blocks[len(op.experts) :]),
                shared_width=moe.shared_size,
                shared_block=1 if op.shared is None else op.shared.block,
                onto_stream=op.onto_stream,
                **norm(op.norm),
            )
        case Sum():
            made.sum(op.factor)
