"""Rates, waits and Retry-After, by themselves."""

from __future__ import annotations

import asyncio
import random
from email.utils import formatdate

import pytest

from dfastllm.distill.teacher.pace import Bucket, Pace, backoff, retry_after
from tests.distill.teacher.conftest import FakeTime


def most_in_a_minute(sent: list[tuple[float, float]]) -> float:
    """The largest sum of amounts over any 60 seconds, counted one by one."""
    return max(sum(amount for at, amount in sent if begun <= at < begun + 60) for begun, _ in sent)


@pytest.mark.parametrize("largest", [1, 5, 90])
@pytest.mark.parametrize("per_minute", [6, 60, 700])
def test_no_minute_has_more_than_the_limit_and_one_burst(time: FakeTime, per_minute: float, largest: int) -> None:
    bucket = Bucket(per_minute, time.clock)
    rng = random.Random(1)
    sent = []
    for _ in range(400):
        amount = rng.choice([1, 1, 1, largest])
        sent.append((time.at + bucket.take(amount), amount))
        time.at += rng.choice([0, 0, 0.01, 2.0])
    assert most_in_a_minute(sent) <= per_minute + max(1, per_minute / 60, largest) + 1e-6
    assert [at for at, _ in sent] == sorted(at for at, _ in sent)


def test_what_is_larger_than_the_bucket_waits_until_it_is_full(time: FakeTime) -> None:
    bucket = Bucket(600, time.clock)  # 10 a second, 10 at once
    assert bucket.take(10) == 0
    assert bucket.take(100) == pytest.approx(1)  # until the bucket is full; what is missing then is a debt
    assert bucket.take(10) == pytest.approx(11)
    bucket.give(90)  # it used 10 after all
    assert bucket.take(10) == pytest.approx(3)
    time.at += 3600
    assert [bucket.take(5) for _ in range(4)] == pytest.approx([0, 0, 0.5, 1.0])  # an hour fills it no further


def test_the_rate_is_used_to_the_full(time: FakeTime) -> None:
    bucket = Bucket(120, time.clock)
    waits = [bucket.take(1) for _ in range(241)]
    assert waits[-1] == pytest.approx((241 - 2) / 2)


def test_without_a_limit_nobody_waits(time: FakeTime) -> None:
    bucket = Bucket(None, time.clock)
    assert [bucket.take(1e9) for _ in range(3)] == [0, 0, 0]


def test_a_pause_holds_everybody_and_grows(time: FakeTime) -> None:
    pace = Pace(None, None, time.clock)
    pace.pause(30)
    pace.pause(5)  # a shorter one takes nothing away
    asyncio.run(pace.enter(1))
    assert time.at == pytest.approx(1030)
    asyncio.run(pace.enter(1))
    assert time.at == pytest.approx(1030)


def test_a_pause_that_begins_while_one_waits_holds_that_one_too() -> None:
    time = FakeTime()
    pace = Pace(60, None, time.clock)

    async def sleep(seconds: float) -> None:
        if not time.slept:
            pace.pause(20)
        await time.sleep(seconds)

    pace.clock = type(time.clock)(time.now, time.wall, sleep)
    asyncio.run(pace.enter(1))
    asyncio.run(pace.enter(1))
    assert time.at == pytest.approx(1020)


def test_backoff_doubles_within_its_bounds() -> None:
    rng = random.Random(0)
    for attempt in range(12):
        full = min(30.0, 0.5 * 2**attempt)
        waits = [backoff(attempt, 0.5, 30.0, rng) for _ in range(200)]
        assert full / 2 <= min(waits) < 0.6 * full
        assert 0.9 * full < max(waits) <= full
    assert backoff(10**6, 0.5, 30.0, rng) <= 30.0


def test_retry_after() -> None:
    now = 1_700_000_000.0

    def told(value: str) -> float | None:
        return retry_after({"retry-after": value}, now)

    assert told("7") == 7
    assert told(" 1.5 ") == 1.5
    assert told(formatdate(now + 90, usegmt=True)) == pytest.approx(90)
    assert told("Tue, 14 Nov 2023 22:14:20 -0000") == pytest.approx(60)  # RFC 5322: no zone known, so UTC
    assert told(formatdate(now - 90, usegmt=True)) == 0
    assert told("-3") == 0
    assert [told(value) for value in ("soon", "", "nan", "inf", "99 Foo 2023")] == [None] * 5
    assert retry_after({}, now) is None
