"""Adapters of a turned model (`models.basis`). They were trained in the model's own basis, so A's inputs and B's
outputs go into the bases that the matrix of the turned model reads and writes: the same sums, and nothing more at run
time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from dfastllm.errors import UnsupportedError
from dfastllm.lora import EMBED, Adapter, Delta
from dfastllm.models.basis import Basis, Side

__all__ = ["require_turnable", "turned_adapter", "turned_bytes"]


def require_turnable(adapter: Adapter, basis: Basis) -> None:
    """Raises UnsupportedError, naming the matrix, for a factor on outputs that are turned: it scales channels that are
    no more there one by one."""
    for name, delta in adapter.deltas.items():
        if delta.factor is not None and (name == EMBED or basis.sides[name].turns_outputs):
            raise UnsupportedError(
                f"a DoRA adapter of {name} scales its outputs one by one, and this model's basis mixes them.",
                param="lora",
                hint="Load the model as it was stored, or with quantization w8g.",
            )


def turned_adapter(adapter: Adapter, basis: Basis, gains: Mapping[str, Tensor]) -> Adapter:
    """The adapter for the turned model, its matrices float32; it keeps its hash. gains: of the folded norms, by own
    name."""
    deltas = {}
    for name, delta in adapter.deltas.items():
        side = basis.sides[name]
        if name == EMBED and side.inputs is not None:  # the stream begins with its rows: they are A's and B's outputs
            side = Side(parts=((side.inputs.size, side.inputs),))
        gain = None if side.gain is None else gains[side.gain]
        deltas[name] = _turned(delta, side, basis.sides[name], gain)
    return dataclasses.replace(adapter, deltas=deltas)


def turned_bytes(adapter: Adapter) -> int:
    """What `turned_adapter` makes beside the adapter: everything in float32 but the factors, which are shared."""
    tensors = (tensor for delta in adapter.deltas.values() for name, tensor in delta.tensors if name != "factor")
    return sum(4 * tensor.numel() for tensor in tensors)


def _turned(delta: Delta, side: Side, whole: Side, gain: Tensor | None) -> Delta:
    """side: of A and B; whole: of a matrix that takes the place of the base's."""
    b = delta.natural_b
    return Delta.of(
        None if delta.a is None else _inputs(delta.a, side, gain),
        None if b is None else side.outputs(b.double()).float(),
        delta.scale,
        delta.factor,
        None if delta.shift is None else side.outputs(delta.shift.double()).float().contiguous(),
        None if delta.full is None else _inputs(delta.full, whole, gain),
    )


def _inputs(matrix: Tensor, side: Side, gain: Tensor | None) -> Tensor:
    """matrix [rows, inputs], which reads the turned inputs."""
    wide = matrix.double() if gain is None else matrix.double() * gain.double()
    if side.inputs is not None and not side.late:
        wide = side.inputs.apply(wide)
    return wide.float().contiguous()
