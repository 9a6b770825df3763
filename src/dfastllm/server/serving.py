"""What the routes share: the models being served, whether the server is ready, and the requests in flight.

Holds no HTTP and runs no model: `engine.Worker` steps the engines in its own thread.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol

from dfastllm.core import ModelInfo, SpeculativeParams
from dfastllm.errors import DFastLLMError, ModelNotFoundError, NotReadyError, RequestNotFoundError, ValidationError
from dfastllm.metrics import Metrics
from dfastllm.metrics.activity import Activity
from dfastllm.server.readers import Readers
from dfastllm.server.recording import Recording
from dfastllm.server.shelf import Shelf
from dfastllm.settings import Settings
from dfastllm.tenants import Identity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dfastllm.engine import Engine, Worker
    from dfastllm.server.pipelines.kept import Pipelines
    from dfastllm.tenants.store import Store
    from dfastllm.text import Tokenizer

__all__ = ["Phase", "Running", "ServedModel", "Serving"]

Phase = Literal["loading", "ready", "stopping", "failed"]


class Running(Protocol):
    """What is in flight under a response id and an X-Request-ID, and how it is ended early."""

    id: str
    request_id: str

    def cancel(self) -> None: ...

    def fail(self, error: DFastLLMError) -> None: ...


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
    Raises ValidationError for one that cannot be written."""

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
        self._traced: dict[str, set[Running]] = {}  # by X-Request-ID, which clients make
        self._shared: set[str] = set()  # those that two of them sent while one was running
        self.draining = False
        self.identify: Callable[[str], Awaitable[Identity]] | None = None  # who carries a key; None: there are no keys
        self.pipelines: Pipelines  # made by `app`, which knows how requests are read
        self.tenants: Store | None = None  # None: there is no database of tenants
        self.started = time.monotonic()

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

    def model(self, name: str | None) -> ServedModel:
        """The model of that name, or the only one for None; for the name of an adapter, or MODEL:ADAPTER, its model
        with `lora`. Raises ModelNotFoundError, and ValidationError when none is named and several are served."""
        self.require_ready()
        if name is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        if name is not None and name not in self.models and (found := self.shelf.find(name)) is not None:
            return replace(self.models[found[0]], lora=found[1])
        if name is None or name not in self.models:
            known = ", ".join(sorted(self.models))
            if name is None:
                raise ValidationError(f"model is required where several are served: {known}.", param="model")
            raise ModelNotFoundError(f"There is no model {name[:200]!r}; served here: {known}.", param="model")
        return self.models[name]

    @contextmanager
    def tracked(self, job: Running) -> Iterator[None]:
        """Makes a job cancellable by its ids while it runs."""
        self.jobs[job.id] = job
        alike = self._traced.setdefault(job.request_id, set())
        alike.add(job)
        if len(alike) > 1:
            self._shared.add(job.request_id)
        try:
            yield
        finally:
            self.jobs.pop(job.id, None)
            alike.discard(job)
            if not alike:
                self._traced.pop(job.request_id, None)
                self._shared.discard(job.request_id)

    def cancel(self, name: str) -> int:
        """Cancel the job with that response id, or the one with that X-Request-ID. Two clients may send the same
        X-Request-ID, and neither shall end the other's request: then it names none of them, until all have ended.
        Raises RequestNotFoundError."""
        jobs = [self.jobs[name]] if name in self.jobs else list(self._traced.get(name, ()))
        if not jobs:
            raise RequestNotFoundError(f"No request {name[:200]!r} is running.", param="id")
        if len(jobs) > 1 or (name not in self.jobs and name in self._shared):
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

    def abort(self) -> None:
        """End every request in flight with an error."""
        for job in list(self.jobs.values()):
            job.fail(NotReadyError("The server is shutting down."))
