"""How much a tenant may ask for: requests and tokens a minute, requests at once. Pure: the clock is given.

A limit a minute holds in *every* span of 60 seconds, not only on the average: what was let in is kept for a minute, and
a request is let in when it fits beside that. So `retry_after` is exact: at that time the same request is let in if
nobody else of the tenant came between, and a moment earlier it is not.

Tokens are counted when a request begins, as the most it may take (its prompts and max_tokens of every choice); when it
ends, its place in the window shrinks to what it really took. One server counts by itself: two servers over one database
let in twice as much.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from dfastllm.errors import RateLimitError, ValidationError
from dfastllm.tenants.identity import Tenant

__all__ = ["WINDOW", "Lease", "Limits"]

WINDOW = 60.0  # seconds of "a minute"
AT_ONCE = 1.0  # seconds to wait where a running request must end first: nobody knows when it will


class _Taken:
    """A request in the window: when it began and how many tokens it is counted for."""

    __slots__ = ("at", "tokens")

    def __init__(self, at: float, tokens: int) -> None:
        self.at = at
        self.tokens = tokens


class _Window:
    """What one tenant was let in for. taken: of the last minute, oldest first; tokens: their sum; running: at once."""

    __slots__ = ("running", "taken", "tokens")

    def __init__(self) -> None:
        self.taken: deque[_Taken] = deque()
        self.tokens = 0
        self.running = 0

    def forget(self, now: float) -> None:
        while self.taken and self.taken[0].at + WINDOW <= now:
            self.tokens -= self.taken.popleft().tokens

    def wait_for_requests(self, limit: int, now: float) -> float:
        """Seconds until one more request fits."""
        beyond = len(self.taken) - limit  # the limit may have been lowered since
        return 0.0 if beyond < 0 else self.taken[beyond].at + WINDOW - now

    def wait_for_tokens(self, limit: int, tokens: int, now: float) -> float:
        """Seconds until `tokens` more fit; they alone must."""
        beyond = self.tokens + tokens - limit
        wait = 0.0
        for request in self.taken:
            if beyond <= 0:
                break
            beyond -= request.tokens
            wait = request.at + WINDOW - now
        return wait


class Lease:
    """The place of a request that was let in, until `end`."""

    __slots__ = ("_ended", "_taken", "_window")

    def __init__(self, window: _Window, taken: _Taken) -> None:
        self._window = window
        self._taken = taken
        self._ended = False

    def end(self, tokens: int) -> None:
        """Gives the place back. tokens: prompt and completion tokens that the request really took. A second call does
        nothing."""
        if self._ended:
            return
        self._ended = True
        self._window.running -= 1
        if self._window.taken and self._window.taken[0].at <= self._taken.at:  # not yet forgotten
            self._window.tokens += tokens - self._taken.tokens
        self._taken.tokens = tokens


class Limits:
    """Of all tenants of one server. Used from one thread, the event loop's.

    clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._windows: dict[str, _Window] = {}

    def take(self, tenant: Tenant, tokens: int) -> Lease:
        """Let a request in. tokens: the most it may take.

        Raises RateLimitError, with the seconds after which it is let in, and ValidationError where the request alone is
        over the tokens a minute, so that no waiting helps. The limits are those of `tenant` as it is given now.
        """
        now = self._clock()
        window = self._windows.get(tenant.id)
        if window is None:
            self._drop_idle(now)
            window = self._windows[tenant.id] = _Window()
        window.forget(now)
        most = tenant.tokens_per_minute
        if most is not None and tokens > most:
            raise ValidationError(
                f"The request may take {tokens:,} tokens (its prompt and max_tokens of each choice); tenant"
                f" {tenant.name!r} has {most:,} a minute.",
                param="max_tokens",
                hint="Ask for fewer with max_tokens.",
            )
        self._check(tenant, window, tokens, now)
        taken = _Taken(now, tokens)
        window.taken.append(taken)
        window.tokens += tokens
        window.running += 1
        return Lease(window, taken)

    def running(self, tenant_id: str) -> int:
        """How many requests of a tenant hold a place."""
        window = self._windows.get(tenant_id)
        return 0 if window is None else window.running

    def _check(self, tenant: Tenant, window: _Window, tokens: int, now: float) -> None:
        waits: list[tuple[float, str]] = []
        if tenant.requests_per_minute is not None:
            wait = window.wait_for_requests(tenant.requests_per_minute, now)
            waits.append((wait, f"{tenant.requests_per_minute:,} requests a minute"))
        if tenant.tokens_per_minute is not None:
            wait = window.wait_for_tokens(tenant.tokens_per_minute, tokens, now)
            waits.append((wait, f"{tenant.tokens_per_minute:,} tokens a minute (this may take {tokens:,})"))
        if tenant.max_concurrent is not None and window.running >= tenant.max_concurrent:
            waits.append((AT_ONCE, f"{tenant.max_concurrent:,} requests at once"))
        wait, what = max(waits, default=(0.0, ""))
        if wait > 0:
            raise RateLimitError(
                f"Tenant {tenant.name!r} has {what}.", retry_after=wait, hint=f"In {wait:.1f} s again."
            )

    def _drop_idle(self, now: float) -> None:
        """Forget tenants of which nothing runs and nothing is in the window."""
        for name, window in list(self._windows.items()):
            window.forget(now)
            if not window.taken and not window.running:
                del self._windows[name]
