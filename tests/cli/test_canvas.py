"""The live canvas: what it makes of events, and that it can be read without colour."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence

import pytest
from rich.console import Console
from rich.style import Style

from dfastllm.cli.canvas import STYLES, Canvas, Screen, draw, summary
from dfastllm.cli.output import printable
from dfastllm.core import CanvasUpdate, Finish, FinishReason, StepEvent, Tier, Usage

EOS = 99


class Letters:
    """Token i is the i-th letter."""

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return "".join(chr(ord("a") + i) for i in ids)


def canvas() -> Canvas:
    return Canvas(Letters(), {EOS})


def event(length: int = 6, **update: object) -> StepEvent:
    fields = {"commit": {}, "provisional": {}, "revise": {}, "block_done": False, "masked": 0, **update}
    return StepEvent("r", canvas=CanvasUpdate(length=length, **fields))  # type: ignore[arg-type]


def seen(canvas: Canvas) -> list[tuple[str, str, int]]:
    return [(segment.kind, segment.text, segment.tokens) for segment in canvas.segments()]


def test_denoising_step_by_step() -> None:
    c = canvas()
    c.absorb(event(commit={1: 1}, provisional={0: 0, 2: 2}))
    assert seen(c) == [("guess", "a", 1), ("fresh", "b", 1), ("guess", "c", 1), ("masked", "", 3)]
    c.absorb(event(commit={0: 0, 2: 3}, provisional={3: EOS}))
    assert seen(c) == [("fresh", "a", 1), ("fixed", "b", 1), ("fresh", "d", 1), ("masked", "", 3)]
    c.absorb(event(revise={1: 4, 2: None}, commit={3: EOS, 4: EOS, 5: EOS}))
    assert seen(c) == [("fixed", "a", 1), ("fresh", "e", 1), ("masked", "", 1), ("end", "", 3)]
    assert c.status().startswith("step 3 · 5/6 tokens fixed · 1.7 tokens/forward · ")


def test_the_end_brings_the_true_counts() -> None:
    c = canvas()
    c.absorb(event(commit={0: 0}))
    usage = Usage(prompt_tokens=3, completion_tokens=4, forwards=8, exactness="reference", total_s=2.0)
    c.absorb(StepEvent("r", (0,), "a", finish=Finish(FinishReason.STOP, usage)))
    assert c.usage == usage
    assert c.text == "a"
    assert (c.forwards, c.committed, c.tokens_per_forward, c.tokens_per_second) == (8, 4, 0.5, 2.0)
    assert summary(usage) == "4 tokens · 8 steps · 0.5 tokens/forward · 2 tok/s · reference"


def test_autoregressive_text_has_no_canvas() -> None:
    c = canvas()
    for letter in (0, 1):
        c.absorb(StepEvent("r", (letter,), "ab"[letter]))
    assert seen(c) == [("fixed", "ab", 2)]
    assert c.status().startswith("step 2 · 2 tokens · 1.0 tokens/forward")


def test_kinds_differ_without_colour() -> None:
    """Whoever sees no colour tells guesses by a line under them and masks by their sign."""
    assert Style.parse(STYLES["guess"]).underline
    assert not Style.parse(STYLES["fixed"] or "none").underline
    assert not Style.parse(STYLES["fresh"]).underline
    assert Style.parse(STYLES["fresh"]).bold
    c = canvas()
    c.absorb(event(commit={0: 0}, provisional={1: 1}))
    drawn, before = draw(c)
    assert drawn.plain == "ab░░░░"
    assert before.plain == "a"
    screen = Console(file=io.StringIO(), force_terminal=True, no_color=True, width=40)
    screen.print(drawn)
    assert "\x1b[3;4mb" in screen.file.getvalue()  # type: ignore[attr-defined]


def test_signs_without_unicode() -> None:
    c = canvas()
    c.absorb(event(commit={0: 0, 1: EOS}))
    assert draw(c, signs=("_", "$"))[0].plain == "a$____"


@pytest.mark.parametrize(("fixed", "first"), [(0, 0), (300, 21)])
def test_a_long_canvas_scrolls_with_its_frontier(fixed: int, first: int) -> None:
    c = canvas()
    c.absorb(event(length=400, commit=dict.fromkeys(range(fixed), 0)))
    screen = Screen(Console(file=io.StringIO(), force_terminal=True, width=10, height=22), c)
    *lines, _, status, legend = [line.plain for line in screen.frame().renderables]  # type: ignore[union-attr]
    assert len(lines) == 18
    assert lines == (["a" * 10] * 30 + ["░" * 10] * 10 if fixed else ["░" * 10] * 40)[first : first + 18]
    assert status.startswith("step 1")
    assert "masked" in legend


def test_a_models_text_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2J\x07\x9bb\tc\nd") == "a␛[2J␇�b\tc\nd"
    c = canvas()
    c.tokenizer = type("T", (), {"decode": lambda self, ids, skip_special=True: "\x1b]0;title\x07"})()
    c.absorb(event(commit={0: 0}))
    assert "\x1b" not in draw(c)[0].plain


def test_speed_is_of_the_whole_request() -> None:
    """Over its own seconds, however few, once they are known."""
    c = canvas()
    c.absorb(event(commit={0: 1, 1: 2}))
    usage = Usage(prompt_tokens=1, completion_tokens=2, forwards=4, exactness=Tier.REFERENCE, total_s=0.25)
    c.absorb(StepEvent("r", finish=Finish(FinishReason.LENGTH, usage)))
    assert (c.tokens_per_second, c.tokens_per_forward) == (8.0, 0.5)
    assert c.status() == "step 4 · 2/6 tokens fixed · 0.5 tokens/forward · 8 tok/s"
    c.usage = dataclasses.replace(usage, total_s=0.0)
    assert c.tokens_per_second == 0.0
