"""`serve`: one process, listening at once, loading behind it, ending cleanly.

The socket is bound before anything is loaded, so that a port in use is told in a moment (`listening`). The server
answers health checks while a thread loads the models. SIGTERM and SIGINT stop it: no new requests, those running finish
within `shutdown_timeout` or end with an error, then the engine's thread ends. A second SIGINT does not wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from dfastllm.errors import DFastLLMError, GenerationError, ModelLoadError, ValidationError
from dfastllm.hub.names import KNOWS
from dfastllm.server.app import create_app
from dfastllm.server.connections import Connection, Limits
from dfastllm.server.cuts import Tally
from dfastllm.server.listening import Acceptor, address_of, connections_allowed, listen, listen_unix, raise_file_limit
from dfastllm.server.ws.connection import WebSocketConnection
from dfastllm.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from dfastllm.engine import Engine, Worker
    from dfastllm.server.serving import Serving

__all__ = ["Loading", "Server", "serve"]

log = logging.getLogger("dfastllm.server")


def serve(settings: Settings) -> None:
    """Serve until a signal. Raises ValidationError when the port or the socket is in use or the address is not this
    machine's, and what loading raises: ModelNotFoundError, ModelLoadError, CheckpointError, TokenizerError."""
    _log_to_stderr(settings.log_level)
    raise_file_limit(settings.max_connections)
    with _listener(settings) as listener:
        app = create_app(settings=settings)
        server = Server(app, settings)
        loading = Loading(settings, server)
        try:
            server.run(sockets=[listener])
        finally:
            loading.close()
    if loading.error is not None:
        raise loading.error
    if loading.busy:
        # A thread inside torch when the interpreter ends aborts the process ("terminate called without an active
        # exception"); nothing is left to clean up but that thread's half-loaded model.
        logging.shutdown()
        os._exit(0)


def _listener(settings: Settings) -> contextlib.AbstractContextManager[socket.socket]:
    if settings.uds is not None:
        return listen_unix(settings.uds, int(settings.uds_mode, 8))
    return contextlib.closing(listen(settings.host, settings.port))


def _log_to_stderr(level: str) -> None:
    """One line per event of dfastllm and uvicorn on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("dfastllm", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, logging.getLogger("uvicorn").level))


class Server(uvicorn.Server):
    """uvicorn with a shutdown that ends requests rather than connections, and that returns instead of dying of the
    signal, so that what was started is also stopped."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self.serving: Serving = app.state.serving
        self.grace = settings.shutdown_timeout
        self.limits = Limits.of(settings)
        self.tally = Tally(self.serving.metrics)
        self.most = connections_allowed(settings.max_connections)
        if self.most < settings.max_connections:
            log.warning("at most %d connections: the limit of open files leaves no more (ulimit -n)", self.most)
        self.up = threading.Event()
        self.base: str | None = None  # of URLs, where it listens on a port
        super().__init__(
            uvicorn.Config(
                app,
                loop="asyncio",  # `connections` asks its sockets
                http="h11",
                log_config=None,
                access_log=False,
                lifespan="off",
                ws=WebSocketConnection,
                ws_ping_interval=settings.websocket_ping_interval,
                ws_ping_timeout=settings.websocket_ping_interval,
                ws_per_message_deflate=False,  # a few bytes would become megabytes, and sizes tell of secrets
                server_header=False,
                timeout_graceful_shutdown=max(1, round(self.grace)) + 5,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """From here on the port answers and signals are handled."""
        await super().startup([])
        state = self.server_state
        self.serving.metrics.count_connections(lambda: len(state.connections))

        def make() -> Connection:
            return Connection(self.config, state, self.lifespan.state, limits=self.limits, tally=self.tally)

        for listener in sockets or ():
            acceptor = Acceptor(listener, make, state.connections, self.most, self.tally)
            self.servers.append(acceptor)  # type: ignore[arg-type]  # it has what uvicorn calls
            where = address_of(listener)
            log.info("listening on %s", where)
            self.base = where if where.startswith("http") else self.base
        self.up.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.serving.drain()
        loop = asyncio.get_running_loop()
        last_call = loop.call_later(self.grace, self.serving.abort)
        watch = loop.create_task(self._abort_when_forced())
        try:
            await super().shutdown(sockets)
        finally:
            last_call.cancel()
            watch.cancel()
            self.serving.close()

    async def _abort_when_forced(self) -> None:
        while not self.force_exit:
            await asyncio.sleep(0.1)
        self.serving.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, without raising the signal again afterwards: that would skip the caller's clean-up."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        log.info("%s: stopping", signal.Signals(number).name)
        self.handle_exit(number, frame)


class Loading:
    """Loads the models on a thread and opens the server; `error` is why it could not, or what the engine's thread died
    of, and then the server stops."""

    def __init__(self, settings: Settings, server: Server) -> None:
        self.settings = settings
        self.server = server
        self.error: DFastLLMError | None = None
        self.worker: Worker | None = None
        self._thread = threading.Thread(target=self._run, name="dfastllm-load", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wait for the loading to stop, then stop the engine's thread."""
        self._thread.join(self.settings.shutdown_timeout)
        if self.worker is not None:
            self.worker.stop()

    @property
    def busy(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            engines = self._load()
            if self.server.should_exit:
                return
            from dfastllm.engine import Worker

            self.worker = Worker(engines, self._died).start()
            self.server.serving.open(self.worker, engines)
            log.info("ready: %s", ", ".join(engines))
            for line in self._to_try(next(iter(engines))):
                log.info("%s", line)
        except DFastLLMError as error:
            self.error = error
            self.server.should_exit = True
        except Exception as error:
            log.exception("loading failed")
            self.error = ModelLoadError(f"Loading failed: {type(error).__name__}: {error}.")
            self.server.should_exit = True

    def _to_try(self, name: str) -> list[str]:
        """What somebody may do now, for the log of one who serves for the first time."""
        base = self.server.base
        if base is None:
            return []
        question = KNOWS.get(name, ("", "Hello!"))[1]
        body = json.dumps({"model": name, "messages": [{"role": "user", "content": question}]})
        key = "" if not self.server.serving.keys.wanted else " -H 'Authorization: Bearer KEY'"
        return [
            f"try: curl {base}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'",
            f"or any OpenAI client at {base}/v1; documentation at {base}/docs; ctrl-C stops",
        ]

    def _died(self, failure: BaseException) -> None:
        """The engine's thread is no more: the server stops with an error, so that who watches the process starts it
        anew. Its requests have been ended."""
        self.error = GenerationError(f"The engine's thread died of {type(failure).__name__}: {failure!s:.500}.")
        self.server.should_exit = True

    def _load(self) -> dict[str, Engine]:
        from dfastllm.engine import EngineConfig
        from dfastllm.hub import title
        from dfastllm.kernels import set_threads
        from dfastllm.llm import load_engine, model_kind, model_options, shipped_models

        settings = self.settings
        set_threads(settings.threads)
        wanted = settings.model or tuple(shipped_models())
        if not wanted:
            raise ValidationError("There is no model to serve.", param="model", hint="Name one with --model.")
        names = settings.served_model_name or tuple(title(model) or Path(model).resolve().name for model in wanted)
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValidationError(
                f"Two models would be called {twice!r}.", param="served_model_name", hint="Name each of them."
            )
        engines: dict[str, Engine] = {}
        for at, (model, name) in enumerate(zip(wanted, names, strict=True), 1):
            if self.server.should_exit:
                break
            log.info("loading %s (%d of %d)", name, at, len(wanted))
            engines[name] = load_engine(
                model,
                name=name,
                **model_options(settings),
                config=EngineConfig(**settings.engine_options()),
                draft=settings.draft_model if model_kind(model) != "ar" else None,
            )
        return engines
