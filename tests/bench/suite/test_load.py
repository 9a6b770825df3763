"""Load against a server whose capacity is known."""

from __future__ import annotations

import asyncio
import itertools
import statistics
from typing import Any

import pytest

from dfastllm.bench.suite.client import Client
from dfastllm.bench.suite.load import Driver, Point, arrivals, parse_ramp, parse_slo, points
from dfastllm.bench.suite.sweep import Settings, Trial
from dfastllm.bench.suite.workloads import prompt_types
from dfastllm.errors import ValidationError
from tests.kit.mock_server import Behaviour, MockServer

SOURCES = {"security": prompt_types()["security"]}
STEADY = Behaviour(ttft=0.05, itl=0.005, tokens=11)  # an answer takes 0.1 s


def drive(server: MockServer, *wanted: Point, timeout: float = 10.0, **options: Any) -> Driver:
    async def work() -> Driver:
        client = Client(server.url, "mock", timeout=timeout)
        driver = Driver(client, Trial("none"), SOURCES, Settings(max_tokens=16), **options)
        try:
            await driver.run(wanted)
        finally:
            await client.aclose()
        return driver

    return asyncio.run(work())


def test_a_closed_loop_keeps_so_many_in_flight() -> None:
    with MockServer(STEADY) as server:
        [point] = drive(server, Point("closed", concurrency=4, requests=16)).results
        assert server.most_in_flight == 4
    assert point.max_in_flight == 4
    assert point.figures.speed.requests == 16
    # 16 answers of 0.1 s, four at a time
    assert point.figures.speed.duration == pytest.approx(0.4, rel=0.35)
    assert point.figures.speed.output_throughput == pytest.approx(16 * 11 / point.figures.speed.duration)


def test_an_open_loop_does_not_wait_for_the_server() -> None:
    """20 a second into a server that does 10 at most: the queue grows and the latencies show it."""
    slow = Behaviour(ttft=0.05, itl=0.005, tokens=11, slots=1)
    with MockServer(slow) as server:
        [point] = drive(server, Point("fixed", rate=20.0, requests=20), slo={"e2el": 300}).results
    speed = point.figures.speed
    assert point.achieved_rate == pytest.approx(20, rel=0.15)
    assert point.max_in_flight >= 8
    assert speed.request_throughput == pytest.approx(10, rel=0.3)
    assert speed.e2el is not None
    assert speed.e2el.p99 > 5 * speed.cdf["e2el"][0]
    assert speed.request_goodput is not None
    assert 0 < speed.request_goodput < speed.request_throughput / 2


def test_poisson_arrivals_have_the_rate_and_the_spread_and_repeat() -> None:
    times = list(itertools.islice(arrivals("poisson", 50.0, 7), 4000))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert statistics.pstdev(gaps) == pytest.approx(1 / 50, rel=0.08)  # of an exponential: its mean
    assert times == list(itertools.islice(arrivals("poisson", 50.0, 7), 4000))
    assert times != list(itertools.islice(arrivals("poisson", 50.0, 8), 4000))
    assert list(itertools.islice(arrivals("fixed", 4.0, 0), 3)) == [0.0, 0.25, 0.5]


@pytest.mark.parametrize("of_rate", [False, True])
def test_a_ramp_rises(of_rate: bool) -> None:
    quick = Behaviour(ttft=0.03, itl=0.002, tokens=11)
    steps = (2.0, 30.0) if of_rate else (1.0, 6.0)
    with MockServer(quick) as server:
        [point] = drive(server, Point("ramp", steps=steps, seconds=1.0, of_rate=of_rate)).results
    assert point.kind == "ramp"
    first, second = point.timeline[0], point.timeline[1]
    assert (first[0], second[0]) == (0.0, 1.0)
    assert second[2] > 2.5 * first[2], "tokens per second rise with the load"
    assert sum(row[2] for row in point.timeline) == pytest.approx(point.figures.speed.output_tokens)
    assert point.max_in_flight >= (2 if of_rate else 6)


def test_timeouts_and_errors_are_counted() -> None:
    with MockServer(Behaviour(fault="hangs")) as server:
        [point] = drive(server, Point("closed", concurrency=2, requests=2), timeout=0.3).results
    assert (point.timeouts, point.figures.speed.errors) == (2, 2)
    assert not point.partial


def test_a_server_that_dies_leaves_a_partial_point() -> None:
    with MockServer(STEADY, stop_after=12) as server:
        wanted = (Point("closed", concurrency=2, requests=40), Point("closed", concurrency=2, requests=40))
        driver = drive(server, *wanted)
    [point] = driver.results
    assert point.partial
    assert point.partial_reason is not None
    assert "stopped answering" in point.partial_reason
    assert driver.lost == point.partial_reason
    assert 5 <= point.figures.speed.requests <= 12
    assert point.figures.speed.errors < 40 - 12


def test_points_of_a_plan() -> None:
    made = points([1, 8], [2.0], "poisson", [parse_ramp("1:4:4", 2.0)], 10, 6.0)
    assert [(p.name, p.requests) for p in made[:3]] == [
        ("1 in flight", 10),
        ("8 in flight", 32),
        ("2 requests/s, poisson", 12),
    ]
    assert made[3].steps == (1.0, 2.0, 3.0, 4.0)
    assert parse_ramp("1:4:4/s", 2.0).of_rate


@pytest.mark.parametrize(
    "arguments",
    [
        ([0], [], "poisson", [], 4, 1.0),
        ([1], [-2.0], "poisson", [], 4, 1.0),
        ([1], [0.0], "poisson", [], 4, 1.0),
        ([1], [float("nan")], "poisson", [], 4, 1.0),
        ([1], [2.0], "sometimes", [], 4, 1.0),
        ([1], [2.0], "poisson", [], 0, 1.0),
        ([1], [2.0], "poisson", [], 4, 0.0),
    ],
)
def test_points_that_cannot_be(arguments: Any) -> None:
    with pytest.raises(ValidationError):
        points(*arguments)


@pytest.mark.parametrize("text", ["1", "1:2", "a:b:c", "1:8:1", "0:8:3", "0.5:8:3", "1:inf:3", "-1:3:3/s"])
def test_ramps_that_cannot_be(text: str) -> None:
    with pytest.raises(ValidationError):
        parse_ramp(text, 1.0)


@pytest.mark.parametrize("text", ["ttft", "ttft=", "ttft=-1", "ttft=nan", "speed=3"])
def test_slos_that_cannot_be(text: str) -> None:
    with pytest.raises(ValidationError):
        parse_slo([text])


def test_slos() -> None:
    assert parse_slo(["ttft=200", "tpot=50.5"]) == {"ttft": 200.0, "tpot": 50.5}
