"""A forward that is given up for a newcomer: it is done again, to the same bits, and who it was given up for pays."""

from __future__ import annotations

import random
import statistics
import threading
from typing import Any

import pytest

from dfastllm.core import DecodeParams, Request, SamplingParams, StepStats
from dfastllm.engine import Engine, EngineConfig, Worker
from dfastllm.kernels.halt import Halt
from dfastllm.kernels.step import Step
from dfastllm.llm import load_engine
from tests.engine.test_fairness import engine, request
from tests.engine.test_loop import either
from tests.engine.test_preemption import CASES, PROMPT
from tests.kit.fake import FakeModel


def halting(loaded: Engine, part: float) -> None:
    """Two of three runs are asked to end: one before its first layer, one by a thread after up to `part` seconds."""
    halt, inner, rng = loaded.runner.halt, loaded.runner.run, random.Random(1)

    def run(step: Step) -> Any:
        number = halt.runs + 1
        if number % 3 == 0:
            return inner(step)
        if number % 3 == 1:
            halt.ask(number)
            return inner(step)
        timer = threading.Timer(part * rng.random(), halt.ask, (number,))
        timer.start()
        try:
            return inner(step)
        finally:
            timer.join()

    loaded.runner.run = run  # type: ignore[method-assign]


def answer(loaded: Engine, decode: dict[str, Any] | None) -> tuple[list[int], list[float], int]:
    assert loaded.tokenizer is not None
    options = None if decode is None else DecodeParams(**decode)
    sampling = SamplingParams(temperature=0, max_tokens=24, logprobs=0, seed=1, ignore_eos=True)
    loaded.add(Request("r", tuple(loaded.tokenizer.encode(PROMPT)), sampling, options))
    ids: list[int] = []
    logprobs: list[float] = []
    while loaded.has_work:
        for event in loaded.step():
            ids += event.token_ids
            logprobs += [token.logprob for token in event.logprobs]
            forwards = 0 if event.finish is None else event.finish.usage.forwards
    return ids, logprobs, forwards


@pytest.mark.parametrize(
    ("model", "decode", "backend"),
    [(*case, "native") for case in CASES] + [(*case, "torch") for case in CASES[:: len(CASES) - 1]],
    ids=str,
)
def test_a_step_that_is_given_up_changes_no_bit(model: str, decode: dict[str, Any] | None, backend: Any) -> None:
    config = EngineConfig(kv_tokens=512, prefill_chunk=16, prefix_caching=False)
    loaded = load_engine(model, backend=backend, config=config)
    wanted = answer(loaded, decode)
    seen: list[StepStats] = []
    loaded.subscribe(seen.append)
    answer(loaded, decode)
    halting(loaded, 2 * statistics.median(stats.run_seconds for stats in seen))
    del seen[:]
    assert answer(loaded, decode) == wanted
    assert loaded.underway.given_up == sum(stats.sequences == 0 for stats in seen) >= 1
    assert loaded.pages.used == 0


def test_asking_for_a_run_that_is_over_ends_no_other() -> None:
    halt = Halt()
    halt.begin()
    halt.ask(1)
    assert halt.asked
    halt.begin()
    assert not halt.asked
    halt.ask(1)
    assert not halt.asked


class Held:
    """A model whose forward waits in its middle until it is let go."""

    def __init__(self, loaded: Engine) -> None:
        self.inside, self.go = threading.Event(), threading.Event()
        self.hold = False
        runner: Any = loaded.runner
        inner = FakeModel.__call__

        def call(model: FakeModel, ids: Any, positions: Any, attend: Any) -> Any:
            def slow(layer: int, *rest: Any) -> Any:
                if self.hold and layer == 1:
                    self.inside.set()
                    assert self.go.wait(20)
                return attend(layer, *rest)

            return inner(model, ids, positions, slow)

        runner.model = type("Slow", (FakeModel,), {"__call__": call})("ar")


def fed() -> tuple[Engine, Held]:
    """An engine of which tenant a had much more than a burst."""
    loaded = Engine(
        FakeModel("ar"), config=EngineConfig(max_batch_rows=64, prefill_chunk=16, prefix_caching=False), choose=either
    )
    held = Held(loaded)
    for n in range(12):
        loaded.add(request(f"a{n}", "a", prompt=16, tokens=200))
    for _ in range(40):
        loaded.step()
    return loaded, held


@pytest.mark.parametrize(
    ("newcomer", "given_up"),
    [
        ({"tenant": "b"}, 1),
        ({"tenant": "a"}, 0),  # the same tenant
        ({"tenant": ""}, 0),  # of no tenant
        ({"tenant": "b", "priority": 1}, 0),  # less urgent than what runs
        ({"tenant": "b", "prompt": 300}, 1),
    ],
    ids=str,
)
def test_a_long_step_of_others_is_given_up_for_a_newcomer(
    newcomer: dict[str, Any], given_up: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, held = fed()
    fairness = loaded.scheduler.fairness
    charge, charged = fairness.charge, []

    def watched(*what: Any) -> None:
        charged.append(what)
        charge(*what)

    monkeypatch.setattr(fairness, "charge", watched)
    with Worker({"m": loaded}) as worker:
        held.hold = True
        assert held.inside.wait(20)
        stream = worker.submit("m", request("new", **newcomer))
        held.hold = False
        held.go.set()
        assert len([token for event in stream for token in event.token_ids]) == 8
        assert loaded.underway.given_up == given_up
        if given_up:  # its own rows, and those that were given up for it: at least one, at most the twelve
            own = newcomer.get("prompt", 8) + 7
            assert own < sum(rows for tenant, _, rows, *_ in charged if tenant == "b") <= own + 12


def test_a_step_that_is_being_planned_is_given_up_too() -> None:
    """A newcomer that comes after the inbox was emptied and before the forward begins does not wait for that."""
    loaded, _ = fed()
    admission = loaded.admit(request("new", "b"))
    schedule = loaded.scheduler.schedule

    def late(step: int) -> Any:
        chosen = schedule(step)
        loaded.underway.give_way(admission)
        return chosen

    loaded.scheduler.schedule = late  # type: ignore[method-assign]
    assert loaded.step() == []
    assert loaded.underway.given_up == 1
    loaded.scheduler.schedule = schedule  # type: ignore[method-assign]
    loaded.add(admission)
    assert [event.request_id for event in loaded.step()] == ["new"]
    loaded.step()
    assert loaded.underway.given_up == 1


def test_who_has_had_its_burst_interrupts_nobody() -> None:
    loaded, held = fed()
    loaded.scheduler.fairness.charge("b", 1.0, 100)
    with Worker({"m": loaded}) as worker:
        held.hold = True
        assert held.inside.wait(20)
        stream = worker.submit("m", request("new", "b"))
        held.hold = False
        held.go.set()
        assert len(list(stream)) > 0
    assert loaded.underway.given_up == 0


def test_no_place_no_interruption() -> None:
    """Where the newcomer could not run at once, giving up a step would help nobody."""
    loaded = engine(max_sequences=1)
    loaded.add(request("a", "a", prompt=60, tokens=100))
    loaded.scheduler.fairness.charge("a", 1.0, 10_000)
    loaded.step()
    loaded.add(request("b", "b"))  # waits: one place cannot be shared
    loaded.step()
    chosen = [(live, live.policy.plan(live.state, 16)) for live in loaded.scheduler.running]
    assert [live.request.tenant for live, _ in chosen] == ["a"]
    loaded.underway.begins(chosen)
    loaded.underway.give_way(loaded.admit(request("b2", "b")))
    assert loaded.runner.halt.words.tolist() == [0, loaded.runner.halt.runs]
