"""All records one after another: what there is to run, how long it takes on two idle cores, and what is done already.

Every record is a command of its own (`python -m dfastllm.bench NAME`), run here as a process. What came of it is kept
in a journal by the source it measured: a run that was stopped goes on where it was, and a record that failed is tried
again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["RECORDS", "Journal", "Record", "chosen", "run_all", "source_hash"]

_BLOCKS = ("--case", "decode, batch 1", "--case", "block of 32")
_PEERS = ("--peer", "pytorch", "--peer", "openvino-genai", "--peer", "llama.cpp")
_MIXTURE = ("--shape", "moe-a1b-4l", "--case", "decode", "--case", "block of 32, all")


@dataclass(frozen=True, slots=True)
class Record:
    """name: how it is chosen and skipped. arguments: of `python -m dfastllm.bench`. minutes: about, the peers'
    environments and files being there. environment: set for it. resumes: whether the command has --resume."""

    name: str
    arguments: tuple[str, ...]
    minutes: int
    environment: Mapping[str, str] = field(default_factory=dict)
    resumes: bool = False


def _cpu(name: str, minutes: int, *arguments: str, isa: str = "", resumes: bool = True) -> Record:
    return Record(name, ("cpu", *arguments), minutes, {"DFASTLLM_ISA": isa} if isa else {}, resumes)


# Fidelity first: the tables of the others show its figures. The report last.
RECORDS: tuple[Record, ...] = (
    Record("fidelity", ("fidelity",), 6),
    Record("fidelity of peers", ("fidelity", *_PEERS), 8),
    Record("overhead", ("overhead",), 2),
    Record("kernels", ("kernels",), 6),
    Record("formats", ("formats",), 16),
    Record("decoders", ("decoders",), 10),
    Record("batching", ("batching",), 4),
    Record("prefix", ("prefix",), 5),
    Record("lossless", ("lossless",), 10),
    Record("speculation", ("speculation",), 15),
    Record("lora", ("lora",), 5),
    Record("tenants", ("tenants",), 10),
    _cpu("llama.cpp 0.5B", 10, "llama.cpp"),
    _cpu("llama.cpp 1.5B", 10, "llama.cpp", "--shape", "qwen2.5-1.5b", *_BLOCKS),
    _cpu("llama.cpp mixture", 10, "llama.cpp", *_MIXTURE, "--format", "Q8_0", "--format", "Q4_0"),
    _cpu("llama.cpp AVX2", 15, "llama.cpp", "--build", "avx2", isa="avx2"),
    _cpu("llama.cpp AVX-VNNI", 15, "llama.cpp", "--build", "avx-vnni", isa="avx512vl"),
    _cpu("openvino", 22, "openvino"),
    _cpu("pytorch", 11, "pytorch"),
    _cpu("pytorch mixture", 12, "pytorch", *_MIXTURE),
    _cpu("serving", 20, "serving", resumes=False),
    _cpu("diffusion", 12, "diffusion", resumes=False),
    _cpu("diffusion 1B", 8, "diffusion", "--shape", "llada-1b", "--side", "torch bf16, none", "--side",
         "native w8r, dual", resumes=False),
    _cpu("neutral", 8, "neutral", resumes=False),
    _cpu("report", 1, "report", resumes=False),
)  # fmt: skip


def chosen(only: Sequence[str], skip: Sequence[str]) -> list[Record]:
    """Records whose name begins with one of `only` (none: all) and with none of `skip`, in the order of RECORDS. Raises
    ValueError for a beginning that no name has."""
    for asked in (*only, *skip):
        if not any(record.name.startswith(asked) for record in RECORDS):
            raise ValueError(f"no record begins with {asked!r}; there are {', '.join(r.name for r in RECORDS)}.")
    wanted = [r for r in RECORDS if not only or any(r.name.startswith(beginning) for beginning in only)]
    return [r for r in wanted if not any(r.name.startswith(beginning) for beginning in skip)]


def source_hash(root: Path) -> str:
    """What git calls the tree of src/ below `root`, with "+" behind it where it has uncommitted changes; "unknown"
    outside of a repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    found = git("rev-parse", "--short=12", "HEAD:src")
    return f"{found}{'+' if git('status', '--porcelain', '--', 'src') else ''}" if found else "unknown"


class Journal:
    """What came of each record, in a JSON file that is written after each: by name the source that was measured,
    whether it ended well, and the seconds it took."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def done(self, record: Record, source: str) -> bool:
        """Whether it ended well, of this very source. Of uncommitted changes nobody knows whether they are the same."""
        row = self.rows.get(record.name)
        return row is not None and row["ok"] and row["source"] == source and not source.endswith("+")

    def begun(self, record: Record, source: str) -> bool:
        """Whether it was begun of this source and not finished: --resume may go on with it."""
        row = self.rows.get(record.name)
        return row is not None and not row["ok"] and row["source"] == source and not source.endswith("+")

    def write(self, record: Record, source: str, ok: bool, seconds: float) -> None:
        self.rows[record.name] = {"source": source, "ok": ok, "seconds": round(seconds, 1)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.rows, indent=1) + "\n")
        part.replace(self.path)


def run_all(records: Sequence[Record], journal: Journal, source: str, say: Callable[[str], None]) -> Iterator[Record]:
    """Run those that are not done, each with its output in `<name>.log` beside the journal; yields those that
    failed."""
    for record in records:
        if journal.done(record, source):
            say(f"{record.name}: done before")
            continue
        again = ("--resume",) if record.resumes and journal.begun(record, source) else ()
        command = [sys.executable, "-m", "dfastllm.bench", *record.arguments, *again]
        log = journal.path.parent / f"{record.name.replace(' ', '-')}.log"
        journal.write(record, source, False, 0.0)  # begun
        say(f"{record.name}: about {record.minutes} min; {log}")
        began = time.monotonic()
        with log.open("ab") as out:
            done = subprocess.run(command, stdout=out, stderr=out, env={**os.environ, **record.environment})
        seconds = time.monotonic() - began
        journal.write(record, source, done.returncode == 0, seconds)
        say(f"{record.name}: {'done' if done.returncode == 0 else 'FAILED'} after {seconds / 60:.1f} min")
        if done.returncode:
            yield record
