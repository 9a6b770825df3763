"""A server on a loopback socket, in threads of this process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx
from fastapi import FastAPI
from openai import AsyncOpenAI, OpenAI

from dfastllm.engine import Engine, Worker
from dfastllm.server.app import create_app
from dfastllm.server.listening import listen
from dfastllm.server.run import Server
from dfastllm.server.serving import Serving
from dfastllm.settings import Settings
from tests.kit import conformance


@dataclass
class Live:
    url: str
    serving: Serving
    worker: Worker
    app: FastAPI
    seen: set[tuple[str, int, str]]  # operations answered, with status and content type

    def client(self, **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 60, **options})

    def async_client(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def metric(self, name: str, **labels: str) -> float:
        """The value of one series, 0 when it does not exist yet."""
        wanted = {"dfastllm_" + name: labels}
        for family in self.serving.metrics.registry.collect():
            for sample in family.samples:
                if sample.name in wanted and labels.items() <= sample.labels.items():
                    return float(sample.value)
        return 0.0

    def connect(self) -> socket.socket:
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=30)


@contextmanager
def serving(engines: Mapping[str, Engine], **settings: Any) -> Iterator[Live]:
    """Engines served until the block ends; afterwards no thread of theirs is left, and every answer was as openapi.json
    declares it."""
    chosen = Settings(port=0, **{"shutdown_timeout": 0.2, **settings})
    with Worker(engines) as worker, listen("127.0.0.1", 0) as listener:
        app = create_app(worker, engines, chosen)
        violations, seen = conformance.watch(app)
        server = Server(app, chosen)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="test-server")
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.start()
        try:
            assert server.up.wait(20)
            yield Live(url, app.state.serving, worker, app, seen)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
        if violations:
            raise AssertionError("\n".join(violations))
