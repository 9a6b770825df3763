"""How much a tenant may ask for: requests and tokens a minute, requests at once. Pure: the clock is given."""

from __future__ import annotations

import time
from collections.abc import Callable

from dfastllm.tenants.identity import Tenant

__all__ = ["Lease", "Limits"]


class Lease:
    """A place that a request holds."""

    def end(self, tokens: int) -> None:
        """Gives the place back; tokens: prompt and completion tokens it really took. A second call does nothing."""
        raise NotImplementedError


class Limits:
    """Of all tenants of one server; used from one thread (the event loop)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock

    def take(self, tenant: Tenant, tokens: int) -> Lease:
        """tokens: the most it may take (prompts + max_tokens of each choice). Raises RateLimitError with the exact
        retry_after, ValidationError where the request alone is over tokens_per_minute."""
        raise NotImplementedError
