"""Metrics by tenant, with a bounded number of labels: the first tenants that ask have a name, the rest is `other`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

__all__ = ["MOST", "LedgerState", "TenantMetrics"]

MOST = 100  # tenants with series of their own: each has some 25 and one more for each model
OTHER = "other"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class LedgerState(Protocol):
    """Of the ledger: whether its database answers, rows that it has not got, tries that failed."""

    @property
    def up(self) -> bool: ...

    @property
    def owed(self) -> int: ...

    @property
    def failures(self) -> int: ...


class TenantMetrics:
    """Series appear with the first request of a tenant; a server without tenants has none. Thread-safe."""

    def __init__(self, registry: CollectorRegistry, most: int = MOST) -> None:
        self.most = most
        self._named: set[str] = set()
        self._lock = threading.Lock()
        self._registry = registry
        self._requests = self._counter("tenant_requests", "Requests that ended, by how.", "status")
        self._refused = self._counter("tenant_refused", "Requests beyond the tenant's limits, answered with 429.")
        self._prompt = self._counter("tenant_prompt_tokens", "Prompt tokens of ended requests.", "model_name")
        self._generated = self._counter("tenant_generation_tokens", "Output tokens of ended requests.", "model_name")
        self._running = Gauge(
            "tenant_requests_running",
            "Requests between their start and their end, waiting ones included.",
            ["tenant"],
            namespace="dfastllm",
            registry=registry,
        )
        self._first = Histogram(
            "tenant_time_to_first_token_seconds",
            "From a request's start to its first tokens.",
            ["tenant"],
            namespace="dfastllm",
            registry=registry,
            buckets=_SECONDS,
        )

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(name, help, ("tenant", *labels), namespace="dfastllm", registry=self._registry)

    def label(self, tenant: str) -> str:
        """The tenant's name, or `other` where enough have their own."""
        with self._lock:
            if tenant not in self._named and len(self._named) < self.most:
                self._named.add(tenant)
            return tenant if tenant in self._named else OTHER

    def begun(self, tenant: str) -> None:
        """A request was let in."""
        self._running.labels(self.label(tenant)).inc()

    def refused(self, tenant: str) -> None:
        """A request was beyond the limits."""
        self._refused.labels(self.label(tenant)).inc()

    def first_token(self, tenant: str, seconds: float) -> None:
        """A request's first tokens came so long after its start."""
        self._first.labels(self.label(tenant)).observe(seconds)

    def ended(self, tenant: str, model: str, status: str, prompt: int, tokens: int) -> None:
        """A request that had begun is over. status: of a closed set (ok, cancelled, failed)."""
        label = self.label(tenant)
        self._running.labels(label).dec()
        self._requests.labels(label, status).inc()
        self._prompt.labels(label, model).inc(prompt)
        self._generated.labels(label, model).inc(tokens)

    def watch_ledger(self, state: Callable[[], LedgerState]) -> None:
        """Tell of the ledger what it says of itself whenever it is asked."""
        for name, help, value in (
            ("ledger_up", "1 while usage goes to the database, 0 while it goes to the journal.", lambda: state().up),
            ("ledger_owed_rows", "Rows of usage that the database has not got yet.", lambda: state().owed),
            ("ledger_write_failures", "Tries to write usage that failed, since the start.", lambda: state().failures),
        ):
            Gauge(name, help, namespace="dfastllm", registry=self._registry).set_function(value)
