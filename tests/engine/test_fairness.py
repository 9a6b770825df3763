"""Fair shares among tenants: the accounts against exact arithmetic over the whole history, and the scheduler under
floods. What comes out of a request never depends on whose it is."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfastllm.core import Request, SamplingParams, Span
from dfastllm.engine import Engine, EngineConfig
from dfastllm.engine.fairness import FORGET, Fairness
from dfastllm.engine.scheduler import Scheduler
from dfastllm.engine.sequence import Live
from dfastllm.errors import QueueFullError, ValidationError
from tests.engine.test_invariance import answers
from tests.engine.test_loop import either
from tests.kit.fake import FakeModel

WEIGHTS = (0.5, 1.0, 2.0, 8.0)  # exact in binary, so that floats and fractions can be compared


class History:
    """The rule said once more, from all that ever happened: a tenant's time after a charge is the later of its time
    and the floor, plus rows / weight; the floor is the latest of (time - burst / weight) that ever was."""

    def __init__(self, burst: int) -> None:
        self.burst = burst
        self.charges: list[tuple[str, Fraction, int]] = []

    def times(self) -> tuple[dict[str, Fraction], Fraction]:
        times: dict[str, Fraction] = {}
        floor = Fraction(0)
        for tenant, weight, rows in self.charges:
            times[tenant] = max(times.get(tenant, floor), floor) + rows / weight
            floor = max(floor, times[tenant] - self.burst / weight)
        return times, floor


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_times_are_those_of_the_whole_history(data: st.DataObject) -> None:
    burst = data.draw(st.sampled_from((16, 100, 4096)))
    fairness, history = Fairness(burst, 8, 100), History(burst)
    weights = {name: data.draw(st.sampled_from(WEIGHTS)) for name in "abcd"}
    requests: Counter[str] = Counter()
    for step in range(data.draw(st.integers(1, 40))):
        name = data.draw(st.sampled_from("abcd"))
        match data.draw(st.sampled_from(("join", "leave", "charge", "charge"))):
            case "join":
                fairness.join(name, weights[name])
                requests[name] += 1
            case "leave" if requests[name]:
                fairness.leave(name)
                requests[name] -= 1
            case "charge":
                rows = data.draw(st.integers(1, 3 * burst))
                fairness.charge(name, weights[name], rows, step)
                history.charges.append((name, Fraction(weights[name]), rows))
    times, floor = history.times()
    for name in "abcd":
        assert fairness.time(name) == max(times.get(name, floor), floor)
        for other in "abcd":
            lag = max(times.get(other, floor), floor) - max(times.get(name, floor), floor)
            ahead = other in times and lag * Fraction(weights[other]) > Fraction(burst, 2)
            assert fairness.before(name, other) == ahead
    known = {name: fairness.time(name) for name in "abcd" if name in fairness._accounts}
    hasty = data.draw(st.sets(st.sampled_from(sorted(known)))) if known else set()
    back = {other for other in known if any(fairness.before(name, other) for name in hasty)}
    assert fairness.standing_back(known, hasty) == back
    active = [name for name in "abcd" if requests[name]]
    assert fairness.alone == (len(active) <= 1)
    for name in active:
        assert fairness.share(name) == pytest.approx(weights[name] / sum(weights[other] for other in active))


@settings(max_examples=10, deadline=None)
@given(st.lists(st.sampled_from(WEIGHTS), min_size=2, max_size=5), st.integers(0, 1 << 30))
def test_who_always_has_work_gets_rows_by_weight(weights: list[float], seed: int) -> None:
    """Nobody who waits all the time is behind another by more than one turn of either (start-time fair queueing)."""
    rng, fairness = random.Random(seed), Fairness(1 << 20, 8, 8)
    names = [str(i) for i in range(len(weights))]
    had = [0] * len(weights)
    for name, weight in zip(names, weights, strict=True):
        fairness.join(name, weight)
    for step in range(300):
        i = min(range(len(names)), key=lambda n: fairness.time(names[n]))
        rows = rng.randint(1, 64)
        fairness.charge(names[i], weights[i], rows, step)
        had[i] += rows
    for i, weight in enumerate(weights):
        for j, other in enumerate(weights):
            assert abs(had[i] / weight - had[j] / other) <= 64 / weight + 64 / other


def test_a_tenant_saves_up_a_burst_and_no_more() -> None:
    fairness = Fairness(100, 4, 4)
    for name in ("flood", "quiet"):
        fairness.join(name, 1.0)
    for step in range(1000):
        fairness.charge("flood", 1.0, 50, step)
    assert fairness.time("flood") - fairness.time("quiet") == 100
    assert fairness.before("quiet", "flood")
    fairness.charge("quiet", 1.0, 50)
    assert not fairness.before("quiet", "flood")  # half the burst is gone: from here on they share
    assert not fairness.before("flood", "quiet")
    assert not fairness.before("flood", "flood")
    assert fairness.before("new", "flood")


def test_accounts_of_tenants_that_went_are_dropped() -> None:
    fairness = Fairness(100, 4, 4)
    fairness.join("here", 1.0)
    for n in range(5000):
        fairness.join(str(n), 1.0)
        fairness.charge(str(n), 1.0, 1 + n % 90, n)
        fairness.leave(str(n))
    assert len(fairness._accounts) <= FORGET + 1
    assert fairness.share("here") == 1.0
    assert fairness.time("here") == 0.0


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_displacing_comes_to_an_end_with_everybody_at_his_share(data: st.DataObject) -> None:
    """Any start, any order: whoever is within his share takes a place of whoever is most above. It ends, and then all
    who want places have at least the whole part of their share."""
    places = data.draw(st.integers(1, 24))
    fairness = Fairness(10, places, 1 << 30)
    weights = {str(n): data.draw(st.sampled_from(WEIGHTS)) for n in range(data.draw(st.integers(2, 5)))}
    for name, weight in weights.items():
        fairness.join(name, weight)
    held = Counter(dict.fromkeys(weights, 0))
    for _ in range(places):
        held[data.draw(st.sampled_from(sorted(weights)))] += 1
    for _ in range(4 * places + 1):
        fairness.hold([(name, 0) for name, count in held.items() for _ in range(count)])
        hungry = [name for name in weights if fairness.may_displace(name, 1, 0)]
        victim = fairness.above(weights)
        if not hungry or victim is None:
            break
        held[data.draw(st.sampled_from(hungry))] += 1
        held[victim] -= 1
    else:
        pytest.fail("it goes on for ever")
    total = sum(weights.values())
    for name, weight in weights.items():
        assert held[name] >= int(Fraction(weight) * places / Fraction(total))


# ---- the scheduler


def request(name: str, tenant: str = "", prompt: int = 8, tokens: int = 8, **options: Any) -> Request:
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return Request(name, tuple((7 * i + len(name)) % 40 for i in range(prompt)), sampling, tenant=tenant, **options)


def engine(kind: type[Scheduler] = Scheduler, **config: Any) -> Engine:
    sizes = {"max_batch_rows": 64, "prefill_chunk": 16, "max_sequences": 8, "kv_tokens": 4096, "prefix_caching": False}
    made = Engine(FakeModel("ar"), config=EngineConfig(**(sizes | config)), choose=either)
    made.scheduler.__class__ = kind
    return made


class Watched:
    """An engine with what each of its steps ran: (request, rows)."""

    def __init__(self, loaded: Engine) -> None:
        self.engine = loaded
        self.steps: list[list[tuple[str, int]]] = []
        inner = loaded.scheduler.schedule

        def schedule(step: int) -> list[tuple[Live, Span]]:
            chosen = inner(step)
            self.steps.append([(live.request.request_id, span.rows) for live, span in chosen])
            return chosen

        loaded.scheduler.schedule = schedule  # type: ignore[method-assign]

    def first_token(self, name: str, most: int = 500) -> int:
        """Steps until a request's first token."""
        for step in range(most):
            if any(event.request_id == name and event.token_ids for event in self.engine.step()):
                return step + 1
        raise AssertionError("no token")


@pytest.mark.parametrize("ageing", [0, 7])
def test_one_tenant_is_scheduled_as_if_there_were_none(ageing: int) -> None:
    """Places short, pages short, priorities: step by step the same sequences, in the same order, with the same rows."""
    runs = []
    for tenant in ("", "acme"):
        rng = random.Random(5)
        watched = Watched(engine(max_sequences=4, kv_tokens=160, ageing_steps=ageing))
        for n in range(24):
            watched.engine.add(
                request(str(n), tenant, rng.randint(1, 60), rng.randint(1, 40), priority=rng.randint(-1, 1))
            )
            for _ in range(rng.randint(0, 6)):
                watched.engine.step()
        answered = answers(watched.engine)
        runs.append((watched.steps, answered, watched.engine.scheduler.preempted))
    assert runs[0] == runs[1]
    assert runs[0][2] > 0


class PlainScheduler(Scheduler):
    """The order among tenants said plainly: for each place everything is counted and compared anew, and each sequence
    asks for itself who stands back."""

    def _admit_in_turn(self, queue: Iterable[Live], step: int) -> None:
        left = list(queue)
        while left:
            self._count()
            heads = [next(s for s in left if s.request.tenant == name) for name in {s.request.tenant for s in left}]
            turn = self.fairness.turn
            live = min(heads, key=lambda s: (self._urgency(s, step), *turn(s.request.tenant), s.order))
            if not self._admit(live, step):
                return
            left.remove(live)

    def _by_tenant(self, step: int) -> tuple[list[Live], list[Live]]:
        hasty = {s.request.tenant for s in self.running if s.first_token is None}

        def starved(live: Live) -> int:
            ageing = self.config.ageing_steps
            return (step - max(live.ran, live.enqueued)) // ageing if ageing else 0

        def key(live: Live) -> tuple[int, float, int, int]:
            time = self.fairness.time(live.request.tenant)
            return (live.request.priority - starved(live), time, live.ran, live.order)

        def stands_back(live: Live) -> bool:
            return not starved(live) and any(self.fairness.before(name, live.request.tenant) for name in hasty)

        queue = sorted(self.running, key=key)
        return [s for s in queue if not stands_back(s)], [s for s in queue if stands_back(s)]


@pytest.mark.parametrize("seed", range(3))
def test_the_order_among_tenants_is_the_plain_one(seed: int) -> None:
    """Places short, pages short, priorities, weights, newcomers beside floods: step by step the same rows."""
    runs = []
    for kind in (Scheduler, PlainScheduler):
        rng = random.Random(seed)
        config = {"max_sequences": 6, "kv_tokens": 200, "ageing_steps": (0, 4, 12)[seed]}
        watched = Watched(engine(kind, **config))
        for n in range(18):
            for tenant in "abbb" if n < 6 else rng.choice("acdef"):
                size = {"prompt": rng.randint(1, 60), "tokens": rng.randint(1, 24), "priority": rng.randint(-1, 1)}
                watched.engine.add(request(f"{tenant}{n}-{rng.random()}", tenant, share=rng.choice(WEIGHTS), **size))
            for _ in range(rng.randint(0, 6)):
                watched.engine.step()
        answered = answers(watched.engine)
        runs.append((watched.steps, answered, watched.engine.scheduler.preempted))
    assert runs[0] == runs[1]
    assert runs[0][2] > 0


@pytest.mark.parametrize("kind", ["ar", "diffusion", "block"])
@pytest.mark.parametrize("seed", range(3))
def test_what_comes_out_does_not_depend_on_tenants(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    requests = [request(str(n), prompt=rng.randint(1, 50), tokens=rng.randint(1, 24)) for n in range(8)]
    config = EngineConfig(max_batch_rows=64, prefill_chunk=16, max_sequences=2 + seed, kv_tokens=192)
    single = Engine(FakeModel(kind), config=config, choose=either)
    alone: dict[str, Any] = {}
    for each in requests:
        single.add(each)
        alone |= answers(single)
    mixed = Engine(FakeModel(kind), config=config, choose=either)
    got: dict[str, list[int]] = {each.request_id: [] for each in requests}
    for each in requests:
        mixed.add(replace(each, tenant=rng.choice("abc"), share=rng.choice(WEIGHTS), priority=rng.randint(-1, 1)))
        for event in mixed.step():
            got[event.request_id] += event.token_ids
    for name, (tokens, _) in answers(mixed).items():
        got[name] += tokens
    assert got == {name: tokens for name, (tokens, _) in alone.items()}
    assert mixed.pages.used == 0


def flooded(count: int = 100, **config: Any) -> Watched:
    watched = Watched(engine(**config))
    for n in range(count):
        watched.engine.add(request(f"a{n}", "a", prompt=16, tokens=40))
    for _ in range(30):
        watched.engine.step()
    assert len(watched.engine.scheduler.running) == watched.engine.config.max_sequences
    return watched


def test_a_newcomer_has_its_first_token_as_soon_as_alone() -> None:
    """100 requests of another tenant wait and hold every place; each newcomer's steps until its first token are those
    that it takes alone, and hold nobody else's rows, as long as it asks for less than its share."""
    alone = Watched(engine())
    alone.engine.add(request("b", "b", prompt=40))
    wanted = alone.first_token("b")
    assert wanted == 3
    watched = flooded()
    for n in range(6):
        watched.engine.add(request(f"b{n}", "b", prompt=40, tokens=4))
        at = len(watched.steps)
        assert watched.first_token(f"b{n}") == wanted
        assert all(name.startswith("b") for step in watched.steps[at:] for name, _ in step)
        for _ in range(12):
            watched.engine.step()
    ran = Counter(name[0] for step in watched.steps[30:] for name, _ in step)
    assert ran["a"] > 300  # the flood had the rest


def test_two_floods_share_by_weight() -> None:
    watched = Watched(engine())
    for n in range(60):
        watched.engine.add(request(f"a{n}", "a", prompt=16, tokens=64))
        watched.engine.add(request(f"b{n}", "b", prompt=16, tokens=64, share=3.0))
    for _ in range(400):
        watched.engine.step()
    places = Counter(live.request.tenant for live in watched.engine.scheduler.running)
    assert places == {"a": 2, "b": 6}
    rows: Counter[str] = Counter()
    for step in watched.steps:
        for name, count in step:
            rows[name[0]] += count
    assert 2.5 < rows["b"] / rows["a"] < 3.5


def test_nobody_starves_beside_newcomers_that_never_end() -> None:
    """Tenant b sends a prompt in every step: the flood's tenant still has its part of the rows, and no sequence of it
    stands back for longer than the ageing."""
    watched = flooded(ageing_steps=16)
    at = len(watched.steps)
    for n in range(120):
        watched.engine.add(request(f"b{n}", "b", prompt=48, tokens=1))
        watched.engine.step()
    gap = longest = 0
    rows: Counter[str] = Counter()
    for step in watched.steps[at:]:
        gap = 0 if any(name[0] == "a" for name, _ in step) else gap + 1
        longest = max(longest, gap)
        for name, count in step:
            rows[name[0]] += count
    assert longest <= 16
    assert rows["a"] > 0.1 * rows["b"]


def test_a_flood_does_not_age_past_others_and_no_low_priority_starves() -> None:
    watched = flooded(ageing_steps=4)  # what waits of the flood has aged by seven levels
    watched.engine.add(request("b", "b", prompt=16, tokens=2))
    assert watched.first_token("b") == 1
    low = flooded(ageing_steps=4)
    low.engine.add(request("b", "b", prompt=16, tokens=2, priority=5))
    assert 1 < low.first_token("b") <= 4 * 5 + 60


def test_pages_too_are_shared() -> None:
    """A flood of long texts holds every page, with places to spare; a newcomer within its share gets pages."""
    watched = Watched(engine(kv_tokens=640, max_sequences=32))
    for n in range(20):
        watched.engine.add(request(f"a{n}", "a", prompt=90, tokens=60))
    for _ in range(40):
        watched.engine.step()
    assert watched.engine.pages.free < 7
    watched.engine.add(request("b", "b", prompt=100, tokens=4))
    assert watched.first_token("b") <= 8
    assert watched.engine.scheduler.preempted > 0


def test_one_tenant_s_queue_turns_nobody_else_away() -> None:
    loaded = engine(max_waiting=10)
    for n in range(10):
        loaded.add(request(f"a{n}", "a"))
    with pytest.raises(QueueFullError):
        loaded.add(request("a10", "a"))
    for n in range(5):
        loaded.add(request(f"b{n}", "b"))
    with pytest.raises(QueueFullError):
        loaded.add(request("b5", "b"))
    with pytest.raises(QueueFullError):
        loaded.add(request("a11", "a"))
    loaded.add(request("c", "c"))


def test_a_share_is_a_number_above_zero() -> None:
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValidationError, match="share"):
            request("x", "a", share=bad)


def test_salts_of_two_kinds_never_make_one_text() -> None:
    pairs = [("a", "b"), ("ab", ""), ("", "ab"), ("a", "', 'b"), ("a', '", "b"), ("", "('a', 'b')"), ("", "")]
    salts = [request("x", tenant_salt=t, cache_salt=c).salt for t, c in pairs]
    assert len({s for s, (t, _) in zip(salts, pairs, strict=True) if t}) == 4
    assert request("x", cache_salt="as it was").salt == "as it was"
