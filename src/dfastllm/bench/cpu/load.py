"""How much of the processor everything else used while something was measured (Linux; elsewhere None)."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

__all__ = ["Foreign"]

_STAT = Path("/proc/stat")


def _busy() -> float:
    """Seconds that all cores together were not idle since boot, time stolen by the host included."""
    user, nice, system, _idle, _wait, irq, soft, steal = map(int, _STAT.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def _used(pid: int) -> float:
    """Processor seconds of a process so far, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Foreign:
    """`share` after a `with` block: the fraction of the machine's processor time that processes other than `pids` (and
    the host's other guests) took during it. Counted in ticks of 10 ms: meaningless below about 100 ms."""

    def __init__(self, pids: Sequence[int]) -> None:
        self.pids = pids
        self.share: float | None = None

    def _foreign(self) -> float:
        return _busy() - sum(map(_used, self.pids))

    def __enter__(self) -> Foreign:
        if _STAT.exists():
            self._began, self._before = time.monotonic(), self._foreign()
        return self

    def __exit__(self, *_: object) -> None:
        if _STAT.exists():
            span = (time.monotonic() - self._began) * (os.cpu_count() or 1)
            self.share = min(1.0, max(0.0, (self._foreign() - self._before) / span))
