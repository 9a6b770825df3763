"""The loop on a deterministic fake model: ar and diffusion in one batch, any interleaving, every request ends once."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfastllm.core import DecodeParams, FinishReason, ModelInfo, Request, SamplingParams, StepEvent, StepStats
from dfastllm.decode.ar import Autoregressive
from dfastllm.decode.policy import Compiled
from dfastllm.decode.registry import policy_for
from dfastllm.engine import Engine, EngineConfig
from dfastllm.errors import ContextLengthError, QueueFullError, ValidationError
from dfastllm.kernels.rows import Rows
from dfastllm.kernels.step import Step
from dfastllm.models import tiny
from tests.kit.fake import MASK, FakeModel


class AnyKindAr(Autoregressive):
    """The ar policy on the fake model, whose attention serves either kind."""

    def compile(self, request: Request, model: ModelInfo) -> Compiled:
        return super().compile(request, dataclasses.replace(model, kind="ar"))


AR = AnyKindAr()


def either(request: Request, info: ModelInfo) -> Any:
    return AR if request.decode is None or not request.decode.given else policy_for(request, info)


@dataclass
class Result:
    tokens: tuple[int, ...]
    finish: Any
    forwards: int


def drain(engine: Engine, limit: int = 5000) -> dict[str, list[StepEvent]]:
    events: dict[str, list[StepEvent]] = {}
    for _ in range(limit):
        if not engine.has_work:
            return events
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
        audit(engine)
    raise AssertionError("the engine did not come to an end")


def audit(engine: Engine) -> None:
    """Pages: each held by exactly one table, counted right."""
    tables = [live.table for live in engine.scheduler.everyone()]
    held = Counter(page for table in tables for page in table.pages)
    assert all(n == 1 for n in held.values())
    assert engine.pages.used == len(held)
    assert not any(live.table.pages for live in engine.scheduler.waiting)


def result(events: list[StepEvent]) -> Result:
    ends = [e for e in events if e.finish is not None]
    assert len(ends) == 1
    assert events[-1] is ends[0]
    tokens = tuple(t for e in events for t in e.token_ids)
    assert MASK not in tokens
    return Result(tokens, ends[0].finish, ends[0].finish.usage.forwards)


def solo(request: Request, **model: Any) -> Result:
    engine = Engine(FakeModel(**model), config=EngineConfig(kv_tokens=512), choose=either)
    engine.add(request)
    return result(drain(engine)[request.request_id])


@st.composite
def requests(draw: st.DrawFn, name: str) -> Request:
    prompt = tuple(draw(st.lists(st.integers(0, 45), min_size=1, max_size=30)))
    sampling = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.7, 1.5])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        seed=draw(st.integers(0, 2**40)),
        max_tokens=draw(st.integers(1, 20)),
        ignore_eos=draw(st.booleans()),
    )
    decode, suffix = None, ()
    if draw(st.booleans()):
        decode = DecodeParams(
            cache=draw(st.sampled_from(["none", "prefix", "dual", "windowed"])),
            block_length=draw(st.sampled_from([3, 4, 8])),
            threshold=draw(st.sampled_from([None, 0.3])),
        )
        suffix = tuple(draw(st.lists(st.integers(0, 45), max_size=5)))
    return Request(name, prompt, sampling, decode, suffix, priority=draw(st.integers(0, 2)))


CONFIGS = st.builds(
    EngineConfig,
    max_batch_rows=st.sampled_from([4, 17, 64, 2048]),
    prefill_chunk=st.sampled_from([1, 5, 512]),
    max_sequences=st.integers(1, 5),
    page_size=st.sampled_from([1, 4, 16]),
    kv_tokens=st.sampled_from([64, 80, 128, 512]),
    ageing_steps=st.sampled_from([0, 1, 8]),
)


@given(st.data(), CONFIGS)
@settings(max_examples=80, deadline=None)
def test_any_interleaving_gives_the_same_tokens(data: st.DataObject, config: EngineConfig) -> None:
    batch = [data.draw(requests(f"r{i}")) for i in range(data.draw(st.integers(1, 6)))]
    engine = Engine(FakeModel(eos_bias=1.0), config=config, choose=either)
    events: dict[str, list[StepEvent]] = {}
    todo = list(batch)
    while todo or engine.has_work:
        while todo and (not engine.has_work or data.draw(st.booleans())):
            engine.add(todo.pop(0))
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
        audit(engine)
        assert engine.steps < 5000
    assert engine.pages.used == 0
    for request in batch:
        got, alone = result(events[request.request_id]), solo(request, eos_bias=1.0)
        assert got.tokens == alone.tokens, request
        assert got.finish.reason == alone.finish.reason
        assert got.finish.usage.completion_tokens == alone.finish.usage.completion_tokens


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_cancel_at_any_point_returns_the_pages(data: st.DataObject) -> None:
    batch = [data.draw(requests(f"r{i}")) for i in range(3)]
    engine = Engine(FakeModel(), config=EngineConfig(kv_tokens=128, max_batch_rows=64), choose=either)
    for request in batch:
        engine.add(request)
    events: dict[str, list[StepEvent]] = {}
    victim = data.draw(st.sampled_from(batch)).request_id
    at = data.draw(st.integers(0, 30))
    while engine.has_work:
        known = False
        if engine.steps == at:
            known = engine.cancel(victim)
            assert engine.scheduler.find(victim) is None
            audit(engine)
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
        if known:
            assert events[victim][-1].finish.reason is FinishReason.CANCELLED
    assert engine.pages.used == 0
    for request in batch:
        got, alone = result(events[request.request_id]), solo(request)
        if request.request_id == victim and got.finish.reason is FinishReason.CANCELLED:
            assert alone.tokens[: len(got.tokens)] == got.tokens
        else:
            assert got.tokens == alone.tokens
    assert not engine.cancel(victim)


def long_request(name: str, priority: int = 0, tokens: int = 40, **options: Any) -> Request:
    return Request(
        name, (1, 2, 3), SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), priority=priority, **options
    )


def test_memory_pressure_preempts_and_resumes() -> None:
    config = EngineConfig(kv_tokens=64, page_size=4, max_sequences=4)
    engine = Engine(FakeModel(), config=config, choose=either)
    stats: list[StepStats] = []
    engine.subscribe(stats.append)
    for i in range(4):
        engine.add(long_request(f"r{i}"))
    events = drain(engine)
    assert sum(s.preempted for s in stats) > 0
    for i in range(4):
        assert result(events[f"r{i}"]).tokens == solo(long_request(f"r{i}")).tokens
    assert max(s.pages_used for s in stats) <= 16


def test_higher_priority_takes_the_place_of_lower() -> None:
    engine = Engine(FakeModel(), config=EngineConfig(max_sequences=1), choose=either)
    engine.add(long_request("low", priority=5))
    for _ in range(5):
        engine.step()
    engine.add(long_request("high", priority=0, tokens=3))
    ended = [e.request_id for _ in range(200) for e in engine.step() if e.finish]
    assert ended == ["high", "low"]
    assert engine.scheduler.preempted == 1


@pytest.mark.parametrize("ageing", [4, 32])
def test_nothing_starves(ageing: int) -> None:
    """A low-priority request finishes although high-priority ones never stop coming."""
    engine = Engine(FakeModel(), config=EngineConfig(max_sequences=1, ageing_steps=ageing), choose=either)
    engine.add(long_request("poor", priority=3, tokens=5))
    added = 0
    for _ in range(40 * ageing):
        while len(engine.scheduler) < 3:
            engine.add(long_request(f"rich{added}", priority=0, tokens=4))
            added += 1
        if any(e.request_id == "poor" and e.finish for e in engine.step()):
            return
    raise AssertionError(f"starved after {engine.steps} steps and {added} richer requests")


def test_without_ageing_priority_is_strict() -> None:
    engine = Engine(FakeModel(), config=EngineConfig(max_sequences=1, ageing_steps=0), choose=either)
    engine.add(long_request("poor", priority=3, tokens=5))
    for i in range(300):
        while len(engine.scheduler) < 3:
            engine.add(long_request(f"rich{i}-{len(engine.scheduler)}", priority=0, tokens=4))
        assert not any(e.request_id == "poor" and e.finish for e in engine.step())


def test_budget_is_kept_and_shared() -> None:
    """12 canvases of 24 rows against a budget of 100: at most 4 a step, and none runs twice before the others."""
    engine = Engine(FakeModel(), config=EngineConfig(max_batch_rows=100), choose=either)
    stats: list[StepStats] = []
    engine.subscribe(stats.append)
    decode = DecodeParams(cache="none", block_length=4)
    for i in range(12):
        engine.add(Request(f"r{i}", (1, 2, 3, 4), SamplingParams(temperature=0, max_tokens=20, seed=i), decode))
    for _ in range(3):
        engine.step()
    assert [live.state.forwards for live in engine.scheduler.running] == [1] * 12
    drain(engine)
    assert max(s.rows for s in stats) <= 100


def test_a_canvas_larger_than_the_budget_runs_alone() -> None:
    engine = Engine(FakeModel(), config=EngineConfig(max_batch_rows=16), choose=either)
    stats: list[StepStats] = []
    engine.subscribe(stats.append)
    decode = DecodeParams(cache="none", block_length=8)
    big = Request("big", (1,) * 30, SamplingParams(temperature=0, max_tokens=8), decode)
    engine.add(big)
    engine.add(long_request("small"))
    events = drain(engine)
    assert {"big", "small"} == set(events)
    assert all(s.sequences == 1 for s in stats if s.rows > 16)


def test_a_failing_forward_ends_its_batch_and_nothing_else() -> None:
    model = FakeModel()
    engine = Engine(model, config=EngineConfig(), choose=either)
    model.fail_on = 9
    engine.add(Request("bad", (9,), SamplingParams(temperature=0)))
    events = drain(engine)
    end = events["bad"][-1].finish
    assert end.reason is FinishReason.ERROR
    assert end.error is not None
    assert events["bad"][-1].token_ids == ()
    model.fail_on = None
    engine.add(long_request("good"))
    assert result(drain(engine)["good"]).tokens == solo(long_request("good")).tokens
    assert engine.pages.used == 0


def test_nan_logits_end_only_their_own_request() -> None:
    model = FakeModel()
    model.nan_on = 9
    engine = Engine(model, config=EngineConfig(), choose=either)
    engine.add(Request("bad", (1, 9), SamplingParams(temperature=0)))
    engine.add(Request("good", (1, 2), SamplingParams(temperature=0, logit_bias={9: -100}, ignore_eos=True)))
    events = drain(engine)
    assert events["bad"][-1].finish.reason is FinishReason.ERROR
    assert result(events["good"]).finish.reason is FinishReason.LENGTH


def test_timeout_ends_a_request() -> None:
    engine = Engine(FakeModel(), config=EngineConfig(), choose=either)
    engine.add(long_request("late", timeout=1e-9))
    events = drain(engine)
    assert events["late"][-1].finish.reason is FinishReason.TIMEOUT


def test_admission_refuses_by_name() -> None:
    engine = Engine(FakeModel(max_len=32), config=EngineConfig(max_waiting=1), choose=either)
    with pytest.raises(ContextLengthError) as long:
        engine.add(Request("a", (1,) * 40))
    assert long.value.param == "prompt"
    with pytest.raises(ContextLengthError) as more:
        engine.add(Request("a", (1,) * 20, SamplingParams(max_tokens=20)))
    assert more.value.param == "max_tokens"
    with pytest.raises(ValidationError, match="token id 99"):
        engine.add(Request("a", (99,)))
    with pytest.raises(ValidationError, match="mask token"):
        engine.add(Request("a", (MASK,)))
    with pytest.raises(ValidationError, match="tokenizer"):
        engine.add(Request("a", (1,), SamplingParams(stop=("x",))))
    engine.add(Request("a", (1,)))
    with pytest.raises(ValidationError, match="already in use"):
        engine.add(Request("a", (1,)))
    with pytest.raises(QueueFullError):
        engine.add(Request("b", (1,)))


def test_a_request_larger_than_the_kv_memory_is_refused() -> None:
    engine = Engine(FakeModel(), config=EngineConfig(kv_tokens=32), choose=either)
    with pytest.raises(ContextLengthError, match="kv_tokens"):
        engine.add(long_request("a"))


def test_logits_are_counted_only_where_wanted() -> None:
    engine = Engine(FakeModel(), config=EngineConfig(), choose=either)
    stats: list[StepStats] = []
    engine.subscribe(stats.append)
    engine.add(Request("a", (1,) * 30, SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)))
    drain(engine)
    assert [s.rows for s in stats] == [30, 1, 1, 1, 1]
    assert [s.wanted for s in stats] == [1, 1, 1, 1, 1]


def test_prompts_that_fit_one_by_one_do_not_preempt_each_other() -> None:
    """Six prompts of 40 tokens, K,V for two of them: the others wait until the pages of the whole prompt are free
    beside what those under way still lack, so that nobody reads a prompt and loses it."""
    config = EngineConfig(kv_tokens=96, page_size=4, prefill_chunk=8, max_batch_rows=16, max_sequences=6)
    engine = Engine(FakeModel(), config=config, choose=either)
    batch = [
        Request(f"r{i}", tuple(range(i, i + 40)), SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
        for i in range(6)
    ]
    for request in batch:
        engine.add(request)
    events = drain(engine)
    assert engine.scheduler.preempted == 0
    for request in batch:
        assert result(events[request.request_id]).tokens == solo(request).tokens


@pytest.mark.parametrize("kv_tokens", [64, 60])
def test_the_lowest_rank_is_preempted_first(kv_tokens: int) -> None:
    """Three share the pages of two: the one of the highest priority goes on, the others begin anew, the lowest first.
    With 16 pages the second asks when pages run out and only the third can be taken; with 15, five for each, the first
    asks, and both others could be."""
    config = EngineConfig(kv_tokens=kv_tokens, page_size=4, max_sequences=3, ageing_steps=0)
    engine = Engine(FakeModel(), config=config, choose=either)
    for name, priority in (("first", 0), ("second", 1), ("third", 2)):
        engine.add(long_request(name, priority=priority, tokens=30))
    lost: list[str] = []
    running: list[str] = []
    ended: list[str] = []
    while engine.has_work:
        ended += [event.request_id for event in engine.step() if event.finish]
        now = [live.request.request_id for live in engine.scheduler.running]
        lost += [name for name in running if name not in now and name not in ended]
        running = now
    assert "first" not in lost
    assert lost[0] == "third"
    assert ended == ["first", "second", "third"]


def test_time_of_drafting_is_not_time_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a draft costs and what a step costs are weighed against each other, so they are measured apart."""
    engine = Engine(FakeModel(), config=EngineConfig(kv_tokens=128), choose=either)
    steps: list[float] = []
    monkeypatch.setattr(engine.drafting, "draft", lambda running: 100.0)
    monkeypatch.setattr(engine.drafting, "observe", lambda chosen, commits, seconds: steps.append(seconds))
    engine.add(long_request("r", tokens=3))
    drain(engine)
    assert steps
    assert all(-100 < seconds < -90 for seconds in steps)


def test_a_new_request_takes_its_turn_behind_those_under_way() -> None:
    """Canvases that fill a step each: the one that was there first goes on when another is admitted."""
    engine = Engine(FakeModel(), config=EngineConfig(max_batch_rows=24, ageing_steps=0), choose=either)
    decode = DecodeParams(cache="none", block_length=20)

    def canvas(name: str) -> Request:
        return Request(name, (1, 2, 3, 4), SamplingParams(temperature=0, max_tokens=20, seed=1), decode)

    engine.add(canvas("old"))
    for _ in range(3):
        engine.step()
    engine.add(canvas("new"))
    engine.step()
    forwards = {live.request.request_id: live.state.forwards for live in engine.scheduler.running}
    assert forwards == {"old": 4, "new": 0}
    engine.step()
    forwards = {live.request.request_id: live.state.forwards for live in engine.scheduler.running}
    assert forwards == {"old": 4, "new": 1}  # then in turn


def test_memory_that_runs_out_ends_the_request_with_the_most_rows_alone() -> None:
    """The others run in the next step, and get the tokens that they get alone."""
    model = tiny("llama", seed=3)
    config = EngineConfig(kv_tokens=512, prefix_caching=False)

    def requests() -> list[Request]:
        sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        return [Request(name, tuple(range(3, 3 + n)), sampling) for name, n in (("a", 5), ("b", 40), ("c", 7))]

    def answers(engine: Engine) -> tuple[dict[str, list[int]], dict[str, str]]:
        tokens: dict[str, list[int]] = {}
        errors = {}
        while engine.has_work:
            for event in engine.step():
                tokens.setdefault(event.request_id, []).extend(event.token_ids)
                if event.finish is not None and event.finish.error is not None:
                    errors[event.request_id] = str(event.finish.error)
        return tokens, errors

    alone = Engine(model, config=config)
    for request in requests():
        alone.add(request)
    wanted, _ = answers(alone)
    full = Engine(model, config=config)
    run = full.runner.run

    def small(step: Step) -> Rows:
        if len(step) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return run(step)

    full.runner.run = small  # type: ignore[method-assign]
    for request in requests():
        full.add(request)
    tokens, errors = answers(full)
    assert set(errors) == {"b"}
    assert "memory ran out while computing this request: CUDA out of memory" in errors["b"]
    assert {name: tokens[name] for name in "ac"} == {name: wanted[name] for name in "ac"}
    assert full.pages.used == 0
