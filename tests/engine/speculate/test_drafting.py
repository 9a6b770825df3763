"""Speculation changes no answer: good, bad and hostile drafters, every option, in mixed batches with preemption; K,V of
what was rejected are never seen; by rejection an answer does not depend on the neighbours."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfastllm import assemble
from dfastllm.core import (
    Draft,
    ModelInfo,
    Request,
    SamplingParams,
    SequenceState,
    SpeculativeParams,
    StepEvent,
    StepStats,
)
from dfastllm.decode.draft import Drafter
from dfastllm.engine import Engine, EngineConfig
from dfastllm.engine.runners.native import NativeRunner
from dfastllm.engine.speculate.canvas import DraftCanvas
from dfastllm.engine.speculate.model import DraftModel, check_vocabulary
from dfastllm.errors import UnsupportedError
from dfastllm.kernels import native, set_threads
from dfastllm.kernels.step import BLOCK
from dfastllm.llm import resolve
from dfastllm.models import tiny
from dfastllm.text import Tokenizer
from tests.kit.fake import EOS, MASK, VOCAB, FakeModel

Answer = tuple[tuple[int, ...], str, Any, tuple[Any, ...], str]


class Made:
    """A drafter whose drafts a function of the tokens and the request gives."""

    def __init__(self, make: Callable[[SequenceState, int], Sequence[int]], *, passes: bool = False) -> None:
        self.make = make
        self.costs = passes
        self.released = 0

    def check(self, request: Request, model: ModelInfo) -> None:
        return None

    def passes(self, most: int) -> int:
        return most if self.costs else 0

    def propose(self, wanted: Sequence[tuple[SequenceState, int]]) -> list[Draft]:
        return [Draft(tuple(self.make(seq, most)), len(seq.tokens)) for seq, most in wanted]

    def release(self, seq: SequenceState) -> None:
        self.released += 1


def anything(seq: SequenceState, most: int) -> list[int]:
    """Nonsense, a function of the text, of any length, end tokens among it."""
    base = hash(tuple(seq.tokens))
    return [(base >> (5 * j)) % VOCAB for j in range(base % (most + 1))]


class Oracle:
    """Knows the answers. wrong: where to err, a function of (position, token)."""

    def __init__(self, wrong: Callable[[int, int], int] = lambda at, token: token, extra: int = 0) -> None:
        self.texts: dict[str, list[int]] = {}
        self.wrong = wrong
        self.extra = extra

    def __call__(self, seq: SequenceState, most: int) -> list[int]:
        text = self.texts[seq.request.request_id]
        at = len(seq.tokens)
        assert text[:at] == seq.tokens, "a sequence left the path of plain decoding"
        right = (text + [3] * 80)[at : at + most + self.extra]
        return [self.wrong(at + j, token) for j, token in enumerate(right)]


def drain(engine: Engine) -> dict[str, Answer]:
    seen: dict[str, list[StepEvent]] = {}
    while engine.has_work:
        for event in engine.step():
            seen.setdefault(event.request_id, []).append(event)
        assert engine.steps < 20_000
    assert engine.prefix is not None or engine.pages.used == 0
    out: dict[str, Answer] = {}
    for name, events in seen.items():
        finish = events[-1].finish
        assert finish is not None
        assert finish.error is None, finish.error
        out[name] = (
            tuple(t for e in events for t in e.token_ids),
            finish.reason.value,
            finish.stop,
            tuple(p for e in events for p in e.logprobs),
            "".join(e.text for e in events),
        )
    return out


def run(engine: Engine, batch: Sequence[Request]) -> dict[str, Answer]:
    for request in batch:
        engine.add(request)
    return drain(engine)


# ---- the fake model: any fault in what a row sees changes its token --------------------------------------------------

SAMPLING = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_p=st.sampled_from([1.0, 0.8]),
    top_k=st.sampled_from([0, 5]),
    min_p=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 2**40),
    max_tokens=st.integers(1, 24),
    ignore_eos=st.booleans(),
    min_tokens=st.sampled_from([0, 1]),
    frequency_penalty=st.sampled_from([0.0, 1.0]),
    presence_penalty=st.sampled_from([0.0, -0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    logit_bias=st.sampled_from([{}, {5: 3.0, EOS: -100.0}]),
    stop_token_ids=st.sampled_from([(), (7, 8, 9)]),
    allowed_token_ids=st.sampled_from([None, (*range(20), EOS)]),
    logprobs=st.sampled_from([None, 2]),
)
CONFIGS = st.builds(
    EngineConfig,
    max_batch_rows=st.sampled_from([4, 17, 64, 2048]),
    prefill_chunk=st.sampled_from([1, 5, 512]),
    max_sequences=st.integers(1, 5),
    page_size=st.sampled_from([1, 4, 16]),
    kv_tokens=st.sampled_from([64, 80, 512]),
    prefix_caching=st.booleans(),
)


def fake(**changes: Any) -> FakeModel:
    return FakeModel("ar", eos_bias=1.0, **changes)


def texts(batch: Sequence[Request], answers: dict[str, Answer]) -> dict[str, list[int]]:
    """Prompt and answer, the ending token included (an EOS where none is named, so that oracles try their luck)."""
    out = {}
    for request in batch:
        tokens, _, stop, _, _ = answers[request.request_id]
        out[request.request_id] = [*request.prompt, *tokens, *([stop] if isinstance(stop, int) else [])]
    return out


@given(st.data(), CONFIGS)
@settings(max_examples=80, deadline=None)
def test_no_drafter_changes_an_answer(data: st.DataObject, config: EngineConfig) -> None:
    batch = []
    for i in range(data.draw(st.integers(1, 6))):
        prompt = tuple(data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=30)))
        asked = data.draw(
            st.none()
            | st.builds(
                SpeculativeParams,
                method=st.sampled_from(["none", "ngram", "suffix", "draft_model", "diffusion"]),
                num_speculative_tokens=st.integers(1, 7),
                prompt_lookup_min=st.just(1),
                adaptive=st.booleans(),
            )
        )
        batch.append(
            Request(f"r{i}", prompt, data.draw(SAMPLING), speculative=asked, priority=data.draw(st.integers(0, 2)))
        )
    plain = [dataclasses.replace(r, speculative=None) for r in batch]
    model = fake(max_len=data.draw(st.sampled_from([55, 512])))
    wanted: dict[str, Answer] = {}
    for request in plain:
        wanted |= run(Engine(model, config=EngineConfig(kv_tokens=512)), [request])
    right = Oracle(extra=data.draw(st.sampled_from([0, 9])))
    wrong = Oracle(lambda at, token: token if at % 3 else (token + 1) % VOCAB)
    right.texts = wrong.texts = texts(batch, wanted)
    bad = data.draw(st.sampled_from([Made(wrong), Made(anything), Made(anything, passes=True)]))
    drafters: dict[str, Drafter] = {"draft_model": Made(right, passes=True), "diffusion": bad}
    engine = Engine(model, config=config, drafters=drafters)
    assert run(engine, batch) == wanted
    assert run(engine, batch) == wanted  # with what was learned


def test_good_drafts_save_forwards_and_are_counted() -> None:
    request = Request("r", (1, 2, 3), SamplingParams(temperature=0.9, seed=5, max_tokens=20, ignore_eos=True))
    plain = run(Engine(fake(), config=EngineConfig()), [request])
    oracle = Oracle(lambda at, token: token if at % 5 else (token + 1) % VOCAB)
    oracle.texts = texts([request], plain)
    drafter = Made(oracle)
    engine = Engine(fake(), config=EngineConfig(), drafters={"diffusion": drafter})
    asked = SpeculativeParams("diffusion", 4, adaptive=False)
    stats: list[Any] = []
    engine.subscribe(stats.append)
    engine.add(dataclasses.replace(request, speculative=asked))
    events = [e for _ in range(99) if engine.has_work for e in engine.step()]
    usage = events[-1].finish.usage  # type: ignore[union-attr]
    assert tuple(t for e in events for t in e.token_ids) == plain["r"][0]
    # by hand: from position 3 drafts of 4, wrong at the multiples of 5; the last step may give one token only
    at, drafts, drafted, positions = 3, 0, 0, [0, 0, 0, 0]
    while at < 23:
        n = min(4, 23 - at - 1)
        stood = next((j for j in range(n) if (at + j) % 5 == 0), n)
        if n:
            drafts, drafted = drafts + 1, drafted + n
        for j in range(stood):
            positions[j] += 1
        at += stood + 1
    assert usage.drafts == drafts
    assert usage.draft_tokens == drafted
    assert usage.accepted_per_position == tuple(positions)[: len(usage.accepted_per_position)]
    assert usage.accepted_tokens == sum(positions)
    assert usage.forwards == len(stats) < 20
    assert sum(d for s in stats for d, _ in s.drafts) == drafted
    assert usage.exactness == "exact-fast"
    assert drafter.released == 1


def test_a_failing_drafter_costs_speed_only(caplog: pytest.LogCaptureFixture) -> None:
    def fail(seq: SequenceState, most: int) -> list[int]:
        raise RuntimeError("told to fail")

    request = Request("r", (1, 2, 3), SamplingParams(temperature=0, max_tokens=8))
    plain = run(Engine(fake(), config=EngineConfig()), [request])
    engine = Engine(fake(), config=EngineConfig(), drafters={"diffusion": Made(fail)})
    with caplog.at_level(logging.ERROR):
        got = run(engine, [dataclasses.replace(request, speculative=SpeculativeParams("diffusion"))])
    assert got == plain
    assert "drafter diffusion failed" in caplog.text


def test_refusals() -> None:
    engine = Engine(fake(), config=EngineConfig())
    with pytest.raises(UnsupportedError, match="no 'draft_model' drafter is loaded") as error:
        engine.add(Request("r", (1,), speculative=SpeculativeParams("draft_model")))
    assert error.value.param == "speculative_config"
    with pytest.raises(UnsupportedError, match="is no autoregressive model"):
        Engine(FakeModel(), config=EngineConfig()).add(Request("r", (1,), speculative=SpeculativeParams("ngram")))
    with pytest.raises(UnsupportedError, match="needs an autoregressive model"):
        DraftModel(tiny("llada"), EngineConfig())
    with pytest.raises(UnsupportedError, match="needs a masked model"):
        DraftCanvas(tiny("llama"), EngineConfig())


# ---- real drafters on the fake model --------------------------------------------------------------------------------


def options(count: int = 12) -> list[SamplingParams]:
    """Every option once, greedy and drawn."""
    extra: list[dict[str, Any]] = [
        {},
        {"frequency_penalty": 1.0, "repetition_penalty": 1.2},
        {"logit_bias": {5: 4.0, 9: -100.0}},
        {"min_tokens": 6},
        {"stop_token_ids": (7, 8, 9, 10)},
        {"logprobs": 3, "top_k": 7},
    ]
    return [
        SamplingParams(
            temperature=(0.0, 1.0)[i % 2], seed=i, max_tokens=20 + i, ignore_eos=i % 4 > 0, **extra[i // 2 % len(extra)]
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("kv_tokens", [96, 2048])
@pytest.mark.parametrize("kind", ["ar", "diffusion", "block"])
@pytest.mark.parametrize("shift", [0, 1])
def test_model_drafters_change_nothing_and_their_pages_add_up(kind: str, shift: int, kv_tokens: int) -> None:
    """A drafter that is the target (kind ar) is always right, also after losing its K,V; a canvas of hashes is not."""
    config = EngineConfig(kv_tokens=kv_tokens, page_size=4, max_sequences=5, prefill_chunk=8, prefix_caching=False)
    method = "draft_model" if kind == "ar" else "diffusion"
    if kind == "ar" and shift:
        pytest.skip("an autoregressive model has no shift")
    drafter: Any = (DraftModel if kind == "ar" else DraftCanvas)(FakeModel(kind, 1.0, shift=shift), config)
    batch = [Request(f"r{i}", tuple((5 * i + j) % 45 for j in range(3 + 2 * i)), s) for i, s in enumerate(options())]
    wanted = run(Engine(fake(), config=config), batch)
    engine = Engine(fake(), config=config, drafters={method: drafter})
    asked = SpeculativeParams(method, 4, adaptive=False)  # type: ignore[arg-type]
    engine_events: list[Any] = []
    engine.subscribe(lambda s: engine_events.extend(s.drafts))
    assert run(engine, [dataclasses.replace(r, speculative=asked) for r in batch]) == wanted
    assert sum(d for d, _ in engine_events) > 50
    if kind == "ar":
        assert all(accepted == drafted for drafted, accepted in engine_events)
    if drafter.mirrors is not None:
        assert drafter.mirrors.pages.used == 0
        assert not drafter.mirrors._held
        assert (drafter.mirrors.evicted > 0) == (kv_tokens == 96 and kind == "ar") or kind == "block"


@pytest.mark.parametrize("shift", [0, 1])
def test_kept_blocks_draft_what_a_whole_forward_would(shift: int) -> None:
    """The block-causal drafter with K,V against the same without: the same drafts, step after step."""
    config = EngineConfig(kv_tokens=512, page_size=4, prefill_chunk=8)
    keeping = DraftCanvas(FakeModel("block", shift=shift), config)
    request = Request("r", tuple(range(1, 12)), SamplingParams(temperature=0, max_tokens=40))
    seq = SequenceState(request, fake().info, list(request.prompt), seed=1)
    for more in (1, 3, 1, 2, 6, 1, 4, 1):
        (kept,) = keeping.propose([(seq, 5)])
        (fresh,) = DraftCanvas(FakeModel("block", shift=shift), config).propose([(seq, 5)])
        assert kept.tokens == fresh.tokens
        assert 1 <= len(kept.tokens) <= 5
        assert MASK not in kept.tokens
        seq.tokens += [(7 * len(seq.tokens)) % 40 for _ in range(more)]


def test_a_draft_stops_at_an_end_and_at_the_drafters_context() -> None:
    drafter = DraftModel(FakeModel("ar", eos_bias=100.0, max_len=6), EngineConfig())
    request = Request("r", (1, 2), SamplingParams(temperature=0, max_tokens=40))
    seq = SequenceState(request, fake().info, [1, 2], seed=1)
    assert drafter.propose([(seq, 4)])[0].tokens == (EOS,)
    ignoring = dataclasses.replace(request, request_id="i", sampling=SamplingParams(temperature=0, ignore_eos=True))
    seq = SequenceState(ignoring, fake().info, [1, 2, 3, 4, 5], seed=1)
    assert drafter.propose([(seq, 4)])[0].tokens == (EOS, EOS)  # positions 5 and 6 of a context of 6
    seq.tokens += [6, 7]
    assert drafter.propose([(seq, 4)])[0].tokens == ()


# ---- rejection ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("method", ["draft_model", "diffusion", "suffix", "ngram"])
def test_by_rejection_answers_do_not_depend_on_neighbours_or_preemption(method: str, adaptive: bool) -> None:
    asked = SpeculativeParams(method, 4, acceptance="rejection", adaptive=adaptive, prompt_lookup_min=1)  # type: ignore[arg-type]
    batch = [
        Request(
            f"r{i}",
            tuple((5 * i + j) % 9 for j in range(3 + 3 * i)),
            SamplingParams(temperature=1.2, seed=i, max_tokens=30, ignore_eos=True, logprobs=1, top_k=6),
            speculative=asked,
        )
        for i in range(6)
    ]

    def engine(config: EngineConfig) -> Engine:
        drafters: dict[str, Drafter] = {
            "draft_model": DraftModel(FakeModel("ar"), config),
            "diffusion": DraftCanvas(FakeModel("diffusion"), config),
        }
        return Engine(fake(), config=config, drafters=drafters)

    crowded = EngineConfig(kv_tokens=96, page_size=4, max_sequences=6, prefix_caching=False)
    together = engine(crowded)
    got = run(together, batch)
    assert together.scheduler.preempted > 0
    for request in batch:
        alone = run(engine(EngineConfig(kv_tokens=512)), [request])
        assert got[request.request_id] == alone[request.request_id]


def test_by_rejection_the_engine_draws_from_the_targets_distribution() -> None:
    """Two tokens of four allowed ones, over many seeds, against the exact joint distribution of the fake model; the
    drafting model is another one."""
    allowed, prompt, seeds = (3, 5, 11, 17), (1, 2, 3), 3000
    asked = SpeculativeParams("draft_model", 1, acceptance="rejection", adaptive=False)
    sampling = SamplingParams(temperature=3.0, max_tokens=2, allowed_token_ids=allowed, ignore_eos=True)
    config = EngineConfig(kv_tokens=1024)

    def exact(prefix: tuple[int, ...]) -> torch.Tensor:
        engine = Engine(FakeModel("ar"), config=config)
        one = dataclasses.replace(sampling, temperature=0.0, max_tokens=1, logprobs=20, allowed_token_ids=None)
        rows = [
            dict(
                run(engine, [Request(f"{t}", prefix, dataclasses.replace(one, allowed_token_ids=(t,)))])[f"{t}"][3][
                    0
                ].top
            )
            | {
                t: run(engine, [Request("x", prefix, dataclasses.replace(one, allowed_token_ids=(t,)))])["x"][3][
                    0
                ].logprob
            }
            for t in allowed
        ]
        logits = torch.tensor([rows[i][t] for i, t in enumerate(allowed)], dtype=torch.float64)
        return torch.softmax(logits / 3.0, -1)

    first = exact(prompt)
    wanted = {
        (a, b): seeds * float(first[i] * exact((*prompt, a))[j])
        for i, a in enumerate(allowed)
        for j, b in enumerate(allowed)
    }
    drafter = DraftModel(FakeModel("ar", layers=1), config)
    engine = Engine(FakeModel("ar"), config=config, drafters={"draft_model": drafter})
    events: list[Any] = []
    engine.subscribe(lambda s: events.extend(s.drafts))
    counts: Counter[tuple[int, ...]] = Counter()
    for at in range(0, seeds, 500):
        batch = [
            Request(f"r{i}", prompt, dataclasses.replace(sampling, seed=i), speculative=asked)
            for i in range(at, at + 500)
        ]
        counts.update(answer[0] for answer in run(engine, batch).values())
    assert 0.2 < sum(a for _, a in events) / len(events) < 0.98
    assert sum((counts[pair] - n) ** 2 / n for pair, n in wanted.items()) < 37.7  # 15 degrees of freedom, 1 in 1000


# ---- the real thing -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> Callable[..., Engine]:
    """Engines over demo-ar with every drafter, on the native kernels where they are built."""
    set_threads(1)
    names = ("demo-ar", "demo-draft", "demo-diffusion", "demo-block")
    # bits are the kernels' promise: the twins sum by the batch's shape, and bfloat16 would make tokens of that
    dtype = None if native() is not None else "float32"
    loaded = {name: assemble.load(resolve(name), backend="native", dtype=dtype) for name in names}
    tokenizer = loaded["demo-ar"].tokenizer

    def make(config: EngineConfig, canvas: str = "demo-diffusion") -> Engine:
        drafters: dict[str, Drafter] = {
            "draft_model": DraftModel(loaded["demo-draft"].model, config),
            "diffusion": DraftCanvas(loaded[canvas].model, config),
        }
        return Engine(loaded["demo-ar"].model, tokenizer, config, drafters=drafters)

    return make


def spoken(tokenizer: Tokenizer, speculative: SpeculativeParams | None, offset: int = 0) -> list[Request]:
    questions = ["What is 12 + 30?", "Repeat: red blue red blue red", "Sort: pear fig apple", "Count from 3 to 9."]
    extra: list[dict[str, Any]] = [
        {},
        {"stop": ("e", "1")},
        {"stop": ("blue red",), "include_stop_str_in_output": True},
        {"frequency_penalty": 0.8, "presence_penalty": 0.2, "repetition_penalty": 1.1},
        {"logit_bias": {300: 5.0}, "min_tokens": 5},
        {"max_tokens": 1},
        {"max_tokens": 2, "ignore_eos": True},
        {"ignore_eos": True, "top_p": 0.9, "min_p": 0.02},
    ]
    out = []
    for i, more in enumerate(extra):
        text = tokenizer.apply_chat_template([{"role": "user", "content": questions[i % len(questions)]}])
        prompt = tuple(tokenizer.encode(text, add_special=False))
        for temperature in (0.0, 0.9):
            fields = {"temperature": temperature, "max_tokens": 24, "seed": i, "logprobs": 1, **more}
            name = f"r{offset + i}-{temperature}"
            out.append(Request(name, prompt, SamplingParams(**fields), speculative=speculative))
    return out


def _note(accepted: list[int], stats: StepStats) -> None:
    accepted += [a for _, a in stats.drafts]


@pytest.mark.parametrize("kv_tokens", [256, 8192])
@pytest.mark.parametrize("adaptive", [False, True])
def test_answers_and_their_bits_are_plain_decodings(
    demo: Callable[..., Engine], adaptive: bool, kv_tokens: int
) -> None:
    """Text, tokens, stops and every bit of the logprobs, all drafters and options in one batch, with preemption."""
    config = EngineConfig(kv_tokens=kv_tokens, max_sequences=12)
    plain_engine = demo(EngineConfig(kv_tokens=8192))
    assert plain_engine.tokenizer is not None
    methods = ["ngram", "suffix", "draft_model", "diffusion"]
    for canvas in ("demo-diffusion", "demo-block"):
        engine = demo(config, canvas)
        accepted: list[int] = []
        engine.subscribe(functools.partial(_note, accepted))
        batch, wanted = [], {}
        for n, method in enumerate(methods):
            asked = SpeculativeParams(method, 1 + 2 * n, prompt_lookup_min=1, adaptive=adaptive)  # type: ignore[arg-type]
            batch += spoken(plain_engine.tokenizer, asked, offset=100 * n)
        batch += spoken(plain_engine.tokenizer, None, offset=900)
        wanted = run(plain_engine, [dataclasses.replace(r, speculative=None) for r in batch])
        parts = 5 if native() is not None else 3  # of an answer: all, or tokens, reason and stop
        got = run(engine, batch)
        assert {name: a[:parts] for name, a in got.items()} == {name: a[:parts] for name, a in wanted.items()}
        assert sum(accepted) > (0 if adaptive else 100)
        assert (engine.scheduler.preempted > 0) == (kv_tokens == 256)


def vectors(engine: Engine, slots: Sequence[int]) -> list[torch.Tensor]:
    """K and V at these slots, float32, all layers."""
    kv: Any = engine.runner.kv
    at = torch.tensor(list(slots))
    if isinstance(engine.runner, NativeRunner):
        return [kv.k[:, at // BLOCK, :, :, at % BLOCK].float(), kv.v[:, at // BLOCK, :, at % BLOCK].float()]
    return [kv.k[:, at].clone(), kv.v[:, at].clone()]


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("right", [False, True])
def test_k_and_v_are_those_of_a_recomputation(backend: str, right: bool) -> None:
    """Drafts partly or never right; then K,V of the text, against a prefill of it: bit for bit on the kernels."""
    model = tiny("llama", seed=4, vocab_size=64)
    built: Any = assemble.pack(model) if backend == "native" else model
    config = EngineConfig(kv_tokens=256, prefix_caching=False)
    sampling = SamplingParams(temperature=1.0, seed=3, max_tokens=40, ignore_eos=True)
    request = Request("r", (1, 2, 3, 4, 5), sampling)
    oracle = Oracle(lambda at, token: token if right and at % 4 else (token + 1) % 64)
    oracle.texts = texts([request], run(Engine(built, config=config), [request]))
    engine = Engine(built, config=config, drafters={"diffusion": Made(oracle)})
    engine.add(dataclasses.replace(request, speculative=SpeculativeParams("diffusion", 4, adaptive=False)))
    engine.step()
    live = engine.scheduler.running[0]
    while len(live.state.tokens) < 30:
        engine.step()
    assert live.drafts > 0
    assert (sum(live.accepted) > 0) == right
    held = live.state.kv_len
    assert held == len(live.state.tokens) - 1
    again = Engine(built, config=config)
    again.add(Request("again", tuple(live.state.tokens[:held]), sampling))
    again.step()
    other = again.scheduler.running[0]
    for mine, theirs in zip(
        vectors(engine, live.table.slots(0, held)), vectors(again, other.table.slots(0, held)), strict=True
    ):
        assert mine.abs().sum() > 0
        exact = backend == "native" and native() is not None
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0 if exact else 1e-5)


# ---- tokenizers -----------------------------------------------------------------------------------------------------


def test_drafts_of_another_tokenizer_are_refused() -> None:
    loaded = {name: assemble.load(resolve(name)) for name in ("demo-ar", "demo-draft", "demo-diffusion")}
    target = loaded["demo-ar"]
    for name in ("demo-draft", "demo-diffusion"):
        check_vocabulary(target.model.info, target.tokenizer, loaded[name].model.info, loaded[name].tokenizer)
    assert loaded["demo-draft"].tokenizer is not None
    other = Tokenizer.load(resolve("demo-draft"))
    other.backend.add_special_tokens(["<|new|>"])
    with pytest.raises(UnsupportedError, match=r"1 ids mean other tokens.*<\|new\|>") as error:
        check_vocabulary(target.model.info, target.tokenizer, loaded["demo-draft"].model.info, other)
    assert error.value.param == "speculative_config"
    info = dataclasses.replace(loaded["demo-draft"].model.info, eos_ids=(17,))
    with pytest.raises(UnsupportedError, match="no common end token"):
        check_vocabulary(target.model.info, target.tokenizer, info, loaded["demo-draft"].tokenizer)
    with pytest.raises(UnsupportedError, match="64 ids against"):
        check_vocabulary(target.model.info, None, dataclasses.replace(info, vocab_size=64), None)


def test_pages_of_rejected_drafts_return_at_once() -> None:
    """After every step a sequence holds the pages of its K,V and no more, however long the draft was."""
    config = EngineConfig(kv_tokens=512, page_size=1)
    engine = Engine(FakeModel("ar"), config=config)
    sampling = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    asked = SpeculativeParams("ngram", prompt_lookup_min=1, num_speculative_tokens=8, adaptive=False)
    engine.add(Request("r", (3, 4, 5, 3, 4, 5, 3, 4, 5), sampling, speculative=asked))
    rejected = 0
    while engine.has_work:
        ends = [event.finish for event in engine.step() if event.finish]
        for live in engine.scheduler.running:
            assert len(live.table.pages) == engine.pages.pages_for(live.state.kv_len) == engine.pages.used
        rejected += sum(end.usage.draft_tokens - end.usage.accepted_tokens for end in ends)
    assert rejected > 20


@pytest.mark.parametrize("adaptive", [True, False])
def test_where_drafting_does_not_pay_only_those_draft_who_ask_for_it(
    adaptive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the pace rests, requests whose draft lengths follow what pays are not looked at, and are counted; one that
    wants drafts whatever they cost has them."""
    engine = Engine(FakeModel("ar"), config=EngineConfig(kv_tokens=512))
    monkeypatch.setattr(engine.drafting.pace, "resting", lambda: True)
    sampling = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    asked = SpeculativeParams("ngram", prompt_lookup_min=1, num_speculative_tokens=3, adaptive=adaptive)
    stats: list[StepStats] = []
    engine.subscribe(stats.append)
    engine.add(Request("r", (3, 4, 5, 3, 4, 5, 3, 4, 5), sampling, speculative=asked))
    while engine.has_work:
        engine.step()
    drafted, held = sum(len(step.drafts) for step in stats), sum(step.suppressed for step in stats)
    assert (drafted == 0) == adaptive
    assert (held > 10) == adaptive
