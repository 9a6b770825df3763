"""Attention over K,V in blocks: against float64, and the native kernels' promise that a row's bits are its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kit.isas import lesser
from torch import Tensor

from dfastllm.errors import ValidationError
from dfastllm.kernels import attention_plain, extension
from dfastllm.kernels.attention import attention
from dfastllm.kernels.kv import KV_TYPES, KvCache, KvLayer
from dfastllm.kernels.step import BLOCK, SPAN_WORDS, Step

needs_native = pytest.mark.skipif(extension.native() is None, reason=extension.describe())
SOME = settings(max_examples=40, deadline=None)


@dataclass(frozen=True)
class Shape:
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    type: str = "f32"


@dataclass
class Rows:
    """One span: q of its rows, K,V of its sequence (cached ones, then its own), and what each row sees."""

    q: Tensor  # [rows, heads * dim]
    k: Tensor  # [cached + own, kv_heads, dim]
    v: Tensor
    cached_limit: list[int]
    own_limit: list[int]
    cached: int
    mask: np.ndarray | None = None  # bool [rows, cached + own]
    positions: list[int] = field(default_factory=list)  # of the rows; by default the last ones of the keys
    own_start: int = -1  # position of the first own key; by default after the cached ones

    def __post_init__(self) -> None:
        last = self.cached + self.own
        self.positions = self.positions or [max(0, last - len(self.q) + i) for i in range(len(self.q))]
        self.own_start = self.cached if self.own_start < 0 else self.own_start

    @property
    def own(self) -> int:
        return len(self.k) - self.cached

    def seen(self, window: int = 0) -> np.ndarray:
        parts = [
            np.arange(n) < np.array(limit)[:, None]
            for n, limit in ((self.cached, self.cached_limit), (self.own, self.own_limit))
        ]
        seen = np.concatenate(parts, axis=1)
        if window:
            places = np.concatenate([np.arange(self.cached), self.own_start + np.arange(self.own)])
            seen = seen & (places > np.array(self.positions)[:, None] - window)
        return seen if self.mask is None else seen & self.mask


@dataclass
class Packed:
    """Spans in one step, their K,V scattered over blocks; what no key lies in holds NaN."""

    shape: Shape
    spans: list[Rows]
    seed: int = 0
    gap: int = 0  # padding rows before each span
    window: int = 0
    softcap: float = 0.0
    q: Tensor = field(init=False)
    step: Step = field(init=False)
    cache: KvLayer = field(init=False)
    own: KvLayer = field(init=False)

    def __post_init__(self) -> None:
        shape, draw = self.shape, np.random.default_rng(self.seed)
        counts = [[-(-n // BLOCK) for n in (s.cached, s.own)] for s in self.spans]
        layers, tables = [], []
        for part in (0, 1):
            total = sum(c[part] for c in counts) + 3
            layers.append(poisoned(shape, total))
            tables.append(draw.permutation(total).astype(np.int32)[: total - 3])
        self.cache, self.own = layers
        rows, at, spans, limits = 0, [0, 0], [], ([], [])
        positions: list[int] = []
        q = [torch.zeros(0, shape.heads * shape.dim)]
        masks: list[np.ndarray] = []
        for s, (nc, no) in zip(self.spans, counts, strict=True):
            rows += self.gap
            positions += [0] * self.gap + s.positions
            for limit, part in zip(limits, (s.cached_limit, s.own_limit), strict=True):
                limit += [0] * self.gap + part
            q += [torch.full((self.gap, shape.heads * shape.dim), torch.nan), s.q]
            area = sum(m.size for m in masks)
            spans.append([rows, rows + len(s.q), s.cached, s.own, *at, s.own_start, -1 if s.mask is None else area])
            rows += len(s.q)
            fill(self.cache, tables[0][at[0] : at[0] + nc], s.k[: s.cached], s.v[: s.cached])
            fill(self.own, tables[1][at[1] : at[1] + no], s.k[s.cached :], s.v[s.cached :])
            at = [at[0] + nc, at[1] + no]
            if s.mask is not None:
                masks.append(s.mask.astype(np.uint8).ravel())
        self.q = torch.cat(q)
        self.step = Step.of(
            {
                "ids": np.zeros(rows),
                "positions": np.array(positions),
                "spans": np.array(spans).reshape(-1, SPAN_WORDS),
                "blocks": tables[0],
                "own_blocks": tables[1],
                "cached_limit": limits[0],
                "own_limit": limits[1],
                "mask": np.concatenate([np.zeros(0, np.uint8), *masks]),
            }
        )

    def run(self, function: Callable[..., Tensor] = attention, scale: float | None = None) -> list[Tensor]:
        """The spans' results."""
        scale = self.shape.dim**-0.5 if scale is None else scale
        how = {"scale": scale, "window": self.window, "softcap": self.softcap}
        out = function(self.q, self.step, self.cache, self.own, heads=self.shape.heads, **how)
        assert out.shape == self.q.shape
        covered = torch.zeros(len(out), dtype=torch.bool)
        for row0, row1 in self.step.spans[:, :2].tolist():
            covered[row0:row1] = True
        assert not out[~covered].any()
        return [out[row0:row1] for row0, row1 in self.step.spans[:, :2].tolist()]


def poisoned(shape: Shape, blocks: int) -> KvLayer:
    cache = KvCache(1, blocks, shape.kv_heads, shape.dim, shape.type)
    for tensor in (cache.k, cache.v) if shape.type != "int8" else (cache.k_scales, cache.v_scales):
        assert tensor is not None
        tensor.fill_(torch.nan)
    # clones: memory that ends where the blocks do, for the address sanitizer
    return KvLayer(*(None if t is None else t.clone() for t in cache.layer(0)))


def fill(layer: KvLayer, blocks: np.ndarray, k: Tensor, v: Tensor) -> None:
    """k, v [n, kv_heads, dim] into the first n slots of the blocks."""
    if len(k):
        slot = torch.arange(len(k))
        attention_plain._write(layer, torch.from_numpy(blocks).long()[slot // BLOCK] * BLOCK + slot % BLOCK, k, v)


def stored(x: Tensor, type: str) -> Tensor:
    """x [n, kv_heads, dim] as a cache of `type` gives it back."""
    if type == "int8":
        codes, scales = attention_plain._quantise(x)
        return codes.float() * scales[..., None]
    return x.to(KV_TYPES[type]).float()


def pairs(type: str, function: Callable[..., Tensor]) -> bool:
    """Whether q and the softmax weights are rounded to bfloat16 too (native/attention_products.h)."""
    module = extension.native()
    return type != "f32" and function is attention and module is not None and module.isa() == "avx512"


def dense(
    shape: Shape,
    span: Rows,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    *,
    rounded: bool = False,
) -> Tensor:
    """In float64, over the visible keys only. rounded: of bfloat16 q (times scale and log2(e), as kernels have it)."""
    unit = np.float32(1 / softcap if softcap else np.log2(np.e))
    factor = np.float32(shape.dim**-0.5 if scale is None else scale) * unit
    scaled = span.q * torch.tensor(factor)
    if rounded:
        scaled = scaled.bfloat16()
    k, v = stored(span.k, shape.type).double().numpy(), stored(span.v, shape.type).double().numpy()
    q = scaled.double().view(len(span.q), shape.heads, shape.dim).numpy()
    out = np.zeros_like(q)
    for row, seen in enumerate(span.seen(window)):
        for head in range(shape.heads) if seen.any() else ():
            mine = head // (shape.heads // shape.kv_heads)
            scores = k[seen, mine] @ q[row, head]
            scores = softcap * np.log2(np.e) * np.tanh(scores) if softcap else scores
            weights = np.exp2(scores - scores.max())
            out[row, head] = weights / weights.sum() @ v[seen, mine]
    return torch.from_numpy(out.reshape(len(q), -1))


def check(
    got: Tensor,
    shape: Shape,
    span: Rows,
    function: Callable[..., Tensor] = attention,
    *,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    atol: float = 1e-5,
) -> None:
    """Against float64. Weights rounded to bfloat16 are off by 2^-9 of themselves, and so is their sum."""
    rounded = pairs(shape.type, function)
    if rounded and len(span.v):
        atol += 2**-8 * span.v.abs().max().item()
    wanted = dense(shape, span, scale, window, softcap, rounded=rounded)
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=atol)


def random_span(shape: Shape, rows: int, cached: int, own: int, kind: str, seed: int) -> Rows:
    """kind: full, causal (own keys or the cached ones' end, one more a row), ragged (any limits) or mask (any keys)."""
    draw = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, cached + own, shape.kv_heads, shape.dim, generator=draw)
    q = torch.randn(rows, shape.heads * shape.dim, generator=draw) * 2
    span = Rows(q, k, v, [cached] * rows, [own] * rows, cached)
    if kind == "causal":
        name, count = ("own_limit", own) if own else ("cached_limit", cached)
        limits = [min(max(count - rows + 1 + i, 1), count) for i in range(rows)]
        span = replace(span, **{name: limits})
    elif kind == "ragged":
        limits = [torch.randint(0, n + 1, (rows,), generator=draw).tolist() for n in (cached, own)]
        span = replace(span, cached_limit=limits[0], own_limit=limits[1])
    elif kind == "mask":
        span = replace(span, mask=(torch.rand(rows, cached + own, generator=draw) < 0.7).numpy())
    return span


shapes = st.builds(
    lambda group, kv_heads, dim, type: Shape(group * kv_heads, kv_heads, dim, type),
    st.sampled_from([1, 2, 3, 7, 9, 17]),
    st.integers(1, 3),
    st.sampled_from([64, 64, 16, 80, 96, 128, 1, 8, 20, 37]),
    st.sampled_from(list(KV_TYPES)),
)


@st.composite
def mixes(draw: st.DrawFn) -> Packed:
    shape = draw(shapes)
    spans = []
    for _ in range(draw(st.integers(1, 4))):
        cached = draw(st.one_of(st.just(0), st.integers(1, 40), st.integers(100, 400)))
        own = draw(st.one_of(st.integers(0 if cached else 1, 33), st.integers(120, 140)))
        kind = draw(st.sampled_from(["full", "causal", "ragged", "mask"]))
        spans.append(random_span(shape, draw(st.integers(1, 20)), cached, own, kind, draw(st.integers(0, 99))))
    window = draw(st.one_of(st.just(0), st.integers(1, 40), st.integers(100, 300)))
    softcap = draw(st.sampled_from([0.0, 0.0, 2.0, 50.0]))
    return Packed(shape, spans, draw(st.integers(0, 99)), draw(st.integers(0, 2)), window, softcap)


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = extension.threads()
    yield
    extension.set_threads(before)


@SOME
@given(mixes())
@pytest.mark.parametrize("function", [attention, attention_plain.attention], ids=["dispatched", "twin"])
def test_agrees_with_float64(function: Callable[..., Tensor], mix: Packed) -> None:
    for got, span in zip(mix.run(function), mix.spans, strict=True):
        check(got, mix.shape, span, function, window=mix.window, softcap=mix.softcap)


def alone(shape: Shape, span: Rows, row: int, seed: int, window: int = 0, softcap: float = 0.0) -> Tensor:
    """One row's result with nothing else in the step and no key that it does not see at the end."""
    cached, own = span.cached_limit[row], span.own_limit[row]
    keys = [*range(cached), *range(span.cached, span.cached + own)]
    mask = None if span.mask is None else span.mask[row : row + 1, keys]
    q, place = span.q[row : row + 1], [span.positions[row]]
    single = Rows(q, span.k[keys], span.v[keys], [cached], [own], cached, mask, place, span.own_start)
    return Packed(shape, [single], seed=seed, window=window, softcap=softcap).run()[0]


@needs_native
@SOME
@given(mixes(), st.data())
def test_a_row_alone_has_the_same_bits(mix: Packed, data: st.DataObject) -> None:
    """Not the other rows, nor the spans beside it, nor keys beyond its limits, nor which blocks hold the keys."""
    for got, span in zip(mix.run(), mix.spans, strict=True):
        for row in {0, len(got) - 1, data.draw(st.integers(0, len(got) - 1))}:
            assert torch.equal(got[row : row + 1], alone(mix.shape, span, row, mix.seed + 1, mix.window, mix.softcap))


@needs_native
@SOME
@given(mixes())
def test_threads_do_not_show(mix: Packed) -> None:
    results = []
    for count in (1, 2, 3, 8):
        extension.set_threads(count)
        results.append(torch.cat(mix.run()))
    assert all(torch.equal(results[0], other) for other in results[1:])


@needs_native
@pytest.mark.parametrize("type", list(KV_TYPES))
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("window", [0, 700, 1500])
def test_long_contexts_are_cut_the_same_way_always(type: str, rows: int, window: int) -> None:
    """Beyond 1024 keys ranges are merged; with idle threads each range is a task. 2100 + 1030 keys: three and two."""
    shape = Shape(heads=6, kv_heads=2, dim=32, type=type)
    span = random_span(shape, rows, 2100, 1030, "causal", 5)
    results = []
    for count in (1, 2, 8):
        extension.set_threads(count)
        results.append(Packed(shape, [span], window=window).run()[0])
    spans = [*(random_span(shape, 30, 64, 0, "full", i) for i in range(3)), span]
    beside = Packed(shape, spans, seed=4, window=window).run()[-1]
    check(results[0], shape, span, window=window)
    assert all(torch.equal(results[0], other) for other in [*results[1:], beside])


@needs_native
@pytest.mark.parametrize("type", list(KV_TYPES))
@pytest.mark.parametrize("window", [0, 200])
def test_a_prompt_chunk_equals_decode_steps(type: str, window: int) -> None:
    """512 causal rows at once, against single rows that see the cache as it was then."""
    shape = Shape(heads=14, kv_heads=2, dim=64, type=type)
    span = random_span(shape, 512, 700, 0, "causal", 1)
    together = Packed(shape, [span], window=window).run()[0]
    for row in (0, 1, 15, 16, 17, 100, 255, 324, 400, 511):
        assert torch.equal(together[row : row + 1], alone(shape, span, row, row, window))


@needs_native
@pytest.mark.parametrize("type", list(KV_TYPES))
def test_what_lies_behind_hidden_keys_is_never_used(type: str) -> None:
    """NaN in a later row's K and V, in a masked key's too, does not reach the rows that do not see it."""
    shape = Shape(type=type)
    clean = random_span(shape, 40, 20, 40, "causal", 2)
    clean.mask = np.ones((40, 60), dtype=bool)
    clean.mask[:, 3] = False
    dirty = replace(clean, k=clean.k.clone(), v=clean.v.clone())
    for position in (3, 20 + 25):
        dirty.k[position] = torch.nan
        dirty.v[position] = torch.nan
    before, after = Packed(shape, [clean]).run()[0], Packed(shape, [dirty]).run()[0]
    assert torch.equal(before[:25], after[:25])
    assert after[25:].isnan().all()


@pytest.mark.parametrize("type", list(KV_TYPES))
@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("function", [attention, attention_plain.attention], ids=["dispatched", "twin"])
def test_extreme_scores(function: Callable[..., Tensor], size: float, type: str) -> None:
    """Scores of +-size in every order of appearance: no overflow, and the winners share."""
    shape = Shape(heads=2, kv_heads=1, dim=16, type=type)
    keys = 300
    k = torch.zeros(keys, 1, 16)
    k[:, 0, 0] = torch.linspace(-1, 1, keys)
    v = torch.randn(keys, 1, 16, generator=torch.Generator().manual_seed(0))
    q = torch.zeros(2, 32)
    q[:, 0], q[:, 16] = size, -size
    span = Rows(q, k, v, [keys] * 2, [0] * 2, keys)
    got = Packed(shape, [span]).run(function, scale=1.0)[0]
    assert got.isfinite().all()
    check(got, shape, span, function, scale=1.0, atol=3e-7 * size + 1e-5)


@pytest.mark.parametrize("type", list(KV_TYPES))
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("keys", [1, 5, 40, 300])
@pytest.mark.parametrize("function", [attention, attention_plain.attention], ids=["dispatched", "twin"])
def test_what_is_not_finite_is_not_lost(function: Callable[..., Tensor], keys: int, value: float, type: str) -> None:
    """A row with such a q gives NaN, never zeros or numbers that look right; its neighbours are as before."""
    shape = Shape(heads=1, kv_heads=1, dim=16, type=type)
    span = random_span(shape, 9, keys, 0, "full", 0)
    before = Packed(shape, [span]).run(function)[0]
    span.q[4] = value
    after = Packed(shape, [span]).run(function)[0]
    assert after[4].isnan().all()
    others = [row for row in range(9) if row != 4]
    assert torch.equal(after[others], before[others])


@pytest.mark.parametrize("function", [attention, attention_plain.attention], ids=["dispatched", "twin"])
def test_rows_that_see_nothing_give_zeros(function: Callable[..., Tensor]) -> None:
    shape = Shape()
    span = replace(random_span(shape, 3, 20, 5, "full", 0), cached_limit=[0, 20, 0], own_limit=[0, 0, 5])
    got = Packed(shape, [span]).run(function)[0]
    assert not got[0].any()
    check(got, shape, span, function)


@pytest.mark.parametrize("function", [attention, attention_plain.attention], ids=["dispatched", "twin"])
def test_equal_scores_give_the_mean(function: Callable[..., Tensor]) -> None:
    shape = Shape(heads=1, kv_heads=1, dim=16)
    span = random_span(shape, 1, 33, 0, "full", 0)
    span.q.zero_()
    got = Packed(shape, [span]).run(function)[0]
    torch.testing.assert_close(got, span.v.mean(0), rtol=0, atol=1e-6)


def test_nothing_to_do() -> None:
    mix = Packed(Shape(), [])
    empty = Step.of({"ids": np.zeros(4)})
    assert not attention(torch.ones(4, 256), empty, mix.cache, mix.own, heads=4).any()


def test_q_may_be_part_of_qkv() -> None:
    mix = Packed(Shape(), [random_span(Shape(), 5, 40, 5, "causal", 0)])
    wide = torch.randn(5, 512)
    wide[:, :256] = mix.q
    expected = attention(mix.q, mix.step, mix.cache, mix.own, heads=4)
    assert torch.equal(attention(wide, mix.step, mix.cache, mix.own, heads=4), expected)


@pytest.mark.parametrize("function", [attention, attention_plain.attention], ids=["dispatched", "twin"])
@pytest.mark.parametrize("seed", range(5))
def test_int8_error_bound(function: Callable[..., Tensor], seed: int) -> None:
    """Codes are off by at most half a step each: d(score) <= scale |q|_1 s_k / 2, so weights change by a factor within
    exp(+-2 max d), and V by s_v / 2."""
    shape = Shape(heads=2, kv_heads=2, dim=64, type="int8")
    span = random_span(shape, 4, 200, 0, "full", seed)
    got = Packed(shape, [span]).run(function)[0].double()
    exact = dense(replace(shape, type="f32"), span)
    q = span.q.view(4, 2, 64)
    off = 64**-0.5 * q.abs().sum(-1) * (span.k.abs().amax((0, 2)) / 254)  # [rows, heads]
    bound = torch.expm1(2 * off) * span.v.abs().amax((0, 2)) + span.v.abs().amax((0, 2)) / 254
    worst = (got - exact).abs().view(4, 2, 64).amax(-1)
    assert (worst <= bound).all()
    assert worst.max() < 0.02  # and in fact it is far below


@needs_native
@pytest.mark.parametrize("isa", ["avx2", "neon", "scalar"])  # the dot products of ARM are of linears alone
def test_lesser_instruction_sets(isa: str) -> None:
    """The same tests on the kernels that this CPU would not choose."""
    if isa not in lesser(extension.native().isa()):
        pytest.skip(f"{extension.native().isa()} runs here, and {isa} is not a lesser one")
    chosen = "float64 or alone or decode or hidden or extreme or long or finite"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        f"({chosen}) and not twin",
    ]
    done = subprocess.run(command, env=os.environ | {"DFASTLLM_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def _good() -> Packed:
    return Packed(Shape(), [random_span(Shape(), 5, 40, 5, "causal", 0)])


def _with(array: np.ndarray, index: int | tuple[int, int], value: int) -> np.ndarray:
    out = array.copy()
    out[index] = value
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"blocks": _with(s.blocks, 0, 99)}, "blocks of the step must be from 0 to"),
        (lambda s: {"own_blocks": _with(s.own_blocks, 0, -1)}, "own_blocks of the step must be from 0 to"),
        (lambda s: {"blocks": s.blocks[:2]}, "not the blocks for them"),
        (lambda s: {"cached_limit": _with(s.cached_limit, 2, 41)}, "sees 41 of 40 cached keys"),
        (lambda s: {"own_limit": _with(s.own_limit, 2, -1)}, "of 5 own keys"),
        (lambda s: {"spans": _with(s.spans, (0, 1), 6)}, "wanted in order within 5"),
        (lambda s: {"spans": np.concatenate([s.spans, s.spans])}, "wanted in order within 5"),
        (lambda s: {"spans": _with(s.spans, (0, 7), 0), "mask": np.ones(5)}, "the mask of span 0"),
        (lambda s: {"want": [5]}, "want of the step must be from 0 to 4"),
        (lambda s: {"ids": _with(s.ids, 1, -1)}, "ids of the step must be from 0"),
    ],
)
def test_bad_steps(change: Callable[[Step], dict[str, np.ndarray]], message: str) -> None:
    mix = _good()
    with pytest.raises(ValidationError, match=message):
        attention(mix.q, Step.of(mix.step.arrays() | change(mix.step)), mix.cache, mix.own, heads=4)


def test_bad_tensors() -> None:
    mix = _good()

    def refused(
        message: str, q: Tensor = mix.q, cache: KvLayer = mix.cache, own: KvLayer | None = mix.own, heads: int = 4
    ) -> None:
        with pytest.raises(ValidationError, match=message):
            attention(q, mix.step, cache, own, heads=heads)

    refused("multiple of the 2 K,V heads", heads=3)
    refused("multiple of the 2 K,V heads", heads=0)
    refused("q must be", q=mix.q[:, :-1])
    refused("q must be", q=mix.q.double())
    refused("q must be", q=mix.q.t().contiguous().t())
    refused("K must be", cache=mix.cache._replace(k=mix.cache.k.half()))
    refused("V must be contiguous", cache=mix.cache._replace(v=mix.cache.k))
    refused("only int8 K,V have scales", cache=mix.cache._replace(k_scales=mix.cache.k))
    refused(
        "only int8 K,V have scales",
        cache=mix.cache._replace(k=mix.cache.k.to(torch.int8), v=mix.cache.v.to(torch.int8)),
    )
    refused("one type", own=poisoned(Shape(type="bf16"), 4))
    refused("own_slot of the step must be|own_blocks of the step must be", own=None)
