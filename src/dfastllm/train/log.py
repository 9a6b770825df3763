"""What a run says while it goes: log.jsonl, TensorBoard files, a progress bar."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dfastllm.train.work import Value

__all__ = ["FILE", "RunLog", "progress", "read_log"]

FILE = "log.jsonl"
# Of the figures of a step, what is shown while a run goes, and as what; the log has them all, `lr` as a share too.
SHOWN = {"loss": "loss", "lr": "rate/peak", "validation_loss": "validation_loss"}
NO_TENSORBOARD = (
    "TensorBoard files are off: ./run setup train in a clone, or pip install 'dfastllm[train]', gives them,\n"
    "and pictures; log.jsonl has the same figures."
)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl; a last line that was cut short while it was written is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


class RunLog:
    """log.jsonl in a run's directory, and TensorBoard files beside it where they are wanted and can be had.

    A line holds the run's counters and the figures since the line before; a line with "event" says what happened at
    its step. Opened at step n the log forgets what a killed run wrote after n, so that a resumed run's log is that of
    an uninterrupted one.
    """

    def __init__(self, home: Path, step: int, *, tensorboard: bool = False) -> None:
        self.path = home / FILE
        kept = [line for line in read_log(self.path) if line.get("step", 0) <= step]
        part = self.path.with_name(FILE + ".part")
        part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        part.replace(self.path)
        self._writer = _writer(home, step) if tensorboard else None

    def line(self, state: Mapping[str, Any], values: Mapping[str, Value]) -> None:
        """state: the run's counters (step, tokens, samples, seconds). Floats keep 5 decimals, small ones 6 digits."""
        counters = {k: state[k] for k in ("step", "tokens", "samples", "seconds")}
        self._append({**counters, **{k: _short(v) for k, v in values.items()}})
        if self._writer is not None:
            for name, value in values.items():
                if not isinstance(value, str):
                    self._writer.add_scalar(name.replace(".", "/"), value, state["step"])
            self._writer.flush()

    def event(self, step: int, values: Mapping[str, Value]) -> None:
        """values: "event" names it. step: the one that it belongs to, so that a run which resumes before it says it
        once."""
        values = {name: value for name, value in values.items() if name != "step"}
        self._append({"step": step, **values})
        if self._writer is not None:
            text = "  ".join(f"{k}: {v}" for k, v in values.items() if k != "event")
            self._writer.add_text(str(values["event"]), text, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _append(self, line: Mapping[str, Value]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _short(value: Value) -> Value:
    """JSON has no infinity and no NaN: they become words."""
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return round(value, 5) if abs(value) >= 0.01 or value == 0 else float(f"{value:.6g}")


def _writer(home: Path, step: int) -> Any:
    """TensorBoard's writer, None (with a word on stderr) where the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print(NO_TENSORBOARD, file=sys.stderr, flush=True)
        return None
    return SummaryWriter(str(home / "tensorboard"), purge_step=step + 1)  # type: ignore[no-untyped-call]


Show = Callable[[int, Mapping[str, Value]], None]


@contextmanager
def progress(name: str, steps: int, console: Console | None = None) -> Iterator[Show]:
    """show(step, values): a bar of at most 80 columns on a terminal, a plain line elsewhere."""
    console = console or Console(stderr=True)
    if not console.is_terminal:

        def line(step: int, values: Mapping[str, Value]) -> None:
            text = "  ".join(
                f"{label} {values[k]:.4f}" for k, label in SHOWN.items() if isinstance(values.get(k), float)
            )
            print(f"{name} {step}/{steps}  {text}", file=sys.stderr, flush=True)

        yield line
        return
    columns = (
        TextColumn(name if len(name) <= 20 else name[:19] + "…", markup=False),
        BarColumn(16),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=steps, note="")
        note: dict[str, str] = {}

        def move(step: int, values: Mapping[str, Value]) -> None:
            for key, label in (("loss", "loss"), ("validation_loss", "val")):
                if isinstance(values.get(key), float):
                    note[label] = f"{label} {values[key]:.3f}"
            bar.update(task, completed=step, note=" ".join(note.values()))

        yield move
