"""Python programs of unknown origin (a model's answer to "write a function"), run in a process of their own.

What every system gives: a wall-clock and a CPU-time limit, a limit of memory (not on macOS), of the size of a file and
of what is kept of the output; a working directory of its own that is gone afterwards; no variables of this process; the
standard library alone. Linux on x86_64 and aarch64 gives more: no sockets, no further processes, no signals to others;
and from 5.13 on no file outside of the interpreter's own can be read, and none outside of the working directory
written. `guarantees` runs programs that try, so it says what holds here. Nothing limits how many files of the largest
size the working directory gets before the time is over.

Does not judge what a program prints.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dfastllm.errors import SandboxError, ValidationError

__all__ = ["Guarantees", "ProgramLimits", "Ran", "guarantees", "run_program"]

CONFINE = Path(__file__).with_name("confine.py")
MIB = 1 << 20


@dataclass(frozen=True)
class ProgramLimits:
    """What a program may take.

    seconds  of the clock; of the CPU the same, rounded up.
    memory   bytes of its address space.
    file     bytes of one file that it writes, its output included.
    files    that it may have open.
    shown    bytes of its output that are kept.

    Raises ValidationError for numbers that are not above 0.
    """

    seconds: float = 10.0
    memory: int = 1024 * MIB
    file: int = 16 * MIB
    files: int = 64
    shown: int = 1 << 14

    def __post_init__(self) -> None:
        for name in ("seconds", "memory", "file", "files", "shown"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValidationError(f"{name} must be above 0, got {getattr(self, name)}.", param=name)


@dataclass(frozen=True, slots=True)
class Ran:
    """ended: done (it ran to its last line), failed (an error, or it left before), timeout. output: its last bytes, as
    text."""

    ended: Literal["done", "failed", "timeout"]
    output: str


@dataclass(frozen=True, slots=True)
class Guarantees:
    """What a program cannot do on this system, found by trying: connect anywhere; start processes; read this
    project's files; write outside of its directory."""

    network: bool
    processes: bool
    reading: bool
    writing: bool

    def words(self, limits: ProgramLimits) -> str:
        """For people."""
        has = {
            "no network": self.network,
            "no other processes": self.processes,
            "reads no files but Python's own": self.reading,
            "writes only a directory of its own": self.writing,
        }
        kept = [what for what, holds in has.items() if holds]
        lost = [what for what, holds in has.items() if not holds]
        said = f"{limits.seconds:g} s, {limits.memory // MIB} MiB of memory, {limits.file // MIB} MiB a file"
        return ", ".join([said, *kept]) + (f"; NOT ENFORCED here: {', '.join(lost)}" if lost else "")


def run_program(source: str, limits: ProgramLimits | None = None) -> Ran:
    """Run a program. Whatever it does, this returns after its time at most and leaves nothing of it behind. Raises
    SandboxError where no process can be started, and for a source that no file can hold (lone surrogates)."""
    limits = limits or ProgramLimits()
    word = secrets.token_hex(16)
    try:
        text = f"{source}\n\nprint({word!r}, flush=True)\n".encode()
    except UnicodeEncodeError as error:
        raise SandboxError(f"the program is no text that a file can hold: {error}.", param="source") from error
    with tempfile.TemporaryDirectory(prefix="dfastllm-") as place:
        program, output = Path(place, "program.py"), Path(place, "output")
        program.write_bytes(text)
        given = {"cpu": math.ceil(limits.seconds), "memory": limits.memory, "file": limits.file, "files": limits.files}
        command = [sys.executable, "-I", "-S", "-B", str(CONFINE), json.dumps(given), str(program)]
        late = not _finished(command, Path(place), output, limits.seconds)
        with output.open("rb") as file:
            file.seek(max(0, output.stat().st_size - limits.shown))
            shown = file.read().decode("utf-8", errors="replace")
    whole = shown.rstrip("\n")
    if late:
        return Ran("timeout", shown)
    return Ran("done", whole.removesuffix(word)) if whole.endswith(word) else Ran("failed", shown)


def _finished(command: list[str], place: Path, output: Path, seconds: float) -> bool:
    """Run it, its output into a file; False where its time was over first. Nothing of its group is left."""
    environment = {"LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "TMPDIR": str(place), "HOME": str(place)}
    try:
        with output.open("wb") as file:
            process = subprocess.Popen(
                command,
                cwd=place,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    except OSError as error:
        raise SandboxError(f"no process can be started for a program: {error}.") from error
    try:
        process.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


_TRIES = {
    "network": "import socket\nsocket.socket()",
    "processes": "import subprocess\nsubprocess.run(['/bin/true'])",
    "reading": "open({here!r}).read()",
    "writing": "open({there!r}, 'w').write('x')",
}


@functools.cache
def guarantees() -> Guarantees:
    """See `Guarantees`. Runs four programs, once a process."""
    with tempfile.TemporaryDirectory(prefix="dfastllm-") as place:
        there = Path(place, "there")
        found = {}
        for name, source in _TRIES.items():
            text = source.format(here=str(Path(__file__)), there=str(there))
            found[name] = run_program(text).ended == "failed"
        found["writing"] &= not there.exists()
    return Guarantees(**found)
