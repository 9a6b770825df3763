"""Cells, columns and tables of text, and how figures are written in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dfastllm.bench.suite.schema import Accuracy, Comparison

__all__ = [
    "BEST",
    "NONE",
    "TONES",
    "Cell",
    "Column",
    "Table",
    "Tone",
    "accuracy",
    "figure",
    "named",
    "number",
    "percent",
    "printable",
    "share",
    "text",
    "times",
]

NONE = "–"
BEST = "★"
Tone = Literal["", "good", "bad", "dim"]
TONES: dict[str, Tone] = {"faster": "good", "slower": "bad"}


@dataclass(frozen=True, slots=True)
class Cell:
    """key: what the cell sorts by; None for nothing to sort. tone: a hint for colour, never the only carrier."""

    text: str
    key: float | str | None = None
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Column:
    name: str
    right: bool = True


@dataclass(frozen=True, slots=True)
class Table:
    """lines: sentences that belong under the table. Without rows it is only its lines."""

    name: str
    title: str
    columns: tuple[Column, ...] = ()
    rows: tuple[tuple[Cell, ...], ...] = ()
    lines: tuple[str, ...] = ()


def printable(text: str) -> str:
    """One line without control characters: what a server says may not steer the terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def figure(value: float | None, unit: str = "") -> str:
    """Three significant digits or all before the point, thousands separated: 0.0213, 1.23, 45.6, 789, 12,345. A whole
    number stays one."""
    if value is None:
        return NONE
    size = abs(value)
    digits = 0 if size >= 100 or isinstance(value, int) else 1 if size >= 10 else 2 if size >= 1 else 3
    text = f"{value:,.{digits}f}" if size >= 0.1 or value == 0 else f"{value:.3g}"
    return f"{text} {unit}" if unit else text


def share(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f} %".replace(".0 %", " %")


def accuracy(found: Accuracy | None) -> str:
    return NONE if found is None else f"{share(found.value)} ({found.correct}/{found.n})"


def times(gain: Comparison | None) -> str:
    """The ratio, in percent too, with its interval."""
    return NONE if gain is None else f"{gain.ratio:.2f}× ({percent(gain.ratio)}, {gain.low:.2f}–{gain.high:.2f})"


def percent(ratio: float) -> str:
    """A ratio as what it adds: 1.42 is +42 %, 0.9 is -10 %."""
    return f"{round(100 * (ratio - 1)):+d} %"


def text(value: str, tone: Tone = "") -> Cell:
    """Sorts without regard to case."""
    clean = printable(value)
    return Cell(clean, clean.lower(), tone)


def number(value: float | None, unit: str = "", tone: Tone = "") -> Cell:
    return Cell(figure(value, unit), value, tone)


def named(left: str, right: str = "") -> tuple[Column, ...]:
    """Columns of names separated by "|": those set flush left, then the figures."""
    return (*(Column(n, right=False) for n in left.split("|")), *(Column(n) for n in right.split("|") if n))
