"""Our end of the wire to a worker process: one JSON object per line out, one in (the other end: `peers.serve`)."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Peer", "PeerError"]

HERE = Path(__file__).parent


class PeerError(Exception):
    """A worker refused an operation or ended; the message holds what it said."""


class Peer:
    """A worker in another environment. `call` runs one operation there and waits; use as a context manager.

    python: the peer's interpreter. module: a module of `peers`, or the command's arguments themselves. Its stderr (and
    whatever C libraries print) goes to a temporary file, quoted when the worker ends unexpectedly.
    """

    def __init__(
        self, python: Path, module: str | Sequence[str], *, environment: Mapping[str, str] | None = None
    ) -> None:
        arguments = list(module)
        if isinstance(module, str):
            # Appended, so that nothing here shadows a module of the peer's environment.
            start = f"import sys; sys.path.append({str(HERE)!r}); from peers.{module} import main; main()"
            arguments = ["-c", start]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the worker)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "PYTHONHOME"))}
        self._process = subprocess.Popen(
            [str(python), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**kept, **(environment or {})},
            text=True,
            encoding="utf-8",
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, op: str, **arguments: Any) -> Any:
        """The operation's result. Raises PeerError with the worker's own message."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(f"the worker ended during {op!r} (status {self._process.wait()}): {self._tail()}")
        answer = json.loads(line)
        if not answer["ok"]:
            raise PeerError(f"{op}: {answer['error']}")
        return answer["result"]

    def _tail(self, size: int = 2000) -> str:
        self._log.seek(0)
        return self._log.read()[-size:].decode(errors="replace").strip() or "it said nothing"

    def close(self) -> None:
        """End the worker: its input is closed, and it is killed if it does not leave."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it has gone already
                self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
