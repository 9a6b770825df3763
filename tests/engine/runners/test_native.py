"""The native runner: the answers of the plain torch model, and the same bits alone or beside any neighbours, at any
number of threads. Runs on the kernels where they are built and on their twins where not."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from dfastllm import assemble
from dfastllm.core import Request, Span
from dfastllm.engine import Engine, EngineConfig
from dfastllm.engine.batch import pack
from dfastllm.engine.pages import Pages, PageTable
from dfastllm.engine.runners.native import NativeRunner
from dfastllm.engine.runners.torch import TorchRunner
from dfastllm.errors import UnsupportedError, ValidationError
from dfastllm.kernels import native, set_threads
from dfastllm.models import Decoder, PackedDecoder, tiny
from dfastllm.quant import FORMATS, quantise
from tests.engine.test_invariance import answers, requests
from tests.kit.convert_models import grouped

MIXTURES = ("qwen3_moe", "llada_moe", "llada2_moe", "sdar_moe")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "llada", "dream", "sdar", "fast_dllm_v2", *MIXTURES)
WIDE = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 160, "heads": 4, "kv_heads": 2}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield
    set_threads(1)


def spans(rng: np.random.Generator, vocab: int, block: int) -> list[tuple[Span, int]]:
    """One sequence's life: (span, kv_len before it), each kind of span once and in a random length."""

    def ids(n: int) -> tuple[int, ...]:
        return tuple(int(i) for i in rng.integers(1, vocab - 4, n))

    prompt, chunk = int(rng.integers(3, 40)), int(rng.integers(1, 20))
    canvas = int(rng.integers(2, 24))
    known = prompt + chunk
    apart = tuple(range(2, known, 1 + int(rng.integers(1, 3))))
    return [
        (Span(0, ids(prompt), "causal", "keep", want=(prompt - 1,)), 0),
        (Span(prompt, ids(chunk), "causal", "keep", want=tuple(range(chunk))), prompt),
        (Span(known, ids(canvas), "full", "scratch", want=tuple(range(canvas))), known),
        (Span(known, ids(canvas), "block", "scratch", want=tuple(range(canvas)), block=block), known),
        (Span(0, ids(known), "full", "none", want=(0, known - 1)), 0),
        (Span(known, ids(canvas), "full", "scratch", want=(0, canvas), shadows=((known, 5),)), known),
        (Span(1, ids(known - 1), "full", "replace", want=(0,)), known),
        (Span(2, ids(len(apart)), "full", "replace", want=tuple(range(len(apart))), places=apart), known),
        (Span(known, ids(1), "causal", "keep", want=(0,)), known),
    ]


class Sequence:
    """A page table whose pages are scattered, and a list of spans to run on it."""

    def __init__(self, pool: Pages, seed: int, vocab: int, block: int = 4) -> None:
        self.table = PageTable(pool)
        self.todo = spans(np.random.default_rng(seed), vocab, block)
        for span, kv_len in self.todo:
            self.table.grow(max(span.stop, kv_len, 1))

    def item(self, step: int) -> tuple[Span, PageTable, int]:
        span, kv_len = self.todo[step]
        return span, self.table, kv_len


def packed_of(family: str, quantization: str | None = None, **overrides: object) -> tuple[Decoder, PackedDecoder]:
    model = tiny(family, seed=5, **{**WIDE, **overrides})  # type: ignore[arg-type]
    return model, assemble.pack(model, quantization)


@pytest.mark.parametrize("runner", [TorchRunner, NativeRunner])
@pytest.mark.parametrize("above", [0, 100])
def test_an_id_without_an_embedding_row_is_named(runner: type[TorchRunner | NativeRunner], above: int) -> None:
    model, packed = packed_of("llama")
    table = PageTable(Pages(4, 16))
    table.grow(3)
    if runner is TorchRunner:
        made: TorchRunner | NativeRunner = TorchRunner(model, 64, torch.float32, "cpu")
    else:
        made = NativeRunner(packed, 64, torch.float32, 16)

    def run(last: int) -> None:
        made.run(pack([(Span(0, (5, 9, last), "causal", "keep", want=(2,)), table, 0)]))

    run(159)  # the last row
    with pytest.raises(ValidationError, match=rf"the step has id {160 + above}; this model has 160 embedding rows"):
        run(160 + above)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_every_kind_of_span_equal_the_plain_models(family: str) -> None:
    model, packed = packed_of(family)
    pool = Pages(64, 16)
    many = [Sequence(pool, seed, 160) for seed in range(4)]
    plain = TorchRunner(model, 64 * 16, torch.float32, "cpu", min_rows=16)
    fast = NativeRunner(packed, 64 * 16, torch.float32, 16)
    for step in range(len(many[0].todo)):
        items = [s.item(step) for s in many]
        wanted, got = plain.run(pack(items)).logits(), fast.run(pack(items)).logits()
        assert wanted.shape == got.shape
        torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-4)


def test_pages_of_several_blocks_and_scattered_pages() -> None:
    model, packed = packed_of("llada")
    pool = Pages(16, 64)
    many = [Sequence(pool, seed, 160) for seed in (1, 2)]
    many[0].table.pages = many[0].table.pages[::-1]
    plain = TorchRunner(model, 16 * 64, torch.float32, "cpu", min_rows=16, block_size=64)
    fast = NativeRunner(packed, 16 * 64, torch.float32, 64)
    for step in range(len(many[0].todo)):
        items = [s.item(step) for s in many]
        wanted, got = plain.run(pack(items, 64)).logits(), fast.run(pack(items)).logits()
        torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kv", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("weights", [None, "bf16", "w8", "w8r", "w8g", "w6", "w4m", "w4"])
def test_bits_of_a_row_do_not_depend_on_neighbours_or_threads(weights: str | None, kv: torch.dtype) -> None:
    bits_are_a_rows_own(tiny("llada", seed=6, **WIDE), weights, kv)


@pytest.mark.parametrize("weights", [None, "bf16", "w8", "w8r", "w8g", "w6", "w4m", "w4"])
@pytest.mark.parametrize("family", ["llada_moe", "llada2_moe"])
def test_bits_of_a_row_of_a_mixture_do_not_depend_on_neighbours_or_threads(family: str, weights: str | None) -> None:
    bits_are_a_rows_own(tiny(family, seed=6, **{**grouped(family), **WIDE}), weights, torch.bfloat16)


def bits_are_a_rows_own(model: Decoder, weights: str | None, kv: torch.dtype) -> None:
    if weights == "bf16":
        model = model.to(torch.bfloat16)
    packed = assemble.pack(model, None if weights == "bf16" else weights)

    def run(seeds: list[int], threads: int) -> list[list[torch.Tensor]]:
        """Logits [step][sequence]."""
        set_threads(threads)
        pool = Pages(96, 16)
        many = [Sequence(pool, seed, 160) for seed in seeds]
        runner = NativeRunner(packed, 96 * 16, kv, 16)
        out = []
        for step in range(len(many[0].todo)):
            items = [s.item(step) for s in many]
            logits = runner.run(pack(items)).logits()
            out.append(list(logits.split([len(i[0].want) for i in items])))
        return out

    alone = run([1], 1)
    threads = (1, 2, 3) if native() is not None else (1, 2)
    for count in threads:
        for seeds in ([1, 2, 3, 4], [4, 3, 1], [1]):
            for one, many in zip(alone, run(seeds, count), strict=True):
                assert torch.equal(one[0], many[seeds.index(1)])


@pytest.mark.parametrize(
    ("family", "weights"),
    [(f, w) for f in ("llama", "llada", "sdar") for w in (None, "w4m")] + [("qwen3_moe", "w8")],
)
def test_same_answers_alone_and_together(family: str, weights: str | None) -> None:
    """Random mixes of options, T = 0 and T > 0: tokens and the bits of every logprob."""
    _, packed = packed_of(family, weights)
    config = EngineConfig(max_batch_rows=256, prefill_chunk=16, kv_tokens=2048)
    together = Engine(packed, config=config)
    for request in requests(packed.info.kind):
        together.add(request)
    set_threads(2)
    batch = answers(together)
    set_threads(1)
    for request in requests(packed.info.kind):
        alone = Engine(packed, config=config)
        alone.add(request)
        assert batch[request.request_id] == answers(alone)[request.request_id]


def test_stats_of_the_fused_head_equal_those_of_its_logits() -> None:
    _, packed = packed_of("llada", "w8g")
    pool = Pages(64, 16)
    many = [Sequence(pool, seed, 160) for seed in range(3)]
    runner = NativeRunner(packed, 64 * 16, torch.bfloat16, 16)
    rows = runner.run(pack([s.item(0) for s in many]))
    logits = rows.logits().double()
    stats = rows.stats(ban=(7,), norm=True, spread=True, top=3)
    logits[:, 7] = -torch.inf
    assert stats.token.tolist() == logits.argmax(dim=-1).tolist()
    np.testing.assert_allclose(stats.norm, logits.logsumexp(-1), rtol=1e-5)
    p = logits.softmax(-1)
    np.testing.assert_allclose(stats.entropy, -(p * p.clamp_min(1e-300).log()).sum(-1), rtol=1e-4, atol=1e-5)
    best = p.topk(2).values
    np.testing.assert_allclose(stats.margin, best[:, 0] - best[:, 1], rtol=1e-4, atol=1e-5)
    assert stats.ids.tolist() == logits.topk(3).indices.tolist()


def test_quantised_logits_stay_close() -> None:
    """Close to the model of the same dequantised weights (what remains is 8-bit activations); random weights of this
    size make every error loud."""
    model, _ = packed_of("llama")
    pool = Pages(64, 16)
    one = Sequence(pool, 1, 160)
    exact = TorchRunner(model, 1024, torch.float32, "cpu", min_rows=16).run(pack([one.item(0)])).logits()
    for weights in ("w8", "w8g", "w6", "w4m", "w4"):
        packed = assemble.pack(model, weights)
        plain = TorchRunner(dequantised(model, weights), 1024, torch.float32, "cpu", min_rows=16)
        wanted = plain.run(pack([one.item(0)])).logits()
        got = NativeRunner(packed, 1024, torch.float32, 16).run(pack([one.item(0)])).logits()
        assert float((got - wanted).norm() / wanted.norm()) < 0.08, weights
        assert float((got - exact).norm() / exact.norm()) < 0.7, weights


def dequantised(model: Decoder, weights: str) -> Decoder:
    """The float model with each matrix replaced by what its quantised form stands for."""
    out = copy.deepcopy(model)
    for name, parameter in out.named_parameters():
        if parameter.ndim == 2:
            outer = name in ("embed.weight", "lm_head.weight")
            chosen = FORMATS[weights].head or weights if outer else weights
            parameter.data = quantise(parameter.data, chosen, name=name).dequantise()
    return out


def test_step_arrays() -> None:
    pool = Pages(8, 16)
    table = PageTable(pool)
    table.grow(40)
    other = PageTable(pool)
    step = pack(
        [
            (Span(32, (1, 2), "causal", "keep", want=(1,)), table, 32),
            (Span(3, (4, 5, 6), "full", "scratch", want=(0,)), table, 32),
            (Span(0, (7,), "full", "none", want=(0,)), other, 0),
        ]
    )
    assert step.ids.tolist() == [1, 2, 4, 5, 6, 7]
    assert step.positions.tolist() == [32, 33, 3, 4, 5, 0]
    assert step.slot.tolist() == [32, 33, -1, -1, -1, -1]
    assert step.own_slot.tolist() == [-1, -1, 0, 1, 2, 16]
    assert step.spans.tolist() == [
        [0, 2, 34, 0, 0, 0, 34, -1],
        [2, 5, 3, 3, 3, 0, 3, -1],
        [5, 6, 0, 1, 4, 1, 0, -1],
    ]
    assert step.blocks.tolist() == [0, 1, 2, 0]
    assert step.own_blocks.tolist() == [0, 1]
    assert step.cached_limit.tolist() == [33, 34, 3, 3, 3, 0]
    assert step.own_limit.tolist() == [0, 0, 3, 3, 3, 1]
    assert step.want.tolist() == [1, 2, 5]


def test_what_it_cannot_run_is_named() -> None:
    model, packed = packed_of("llama")
    with pytest.raises(UnsupportedError, match="multiple of 16"):
        Engine(packed, config=EngineConfig(page_size=8))
    with pytest.raises(UnsupportedError, match="native backend"):
        Engine(model, dtype=torch.int8)


def test_a_request_of_an_unknown_engine_name_keeps_its_name() -> None:
    _, packed = packed_of("llama")
    packed.info = dataclasses.replace(packed.info, name="renamed")
    engine = Engine(packed, config=EngineConfig(kv_tokens=256))
    engine.add(Request("a", (1, 2, 3)))
    assert engine.info.name == "renamed"
