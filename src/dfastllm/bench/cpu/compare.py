"""One row of a record: our times, the peer's, their ratio beside the aim, and both beside the machine's ceilings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dfastllm.bench.cpu.cases import Case, aim_for
from dfastllm.bench.cpu.ceilings import Ceilings, floor_seconds
from dfastllm.bench.cpu.ours import Ours
from dfastllm.bench.cpu.shapes import Shape
from dfastllm.bench.cpu.stats import Ratio, Summary, paired_ratio, summarise
from dfastllm.bench.cpu.turns import Burst, Turn, take_turns

__all__ = ["Contest", "Row", "verdict"]


@dataclass(frozen=True, slots=True)
class Row:
    """seconds: of one forward. ratio: how many times faster we are, turn by turn; made: the same when we too write every
    logit of every wanted row to memory. floor: the least seconds a forward of our weights can take here, and bound what
    sets it; reached: floor over our median. foreign: what other processes used of the machine, median over turns."""

    shape: str
    peer: str
    format: str
    ours: str
    case: str
    ours_seconds: Summary
    peer_seconds: Summary
    ratio: Ratio
    made_seconds: Summary
    made_ratio: Ratio
    aim: float | None
    verdict: str
    ours_tokens_per_s: float
    peer_tokens_per_s: float
    ours_gb_per_s: float
    peer_gb_per_s: float
    ours_gflop_per_s: float
    peer_gflop_per_s: float
    floor_seconds: float
    bound: str
    reached: float
    foreign: float | None


def verdict(ratio: Ratio, aim: float | None) -> str:
    """met or missed by the median; "?" after it when the interval holds the aim, so that this run does not decide."""
    if aim is None:
        return ""
    word = "met" if ratio.median >= aim else "missed"
    return word if ratio.low >= aim or ratio.high < aim else word + "?"


@dataclass(frozen=True)
class Contest:
    """One file or IR of a peer against one model of ours. Bytes: of weights, as stored, on each side."""

    shape: Shape
    peer: str
    format: str
    ours_format: str
    ours_bytes: int
    peer_bytes: int
    ceilings: Ceilings
    rounds: int = 7
    spare: int = 7
    seconds: float = 0.6

    def run(self, case: Case, ours: Ours, burst: Burst, pids: Sequence[int]) -> Row:
        """Measure one case in turns."""
        turns = take_turns(
            {
                "ours": lambda n: ours.measure(case, n),
                "peer": burst,
                "made": lambda n: ours.measure(case, n, "logits"),
            },
            (*ours.pids, *pids),
            rounds=self.rounds,
            spare=self.spare,
            seconds=self.seconds,
        )
        return self.row(case, turns)

    def row(self, case: Case, turns: Sequence[Turn]) -> Row:
        ours, peer, made = ([turn.seconds[side] for turn in turns] for side in ("ours", "peer", "made"))
        mine, theirs = summarise(ours), summarise(peer)
        ratio = paired_ratio(peer, ours)
        aim = aim_for(self.peer, self.format, case.name)
        flops = self.shape.flops(case.tokens, case.head_rows, round(case.keys))
        our_bytes, their_bytes = (self.shape.streamed(n) for n in (self.ours_bytes, self.peer_bytes))
        floor, bound = floor_seconds(self.ceilings, our_bytes, flops)
        shares = [turn.foreign for turn in turns if turn.foreign is not None]
        return Row(
            shape=self.shape.name,
            peer=self.peer,
            format=self.format,
            ours=self.ours_format,
            case=case.name,
            ours_seconds=mine,
            peer_seconds=theirs,
            ratio=ratio,
            made_seconds=summarise(made),
            made_ratio=paired_ratio(peer, made),
            aim=aim,
            verdict=verdict(ratio, aim),
            ours_tokens_per_s=case.tokens / mine.median,
            peer_tokens_per_s=case.tokens / theirs.median,
            ours_gb_per_s=our_bytes / mine.median / 1e9,
            peer_gb_per_s=their_bytes / theirs.median / 1e9,
            ours_gflop_per_s=flops / mine.median / 1e9,
            peer_gflop_per_s=flops / theirs.median / 1e9,
            floor_seconds=floor,
            bound=bound,
            reached=floor / mine.median,
            foreign=summarise(shares).median if shares else None,
        )


def finished(rows: Sequence[dict[str, Any]]) -> set[tuple[str, str, str, str]]:
    """What a record that was begun before holds already: (shape, peer, format, case)."""
    return {(row["shape"], row["peer"], row["format"], row["case"]) for row in rows}


def pending(
    cases: Sequence[Case], done: set[tuple[str, str, str, str]], shape: str, peer: str, form: str
) -> Iterator[Case]:
    """Cases of this contest that are not in `done`."""
    return (case for case in cases if (shape, peer, form, case.name) not in done)
