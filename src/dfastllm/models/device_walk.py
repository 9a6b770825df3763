"""One forward of a decoder on a device, op by op: see `models.device`. The stream is float32, everything between is the
model's dtype; an Add waits for the norm behind it, which adds and norms in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dfastllm.kernels.activations import Acts
from dfastllm.kernels.halt import Halt, Interrupted
from dfastllm.kernels.packed import FORMS
from dfastllm.kernels.triton.weight import Weight, kind_of, one_of, rows_of
from dfastllm.models.mixture import route
from dfastllm.models.packed import (
    FeedForward,
    Gated,
    Mix,
    Normalise,
    PackedOp,
    Project,
    Routed,
    ScaledNorm,
    Sum,
    Weights,
)
from dfastllm.models.program import Linear

if TYPE_CHECKING:
    from dfastllm.kernels.triton.kv import DeviceKv
    from dfastllm.kernels.triton.laid import Laid
    from dfastllm.kernels.triton.ops import Ops
    from dfastllm.models.adapted import AdaptedRows
    from dfastllm.models.device import DeviceDecoder

__all__ = ["DeviceOp", "Mixture", "Walk"]


@dataclass(frozen=True, eq=False)
class Mixture:
    """A Routed whose experts lie in two weights, [experts, n, k] each."""

    routed: Routed
    gated: Weight
    down: Weight
    block: int


DeviceOp = PackedOp | Mixture


class Walk:
    """One forward. x: the stream [rows, hidden]; its pending sum, y times factor, is added by the next norm; h: the
    branch, None where it still is the stream."""

    def __init__(
        self,
        model: DeviceDecoder,
        laid: Laid,
        kv: DeviceKv,
        ops: Ops,
        adapt: AdaptedRows | None,
        halt: Halt | None,
    ) -> None:
        self.model, self.laid, self.kv, self.ops = model, laid, kv, ops
        self.adapt, self.halt = adapt, halt
        self.h: Tensor | Acts | None = None
        self.y: Tensor | None = None
        self.factor = 1.0
        self.prefix = ""  # of the layer's own names
        self.product: Tensor | None = None  # what a gate made, as floats, for adapters
        self.rows: Tensor | None = None  # which rows of the step are left, None: all

    def run(self) -> Tensor:
        model, laid = self.model, self.laid
        self.x = rows_of(model.embed, laid.ids)
        if self.adapt is not None:
            self.x = self.adapt.embed(laid.ids.long(), self.x)
        if model.program.embed_factor != 1:
            self.x = self.x * model.program.embed_factor
        self.angles = model.angles(laid.positions)
        for i, layer in enumerate(model.layers):
            if self.halt is not None and self.halt.asked:
                raise Interrupted
            self.prefix = f"layers.{i}."
            for op in layer:
                self._step(op, i)
        if self.rows is None:
            self._take(laid.want)
        acts: Acts = self.ops.add_norm(
            self.x, self.y, model.norm.weight, model.norm.eps, factor=self.factor, kind="f32"
        )
        return acts.data

    def _step(self, op: DeviceOp, layer: int) -> None:
        match op:
            case Normalise():
                self.h = self._inputs("f32", op.norm).data
            case Project():
                made = self._linears(op)
                if op.onto_stream:
                    self._add(made, 1.0)
                else:
                    self.h = made
            case Gated():
                self._gated(op)
            case Mix():
                self._mix(op, layer)
            case Mixture():
                made = self._mixture(op, f"layers.{layer}.{op.routed.source.name}")
                if op.routed.onto_stream:
                    self._add(made, 1.0)
                else:
                    self.h = made
            case Sum():
                assert isinstance(self.h, Tensor)
                self._add(self.h, op.factor)
            case Routed():  # pragma: no cover
                raise AssertionError("a mixture that was not stacked")

    def _add(self, y: Tensor, factor: float) -> None:
        """The branch ends, and is to be added to the stream."""
        self.h, self.y, self.factor = None, y, factor

    def _inputs(self, kind: str, norm: ScaledNorm | None) -> Acts:
        """The branch, normed, as inputs of a kind; of the stream once its sum is made."""
        weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        if isinstance(self.h, Acts):  # of a gate, for this linear
            return self.h
        acts: Acts
        if self.h is None:
            acts = self.ops.add_norm(self.x, self.y, weight, eps, factor=self.factor, kind=kind)
            self.y, self.factor = None, 1.0
        elif norm is None:
            acts = self.ops.prepare(self.h, kind)
        else:
            acts = self.ops.add_norm(self.h, None, weight, eps, kind=kind)
        return acts

    def _linear(self, x: Acts, weights: Weights, out: torch.dtype, *, steady: bool = False) -> Tensor:
        """steady: a row's bits do not depend on the rows beside it, whatever the model asks for."""
        invariant = steady or self.model.invariant
        y: Tensor = self.ops.linear(x, weights.packed, weights.bias, out=out, invariant=invariant)
        return y

    def _out(self, weights: Weights, onto_stream: bool) -> torch.dtype:
        """What a linear gives: sums of codes go to the float32 stream unrounded."""
        form = FORMS.get(weights.packed.format)
        exact = onto_stream and form is not None and form.quantised
        return torch.float32 if exact else self.model.dtype

    def _linears(self, op: Project) -> Tensor:
        inputs: dict[str, Acts] = {}
        for weights in op.weights:
            kind = kind_of(weights.packed.format)
            if kind not in inputs:
                inputs[kind] = self._inputs(kind, op.norm)
        floats = None if self.adapt is None else self._floats(op.norm)
        onto = op.onto_stream
        parts = [self._linear(inputs[kind_of(w.packed.format)], w, self._out(w, onto)) for w in op.weights]
        made = parts[0] if len(parts) == 1 else torch.cat([part.to(self.model.dtype) for part in parts], dim=1)
        return made if floats is None else self._adapted(op.source, floats, made)

    def _floats(self, norm: ScaledNorm | None) -> Tensor:
        """What adapters get of a linear's inputs, not quantised."""
        if isinstance(self.h, Acts):
            assert self.product is not None
            return self.product
        return self._inputs("f32", norm).data

    def _adapted(self, source: Linear, x: Tensor, y: Tensor) -> Tensor:
        """What a linear of the program gives, y [rows, its matrices side by side], as the rows' adapters have it."""
        assert self.adapt is not None
        column = 0
        for matrix in source.matrices:
            size = sum(matrix.outputs)
            self.adapt(f"{self.prefix}{matrix.name}", x, y[:, column : column + size], self.rows)
            column += size
        return y

    def _gated(self, op: Gated) -> None:
        w = op.weights
        both = self._linear(self._inputs(kind_of(w.packed.format), op.norm), w, self.model.dtype)
        if self.adapt is not None:
            both = self._adapted(op.source, self._floats(op.norm), both)
            self.product = self.ops.gate(both, op.activation, "f32").data
        self.h = self.ops.gate(both, op.activation, op.kind, block=op.block)

    def _mix(self, op: Mix, layer: int) -> None:
        qkv, attend = self.h, op.op
        assert isinstance(qkv, Tensor)
        cos, sin = (None, None) if op.table is None else self.angles[op.table]
        shape = {"heads": attend.heads, "kv_heads": attend.kv_heads, "dim": attend.dim}
        kv = self.kv.layer(layer)
        norms = (None if norm is None else norm.weight for norm in (op.q_norm, op.k_norm))
        eps = 0.0 if op.q_norm is None else op.q_norm.eps
        q_norm, k_norm = norms
        self.ops.rope_write(qkv, self.laid, cos, sin, kv, q_norm=q_norm, k_norm=k_norm, eps=eps, **shape)
        self.h = self.ops.attention(
            qkv,
            kv,
            self.laid,
            scale=attend.scale,
            window=attend.window,
            softcap=attend.softcap,
            invariant=self.model.invariant,
            **shape,
        )
        if layer == len(self.model.layers) - 1 and len(self.laid.want) < self.laid.rows:
            self._take(self.laid.want)  # what follows is only looked at in the wanted rows

    def _take(self, want: Tensor) -> None:
        self.rows = want.long()
        self.x = self.x.index_select(0, want)
        self.y = None if self.y is None else self.y.index_select(0, want)
        if isinstance(self.h, Tensor):
            self.h = self.h.index_select(0, want)

    def _mixture(self, op: Mixture, name: str) -> Tensor:
        routed, moe = op.routed, op.routed.source.config
        kind = kind_of(op.gated.format)
        floats = self._inputs("f32", routed.norm)
        inputs = {"f32": floats}
        for wanted in (kind, *([] if routed.shared is None else [kind_of(routed.shared.gated.packed.format)])):
            if wanted not in inputs:
                inputs[wanted] = self._inputs(wanted, routed.norm)
        router = torch.nn.functional.linear(floats.data, routed.router)
        if self.adapt is not None:
            self.adapt(f"{name}.router", floats.data, router, self.rows)
        weights, chosen = route(router, routed.bias, moe)
        if self.adapt is None:
            out: Tensor = self.ops.experts(
                inputs[kind],
                chosen.int(),
                weights,
                op.gated,
                op.down,
                block=op.block,
                kind=kind_of(op.down.format),
            )
        else:
            out = self._experts(op, name, inputs[kind], floats.data, (weights, chosen))
        if routed.shared is not None:
            shared = inputs[kind_of(routed.shared.gated.packed.format)]
            out = out + self._feed_forward(routed.shared, f"{name}.shared", shared, floats.data, self.rows)
        return out

    def _experts(self, op: Mixture, name: str, x: Acts, floats: Tensor, routes: tuple[Tensor, Tensor]) -> Tensor:
        """The sum over the experts one after the other, as adapters have them."""
        weights, chosen = routes
        out = torch.zeros(x.rows, op.down.n, device=floats.device)
        for number in sorted(set(chosen.flatten().tolist())):
            row, slot = (chosen == number).nonzero(as_tuple=True)
            block = FeedForward(
                Weights(one_of(op.gated, number)), Weights(one_of(op.down, number)), op.gated.n // 2, op.block
            )
            scales, sums = (None if side is None else side[row] for side in (x.scales, x.sums))
            taken = Acts(x.kind, len(row), x.k, x.data[row], scales, sums)
            of = row if self.rows is None else self.rows[row]
            part = self._feed_forward(block, f"{name}.experts.{number}", taken, floats[row], of)
            out = out.index_add(0, row, part.float() * weights[row, slot, None])
        return out

    def _feed_forward(self, block: FeedForward, name: str, x: Acts, floats: Tensor, rows: Tensor | None) -> Tensor:
        """An expert of some rows of the step, float32. How many rows chose it must not show."""
        both = self._linear(x, block.gated, torch.float32, steady=True)
        down = block.down.packed
        if self.adapt is None:
            acts = self.ops.gate(both, "silu", kind_of(down.format), block=block.block)
            return self._linear(acts, block.down, torch.float32, steady=True)
        self.adapt(f"{name}.gate_proj", floats, both[:, : block.width], rows)
        self.adapt(f"{name}.up_proj", floats, both[:, block.width :], rows)
        product = self.ops.gate(both, "silu", "f32").data
        acts = self.ops.gate(both, "silu", kind_of(down.format), block=block.block)
        out = self._linear(acts, block.down, torch.float32, steady=True)
        return self.adapt(f"{name}.down_proj", product, out, rows)
