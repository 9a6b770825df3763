"""The report in a terminal: with rich where it is installed, and without it the same text in plain columns.

A table that is too wide for the terminal goes on in a second one that begins with the same first column, so every
figure is shown at every width."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from typing import IO, Literal

from dfastllm.bench.suite.cells import Cell, Column, Table
from dfastllm.bench.suite.schema import Results
from dfastllm.bench.suite.tables import tables

__all__ = ["fold", "print_report", "print_tables"]

PIPED_WIDTH = 120
NARROWEST = 40
GAP = 3  # between columns: rich's padding and rule, and the plain twin's " | "
WORDS = {"×": "x", "–": "-", "★": "*", "…": "...", "µ": "u", "’": "'", "≤": "<="} | dict(
    zip("▁▂▃▄▅▆▇█", "12345678", strict=True)
)
STYLES = {"good": "green", "bad": "red", "dim": "dim", "": ""}


def print_report(results: Results, *, file: IO[str] | None = None, width: int | None = None) -> None:
    """All tables of a result."""
    print_tables(tables(results), file=file, width=width)


def print_tables(
    parts: Iterable[Table], *, file: IO[str] | None = None, width: int | None = None, rich: bool | None = None
) -> None:
    """file: None is stdout. width: None asks the terminal (COLUMNS counts), 120 when there is none. rich: None uses it
    where it is installed. Characters that the file's encoding lacks are spelled out."""
    out: IO[str] = sys.stdout if file is None else file
    columns = width or shutil.get_terminal_size((PIPED_WIDTH, 24)).columns
    columns = max(columns, NARROWEST)
    narrow = [part for table in parts for part in fold(_encodable(table, getattr(out, "encoding", None)), columns)]
    if rich is None:
        rich = importlib.util.find_spec("rich") is not None
    if rich:
        _print_rich(narrow, out, columns)
    else:
        print("\n".join(line for table in narrow for line in _plain(table, columns)), file=out)


def fold(table: Table, width: int) -> list[Table]:
    """The table as parts no wider than `width`, each with the first column; only the first has the title and only the
    last the lines. A column wider than the room it has is left to be wrapped."""
    widths = _widths(table)
    if not widths or _total(widths) <= width:
        return [table]
    parts: list[list[int]] = [[0]]
    for i in range(1, len(widths)):
        if len(parts[-1]) > 1 and _total([widths[k] for k in parts[-1]] + [widths[i]]) > width:
            parts.append([0])
        parts[-1].append(i)
    out = []
    for number, kept in enumerate(parts):
        rows = tuple(tuple(row[i] for i in kept) for row in table.rows)
        title = table.title if number == 0 else f"{table.title} (continued)"
        lines = table.lines if number == len(parts) - 1 else ()
        out.append(Table(table.name, title, tuple(table.columns[i] for i in kept), rows, lines))
    return out


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + GAP * len(widths) + 1


def _widths(table: Table) -> list[int]:
    return [_column_width(table, i) for i in range(len(table.columns))]


def _column_width(table: Table, i: int) -> int:
    """Of the widest cell; a header is wrapped between its words."""
    return max(_width(text) for text in (*table.columns[i].name.split(), *(row[i].text for row in table.rows)))


def _width(text: str) -> int:
    """Terminal cells: two for wide East Asian characters, none for combining ones."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _encodable(table: Table, encoding: str | None) -> Table:
    def spell(text: str) -> str:
        try:
            text.encode(encoding or "utf-8")
            return text
        except UnicodeEncodeError:
            spelled = "".join(WORDS.get(c, c) for c in text)
            return spelled.encode(encoding or "utf-8", "replace").decode(encoding or "utf-8")

    return Table(
        table.name,
        spell(table.title),
        tuple(Column(spell(c.name), c.right) for c in table.columns),
        tuple(tuple(Cell(spell(c.text), c.key, c.tone) for c in row) for row in table.rows),
        tuple(map(spell, table.lines)),
    )


def _print_rich(parts: Sequence[Table], out: IO[str], width: int) -> None:
    from rich.box import ROUNDED
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(file=out, width=width, highlight=False)
    for table in parts:
        console.print()
        console.print(Text(table.title, style="bold"))
        if table.rows:
            drawn = RichTable(box=ROUNDED, header_style="bold")
            for column, cells in zip(table.columns, _widths(table), strict=True):
                side: Literal["left", "right"] = "right" if column.right else "left"
                drawn.add_column(Text(column.name), justify=side, overflow="fold", max_width=cells)
            for row in table.rows:
                drawn.add_row(*(Text(cell.text, style=STYLES[cell.tone]) for cell in row))
            console.print(drawn)
        for line in table.lines:
            console.print(Text(line, style="yellow" if line.startswith(("Warning:", "PARTIAL:")) else ""))


def _plain(table: Table, width: int) -> list[str]:
    """The twin of rich's output: title, header, rule, rows, lines; cells wrapped where they must be."""
    out = ["", table.title]
    if table.rows:
        widths = _widths(table)
        over = _total(widths) - width
        if over > 0:
            widest = widths.index(max(widths))
            widths[widest] = max(widths[widest] - over, 8)
        sides = [c.right for c in table.columns]
        out += _plain_row([c.name for c in table.columns], widths, sides)
        out.append("-+-".join("-" * w for w in widths))
        for row in table.rows:
            out += _plain_row([cell.text for cell in row], widths, sides)
    for line in table.lines:
        indent = " " * (len(line) - len(line.lstrip()))
        out += textwrap.wrap(line, width, subsequent_indent=indent + "  ") or [""]
    return out


def _plain_row(texts: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> list[str]:
    stacks = [
        [text] if _width(text) <= w else textwrap.wrap(text, w) or [""] for text, w in zip(texts, widths, strict=True)
    ]
    out = []
    for i in range(max(map(len, stacks))):
        cells = []
        for stack, w, flush in zip(stacks, widths, right, strict=True):
            text = stack[i] if i < len(stack) else ""
            pad = " " * max(w - _width(text), 0)
            cells.append(pad + text if flush else text + pad)
        out.append(" | ".join(cells).rstrip())
    return out
