"""In a real terminal (a pty): the canvas is drawn, ctrl-C ends the answer and not the program, /quit leaves."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pty = pytest.importorskip("pty", reason="there are no pseudo-terminals here")
# 257 is the end token of tests/cli/models.py: a random model may draw it, and it does not count as a token.
SLOW = (
    "--mode",
    "standard",
    "--max-tokens",
    "192",
    "--steps",
    "192",
    "--block-length",
    "192",
    "--ignore-eos",
    "--temperature",
    "2",
    "--logit-bias",
    "257=-100",
)


class Terminal:
    """A program on a pty of 90 x 30."""

    def __init__(self, *arguments: str) -> None:
        self.main, side = pty.openpty()
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "90", "LINES": "30", "PYTHONUTF8": "1"}
        command = [str(Path(sys.executable).with_name("dfastllm")), *arguments]
        self.process = subprocess.Popen(
            command, stdin=side, stdout=side, stderr=side, env=environment, start_new_session=True, close_fds=True
        )
        os.close(side)
        self.output = ""

    def read_until(self, pattern: str, seconds: float = 120) -> str:
        """What was printed from here on until `pattern` was in it."""
        start, limit = len(self.output), time.monotonic() + seconds
        while not re.search(pattern, self.output[start:]):
            assert time.monotonic() < limit, f"no {pattern!r} in {self.output[start:]!r}"
            if select.select([self.main], [], [], 0.1)[0]:
                try:
                    self.output += os.read(self.main, 65536).decode("utf-8", "replace")
                except OSError:  # the program has ended
                    assert re.search(pattern, self.output[start:]), f"no {pattern!r} in {self.output[start:]!r}"
        return self.output[start:]

    def type(self, text: str) -> None:
        os.write(self.main, text.encode())

    def interrupt(self) -> None:
        """What the terminal's driver does at ctrl-C."""
        os.killpg(self.process.pid, 2)

    def interrupt_at_prompt(self, pattern: str) -> None:
        """Ctrl-C until `pattern` is printed. One may go by unseen: a signal that comes after readline wrote the prompt
        and before it waits for keys is noticed with the next key or signal only."""
        for _ in range(30):
            self.interrupt()
            try:
                self.read_until(pattern, seconds=4)
            except AssertionError:
                continue
            return
        raise AssertionError(f"no {pattern!r} after 30 interrupts")


@pytest.fixture
def terminal() -> Iterator[type[Terminal]]:
    opened: list[Terminal] = []

    class Kept(Terminal):
        def __init__(self, *arguments: str) -> None:
            super().__init__(*arguments)
            opened.append(self)

    yield Kept
    for one in opened:
        if one.process.poll() is None:
            one.process.kill()
        one.process.wait()
        os.close(one.main)


def test_generate_draws_the_canvas_and_ends_with_a_summary(terminal: type[Terminal], diffusion: Path) -> None:
    t = terminal("generate", "hello", "--model", str(diffusion), *SLOW)
    output = t.read_until(r"192 tokens · 192 steps · 1\.0 tokens/forward · \d+ tok/s · reference")
    assert "░" in output
    assert "tokens fixed" in output
    assert re.search(r"\x1b\[[\d;]*\b4\b[\d;]*m", output), "no guess was underlined"
    assert t.process.wait(20) == 0


def test_an_autoregressive_model_is_shown_live_too(terminal: type[Terminal], ar: Path) -> None:
    t = terminal("generate", "hello", "--model", str(ar), "--max-tokens", "64", "--ignore-eos")
    assert "step " in t.read_until(r"\d+ tokens · 64 steps · ")
    assert t.process.wait(20) == 0


def test_plain_draws_nothing(terminal: type[Terminal], diffusion: Path) -> None:
    t = terminal("generate", "hello", "--model", str(diffusion), "--plain", "--max-tokens", "32")
    assert t.process.wait(60) == 0
    assert "░" not in t.read_until(r"\n")


def test_chat_survives_ctrl_c(terminal: type[Terminal], diffusion: Path) -> None:
    t = terminal("chat", "--model", str(diffusion), *SLOW)
    t.read_until("you> ")
    t.type("hello\n")
    t.read_until("░")
    t.interrupt()
    t.read_until(r"\(stopped\)[\s\S]*you> ")
    t.interrupt_at_prompt(r"/quit leaves\.[\s\S]*you> ")
    t.type("again\n")
    t.read_until(r"192 tokens · 192 steps[\s\S]*you> ")
    t.type("/quit\n")
    assert t.process.wait(20) == 0


def test_ctrl_c_ends_generate_with_130(terminal: type[Terminal], diffusion: Path) -> None:
    t = terminal("generate", "hello", "--model", str(diffusion), *SLOW)
    t.read_until("░")
    t.interrupt()
    assert t.process.wait(20) == 130
    assert "Traceback" not in t.read_until("interrupted")
