"""Servers that a run starts for itself: processes, so that they are measured like any other, and gone with the run.

A server ends with the block that started it, and also when this process is killed: a guard beside it, a process of a
few lines, sees that this one is gone and ends the server in its place.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2

from dfastllm.errors import GenerationError

__all__ = ["Launched", "Started", "launched", "serve_command", "started_process", "started_server"]

LOADING = 600.0  # s until it must be ready: a peer may compile first
STOPPING = 15.0
LISTENING = re.compile(r"listening on (http://\S+)")

# Arguments: the server's process id, the seconds that it has to end. Its standard input is a pipe whose other end only
# the starting process holds, so it ends when that process does, in whatever way. A process descriptor is of that one
# process, whoever gets its number later.
GUARD = """
import os, signal, sys, time
pid, seconds = int(sys.argv[1]), float(sys.argv[2])
try:
    one = os.pidfd_open(pid)
    send = lambda number: signal.pidfd_send_signal(one, number)
except (AttributeError, OSError):
    send = lambda number: os.kill(pid, number)
print("ready", flush=True)
sys.stdin.read()
try:
    send(signal.SIGTERM)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.1)
        send(0)
    os.killpg(pid, signal.SIGKILL)
except OSError:
    pass
"""


@dataclass(frozen=True)
class Started:
    """A server that is ready. url: its root. pid: of its process, the first of a process group of its own."""

    url: str
    pid: int


@dataclass
class Launched:
    """A process that was started and may still be loading.

    url    its root; None: its log will say where it listens.
    ready  the path that answers 200 when requests are taken.
    log    the file that its output goes to.
    """

    process: subprocess.Popen[bytes]
    url: str | None
    ready: str
    log: Path

    def wait(self) -> Started:
        """Returns once it is ready. May run on another thread than the block, whose end ends it. Raises
        GenerationError with the log's last line when it does not come up."""
        deadline = time.monotonic() + LOADING
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                code = self.process.returncode
                raise GenerationError(f"The server that was started ended with code {code}: {self._last()}")
            if self.url is None:
                found = LISTENING.search(self._said())
                self.url = found[1] if found else None
            if self.url is not None:
                try:
                    if httpx2.get(self.url + self.ready, timeout=2.0, trust_env=False).status_code == 200:
                        return Started(self.url, self.process.pid)
                except httpx2.HTTPError:
                    pass  # not listening yet, or busy loading: ask again
            time.sleep(0.1)
        raise GenerationError(f"The server that was started is not ready after {LOADING:g} s: {self._last()}")

    def _said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def _last(self) -> str:
        lines = self._said().strip().splitlines()
        return lines[-1] if lines else "it said nothing."


@contextmanager
def launched(
    command: Sequence[str],
    log: Path | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    url: str | None = None,
    ready: str = "/health",
) -> Iterator[Launched]:
    """Start a server and end it with the block, its process group included.

    command      its words.
    log          the file of its output; default: a temporary one.
    environment  variables besides those of this process.
    folder       where it runs; default: here.
    url          its root; None: its log says "listening on URL", as ours does.
    ready        the path that answers 200 when requests are taken.
    """
    with contextlib.ExitStack() as stack:
        if log is None:
            log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "server.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=stack.enter_context(log.open("wb")),
            stderr=subprocess.STDOUT,
            start_new_session=True,  # ctrl-C is for this process, which stops the server
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
        )
        stack.callback(_stop, process)
        stack.enter_context(_guarded(process.pid))
        yield Launched(process, url, ready, log)


@contextmanager
def started_process(
    command: Sequence[str],
    log: Path | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    url: str | None = None,
    ready: str = "/health",
) -> Iterator[Started]:
    """As `launched`, waiting until it is ready. Raises GenerationError with the log's last line when it does not come
    up."""
    with launched(command, log, environment=environment, folder=folder, url=url, ready=ready) as server:
        yield server.wait()


@contextmanager
def started_server(arguments: Sequence[str], log: Path | None = None) -> Iterator[Started]:
    """`dfastllm serve` with these arguments on a free port, once it is ready. Raises as `started_process`."""
    with started_process(serve_command(arguments), log) as started:
        yield started


def serve_command(arguments: Sequence[str]) -> list[str]:
    """The words that run our server with this interpreter, on a port that its log names."""
    command = [sys.executable, "-c", "from dfastllm.cli import main; main()", "serve"]
    return [*command, "--host", "127.0.0.1", "--port", "0", *arguments]


@contextmanager
def _guarded(pid: int) -> Iterator[None]:
    """A guard for this process from here on; the block ends when the guarded one is to be left alone again."""
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", GUARD, str(pid), str(STOPPING)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert guard.stdout is not None
    guard.stdout.readline()
    try:
        yield
    finally:
        guard.kill()
        guard.communicate()


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOPPING)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing of it is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
