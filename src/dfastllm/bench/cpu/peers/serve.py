"""The worker's end of the wire: one JSON object per line in, one out.

in   {"op": name, ...arguments}
out  {"ok": true, "result": value} or {"ok": false, "error": text}

File descriptor 1 is moved away first, so that whatever a C library prints goes to stderr and cannot break the wire."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["serve", "serve_session", "timed"]


def serve(operations: Mapping[str, Callable[..., Any]]) -> None:
    """Answer requests on stdin until it closes. An exception in an operation is its answer, not the worker's end."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            operation = operations[request.pop("op")]
            answer: dict[str, Any] = {"ok": True, "result": operation(**request)}
        except Exception as error:
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(answer) + "\n")
        out.flush()


def serve_session(make: Callable[..., Any], session: Any, **more: Callable[..., Any]) -> None:
    """Serve what every peer can do: `make` writes its model files; a session loads one and times forwards of a sequence
    and decodes of several. more: what this peer can do besides, by name."""
    known = {name: getattr(session, name) for name in ("load", "forward", "concurrent")}
    serve({"make": make, **known, **more})


def timed(step: Callable[[], None], repeats: int, undo: Callable[[], None] | None = None) -> list[float]:
    """Seconds of each of `repeats` calls of `step`; `undo` runs after each, outside the clock."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
        if undo is not None:
            undo()
    return seconds
