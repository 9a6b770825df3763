"""What speed means here: when each part of an answer arrived, and the figures that follow from it.

A `Timeline` is the record of one request, made from our own engine's events or by any client of any server.
All times are seconds after the request was sent. The definitions:

- TTFT: to the first output token, prefill included; for a canvas, to its first settled token or block.
- TPS: (n - 1) / (t_last - t_first) over the n output tokens; infinite when all came at once.
- ITL: the gap between tokens; tokens that arrive together share the gap. TPOT: (end - TTFT) / (n - 1).
- time per block: from one finished block to the next, the first from the first forward pass (prompt included).

Measures nothing by itself and knows no server: who calls says what the clock shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

__all__ = ["Arrival", "CallPart", "Timeline", "percentiles"]


@dataclass(frozen=True, slots=True)
class CallPart:
    """A piece of a tool call as OpenAI streams it (`delta.tool_calls[i]`): the pieces of one `index` belong together,
    `name` comes with the first and `arguments` are joined."""

    index: int
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Arrival:
    """What came at one moment. tokens None: the server does not say how many; 0: text only (held back before)."""

    at: float
    tokens: int | None = 1
    text: str = ""
    calls: tuple[CallPart, ...] = ()


@dataclass(frozen=True)
class Timeline:
    """One request that ended well.

    arrivals  in order of time. Ones that carry neither tokens nor text nor calls are ignored.
    end       when the answer was complete.
    tokens    of the whole answer, where arrivals do not tell their own (`usage.completion_tokens`).
    began     first forward pass, where it is known (it is not over HTTP: then the request's sending).
    blocks    when each block was finished (canvas models).
    """

    arrivals: Sequence[Arrival]
    end: float
    tokens: int | None = None
    began: float = 0.0
    blocks: Sequence[float] = field(default_factory=tuple)

    @property
    def n(self) -> int | None:
        """Output tokens; None when nothing tells."""
        if self.tokens is not None:
            return self.tokens
        counts = [arrival.tokens for arrival in self.arrivals]
        return None if None in counts else sum(count for count in counts if count is not None)

    @property
    def moments(self) -> list[tuple[float, int | None]]:
        """(time, tokens) of every moment at which output came; arrivals of one moment are one."""
        found: list[tuple[float, int | None]] = []
        for arrival in self.arrivals:
            if not (arrival.tokens or (arrival.tokens is None and (arrival.text or arrival.calls))):
                continue
            if found and found[-1][0] == arrival.at:
                before = found.pop()[1]
                joined = None if before is None or arrival.tokens is None else before + arrival.tokens
                found.append((arrival.at, joined))
            else:
                found.append((arrival.at, arrival.tokens))
        return found

    @property
    def ttft(self) -> float:
        """inf for an answer without output."""
        moments = self.moments
        return moments[0][0] if moments else math.inf

    @property
    def tps(self) -> float | None:
        """None when the tokens are not known or there is none."""
        moments, n = self.moments, self.n
        if not moments or not n:
            return None
        took = moments[-1][0] - moments[0][0]
        return (n - 1) / took if took > 0 else math.inf

    @property
    def tpot(self) -> float | None:
        """Seconds; None below two tokens."""
        n, ttft = self.n, self.ttft
        return (self.end - ttft) / (n - 1) if n is not None and n > 1 and math.isfinite(ttft) else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between moments of output (inter-chunk latency)."""
        return [after[0] - before[0] for before, after in pairwise(self.moments)]

    @property
    def itl(self) -> list[float]:
        """Seconds between tokens; [] where an arrival does not tell its tokens."""
        moments = self.moments
        known = [(at, count) for at, count in moments if count is not None]
        if len(known) < len(moments):
            return []
        return [(b - a) / count for (a, _), (b, count) in pairwise(known) for _ in range(count)]

    @property
    def block_seconds(self) -> list[float]:
        return [after - before for before, after in pairwise((self.began, *self.blocks))]


def percentiles(values: Sequence[float], wanted: Sequence[int] = (50, 90, 95, 99)) -> dict[str, float]:
    """{"p50": ...}: linear percentiles over the finite values; inf if there is none among them, 0 for no values."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return {f"p{q:02d}": math.inf if values else 0.0 for q in wanted}
    found = np.percentile(np.asarray(finite, dtype=np.float64), wanted)
    return {f"p{q:02d}": float(value) for q, value in zip(wanted, found, strict=True)}
