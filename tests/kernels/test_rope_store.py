"""Rotary positions, head norms and K,V writes; the K,V cache itself."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dfastllm.errors import ValidationError
from dfastllm.kernels import attention_plain, extension
from dfastllm.kernels.attention import rope_store
from dfastllm.kernels.kv import KV_TYPES, KvCache, KvLayer
from dfastllm.kernels.step import BLOCK, Step

STATM = Path("/proc/self/statm")
needs_native = pytest.mark.skipif(extension.native() is None, reason=extension.describe())


def step_of(slot: list[int], own_slot: list[int]) -> Step:
    return Step.of({"ids": np.zeros(len(slot)), "slot": slot, "own_slot": own_slot})


class Case:
    """A few rows, some to be kept, some of this pass only, some nowhere, some both."""

    def __init__(
        self, rows: int = 21, heads: int = 4, kv_heads: int = 2, dim: int = 64, rotary: int = 64, norms: bool = True,
        whole: bool = False,
        type: str = "f32", seed: int = 0,
    ) -> None:  # fmt: skip
        draw = torch.Generator().manual_seed(seed)
        self.rows, self.heads, self.kv_heads, self.dim, self.type = rows, heads, kv_heads, dim, type
        self.qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim, generator=draw) * 3
        angle = torch.rand(rows, rotary // 2, generator=draw) * 100
        self.cos, self.sin = angle.cos(), angle.sin()
        sizes = (heads * dim, kv_heads * dim) if whole else (dim, dim)
        self.norms = [torch.randn(size, generator=draw) + 2 for size in sizes] if norms else [None, None]
        self.blocks = rows // BLOCK + 2
        places = torch.randperm(self.blocks * BLOCK, generator=draw)[:rows]
        kept, passing = torch.rand(2, rows, generator=draw) < 0.7
        self.step = step_of(torch.where(kept, places, -1).tolist(), torch.where(passing, places.flip(0), -1).tolist())

    def run(self, function: Callable[..., None] = rope_store) -> tuple[Tensor, KvLayer, KvLayer]:
        qkv = self.qkv.clone()
        empty = KvCache(1, self.blocks, self.kv_heads, self.dim, self.type).layer(0)
        # clones: memory that ends where the blocks do, for the address sanitizer
        cache, own = (KvLayer(*(None if t is None else t.clone() for t in empty)) for _ in range(2))
        q_norm, k_norm = self.norms
        function(
            qkv, self.cos, self.sin, self.step, cache, own, heads=self.heads, q_norm=q_norm, k_norm=k_norm, eps=1e-6
        )
        return qkv, cache, own

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k [rows, heads, dim] and v, in float64."""
        q, k, v = self.qkv.double().view(self.rows, -1, self.dim).split([self.heads, self.kv_heads, self.kv_heads], 1)
        half = self.cos.shape[1]
        out = []
        for x, weight in zip((q, k), self.norms, strict=True):
            if weight is not None:
                whole = len(weight) > self.dim
                size = x.square().mean((1, 2) if whole else 2, keepdim=True)
                x = x / (size + 1e-6).sqrt() * weight.double().view(-1, self.dim)
            pair = torch.complex(x[..., :half], x[..., half : 2 * half])
            turned = pair * torch.complex(self.cos.double(), self.sin.double())[:, None]
            out.append(torch.cat([turned.real, turned.imag, x[..., 2 * half :]], -1))
        return out[0], out[1], v


@settings(max_examples=40, deadline=None)
@given(
    st.builds(
        lambda dim, part, **kw: Case(dim=dim, rotary=2 * int(dim * part / 2), **kw),
        dim=st.sampled_from([64, 128, 80, 96, 16, 20, 37, 2]),
        part=st.sampled_from([1.0, 0.5, 0.25, 0.0]),
        rows=st.integers(1, 40),
        kv_heads=st.integers(1, 3),
        heads=st.just(6),
        norms=st.booleans(),
        whole=st.booleans(),
        seed=st.integers(0, 99),
    )
)
@pytest.mark.parametrize("function", [rope_store, attention_plain.rope_store], ids=["dispatched", "twin"])
def test_agrees_with_float64(function: Callable[..., None], case: Case) -> None:
    q, k, v = case.expected()
    qkv, cache, own = case.run(function)
    got = qkv.double().view(case.rows, -1, case.dim)
    torch.testing.assert_close(got[:, : case.heads], q, rtol=1e-6, atol=1e-5)
    assert torch.equal(got[:, case.heads + case.kv_heads :], v)
    for layer, slots in ((cache, case.step.slot), (own, case.step.own_slot)):
        written = torch.zeros(case.blocks * BLOCK, dtype=torch.bool)
        for row, slot in enumerate(slots.tolist()):
            if slot < 0:
                continue
            written[slot] = True
            block, at = divmod(slot, BLOCK)
            torch.testing.assert_close(layer.k[block, :, :, at].double(), k[row], rtol=1e-6, atol=1e-5)
            assert torch.equal(layer.v[block, :, at].double(), v[row])
        keys, values = attention_plain.read_keys(layer, torch.arange(case.blocks), case.blocks * BLOCK)
        assert not keys[~written].any()
        assert not values[~written].any()


@needs_native
@pytest.mark.parametrize("type", list(KV_TYPES))
@pytest.mark.parametrize("dim", [64, 37])
def test_native_and_twin_write_the_same_bits(type: str, dim: int) -> None:
    """Without norms (whose sums run in another order) every operation rounds alike, the conversions too."""
    case = Case(dim=dim, rotary=dim - dim % 2, norms=False, type=type)
    ours, theirs = case.run(), case.run(attention_plain.rope_store)
    assert torch.equal(ours[0], theirs[0])
    for layer, twin in zip(ours[1:], theirs[1:], strict=True):
        for a, b in zip(layer, twin, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


@needs_native
@pytest.mark.parametrize("type", list(KV_TYPES))
def test_a_row_is_its_own(type: str) -> None:
    """Alone, and with any number of threads, a row's q and K,V have the same bits."""
    case = Case(rows=40, type=type)
    before = extension.threads()
    try:
        results = []
        for count in (1, 2, 3, 8):
            extension.set_threads(count)
            results.append(case.run())
    finally:
        extension.set_threads(before)
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
        assert all(torch.equal(a, b) for a, b in zip(results[0][1], other[1], strict=True) if a is not None)
    for row in (0, 7, 39):
        one = Case(rows=40, type=type)
        one.rows, one.qkv, one.cos, one.sin = (
            1,
            case.qkv[row : row + 1],
            case.cos[row : row + 1],
            case.sin[row : row + 1],
        )
        one.step = step_of([5], [-1])
        qkv, cache, _ = one.run()
        assert torch.equal(qkv[0], results[0][0][row])
        slot = int(case.step.slot[row])
        if slot >= 0:
            assert torch.equal(cache.k[0, :, :, 5], results[0][1].k[slot // BLOCK, :, :, slot % BLOCK])
            assert torch.equal(cache.v[0, :, 5], results[0][1].v[slot // BLOCK, :, slot % BLOCK])


@pytest.mark.parametrize("function", [rope_store, attention_plain.rope_store], ids=["dispatched", "twin"])
def test_bf16_rounds_to_nearest_even(function: Callable[..., None]) -> None:
    case = Case(rows=1, heads=1, kv_heads=1, dim=16, rotary=0, norms=False, type="bf16")
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x00000001, 0x7FC00001], dtype=torch.int32)
    case.qkv[0, 16:22] = bits.view(torch.float32)
    case.qkv[0, 32:48] = -case.qkv[0, 16:32]
    case.step = step_of([3], [-1])
    _, cache, _ = case.run(function)
    wanted = case.qkv[0, 16:32].bfloat16()
    torch.testing.assert_close(cache.k[0, 0, :, 3], wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(cache.v[0, 0, 3], -wanted, rtol=0, atol=0, equal_nan=True)
    assert cache.k[0, 0, 3, 3].isinf()


@pytest.mark.parametrize("function", [rope_store, attention_plain.rope_store], ids=["dispatched", "twin"])
def test_int8_codes(function: Callable[..., None]) -> None:
    """Half a step off at most, the largest exactly, zeros stay zeros, and what is not finite is not lost."""
    case = Case(rows=5, heads=1, kv_heads=1, dim=64, rotary=0, norms=False, type="int8")
    case.step = step_of([0, 1, 2, 3, 4], [-1] * 5)
    case.qkv[1, 64:] = 0
    case.qkv[2, 70] = torch.nan
    case.qkv[2, 140] = torch.inf
    case.qkv[3, 64:] *= 1e-42  # denormal scales
    case.qkv[4, 64:] *= 1e37
    _, cache, _ = case.run(function)
    assert cache.k_scales is not None
    assert cache.v_scales is not None
    k, v = attention_plain.read_keys(cache, torch.arange(1), 5)
    assert k[2].isnan().all()
    assert v[2].isnan().all()
    assert not k[1].any()
    assert not v[1].any()
    for got, wanted in ((k, case.qkv[:, 64:128]), (v, case.qkv[:, 128:])):
        for row in (0, 4):
            step = wanted[row].abs().max() / 127
            assert ((got[row, 0] - wanted[row]).abs() <= step * 0.5001).all()
            largest = wanted[row].abs().argmax()
            torch.testing.assert_close(got[row, 0, largest], wanted[row, largest])
        assert got[3].isfinite().all()
        assert (got[3].abs() <= 1e-40).all()


def test_bad_arguments() -> None:
    case = Case()
    _, cache, own = case.run()

    def refused(message: str, **change: object) -> None:
        arguments = {
            "qkv": case.qkv,
            "cos": case.cos,
            "sin": case.sin,
            "step": case.step,
            "cache": cache,
            "own": own,
            "heads": 4,
        }
        with pytest.raises(ValidationError, match=message):
            rope_store(**(arguments | change))  # type: ignore[arg-type]

    refused("qkv must be", qkv=case.qkv[:, :-1])
    refused("qkv must be", qkv=case.qkv.bfloat16())
    refused("multiple of the 2", heads=5)
    refused("sin must be", sin=case.sin[:, :-1])
    refused("cos must be", cos=case.cos.double())
    refused("do not fit into heads of 64", cos=torch.ones(21, 33), sin=torch.ones(21, 33))
    refused("q_norm must be", q_norm=torch.ones(32))
    refused("k_norm must be", k_norm=torch.ones(64, dtype=torch.float64))
    refused("slot of the step must be from -1 to", step=step_of([case.blocks * BLOCK] * 21, [-1] * 21))
    refused("slot of the step must be from -1 to", step=step_of([-2] * 21, [-1] * 21))
    refused("own_slot of the step must be from -1", own=None)


@pytest.mark.parametrize("type", list(KV_TYPES))
def test_cache_layout(type: str) -> None:
    cache = KvCache(3, 5, 2, 20, type)
    item = {"f32": 4, "bf16": 2, "int8": 1}[type]
    assert cache.layers == 3
    assert cache.blocks == 5
    assert cache.nbytes == 2 * 3 * 5 * 2 * 16 * (20 * item + (4 if type == "int8" else 0))
    second = cache.layer(1)
    assert all(t.data_ptr() % 64 == 0 for t in (cache.k, cache.v))
    assert tuple(second.k.shape) == (5, 2, 20, 16)
    assert tuple(second.v.shape) == (5, 2, 16, 20)
    assert not any(t.any() for t in second if t is not None)


@pytest.mark.skipif(not STATM.exists(), reason="the process's memory is read from /proc")
def test_untouched_blocks_cost_no_memory() -> None:
    def resident() -> int:
        return int(STATM.read_text().split()[1]) * resource.getpagesize()

    before = resident()
    cache = KvCache(24, 8192, 2, 64)  # 128 k positions
    cache.layer(0).k[:10] = 1
    assert cache.nbytes == 3 << 30
    assert resident() - before < 64 << 20


@pytest.mark.parametrize(
    "change", [{"type": "f16"}, {"layers": 0}, {"blocks": -1}, {"kv_heads": 0}, {"dim": 0}], ids=lambda c: next(iter(c))
)
def test_bad_caches(change: dict[str, int | str]) -> None:
    with pytest.raises(ValidationError):
        KvCache(**({"layers": 1, "blocks": 1, "kv_heads": 1, "dim": 16, "type": "f32"} | change))  # type: ignore[arg-type]
