"""A dfastllm server of our own for a run that was given none: a process, so that it is measured like any other."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2

from dfastllm.errors import GenerationError

__all__ = ["started_server"]

LOADING = 300.0  # s until it must be ready
STOPPING = 15.0
LISTENING = re.compile(r"listening on (http://\S+)")


@contextmanager
def started_server(arguments: Sequence[str], log: Path | None = None) -> Iterator[str]:
    """Run `dfastllm serve` with these arguments on a free port; its root URL once it is ready. Its log goes to `log`
    (default: a temporary file). Raises GenerationError with the log's last line when it does not come up."""
    command = [sys.executable, "-c", "from dfastllm.cli import main; main()", "serve"]
    command += ["--host", "127.0.0.1", "--port", "0", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        path = log if log is not None else Path(folder) / "server.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # ctrl-C is for this process, which stops the server
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
            try:
                yield _wait(process, path)
            finally:
                _stop(process)


def _wait(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + LOADING
    url: str | None = None
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise GenerationError(f"The server that was started ended with code {process.returncode}: {_last(log)}")
        if url is None:
            found = LISTENING.search(log.read_text(encoding="utf-8", errors="replace"))
            url = found[1] if found else None
        if url is not None:
            try:
                if httpx2.get(f"{url}/health", timeout=2.0, trust_env=False).status_code == 200:
                    return url
            except httpx2.HTTPError:
                pass  # not listening yet, or busy loading: ask again
        time.sleep(0.1)
    raise GenerationError(f"The server that was started is not ready after {LOADING:g} s: {_last(log)}")


def _last(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing."


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOPPING)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
