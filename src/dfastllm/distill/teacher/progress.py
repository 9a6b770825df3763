"""How far a run with a teacher is: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dfastllm.distill.teacher.summary import Summary

__all__ = ["progress"]

EVERY = 10.0  # seconds between two lines


@contextmanager
def progress(rows: int, show: bool = True) -> Iterator[Callable[[int, Summary], None]]:
    """shown(done, summary), of `rows` in all."""
    console = Console(stderr=True)
    if not show:
        yield lambda done, summary: None
        return
    if not console.is_terminal:
        last = time.monotonic()

        def line(done: int, summary: Summary) -> None:
            nonlocal last
            if done == rows or time.monotonic() - last >= EVERY:
                last = time.monotonic()
                print(f"teacher {done}/{rows}  {_note(summary)}", file=sys.stderr, flush=True)

        yield line
        return
    columns = (TextColumn("teacher"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as bar:
        task = bar.add_task("teacher", total=rows, note="")
        yield lambda done, summary: bar.update(task, completed=done, note=_note(summary))


def _note(summary: Summary) -> str:
    said = f"{summary.accepted} answers, {summary.prompt_tokens + summary.completion_tokens} tokens"
    for name, counts in (("rejected", summary.rejected), ("failed", summary.failed)):
        said += f", {counts.total()} {name}" if counts else ""
    return said
