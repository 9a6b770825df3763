"""Limits against a brute force: every span of a minute, every moment of retry."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfastllm.errors import RateLimitError, ValidationError
from dfastllm.tenants import Tenant
from dfastllm.tenants.limits import Lease, Limits

TICK = 1 / 8  # seconds; times of the tests are exact in floats


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Plain:
    """One request that was let in, as the rule is told to a person: it counts in (at, at + 60]."""

    at: float
    tokens: int
    lease: Lease
    running: bool = True


def fits(kept: list[Plain], tenant: Tenant, tokens: int, now: float) -> bool:
    """The rule, by looking at everything there ever was."""
    recent = [one for one in kept if now - 60 < one.at]
    return (
        (tenant.requests_per_minute is None or len(recent) + 1 <= tenant.requests_per_minute)
        and (tenant.tokens_per_minute is None or sum(o.tokens for o in recent) + tokens <= tenant.tokens_per_minute)
        and (tenant.max_concurrent is None or sum(o.running for o in kept) + 1 <= tenant.max_concurrent)
    )


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.integers(1, 200)),
        st.tuples(st.just("take"), st.integers(1, 60)),
        st.tuples(st.just("end"), st.integers(0, 60)),
        st.tuples(st.just("limit"), st.integers(1, 80)),
    ),
    max_size=60,
)


@given(
    STEPS,
    st.one_of(st.none(), st.integers(1, 5)),
    st.one_of(st.none(), st.integers(1, 80)),
    st.one_of(st.none(), st.integers(1, 3)),
)
def test_against_brute_force(
    steps: list[tuple[str, int]], requests: int | None, tokens: int | None, at_once: int | None
) -> None:
    clock = Clock()
    limits, kept = Limits(clock), list[Plain]()
    tenant = Tenant("t1", "one", requests_per_minute=requests, tokens_per_minute=tokens, max_concurrent=at_once)
    for step, number in steps:
        running = [one for one in kept if one.running]
        if step == "wait":
            clock.now += number * TICK
        elif step == "limit":
            tenant = replace(tenant, tokens_per_minute=None if number == 80 else number)
        elif step == "end" and running:
            one = running[number % len(running)]
            one.lease.end(number)
            one.lease.end(10_000)  # nothing
            one.running, one.tokens = False, number
        elif step == "take":
            if tenant.tokens_per_minute is not None and number > tenant.tokens_per_minute:
                with pytest.raises(ValidationError) as never:
                    limits.take(tenant, number)
                assert never.value.param == "max_tokens"
                continue
            possible = fits(kept, tenant, number, clock.now)
            try:
                kept.append(Plain(clock.now, number, limits.take(tenant, number)))
                assert possible
            except RateLimitError as refused:
                assert not possible
                check_retry(kept, tenant, number, clock.now, refused.retry_after)
        assert limits.running("t1") == sum(one.running for one in kept)


def check_retry(kept: list[Plain], tenant: Tenant, tokens: int, now: float, wait: float) -> None:
    """At `wait` it fits, a tick earlier it does not; where a running request must end first, a second is said."""
    assert wait > 0
    ended = [replace(one, running=False) for one in kept]
    assert fits(ended, tenant, tokens, now + wait)
    if tenant.max_concurrent is None or sum(one.running for one in kept) < tenant.max_concurrent:
        assert not fits(kept, tenant, tokens, now + wait - TICK)
    else:
        assert wait == 1 or not fits(ended, tenant, tokens, now + wait - TICK)


def test_retry_after_to_the_moment() -> None:
    clock = Clock()
    limits, tenant = Limits(clock), Tenant("t1", "one", requests_per_minute=2)
    limits.take(tenant, 1)
    clock.now += 10
    limits.take(tenant, 1)
    clock.now += 5
    with pytest.raises(RateLimitError, match=r"'one' has 2 requests a minute\. In 45\.0 s again") as refused:
        limits.take(tenant, 1)
    assert refused.value.retry_after == 45
    clock.now += 45 - TICK
    with pytest.raises(RateLimitError):
        limits.take(tenant, 1)
    clock.now += TICK
    limits.take(tenant, 1)
    with pytest.raises(RateLimitError) as again:
        limits.take(tenant, 1)
    assert again.value.retry_after == 10


def test_what_was_not_used_comes_back_at_the_end() -> None:
    clock = Clock()
    limits, tenant = Limits(clock), Tenant("t1", "one", tokens_per_minute=100)
    lease = limits.take(tenant, 90)
    with pytest.raises(RateLimitError, match="100 tokens a minute"):
        limits.take(tenant, 50)
    lease.end(40)
    limits.take(tenant, 60)
    with pytest.raises(RateLimitError):
        limits.take(tenant, 1)


def test_a_request_that_outlives_its_minute_ends_quietly() -> None:
    clock = Clock()
    limits, tenant = Limits(clock), Tenant("t1", "one", tokens_per_minute=100)
    lease = limits.take(tenant, 90)
    clock.now += 61
    other = limits.take(tenant, 100)
    lease.end(10)
    with pytest.raises(RateLimitError):
        limits.take(tenant, 1)
    other.end(99)
    limits.take(tenant, 1)


def test_tenants_do_not_share() -> None:
    limits = Limits(Clock())
    for number in range(50):
        tenant = Tenant(f"t{number}", f"n{number}", requests_per_minute=1, max_concurrent=1)
        limits.take(tenant, 1)
        with pytest.raises(RateLimitError):
            limits.take(tenant, 1)


def test_idle_tenants_are_forgotten() -> None:
    clock = Clock()
    limits = Limits(clock)
    for number in range(1000):
        limits.take(Tenant(f"t{number}", f"n{number}"), 1).end(1)
        clock.now += 30
    assert len(limits._windows) <= 3
