"""Interleaving: every side measures a short burst of one case, in turns; a turn's medians are compared as a pair."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from dfastllm.bench.cpu.cases import Case
from dfastllm.bench.cpu.load import Foreign
from dfastllm.bench.cpu.wire import Peer
from dfastllm.errors import ValidationError

__all__ = ["Burst", "Turn", "peer_burst", "take_turns"]

Burst = Callable[[int], Sequence[float]]  # repeats -> seconds of each
PAUSE = 0.03  # seconds between bursts: threads of the last one stop spinning


@dataclass(frozen=True, slots=True)
class Turn:
    """seconds: each side's median of its burst. foreign: what others used of the machine meanwhile, None: unknown."""

    seconds: Mapping[str, float]
    foreign: float | None


def peer_burst(peer: Peer, case: Case) -> Burst:
    """The case as the workers' operations spell it."""

    def burst(repeats: int) -> Sequence[float]:
        if case.sequences > 1:
            out = peer.call("concurrent", sequences=case.sequences, cached=case.cached, repeats=repeats)
        else:
            out = peer.call(
                "forward",
                rows=case.rows,
                cached=case.cached,
                repeats=repeats,
                every_row=case.every_row,
                grow=case.grow,
            )
        return [float(seconds) for seconds in out]

    return burst


def take_turns(
    sides: Mapping[str, Burst],
    pids: Sequence[int],
    *,
    rounds: int = 7,
    spare: int = 7,
    seconds: float = 0.6,
    quiet: float = 0.05,
    most: int = 24,
) -> list[Turn]:
    """`rounds` turns, each with one burst of about `seconds` per side (at most `most` repeats), the order reversed
    every other turn.

    While fewer than `rounds` turns were quiet (others used at most `quiet` of the machine), up to `spare` more are
    taken; the quietest are returned, in the order they were measured. Selection looks at the load alone, never at the
    times. pids: of all sides' processes. Raises ValidationError for fewer than one round."""
    if rounds < 1:
        raise ValidationError(f"rounds must be at least 1, got {rounds}.", param="rounds")
    repeats = {}
    for name, burst in sides.items():
        burst(1)  # caches, compiled kernels, pages
        repeats[name] = max(1, min(most, int(seconds / min(burst(2)))))
    turns: list[Turn] = []
    while len(turns) < rounds or (_quiet(turns, quiet) < rounds and len(turns) < rounds + spare):
        names = list(sides)[:: 1 if len(turns) % 2 == 0 else -1]
        taken = {}
        with Foreign(pids) as others:
            for name in names:
                time.sleep(PAUSE)
                taken[name] = median(sides[name](repeats[name]))
        turns.append(Turn(taken, others.share))
    kept = sorted(range(len(turns)), key=lambda i: turns[i].foreign or 0.0)[:rounds]
    return [turns[i] for i in sorted(kept)]


def _quiet(turns: Sequence[Turn], limit: float) -> int:
    return sum(turn.foreign is None or turn.foreign <= limit for turn in turns)
