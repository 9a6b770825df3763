"""Progress for people: bars on a terminal where rich is installed, otherwise a plain line now and then. On stderr."""

from __future__ import annotations

import importlib.util
import sys
import time
from types import TracebackType
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["Bars"]

EVERY = 5.0  # s between two plain lines of one part


class Bars:
    """`with Bars() as bars: bars(part, done, total, text)`."""

    def __init__(self, file: IO[str] | None = None, *, rich: bool | None = None) -> None:
        self.file = sys.stderr if file is None else file
        known = importlib.util.find_spec("rich") is not None
        self.rich = (known and self.file.isatty()) if rich is None else rich
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._told: dict[str, float] = {}

    def __enter__(self) -> Bars:
        if self.rich:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description:14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            console = Console(file=self.file, highlight=False)
            self._progress = Progress(*columns, TextColumn("{task.fields[text]}", markup=False), console=console)
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def __call__(self, part: str, done: int, total: int, text: str) -> None:
        """`done` of `total` steps of a part; what it does now."""
        if self._progress is not None:
            if part not in self._tasks:
                self._tasks[part] = self._progress.add_task(part, total=total, text=text)
            self._progress.update(self._tasks[part], completed=done, total=total, text=text)
            return
        now = time.monotonic()
        if part not in self._told or done == total or now - self._told[part] >= EVERY:
            self._told[part] = now
            print(f"{part}: {done}/{total} {text}", file=self.file, flush=True)
