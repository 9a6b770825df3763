"""What the routes share: the models being served, whether the server is ready, and the requests in flight.

Holds no HTTP and runs no model: `engine.Worker` steps the engines in its own thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from dfastllm.core import ModelInfo, SpeculativeParams
from dfastllm.errors import (
    AdapterNotFoundError,
    DFastLLMError,
    ModelNotFoundError,
    NotReadyError,
    RequestNotFoundError,
    ValidationError,
)
from dfastllm.metrics import Metrics
from dfastllm.metrics.activity import Activity
from dfastllm.server.access import Keys
from dfastllm.server.readers import Readers
from dfastllm.server.recording import Recording
from dfastllm.server.shelf import Shelf
from dfastllm.settings import Settings
from dfastllm.tenants import Identity
from dfastllm.tenants.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dfastllm.engine import Engine, Stream, Worker
    from dfastllm.engine.adapters import Named
    from dfastllm.engine.admission import Admission
    from dfastllm.tenants.ledger import Ledger
    from dfastllm.tenants.store import Store
    from dfastllm.text import Tokenizer

__all__ = ["KeptPipelines", "Phase", "Running", "ServedModel", "Serving"]

log = logging.getLogger("dfastllm.server")
Phase = Literal["loading", "ready", "stopping", "failed"]


class Running(Protocol):
    """What is in flight under a response id and an X-Request-ID, whose it is, and how it is ended early."""

    id: str
    request_id: str
    identity: Identity

    def cancel(self) -> None: ...

    def fail(self, error: DFastLLMError) -> None: ...


class KeptPipelines(Protocol):
    """Where pipelines are kept: `pipelines.kept.Pipelines`, which stands above this module."""

    async def save(self, who: Identity, body: Any, /) -> Any: ...

    async def get(self, who: Identity, name: str, /) -> Any: ...

    async def all(self, who: Identity, /) -> list[Any]: ...

    async def delete(self, who: Identity, name: str, /) -> None: ...


@dataclass(frozen=True)
class ServedModel:
    """One name of the API. `context` is the most positions a sequence may have: prompt, suffix and output;
    `readers` where its texts are tokenised; `speculative` what a request drafts by that says nothing; `lora` the
    adapter that a name stands for beside the model, "" for none."""

    name: str
    info: ModelInfo
    tokenizer: Tokenizer
    context: int
    readers: Readers
    speculative: SpeculativeParams | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    lora: str = ""

    @property
    def diffuses(self) -> bool:
        return self.info.kind != "ar"


class Serving:
    """Lives as long as the app. `open` is called when the models are loaded, `drain` when the server stops, `close`
    when nothing runs any more. recording: where the prompts of chats are kept, None unless the settings name a file.
    tenants, ledger, limits, keys: who may ask, and for how much. Raises ValidationError for a recording that cannot be
    written, and what opening the database of tenants raises."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.readers = Readers()
        file = settings.record_prompts
        self.recording = None if file is None else Recording(file, settings.record_prompts_bytes)
        self.worker: Worker | None = None
        self.models: Mapping[str, ServedModel] = {}
        self.activity: dict[str, Activity] = {}  # of the engines, by model
        self.shelf = Shelf(settings)
        self.jobs: dict[str, Running] = {}  # by response id, which we made: no two are equal
        self._traced: dict[tuple[str, str], set[Running]] = {}  # by tenant and X-Request-ID, which clients make
        self._shared: set[tuple[str, str]] = set()  # those that two of them sent while one was running
        self.draining = False
        self.pipelines: KeptPipelines  # made by `app`, which knows how requests are read
        self.tenants: Store | None = None  # None, as `ledger`: there is no database of tenants
        self.ledger: Ledger | None = None
        self.limits = Limits()
        if settings.tenants_db is not None:
            self._open_tenants(settings.tenants_db)
        self.keys = Keys(settings.api_key, self.tenants)
        self.identify: Callable[[str], Awaitable[Identity]] | None = self.keys.identify if self.keys.wanted else None
        self.started = time.monotonic()

    def _open_tenants(self, url: str) -> None:
        from dfastllm.tenants.ledger import open_ledger
        from dfastllm.tenants.store import Store

        self.tenants = store = Store(url)
        tenants = store.tenants()
        self.ledger = ledger = open_ledger(store.database, self.settings)
        self.metrics.tenants.watch_ledger(ledger.health)
        disabled = sum(tenant.disabled for tenant in tenants)
        log.info("%d tenants, %d of them disabled, in %s", len(tenants), disabled, store.name)

    def open(self, worker: Worker, engines: Mapping[str, Engine]) -> None:
        """Serve these engines, whose worker has been started. Safe from another thread: one assignment makes ready."""
        models = {}
        for name, engine in engines.items():
            if engine.tokenizer is None:
                raise ModelNotFoundError(f"The model {name!r} has no tokenizer, so it cannot be served.", param="model")
            models[name] = ServedModel(
                name, engine.info, engine.tokenizer, engine.max_len, self.readers, engine.drafting.default
            )
            self.metrics.watch(engine, name, engine.info.kind)
            self.activity[name] = Activity()
            engine.subscribe(self.activity[name].see)
        self.shelf.open(engines)
        self.worker = worker
        self.models = models

    @property
    def phase(self) -> Phase:
        if self.worker is not None and self.worker.failure is not None:
            return "failed"  # while the server stops because of it, too
        if self.draining:
            return "stopping"
        if not self.models or self.worker is None:
            return "loading"
        return "ready" if self.worker.is_alive else "failed"

    def require_ready(self) -> Worker:
        """The worker. Raises NotReadyError with the reason."""
        phase = self.phase
        if phase != "ready" or self.worker is None:
            reason = {
                "loading": "The models are still loading.",
                "stopping": "The server is shutting down.",
                "failed": "The engine has failed.",
            }[phase]
            raise NotReadyError(reason, hint="GET /health/ready answers 200 when requests are taken.")
        return self.worker

    def seen_by(self, identity: Identity) -> Mapping[str, ServedModel]:
        """The models that an identity may use; for it there are no others."""
        return {name: model for name, model in self.models.items() if identity.allows_model(name)}

    def adapters_seen_by(self, identity: Identity) -> list[tuple[str, str, Named]]:
        """Of `shelf.named`, the adapters that an identity may use, of models that it may use."""
        return [
            row for row in self.shelf.named() if identity.allows_model(row[1]) and identity.allows_adapter(row[2].name)
        ]

    def model(self, identity: Identity, name: str | None) -> ServedModel:
        """The model of that name, or the only one for None; for the name of an adapter, or MODEL:ADAPTER, its model
        with `lora`. What the identity may not use is not there. Raises ModelNotFoundError, and ValidationError when
        none is named and several are served."""
        self.require_ready()
        seen = self.seen_by(identity)
        if name is None and len(seen) == 1:
            return next(iter(seen.values()))
        if name is not None and name not in self.models and (found := self._adapted(identity, name)) is not None:
            return replace(self.models[found[0]], lora=found[1])
        if name is None or name not in seen:
            known = ", ".join(sorted(seen)) or "none"
            if name is None:
                raise ValidationError(f"model is required where several are served: {known}.", param="model")
            if adapters := ", ".join(row[0] for row in self.adapters_seen_by(identity)):
                known += f"; adapters: {adapters:.500}"
            raise ModelNotFoundError(f"There is no model {name[:200]!r}; served here: {known}.", param="model")
        return seen[name]

    def _adapted(self, identity: Identity, name: str) -> tuple[str, str] | None:
        """(model, adapter) that a name stands for. An identity with lists is told nothing of other names: neither
        which there are nor that this is one of several."""
        try:
            found = self.shelf.find(name)
        except DFastLLMError:
            if not identity.limited:
                raise
            return None
        if found is None or not (identity.allows_model(found[0]) and identity.allows_adapter(found[1])):
            return None
        return found

    def require_adapter(self, identity: Identity, model: str, name: str) -> None:
        """Raises AdapterNotFoundError unless there is such an adapter for this identity, as if there were no others."""
        if not identity.limited:
            return  # the engine knows, and may say so
        known = sorted(named.name for _, of, named in self.adapters_seen_by(identity) if of == model)
        if name not in known:
            there = ", ".join(known) or "none"
            raise AdapterNotFoundError(f"there is no adapter {name[:200]!r}; there are: {there:.500}.", param="lora")

    def submit(self, identity: Identity, model: str, admission: Admission) -> Stream:
        """Queue a request that was admitted, as the identity's: the one way from a route to the engine. Raises what
        `Worker.submit` raises."""
        assert admission.request.tenant == identity.tenant.id, "a request of another tenant"
        return self.require_ready().submit(model, admission)

    @contextmanager
    def tracked(self, job: Running) -> Iterator[None]:
        """Makes a job cancellable by its ids while it runs."""
        self.jobs[job.id] = job
        traced = (job.identity.tenant.id, job.request_id)
        alike = self._traced.setdefault(traced, set())
        alike.add(job)
        if len(alike) > 1:
            self._shared.add(traced)
        try:
            yield
        finally:
            self.jobs.pop(job.id, None)
            alike.discard(job)
            if not alike:
                self._traced.pop(traced, None)
                self._shared.discard(traced)

    def cancel(self, identity: Identity, name: str) -> int:
        """Cancel the tenant's job with that response id, or the one with that X-Request-ID. Two clients may send the
        same X-Request-ID, and neither shall end the other's request: then it names none of them, until all have ended.
        A key with the scope `admin` may cancel any job by its response id. Raises RequestNotFoundError, for another
        tenant's as for none."""
        tenant = identity.tenant.id
        own = self.jobs.get(name)
        if own is not None and own.identity.tenant.id != tenant and not identity.has("admin"):
            own = None
        jobs = [own] if own is not None else list(self._traced.get((tenant, name), ()))
        if not jobs:
            raise RequestNotFoundError(f"No request {name[:200]!r} is running.", param="id")
        if len(jobs) > 1 or (own is None and (tenant, name) in self._shared):
            raise RequestNotFoundError(
                f"The X-Request-ID {name[:200]!r} was sent with several requests, so it names none.",
                param="id",
                hint="Cancel by the id of the response, or close the connection.",
            )
        jobs[0].cancel()
        return 1

    def drain(self) -> None:
        """Take no more requests; those in flight go on."""
        self.draining = True

    def close(self) -> None:
        """End the threads of the front."""
        self.readers.close()
        if self.recording is not None:
            self.recording.close()
        if self.ledger is not None:
            self.ledger.close()
        if self.tenants is not None:
            self.tenants.close()

    def abort(self) -> None:
        """End every request in flight with an error."""
        for job in list(self.jobs.values()):
            job.fail(NotReadyError("The server is shutting down."))
