"""How fast a teacher is asked: token buckets for requests and tokens a minute, Retry-After, and bounded backoff."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime

from dfastllm.distill.teacher.clock import Clock

__all__ = ["Bucket", "Pace", "backoff", "retry_after"]

BURST = 1.0  # seconds of the rate that may be used at once


class Bucket:
    """A token bucket that holds a second's share (at least 1) and may go into debt: who takes waits until as much is
    there or, where it takes more than the bucket holds, until the bucket is full. So takers are served in the order in
    which they came, and in any minute no more is used than `per_minute` and the larger of what the bucket holds and the
    largest that was taken.

    per_minute: None never makes anybody wait.
    """

    def __init__(self, per_minute: float | None, clock: Clock) -> None:
        self.rate = math.inf if per_minute is None else per_minute / 60  # a second
        self.most = max(1.0, self.rate * BURST)
        self.level = self.most
        self.clock = clock
        self.at = clock.now()

    def take(self, amount: float) -> float:
        """Take `amount`; the seconds to wait before it may be used."""
        if math.isinf(self.rate):
            return 0.0
        now = self.clock.now()
        self.level = min(self.most, self.level + (now - self.at) * self.rate)
        self.at = now
        wait = max(0.0, (min(amount, self.most) - self.level) / self.rate)
        self.level -= amount
        return wait

    def give(self, amount: float) -> None:
        """Put back what was taken and not used; a negative amount takes what was used beyond it."""
        if not math.isinf(self.rate):
            self.level = min(self.most, self.level + amount)


class Pace:
    """One server's limits, shared by all requests to it."""

    def __init__(self, requests_per_minute: float | None, tokens_per_minute: float | None, clock: Clock) -> None:
        self.clock = clock
        self.requests = Bucket(requests_per_minute, clock)
        self.tokens = Bucket(tokens_per_minute, clock)
        self.until = -math.inf  # nobody asks before: the server said so
        self.waited = 0.0  # seconds, of all requests together

    async def enter(self, tokens: float) -> None:
        """Wait until a request that may use so many tokens may be sent."""
        wait = max(self.requests.take(1), self.tokens.take(tokens))
        while (wait := max(wait, self.until - self.clock.now())) > 0:
            self.waited += wait
            await self.clock.sleep(wait)
            wait = 0.0

    def settle(self, taken: float, used: float) -> None:
        """A request that took so many tokens used so many."""
        self.tokens.give(taken - used)

    def pause(self, seconds: float) -> None:
        """The server wants to be left alone for so long."""
        self.until = max(self.until, self.clock.now() + seconds)


def backoff(attempt: int, first: float, most: float, rng: random.Random) -> float:
    """Seconds before the next attempt after attempt 0, 1, ... failed: `first` doubled each time, `most` at most, of
    which a random half is left out, so that clients which failed together do not come back together."""
    return min(most, first * 2.0 ** min(attempt, 60)) * rng.uniform(0.5, 1.0)


def retry_after(headers: Mapping[str, str], wall: float) -> float | None:
    """Seconds that a response's Retry-After asks for (RFC 9110, 10.2.3: seconds, or a date), None where it says nothing
    that can be read. wall: the time now, in seconds since 1970. headers: names in lower case, or of a class that does
    not mind."""
    value = headers.get("retry-after")
    if value is None:
        return None
    value = value.strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except (ValueError, TypeError, IndexError, OverflowError):
            return None
        date = date if date.tzinfo is not None else date.replace(tzinfo=UTC)
        seconds = date.timestamp() - wall
    return max(0.0, seconds) if math.isfinite(seconds) else None
