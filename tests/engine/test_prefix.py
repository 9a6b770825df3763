"""Prefix sharing: a request's tokens are those it gets alone; hits are counted exactly; salts never meet.

The fake model's tokens are a hash of exactly what each row could see, so a wrong, stale or overwritten page shows in
them; the native and the torch runner are compared with themselves without sharing, to the last bit of every logprob.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfastllm import assemble
from dfastllm.core import DecodeParams, Finish, Request, SamplingParams, Span, SpeculativeParams, StepStats
from dfastllm.engine import Engine, EngineConfig
from dfastllm.engine.batch import pack
from dfastllm.engine.pages import Pages, PageTable
from dfastllm.engine.runners.native import NativeRunner
from dfastllm.errors import GenerationError, UnsupportedError
from dfastllm.kernels import native
from dfastllm.kernels.step import Step
from dfastllm.models import tiny
from tests.engine.runners.test_native import WIDE
from tests.kit.fake import FakeModel

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
BLOCK = 4  # of the fake block model


def fake_engine(kind: str, config: EngineConfig, *, cut_free: bool = True, **model: Any) -> Engine:
    """An engine on the fake model. Its sums are exact, so that it may pass for a runner whose bits do not depend on
    cuts."""
    engine = Engine(FakeModel(kind, eos_bias=1.0, **model), config=config)
    if engine.prefix is not None:
        engine.prefix.cut_free = cut_free
    return engine


def alone(request: Request, kind: str, config: EngineConfig) -> tuple[tuple[int, ...], Finish]:
    """The tokens of a request on an engine of its own that shares nothing."""
    own = dataclasses.replace(config, kv_tokens=512, prefix_caching=False)
    engine = Engine(FakeModel(kind, eos_bias=1.0), config=own)
    out, _ = serve(engine, [request])
    tokens, _, finish = out[request.request_id]
    return tuple(tokens), finish


def chain(engine: Engine, salt: str, tokens: Sequence[int]) -> list[bytes]:
    """The keys of the whole units of `tokens`, written out once more from the rule."""
    info, size = engine.info, engine.pages.page_size
    block = max(1, info.block)
    unit = int(np.lcm(size, block))
    about = ("dfastllm", info.kind, block, size, salt)
    parent = hashlib.blake2b(repr(about).encode(), digest_size=32).digest()
    keys = []
    for at in range(0, len(tokens) - unit + 1, unit):
        ids = np.asarray(tokens[at : at + unit], dtype=np.int64).tobytes()
        parent = hashlib.blake2b(parent + ids, digest_size=32).digest()
        keys += [parent] if unit == size else [parent + number.to_bytes(4) for number in range(unit // size)]
    return keys


class Audit:
    """Watches an engine: nothing shared is written, no key stands for tokens that were not committed, salts never
    meet, no page is lost."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.salts: dict[bytes, str] = {}  # key -> salt of the sequence that made it
        inner = engine.runner.run

        def run(step: Step) -> Any:
            for page in set((step.slot[step.slot >= 0] // engine.pages.page_size).tolist()):
                assert engine.pages.writable(page), "a shared page is written"
            return inner(step)

        engine.runner.run = run  # type: ignore[method-assign]

    def check(self) -> None:
        engine, pages = self.engine, self.engine.pages
        held = [0] * pages.count
        for live in engine.scheduler.everyone():
            for page in live.table.pages:
                held[page] += 1
            if live.trail is None or not live.held:
                continue
            salt, size = live.request.cache_salt, pages.page_size
            keys = chain(engine, salt, live.state.tokens[: max(live.state.kv_len, live.state.canvas_start)])
            assert live.trail.held <= live.state.kv_len
            for number in range(live.trail.held // size):
                assert self.salts.setdefault(keys[number], salt) == salt
                page = live.table.pages[number]
                # unless another made the same page first
                assert pages.find(keys[number]) == page or pages.writable(page), "a page of another key"
            for number in range(live.trail.held // size, len(live.table.pages)):
                assert pages.writable(live.table.pages[number]), "a page without committed tokens can be found"
        assert held == pages.refs
        assert not any(live.table.pages for live in engine.scheduler.waiting)


FAMILIES = [tuple((5 * i + 7 * j) % 45 for j in range(40)) for i in range(2)]


@st.composite
def requests(draw: st.DrawFn, name: str, kind: str) -> Request:
    """Beginnings of one of two families of prompts, so that many share, with tails of their own."""
    stem = draw(st.sampled_from(FAMILIES))[: draw(st.integers(0, 40))]
    prompt = stem + tuple(draw(st.lists(st.integers(0, 45), min_size=0 if stem else 1, max_size=6)))
    sampling = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.9])),
        seed=draw(st.integers(0, 3)),
        max_tokens=draw(st.integers(1, 14)),
        ignore_eos=draw(st.booleans()),
    )
    decode, speculative = None, None
    if kind == "block":
        decode = DecodeParams(threshold=draw(st.sampled_from([None, 0.3])), block_length=draw(st.sampled_from([2, 4])))
    elif draw(st.booleans()):
        speculative = SpeculativeParams("ngram", prompt_lookup_min=1, num_speculative_tokens=draw(st.integers(1, 5)))
    return Request(
        name,
        prompt,
        sampling,
        decode,
        speculative=speculative,
        priority=draw(st.integers(0, 2)),
        cache_salt=draw(st.sampled_from(["", "", "a", "b"])),
    )


CONFIGS = st.builds(
    EngineConfig,
    max_batch_rows=st.sampled_from([8, 17, 64, 2048]),
    prefill_chunk=st.sampled_from([1, 4, 5, 8, 512]),
    max_sequences=st.integers(1, 5),
    page_size=st.sampled_from([1, 2, 3, 4, 8]),
    kv_tokens=st.sampled_from([80, 128, 512]),
    ageing_steps=st.sampled_from([0, 1, 8]),
)


@pytest.mark.parametrize("kind", ["ar", "block"])
@given(data=st.data(), config=CONFIGS, cut_free=st.booleans())
@settings(max_examples=25, deadline=None)
def test_any_interleaving_gives_the_tokens_of_a_request_alone(
    kind: str, data: st.DataObject, config: EngineConfig, cut_free: bool
) -> None:
    batch = [data.draw(requests(f"r{i}", kind)) for i in range(data.draw(st.integers(2, 7)))]
    engine = fake_engine(kind, config, cut_free=cut_free)
    assert engine.prefix is not None
    audit = Audit(engine)
    tokens: dict[str, list[int]] = {r.request_id: [] for r in batch}
    ends: dict[str, Finish] = {}
    todo, gone = list(batch), set()
    while todo or engine.has_work:
        while todo and (not engine.has_work or data.draw(st.booleans())):
            engine.add(todo.pop(0))
        if data.draw(st.integers(0, 30)) == 0:
            victim = data.draw(st.sampled_from(batch)).request_id
            if engine.cancel(victim):
                gone.add(victim)
        for event in engine.step():
            tokens[event.request_id] += event.token_ids
            if event.finish is not None:
                ends[event.request_id] = event.finish
        audit.check()
        assert engine.steps < 3000
    assert engine.pages.used == 0
    for request in batch:
        got, (wanted, finish) = tuple(tokens[request.request_id]), alone(request, kind, config)
        if request.request_id in gone:
            assert wanted[: len(got)] == got
        else:
            assert (got, ends[request.request_id].reason) == (wanted, finish.reason), request
    assert engine.prefix.hits <= engine.prefix.queries <= sum(len(r.prompt) for r in batch)


def serve(engine: Engine, batch: Sequence[Request]) -> tuple[dict[str, Any], list[StepStats]]:
    """Request id -> (tokens, logprobs, finish), and the counters of every step."""
    stats: list[StepStats] = []
    engine.subscribe(stats.append)
    for request in batch:
        engine.add(request)
    out: dict[str, Any] = {r.request_id: ([], [], None) for r in batch}
    while engine.has_work:
        for event in engine.step():
            tokens, logprobs, finish = out.get(event.request_id, ([], [], None))
            out[event.request_id] = ([*tokens, *event.token_ids], [*logprobs, *event.logprobs], event.finish or finish)
    engine._subscribers.remove(stats.append)
    return out, stats


def family(count: int, stem: int, seed: int = 0, vocab: int = 150) -> list[Request]:
    """Requests with `stem` tokens in common and tails of different lengths, greedy and drawn."""
    rng = np.random.default_rng(seed)
    common = tuple(int(i) for i in rng.integers(1, vocab, stem))
    out = []
    for i in range(count):
        tail = tuple(int(t) for t in rng.integers(1, vocab, 5 + 7 * i))
        sampling = SamplingParams(
            temperature=(0.0, 0.9)[i % 2], seed=i, max_tokens=20, logprobs=2, ignore_eos=i % 3 != 0
        )
        out.append(Request(f"r{i}", common + tail, sampling))
    return out


def bits_agree(model: Any, kv: torch.dtype | None, batch: Sequence[Request], **config: Any) -> list[int]:
    """Every request twice on one sharing engine against an engine of its own that shares nothing: tokens and the bits
    of every logprob. Returns the cached tokens of the second time."""
    sharing = Engine(model, config=EngineConfig(**config), dtype=kv)
    first, _ = serve(sharing, batch)
    second, _ = serve(sharing, batch)
    for request in batch:
        own = Engine(model, config=EngineConfig(**config, prefix_caching=False), dtype=kv)
        wanted, _ = serve(own, [request])
        tokens, logprobs, finish = wanted[request.request_id]
        assert finish.usage.cached_tokens == 0
        assert len(logprobs) == len(tokens) > 0
        for got in (first, second):
            assert got[request.request_id][:2] == (tokens, logprobs), request.request_id
    assert sharing.pages.used == 0
    return [second[r.request_id][2].usage.cached_tokens for r in batch]


@pytest.mark.parametrize(
    ("family_name", "kv"),
    [(f, kv) for f in ("llama", "sdar", "fast_dllm_v2") for kv in (torch.float32, torch.bfloat16, torch.int8)]
    + [("qwen3_moe", torch.float32)],
)
def test_native_bits_are_those_of_a_request_alone(family_name: str, kv: torch.dtype) -> None:
    """Among others a block model whose prompt ends on a block's end, where the first step is fused with the last chunk
    of the prompt, and one page or block beyond."""
    model = tiny(family_name, seed=5, **WIDE)
    size = max(16, model.info.block)
    batch = family(4, 100)
    exact = Request("exact", batch[0].prompt[:96], batch[1].sampling)  # whole pages and blocks
    batch += [exact, Request("beyond", (*exact.prompt, 3), batch[0].sampling)]
    for weights in (None, "w8"):
        cached = bits_agree(
            assemble.pack(model, weights), kv, batch, prefill_chunk=2 * size, kv_tokens=4096, max_sequences=3
        )
        if native() is None:
            assert all(c % (2 * size) == 0 and c > 0 for c in cached)
        elif model.info.kind == "ar":
            assert cached == [(len(r.prompt) - 1) // 16 * 16 for r in batch]
        else:
            # the block before the answer is computed again where it is fused with the first step
            assert all(len(r.prompt) - c <= 3 * size for r, c in zip(batch, cached, strict=True))


@pytest.mark.parametrize("family_name", ["llama", "sdar"])
@pytest.mark.parametrize("kv", [torch.float32, torch.bfloat16])
def test_torch_bits_are_those_of_a_request_alone(family_name: str, kv: torch.dtype) -> None:
    model = tiny(family_name, seed=5, **WIDE)
    batch = family(5, 100)
    cached = bits_agree(model, kv, batch, prefill_chunk=32, kv_tokens=4096, max_sequences=3)
    assert cached == [(len(r.prompt) - 1) // 32 * 32 for r in batch]  # whole chunks: the cuts stay where they were


def test_generated_tokens_are_shared_too() -> None:
    """A chat of three turns: each prompt is the last one, its answer and something new."""
    packed = assemble.pack(tiny("llama", seed=5, **WIDE), "w8")
    engine = Engine(packed, config=EngineConfig(kv_tokens=4096))
    prompt, sampling = (
        family(1, 40)[0].prompt,
        SamplingParams(temperature=0, max_tokens=37, ignore_eos=True, logprobs=1),
    )
    known = 0
    for turn in range(3):
        request = Request(f"t{turn}", prompt, sampling)
        tokens, logprobs, finish = serve(engine, [request])[0][request.request_id]
        own, _ = serve(Engine(packed, config=EngineConfig(prefix_caching=False)), [request])
        assert (tokens, logprobs) == own[request.request_id][:2]
        if native() is not None:  # the last token of an answer was never run
            assert finish.usage.cached_tokens == max(0, known - 1) // 16 * 16
        prompt += (*tokens, 7, 8, turn)
        known = len(prompt) - 3


@pytest.mark.skipif(native() is None, reason="a promise of the native kernels")
@pytest.mark.parametrize("kv", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("weights", [None, "bf16", "w8", "w8g", "w6", "w4m", "w4"])
@pytest.mark.parametrize("attend", ["causal", "block"])
def test_bits_of_a_row_do_not_depend_on_how_the_prompt_was_cut(
    attend: Any, weights: str | None, kv: torch.dtype
) -> None:
    """1100 positions, more than one range of the attention kernel's."""
    model = tiny("llada", seed=6, **{**WIDE, "max_len": 2048})
    if weights == "bf16":
        model = model.to(torch.bfloat16)
    packed = assemble.pack(model, None if weights == "bf16" else weights)
    rng = np.random.default_rng(1)
    count, block = 1104, 16 if attend == "block" else 0
    ids = tuple(int(i) for i in rng.integers(1, 150, count))

    def run(cuts: Sequence[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        runner = NativeRunner(packed, 1104, kv, 16)
        table = PageTable(Pages(69, 16))
        logits = None
        for start, stop in itertools.pairwise(cuts):
            table.grow(stop)
            want = tuple(range(stop - start - 16, stop - start)) if stop == count else ()
            span = Span(start, ids[start:stop], attend, "keep", want=want, block=block)
            rows = runner.run(pack([(span, table, start)]))
            logits = rows.logits() if want else None
        assert logits is not None
        store = runner.kv
        return logits, [t for t in (store.k, store.v, store.k_scales, store.v_scales) if t is not None]

    wanted, stored = run([0, count])
    for cuts in ([0, 16, 1088, count], [0, *range(48, count, 96), 1088, count], [0, 1040, count]):
        logits, kept = run(cuts)
        assert torch.equal(logits, wanted)
        assert all(torch.equal(a, b) for a, b in zip(kept, stored, strict=True))


def test_rows_and_hits_of_a_known_workload() -> None:
    """Ten requests with 512 tokens in common and 20 of their own, one after the other: 512 are computed once."""
    engine = fake_engine("ar", EngineConfig(kv_tokens=8192), max_len=1024)
    common = tuple(i % 45 for i in range(512))
    rows, cached = [], []
    for i in range(10):
        request = Request(f"r{i}", common + (i,) * 20, GREEDY)
        out, stats = serve(engine, [request])
        rows.append([s.rows for s in stats])
        cached.append(out[f"r{i}"][2].usage.cached_tokens)
        assert sum(s.prefix_queries for s in stats) == 532
        assert sum(s.prefix_hits for s in stats) == (512 if i else 0)
    assert cached == [0] + [512] * 9
    assert rows[0] == [512, 20, 1, 1, 1, 1, 1]
    assert rows[1:] == [[20, 1, 1, 1, 1, 1]] * 9
    assert engine.prefix is not None
    assert (engine.prefix.queries, engine.prefix.hits) == (5320, 512 * 9)


@pytest.mark.parametrize("kind", ["ar", "block"])
@pytest.mark.parametrize("cut_free", [True, False])
def test_requests_that_arrive_together_compute_their_beginning_once(kind: str, cut_free: bool) -> None:
    config = EngineConfig(kv_tokens=8192, prefill_chunk=64)
    engine = fake_engine(kind, config, cut_free=cut_free, max_len=1024)
    batch = [Request(f"r{i}", FAMILIES[0] * 4 + (i,) * 20, GREEDY) for i in range(10)]
    out, stats = serve(engine, batch)
    for request in batch:
        assert tuple(out[request.request_id][0]) == alone(request, kind, config)[0]
    hits, queries = sum(s.prefix_hits for s in stats), sum(s.prefix_queries for s in stats)
    assert queries == 10 * 180
    shared = 160 if cut_free else 128
    assert hits == 9 * shared
    assert hits == sum(out[r.request_id][2].usage.cached_tokens for r in batch)
    if kind == "ar":
        decoding = 10 * (GREEDY.max_tokens - 1)
        assert sum(s.rows for s in stats) == queries - hits + decoding


@pytest.mark.parametrize("kind", ["ar", "block"])
def test_nobody_waits_for_what_it_must_compute_itself(kind: str) -> None:
    """Equal prompts of whole pages: the last page (block) is everybody's own, since its row decides."""
    config = EngineConfig(kv_tokens=2048, page_size=8)
    engine = fake_engine(kind, config)
    for i in range(6):
        engine.add(Request(f"r{i}", FAMILIES[0], GREEDY))
    engine.step()
    assert [live.state.forwards for live in engine.scheduler.running] == [1, 0, 0, 0, 0, 0]
    engine.step()
    assert [live.state.forwards for live in engine.scheduler.running] == [2, 1, 1, 1, 1, 1]
    assert all(live.trail is not None and live.trail.cached == 32 for live in engine.scheduler.running[1:])


def test_one_that_waits_for_another_goes_on_without_it() -> None:
    """The first of two is cancelled in the middle of the common beginning."""
    config = EngineConfig(kv_tokens=2048, prefill_chunk=16)
    engine = fake_engine("ar", config)
    one, two = (Request(name, FAMILIES[0] * 3 + (i,), GREEDY) for i, name in enumerate("ab"))
    engine.add(one)
    engine.add(two)
    engine.step()
    assert engine.cancel("a")
    out = [e for _ in range(60) for e in engine.step() if e.request_id == "b"]
    tokens = tuple(t for e in out for t in e.token_ids)
    assert tokens == alone(two, "ar", config)[0]
    assert out[-1].finish is not None
    assert out[-1].finish.usage.cached_tokens == 16


def test_a_short_common_beginning_does_not_hold_a_request_up() -> None:
    engine = fake_engine("ar", EngineConfig(kv_tokens=2048))
    stem = FAMILIES[0][:16]
    for i in range(2):
        engine.add(Request(f"r{i}", stem + (i,) * 100, GREEDY))
    engine.step()
    assert [live.state.kv_len for live in engine.scheduler.running] == [116, 116]


def test_salts_never_meet() -> None:
    engine = fake_engine("ar", EngineConfig(kv_tokens=2048))
    prompt = FAMILIES[0]
    found = {}
    for name, salt in (("1", ""), ("2", "x"), ("3", "y"), ("4", "x"), ("5", ""), ("6", "x', '")):
        out, _ = serve(engine, [Request(name, prompt, GREEDY, cache_salt=salt)])
        found[name] = out[name][2].usage.cached_tokens
    assert found == {"1": 0, "2": 0, "3": 0, "4": 32, "5": 32, "6": 0}


@pytest.mark.parametrize("kind", ["ar", "block"])
def test_a_key_stands_for_everything_before_it(kind: str) -> None:
    """One other token, at any place, another salt or page size: other keys from there on, and the same before."""

    def keys(prompt: Sequence[int], size: int = 2, salt: str = "", kind: str = kind) -> list[bytes]:
        engine = fake_engine(kind, EngineConfig(page_size=size, kv_tokens=512))
        engine.add(Request("r", tuple(prompt), GREEDY, cache_salt=salt))
        (live,) = engine.scheduler.waiting
        assert engine.prefix is not None
        assert engine.prefix.match(live) == []
        assert live.trail is not None
        return live.trail.keys

    prompt = list(range(24))
    base = keys(prompt)
    assert len(base) == len(set(base)) == 12
    unit = BLOCK if kind == "block" else 2  # a page's K,V of a block model depend on its whole block
    for at in range(24):
        other = keys([*prompt[:at], 45, *prompt[at + 1 :]])
        same = at // unit * unit // 2
        assert other[:same] == base[:same]
        assert not set(other[same:]) & set(base)
    for changed in (
        keys(prompt, size=4),
        keys(prompt, salt="s"),
        keys(prompt, kind="ar" if kind == "block" else "block"),
    ):
        assert not set(changed) & set(base)
    assert len(keys(prompt[:-1])) == (22 if kind == "ar" else 20) // 2


def test_a_preempted_request_takes_its_own_pages_up_again() -> None:
    config = EngineConfig(kv_tokens=64, page_size=4, max_sequences=4)
    engine = fake_engine("ar", config)
    batch = [Request(f"r{i}", (1, 2, 3, i), dataclasses.replace(GREEDY, max_tokens=40)) for i in range(4)]
    out, stats = serve(engine, batch)
    assert sum(s.preempted for s in stats) > 0
    without, plain = serve(fake_engine("ar", dataclasses.replace(config, prefix_caching=False)), batch)
    for request in batch:
        tokens = alone(request, "ar", config)[0]
        assert tuple(out[request.request_id][0]) == tuple(without[request.request_id][0]) == tokens
    assert sum(s.rows for s in stats) < sum(s.rows for s in plain)
    assert sum(s.prefix_queries for s in stats) == 16  # asked again after a preemption, counted once
    assert sum(s.prefix_hits for s in stats) == 0


def test_what_a_cancelled_request_finished_stays() -> None:
    engine = fake_engine("ar", EngineConfig(kv_tokens=2048, prefill_chunk=16, page_size=8))
    engine.add(Request("gone", FAMILIES[0], GREEDY))
    engine.step()
    assert engine.cancel("gone")
    assert engine.pages.used == 0
    assert engine.pages.idle == 2
    out, _ = serve(engine, [Request("next", FAMILIES[0], GREEDY)])
    assert out["next"][2].usage.cached_tokens == 16


def test_the_least_recently_used_beginning_is_given_up() -> None:
    engine = fake_engine("ar", EngineConfig(kv_tokens=104, page_size=8))
    short = dataclasses.replace(GREEDY, max_tokens=1)
    prompts = {name: (i,) * 33 for i, name in enumerate("abc")}

    def cached(name: str) -> int:
        out, _ = serve(engine, [Request(name, prompts[name], short)])
        return int(out[name][2].usage.cached_tokens)

    assert [cached(n) for n in "aba"] == [0, 0, 32]
    assert cached("c") == 0  # 13 pages: four of each, and one for whoever runs
    assert [cached(n) for n in "abc"] == [32, 32, 32]
    serve(engine, [Request("d", (9,) * 33, short)])  # takes the place of a, used longest ago
    assert engine.pages.evicted == 4
    assert [cached(n) for n in "cb"] == [32, 32]
    assert cached("a") == 0


def test_off_shares_nothing() -> None:
    engine = fake_engine("ar", EngineConfig(kv_tokens=2048, prefix_caching=False))
    request = Request("r", FAMILIES[0], GREEDY, cache_salt="s")  # what shares nothing keeps every salt apart
    for _ in range(2):
        out, stats = serve(engine, [request])
        assert out["r"][2].usage.cached_tokens == 0
        assert sum(s.prefix_queries + s.prefix_hits for s in stats) == 0
    assert engine.pages.idle == 0


def test_full_attention_refuses(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dfastllm.engine"):
        engine = Engine(FakeModel("diffusion"), config=EngineConfig(kv_tokens=512))
    assert engine.prefix is None
    assert "prefix caching: off for fake, because its attention is full" in caplog.text
    with pytest.raises(UnsupportedError, match="K,V of a prompt depend on the response") as refused:
        engine.add(Request("r", (1, 2, 3), GREEDY, cache_salt="s"))
    assert refused.value.param == "cache_salt"
    out, _ = serve(engine, [Request(name, (1,) * 40, GREEDY) for name in "ab"])
    assert all(o[2].usage.cached_tokens == 0 for o in out.values())
    assert engine.pages.idle == 0


def test_an_abandoned_step_forgets_what_was_shared() -> None:
    engine = fake_engine("ar", EngineConfig(kv_tokens=512))
    serve(engine, [Request("r", FAMILIES[0], GREEDY)])
    assert engine.pages.idle > 0
    engine.abandon(GenerationError("the step failed."))
    assert engine.pages.idle == 0
    out, _ = serve(engine, [Request("again", FAMILIES[0], GREEDY)])
    assert out["again"][2].usage.cached_tokens == 0


def test_a_failed_forward_leaves_nothing_to_find() -> None:
    model = FakeModel("ar")
    engine = Engine(model, config=EngineConfig(kv_tokens=512, page_size=4))
    assert engine.prefix is not None
    engine.prefix.cut_free = True
    model.fail_on = 9
    serve(engine, [Request("bad", (1, 2, 3, 4, 5, 6, 7, 9), GREEDY)])
    assert engine.pages.idle == 0


def test_rejected_drafts_are_never_found() -> None:
    """A prompt that repeats itself, so that prompt lookup drafts all the time, and mostly wrong: K,V of drafts are
    written into the pages, and only those of committed tokens get keys."""
    config = EngineConfig(kv_tokens=512, page_size=2)
    engine = fake_engine("ar", config)
    audit = Audit(engine)
    request = Request(
        "r",
        FAMILIES[0][:9] * 3,
        dataclasses.replace(GREEDY, max_tokens=40),
        speculative=SpeculativeParams("ngram", prompt_lookup_min=1, num_speculative_tokens=5, adaptive=False),
    )
    engine.add(request)
    tokens: list[int] = []
    usage = None
    while engine.has_work:
        for event in engine.step():
            tokens += event.token_ids
            usage = event.finish.usage if event.finish else usage
        audit.check()
    assert usage is not None
    assert usage.draft_tokens - usage.accepted_tokens > 20
    assert tuple(tokens) == alone(request, "ar", config)[0]
    full = [*request.prompt, *tokens]
    made = (len(full) - 1) // 2  # the last token was never run
    assert [engine.pages.find(key) is not None for key in chain(engine, "", full)] == [
        number < made for number in range(len(full) // 2)
    ]
    assert engine.pages.idle == made


def test_every_character_of_a_salt_counts() -> None:
    """The longest salts there are, which differ in one place: the first, the last or one between."""
    engine = fake_engine("ar", EngineConfig(kv_tokens=4096))
    salts = ["s" * 64, "t" + "s" * 63, "s" * 31 + "t" + "s" * 32, "s" * 63 + "t", "s" * 63]
    for i, salt in enumerate(salts):
        out, _ = serve(engine, [Request(f"r{i}", FAMILIES[0], GREEDY, cache_salt=salt)])
        assert out[f"r{i}"][2].usage.cached_tokens == 0, salt
    out, _ = serve(engine, [Request("again", FAMILIES[0], GREEDY, cache_salt=salts[3])])
    assert out["again"][2].usage.cached_tokens == 32


def test_one_shared_token_is_shared_where_a_page_holds_one() -> None:
    engine = fake_engine("ar", EngineConfig(kv_tokens=256, page_size=1))
    serve(engine, [Request("a", (7, 8, 9, 10), GREEDY)])
    out, _ = serve(engine, [Request("b", (7, 1, 2, 3), GREEDY)])
    assert out["b"][2].usage.cached_tokens == 1
