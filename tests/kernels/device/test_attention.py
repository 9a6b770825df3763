"""Attention under Triton's interpreter: the twin's numbers, and a row's bits are its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from tests.kit.interpreter import lent, needs_interpreter, step_of
from torch import Tensor

from dfastllm.kernels.step import Step
from dfastllm.kernels.triton import laid, plain
from dfastllm.kernels.triton.kv import DeviceKv

pytestmark = needs_interpreter
module = lent(pytest.importorskip("dfastllm.kernels.triton.attention"))
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shape:
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16

    @property
    def facts(self) -> dict[str, Any]:
        return {"heads": self.heads, "kv_heads": self.kv_heads, "dim": self.dim, "scale": self.dim**-0.5}


def filled(shape: Shape, dtype: torch.dtype, slots: int, seed: int = 0) -> DeviceKv:
    """K and V of random numbers in every slot."""
    kv = DeviceKv(1, slots, shape.kv_heads, shape.dim, dtype, CPU)
    draw = torch.Generator().manual_seed(seed)
    for values, scales in ((kv.k, kv.k_scales), (kv.v, kv.v_scales)):
        x = torch.randn(values.shape, generator=draw)
        if scales is not None:
            scales[:] = x.abs().amax(-1) / 127
            x = (x / scales[..., None]).round()
        values[:] = x.to(dtype)
    return kv


def ragged(step: Step, seed: int) -> Step:
    """The step with any limits: rows that see less than they might, or nothing."""
    draw = np.random.default_rng(seed)
    for row0, row1, cached, own, *_ in step.spans.tolist():
        step.cached_limit[row0:row1] = draw.integers(0, cached + 1, row1 - row0)
        step.own_limit[row0:row1] = draw.integers(0, own + 1, row1 - row0)
    return step


def masked(step: Step, spans: list[int], seed: int) -> Step:
    """The step with a mask of some of its spans, whose rows may see every key."""
    draw, arrays = np.random.default_rng(seed), {name: value.copy() for name, value in step.arrays().items()}
    masks = [np.zeros(0, dtype=np.uint8)]
    for number in spans:
        row0, row1, cached, own = step.spans[number, :4].tolist()
        arrays["spans"][number, 7] = sum(mask.size for mask in masks)
        arrays["cached_limit"][row0:row1], arrays["own_limit"][row0:row1] = cached, own
        masks.append((draw.random((row1 - row0) * (cached + own)) < 0.6).astype(np.uint8))
    return Step.of({**arrays, "mask": np.concatenate(masks)})


def rows_of(step: Step, shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(len(step), (shape.heads + 2 * shape.kv_heads) * shape.dim, generator=draw).to(dtype)


def slots_of(step: Step) -> int:
    return 16 * max(1, len(step.blocks))


def compare(step: Step, shape: Shape, *, kv: torch.dtype, dtype: torch.dtype, atol: float, **how: Any) -> None:
    tile_rows = how.pop("tile_rows", 4)
    qkv, cache = rows_of(step, shape, dtype), filled(shape, kv, slots_of(step)).layer(0)
    place = laid.on(CPU, step, tile_rows)
    got = module.attention(qkv, cache, place, **shape.facts, **how)
    how.pop("split", None)
    wanted = plain.attention(qkv.float(), cache, place, **shape.facts, **how)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), wanted, rtol=0, atol=atol)


MIX = [(3, 21, True), (5, 40, False), (1, 90, True), (4, 0, False)]


@pytest.mark.parametrize(
    ("shape", "tile_rows"),
    [(Shape(), 4), (Shape(7, 1, 20), 2), (Shape(9, 3, 37), 8), (Shape(2, 2, 8), 16), (Shape(20, 1, 16), 1)],
)
def test_shapes(shape: Shape, tile_rows: int) -> None:
    step = step_of(MIX, gap=1)
    compare(step, shape, kv=torch.float32, dtype=torch.float32, atol=5e-6, tile_rows=tile_rows)


@pytest.mark.parametrize(
    ("kv", "dtype", "atol"),
    [
        (torch.float16, torch.float16, 4e-3),
        (torch.bfloat16, torch.bfloat16, 3e-2),
        (torch.bfloat16, torch.float32, 3e-2),
        (torch.float8_e4m3fn, torch.float16, 4e-3),
        (torch.int8, torch.float32, 5e-6),
        (torch.int8, torch.float16, 4e-3),
    ],
)
def test_types(kv: torch.dtype, dtype: torch.dtype, atol: float) -> None:
    compare(step_of(MIX), Shape(), kv=kv, dtype=dtype, atol=atol)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (20, 0.0), (700, 2.0)])
def test_long_contexts(split: bool, window: int, softcap: float) -> None:
    """More than a piece of keys, with a window that leaves out whole pieces."""
    step = step_of([(2, 1020, True), (3, 5, False)])
    how = {"window": window, "softcap": softcap, "split": split}
    compare(step, Shape(2, 1), kv=torch.float32, dtype=torch.float32, atol=5e-6, **how)


@pytest.mark.parametrize("window", [0, 15])
def test_any_limits_and_masks(window: int) -> None:
    compare(ragged(step_of(MIX, gap=1), 3), Shape(), kv=torch.float32, dtype=torch.float32, atol=5e-6, window=window)
    compare(masked(step_of(MIX), [1, 3], 5), Shape(), kv=torch.float32, dtype=torch.float32, atol=5e-6, window=window)


def test_rows_that_see_nothing_give_zeros() -> None:
    step = step_of(MIX, gap=2)
    step.cached_limit[:], step.own_limit[:] = 0, 0
    shape = Shape()
    kv = filled(shape, torch.float32, slots_of(step)).layer(0)
    got = module.attention(rows_of(step, shape), kv, laid.on(CPU, step, 4), **shape.facts)
    assert not got.any()


@pytest.mark.parametrize("kv", [torch.float32, torch.bfloat16, torch.int8])
def test_a_row_alone_has_the_same_bits(kv: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, beside others, in pieces of several programs or of one, with NaN in all slots of others."""
    shape, mine, others = Shape(3, 1, 16), (2, 520, True), [(1, 20, True), (5, 3, False)]
    together, alone = step_of([others[0], mine, others[1]], seed=4, gap=1), step_of([mine], seed=9)
    qkv = rows_of(together, shape)
    row0, row1, cached, *_ = together.spans[1].tolist()
    first, second = (filled(shape, kv, slots_of(step), 1) for step in (together, alone))
    for values, theirs in ((first.k, second.k), (first.v, second.v), (first.k_scales, second.k_scales)):
        if values is not None and theirs is not None:
            at, their_at = (_slots(step, number, cached) for step, number in ((together, 1), (alone, 0)))
            theirs[0, their_at] = values[0, at].clone()
    if first.v_scales is not None and second.v_scales is not None:
        second.v_scales[0, _slots(alone, 0, cached)] = first.v_scales[0, _slots(together, 1, cached)]
    elif kv != torch.int8:
        unseen = torch.ones(slots_of(together), dtype=torch.bool)
        unseen[_slots(together, 1, cached)] = False
        first.k[0, unseen] = torch.nan
    found = [
        module.attention(qkv, first.layer(0), laid.on(CPU, together, 4), **shape.facts, split=split, invariant=True)[
            row0:row1
        ]
        for split in (False, True)
    ]
    found += [
        module.attention(
            qkv[row0:row1].clone(), second.layer(0), laid.on(CPU, alone, 4), **shape.facts, split=split, invariant=True
        )
        for split in (False, True)
    ]
    monkeypatch.setattr(
        "dfastllm.kernels.triton.attention.processors", lambda device: 1
    )  # then one program has all pieces of a tile
    place = laid.on(CPU, together, 4)
    found.append(module.attention(qkv, first.layer(0), place, **shape.facts, split=True, invariant=True)[row0:row1])
    assert found[0].isfinite().all()
    assert all(torch.equal(found[0], other) for other in found[1:])


def _slots(step: Step, span: int, count: int) -> Tensor:
    key = np.arange(count)
    return torch.from_numpy(step.blocks[step.spans[span, 4] + key // 16].astype(np.int64) * 16 + key % 16)
