"""A packed mixture of experts in plain torch: the twin of native/experts.cpp, and what the native kernels compute where
they are not built."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dfastllm.kernels import linear, linear_plain
from dfastllm.kernels.activations import Acts
from dfastllm.kernels.linear_plain import gate_product
from dfastllm.kernels.packed import QTensor
from dfastllm.models.mixture import route

if TYPE_CHECKING:
    from dfastllm.models.adapted import Places, PlainRows
    from dfastllm.models.packed import FeedForward, Routed

__all__ = ["routed"]


def routed(op: Routed, h: Tensor, adapted: PlainRows | None) -> Tensor:
    """What the mixture makes of rows h float32 [rows, hidden], of the same shape. adapted: what adapters change."""
    kinds = {block.kinds[0] for block in op.blocks}
    norm = {} if op.norm is None else {"norm": op.norm.weight, "eps": op.norm.eps}
    inputs = {kind: linear.prepare(h, kind, **norm) for kind in {"f32", *kinds}}  # type: ignore[arg-type]
    floats = inputs["f32"].dequantise()
    count = 1 + 2 * len(op.blocks)
    places: list[Places] = [{}] * count if adapted is None else adapted.next_places(count)
    logits = linear_plain.linear(inputs["f32"], QTensor("f32", op.router.float()))
    if adapted is not None:
        adapted.change(places[0], logits, floats)
    weights, chosen = route(logits, op.bias, op.source.config)
    out = torch.zeros_like(h)
    for i, block in enumerate(op.experts):
        row, slot = (chosen == i).nonzero(as_tuple=True)
        if len(row):
            part = _feed_forward(block, inputs[block.kinds[0]], floats, adapted, places[1 + 2 * i : 3 + 2 * i], row)
            out = out.index_add(0, row, part * weights[row, slot, None])
    if op.shared is not None:
        every = torch.arange(len(h))
        out = out + _feed_forward(op.shared, inputs[op.shared.kinds[0]], floats, adapted, places[-2:], every)
    return out


def _feed_forward(
    block: FeedForward,
    inputs: Acts,
    floats: Tensor,
    adapted: PlainRows | None,
    places: list[Places],
    rows: Tensor,
) -> Tensor:
    """One expert of some rows of the step."""
    up, down = places
    taken, gated, kind = _rows(inputs, rows), block.gated, block.kinds[1]
    if adapted is None:
        middle = linear.linear_gated(taken, gated.packed, gated.bias, kind=kind, width=block.width, block=block.block)
        return linear.linear(middle, block.down.packed, block.down.bias)
    both = adapted.change(up, linear.linear(taken, gated.packed, gated.bias), floats[rows], rows)
    product = gate_product(both, block.width, "silu")
    out = linear.linear(linear.prepare(product, kind, block=block.block), block.down.packed, block.down.bias)
    return adapted.change(down, out, product, rows)


def _rows(acts: Acts, rows: Tensor) -> Acts:
    """Some of the prepared rows, in this order."""
    scales, sums = (None if side is None else side[rows] for side in (acts.scales, acts.sums))
    return Acts(acts.kind, len(rows), acts.k, acts.data[rows], scales, sums)
