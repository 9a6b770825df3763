"""A peer that knows nothing: its times are made up, so that the wire and the turns can be tested without one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "src" / "dfastllm" / "bench" / "cpu"))

from peers.serve import serve, timed


def forward(rows: int, cached: int, repeats: int, every_row: bool, grow: bool) -> list[float]:
    print("what a library prints must not break the wire")
    os.write(1, b"not even from C\n")
    return [rows * 1e-3] * repeats


def concurrent(sequences: int, cached: int, repeats: int) -> list[float]:
    return [sequences * 1e-3 + cached * 1e-6] * repeats


def fail(text: str) -> None:
    raise ValueError(text)


def end(status: int) -> None:
    sys.stderr.write("out of luck\n")
    sys.stderr.flush()
    os._exit(status)


def undone(repeats: int) -> list[str]:
    log: list[str] = []
    timed(lambda: log.append("step"), repeats, lambda: log.append("undo"))
    return log


serve({"forward": forward, "concurrent": concurrent, "fail": fail, "end": end, "undone": undone})
