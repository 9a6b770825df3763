"""The server of a soak: a process that is started for it, and what it holds at a moment."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from dfastllm.bench.suite.launch import serve_command, started_process
from tests.soak.attacks import DEADLINE, Address
from tests.soak.deck import MODELS

__all__ = ["Held", "SoakedServer", "soaked_server"]

POOL = 512  # tokens of K,V for each model: so few that requests lose their pages to others
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
_SERIES = re.compile(r"^dfastllm_(\w+)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Held:
    """What the server holds. rss in MB; files and threads counted; busy: the sum of its gauges, 0 at rest."""

    rss: float
    files: int
    threads: int
    busy: float
    connections: float
    series: int  # lines of /metrics


@dataclass(frozen=True)
class SoakedServer:
    address: Address
    pid: int

    def held(self) -> Held:
        proc = Path("/proc") / str(self.pid)
        rss = next(line for line in (proc / "status").read_text().splitlines() if line.startswith("VmRSS"))
        text = self._get("/metrics")
        return Held(
            rss=int(rss.split()[1]) / 1024,
            files=len(list((proc / "fd").iterdir())),
            threads=len(list((proc / "task").iterdir())),
            busy=sum(self.total(name, text) for name in GAUGES),
            connections=self.total("http_connections", text) - 1,  # the one that asks
            series=len(text.splitlines()),
        )

    def count(self, name: str) -> float:
        return self.total(name, self._get("/metrics"))

    @staticmethod
    def total(name: str, text: str) -> float:
        """The sum of a metric over its labels."""
        return sum(float(value) for found, value in _SERIES.findall(text) if found == name)

    def _get(self, path: str) -> str:
        connection = http.client.HTTPConnection(*self.address, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", path)
            return connection.getresponse().read().decode()


@contextmanager
def soaked_server(threads: int, log: Path) -> Iterator[SoakedServer]:
    """The shipped models with a small pool of pages and short deadlines. Raises GenerationError where it fails."""
    arguments = [word for model in MODELS for word in ("--model", model)]
    arguments += ["--threads", str(threads), "--kv-cache-tokens", str(POOL), "--max-num-seqs", "16"]
    arguments += ["--speculative-config", json.dumps([{"method": "ngram", "num_speculative_tokens": 4}])]
    for name in ("header", "body", "write"):
        arguments += [f"--{name}-timeout", str(DEADLINE)]
    with started_process(serve_command(arguments), log) as started:
        where = urlsplit(started.url)
        assert where.hostname is not None
        assert where.port is not None
        yield SoakedServer((where.hostname, where.port), started.pid)
