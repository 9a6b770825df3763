"""A request as it looks while it runs: which tokens are fixed, guessed or masked, and how fast it goes.

`Canvas` keeps the state and knows no terminal; `draw` turns it into rich text; `Screen` shows it live. Fixed, guessed
and masked differ without colour: plain, underlined, and one block character per token.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from dfastllm.cli.output import printable
from dfastllm.core import StepEvent, Usage

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

__all__ = ["Canvas", "Screen", "Segment", "draw", "summary"]

Kind = Literal["fixed", "fresh", "guess", "masked", "end"]
STYLES: dict[Kind, str] = {
    "fixed": "",
    "fresh": "bold",
    "guess": "underline italic cyan",
    "masked": "dim",
    "end": "dim",
}
FRAME_SECONDS = 0.04  # drawing more often costs time and shows nothing


class Decodes(Protocol):
    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str: ...


@dataclass(frozen=True)
class Segment:
    """A run of neighbouring tokens of one kind. `text` is empty for masked and end, which are drawn as signs."""

    kind: Kind
    text: str
    tokens: int


@dataclass
class Canvas:
    """Folds StepEvents. `text` is the final text so far; `length` is 0 for an autoregressive model (no canvas)."""

    tokenizer: Decodes
    eos_ids: Collection[int]
    text: str = ""
    length: int = 0
    committed: int = 0
    forwards: int = 0
    started: float = field(default_factory=time.monotonic)
    fixed: dict[int, int] = field(default_factory=dict)
    guesses: dict[int, int] = field(default_factory=dict)
    fresh: set[int] = field(default_factory=set)
    usage: Usage | None = None

    def absorb(self, event: StepEvent) -> None:
        """Take in the next event of the request. `forwards` counts events until the last one tells the true number."""
        self.text += event.text
        self.forwards += 1
        update = event.canvas
        if update is None:
            self.committed += len(event.token_ids)
        else:
            self.length = update.length
            update.apply(self.fixed)
            self.fresh = set(update.commit) | {p for p, token in update.revise.items() if token is not None}
            self.guesses = dict(update.provisional)
            self.committed = len(self.fixed)
        if event.finish is not None:
            self.usage = event.finish.usage
            self.forwards = self.usage.forwards
            self.committed = self.usage.completion_tokens

    def segments(self) -> list[Segment]:
        """The canvas from left to right. Without one: the text so far."""
        if not self.length:
            return [Segment("fixed", self.text, self.committed)] if self.text else []
        runs: list[tuple[Kind, list[int]]] = []
        for position in range(self.length):
            kind, token = self._at(position)
            if not runs or runs[-1][0] != kind:
                runs.append((kind, []))
            runs[-1][1].append(token)
        drawn_as_signs = ("masked", "end")
        return [
            Segment(kind, "" if kind in drawn_as_signs else self.tokenizer.decode(ids), len(ids)) for kind, ids in runs
        ]

    def _at(self, position: int) -> tuple[Kind, int]:
        if position in self.fixed:
            token = self.fixed[position]
            if token in self.eos_ids:
                return "end", token
            return ("fresh" if position in self.fresh else "fixed"), token
        token = self.guesses.get(position, -1)
        return ("masked", -1) if token < 0 or token in self.eos_ids else ("guess", token)

    @property
    def tokens_per_forward(self) -> float:
        return self.committed / self.forwards if self.forwards else 0.0

    @property
    def tokens_per_second(self) -> float:
        seconds = self.usage.total_s if self.usage is not None else time.monotonic() - self.started
        return self.committed / seconds if seconds > 0 else 0.0

    def status(self) -> str:
        """One line: how far, how many tokens a forward fixes, how fast."""
        done = f"{self.committed}/{self.length} tokens fixed" if self.length else f"{self.committed} tokens"
        return (
            f"step {self.forwards} · {done} · {self.tokens_per_forward:.1f} tokens/forward · "
            f"{self.tokens_per_second:.0f} tok/s"
        )


def summary(usage: Usage) -> str:
    """One line about a finished request."""
    speed = usage.completion_tokens / usage.total_s if usage.total_s > 0 else 0.0
    return (
        f"{usage.completion_tokens} tokens · {usage.forwards} steps · {usage.tokens_per_forward:.1f} tokens/forward · "
        f"{speed:.0f} tok/s · {usage.exactness}"
    )


def draw(canvas: Canvas, *, signs: tuple[str, str] = ("░", "∎")) -> tuple[Text, Text]:
    """The canvas as rich text, and the part of it before the first open position (for scrolling).

    signs: one per masked token; one for everything after the end.
    """
    from rich.text import Text

    drawn, before, is_open = Text(), Text(), False
    for segment in canvas.segments():
        text = printable(segment.text)
        if segment.kind == "masked":
            text = signs[0] * segment.tokens
        elif segment.kind == "end":
            text = signs[1]
        drawn.append(text, STYLES[segment.kind])
        is_open = is_open or segment.kind in ("masked", "guess")
        if not is_open:
            before.append(text)
    return drawn, before


class Screen:
    """Shows a canvas in place while it fills, then clears it: the caller prints the result, which then scrolls."""

    def __init__(self, console: Console, canvas: Canvas) -> None:
        self.console = console
        self.canvas = canvas
        self.signs = ("░", "∎") if "utf" in console.encoding.lower() else ("_", "$")
        self._live: Live | None = None
        self._drawn = 0.0

    def __enter__(self) -> Screen:
        from rich.live import Live

        self._live = Live(console=self.console, auto_refresh=False, transient=True, vertical_overflow="crop")
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self) -> None:
        """Draw the present state, unless it was drawn a moment ago."""
        now = time.monotonic()
        if self._live is not None and now - self._drawn >= FRAME_SECONDS:
            self._live.update(self.frame(), refresh=True)
            self._drawn = now

    def frame(self) -> Group:
        """As many lines of the canvas as fit, around the first open position, and the status below them."""
        from rich.console import Group
        from rich.text import Text

        text, before = draw(self.canvas, signs=self.signs)
        width, height = self.console.width, max(3, self.console.height - 4)
        lines = text.wrap(self.console, width)
        at = len(before.wrap(self.console, width)) if before else 0
        first = max(0, min(at - height // 2, len(lines) - height))
        status = Text(self.canvas.status(), style="dim", no_wrap=True, overflow="ellipsis")
        parts: list[Text] = [*lines[first : first + height], Text(), status]
        if self.canvas.length:
            legend = Text("fixed  ", no_wrap=True).append("just fixed", STYLES["fresh"])
            legend.append("  ").append("guess", STYLES["guess"]).append(f"  {self.signs[0]} masked", STYLES["masked"])
            parts.append(legend.append(f"  {self.signs[1]} end", STYLES["end"]))
        return Group(*parts)
