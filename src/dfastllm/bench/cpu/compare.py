"""One row of a record: our times, the peer's, their ratio beside the aim, and what the forward reads and computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dfastllm.bench.cpu.cases import Case, aim_for
from dfastllm.bench.cpu.ours import Ours
from dfastllm.bench.cpu.shapes import Shape
from dfastllm.bench.cpu.turns import Burst, Turn, take_turns
from dfastllm.metrics.stats import Ratio, Summary, paired_ratio, summarise

__all__ = ["Contest", "Done", "Pace", "Row", "finished", "verdict"]

Done = frozenset[tuple[str, str, str, str, str]]  # shape, peer, format, our format, case


@dataclass(frozen=True, slots=True)
class Pace:
    """How long to measure: see `take_turns`."""

    rounds: int = 7
    spare: int = 7
    seconds: float = 0.6


@dataclass(frozen=True, slots=True)
class Row:
    """seconds: of one forward of `tokens` tokens. ratio: how many times faster we are, turn by turn; made: the same
    when we too write every logit of every wanted row to memory. flops: of the forward; streamed: weight bytes it reads.
    foreign: what other processes used of the machine, median and most over the turns."""

    shape: str
    peer: str
    format: str
    ours: str
    case: str
    tokens: int
    ours_seconds: Summary
    peer_seconds: Summary
    ratio: Ratio
    made_seconds: Summary
    made_ratio: Ratio
    aim: float | None
    verdict: str
    flops: int
    ours_streamed: int
    peer_streamed: int
    foreign: float | None
    foreign_most: float | None


def verdict(ratio: Ratio, aim: float | None) -> str:
    """met or missed by the median; "?" after it when this run does not decide: the interval holds the aim, or fewer
    than five turns make no interval."""
    if aim is None:
        return ""
    word = "met" if ratio.median >= aim else "missed"
    decided = ratio.n >= 5 and (ratio.low >= aim or ratio.high < aim)
    return word if decided else word + "?"


@dataclass(frozen=True)
class Contest:
    """One file or IR of a peer against one model of ours. Bytes: of weights, as stored, on each side."""

    shape: Shape
    peer: str
    format: str
    ours_format: str
    ours_bytes: int
    peer_bytes: int
    pace: Pace

    def run(self, case: Case, ours: Ours, burst: Burst, pids: Sequence[int]) -> Row:
        """Measure one case in turns. pids: of the processes that serve `burst`."""
        sides = {
            "ours": lambda n: ours.measure(case, n),
            "peer": burst,
            "made": lambda n: ours.measure(case, n, "logits"),
        }
        pace = self.pace
        turns = take_turns(sides, (*ours.pids, *pids), rounds=pace.rounds, spare=pace.spare, seconds=pace.seconds)
        return self.row(case, turns)

    def row(self, case: Case, turns: Sequence[Turn]) -> Row:
        """The turns' sides are ours, peer and made."""
        ours, peer, made = ([turn.seconds[side] for turn in turns] for side in ("ours", "peer", "made"))
        ratio = paired_ratio(peer, ours)
        aim = aim_for(self.peer, self.format, case.name, mixture=self.shape.experts > 0)
        shares = [turn.foreign for turn in turns if turn.foreign is not None]
        return Row(
            shape=self.shape.name,
            peer=self.peer,
            format=self.format,
            ours=self.ours_format,
            case=case.name,
            tokens=case.tokens,
            ours_seconds=summarise(ours),
            peer_seconds=summarise(peer),
            ratio=ratio,
            made_seconds=summarise(made),
            made_ratio=paired_ratio(peer, made),
            aim=aim,
            verdict=verdict(ratio, aim),
            flops=self.shape.flops(case.tokens, case.head_rows, round(case.keys)),
            ours_streamed=self.shape.streamed(self.ours_bytes, case.tokens),
            peer_streamed=self.shape.streamed(self.peer_bytes, case.tokens),
            foreign=summarise(shares).median if shares else None,
            foreign_most=max(shares) if shares else None,
        )


def finished(rows: Sequence[Mapping[str, Any]]) -> Done:
    """What the rows of an earlier run hold already."""
    return frozenset((row["shape"], row["peer"], row["format"], row["ours"], row["case"]) for row in rows)
