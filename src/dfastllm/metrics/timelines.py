"""What a measurement keeps of each request, and the percentiles that gates hold: beside the definitions of
`metrics.speed` these:

- TTFA: index (from 1) and time of the first token at which the text so far holds a complete tool call that fits its
  tool's schema; infinite when there is none.
- TTFA excess: how many of those tokens the call did not need: TTFA less the tokens of the same call written alone and
  as short as its form allows. What came before the call and spaces inside its arguments count; how long the
  tool's name and the values are does not. 0 for an answer that is nothing but a call.

Knows no server: who calls says what the clock shows.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from dfastllm.core import StepEvent
from dfastllm.metrics.speed import Arrival, CallPart, Timeline, percentiles
from dfastllm.metrics.tool_schemas import CallFinder, ToolSchemas, argument_writings
from dfastllm.text import Detokenizer, Tokenizer, ToolCall

__all__ = ["FirstCall", "ToolTimeline", "aggregate", "measure", "record"]

Tools = Sequence[Mapping[str, Any]] | ToolSchemas
PERCENTILES: Mapping[str, tuple[int, ...]] = {
    "ttft_ms": (50, 90, 95),
    "tps": (50, 90, 95, 5),  # of a speed the low end is the slow tail
    "ttfa_tokens": (50, 95),
    "ttfa_excess_tokens": (50, 95),
    "ttfa_ms": (50, 95),
}


class FirstCall(NamedTuple):
    """When the first complete call was there.

    tokens   of the answer up to it.
    seconds  after the request was sent.
    excess   tokens that it did not need.
    """

    tokens: float
    seconds: float
    excess: float


NEVER = FirstCall(math.inf, math.inf, math.inf)


@dataclass(frozen=True)
class ToolTimeline(Timeline):
    """A Timeline that also tells when a tool call was complete.

    count  tokens of a text under the model's tokenizer, where that is at hand.
    """

    count: Callable[[str], int] | None = field(default=None, compare=False, repr=False)

    def ttfa(self, tools: Tools | None = None) -> tuple[float, float]:
        """(tokens, seconds) to the first complete call, see `first_call`."""
        found = self.first_call(tools)
        return found.tokens, found.seconds

    def first_call(self, tools: Tools | None = None) -> FirstCall:
        """The first complete call, all of it infinite without one. tools None: any well-formed call.

        Where arrivals do not tell their tokens the index is estimated from the share of the answer's characters that
        had come, rounded up; without `count` the tokens of the call alone are estimated from its share of them."""
        finder, parts, said = CallFinder(tools), _Calls(), 0
        for arrival in self.arrivals:
            said += _size(arrival)
            if finder.push(arrival.text) is not None:
                writings = finder.writings()
            else:
                found = next((call for call in parts.push(arrival.calls) if finder.fits(call)), None)
                if found is None:
                    continue
                writings = tuple(found.name + written for written in argument_writings(found.arguments))
            tokens = self._tokens_with(arrival)
            return FirstCall(tokens, arrival.at, self._excess(tokens, said, writings))
        return NEVER

    def _excess(self, tokens: float, characters: int, writings: Sequence[str]) -> float:
        """Of `tokens`, which spell so many characters, those beyond the shortest of the writings."""
        if math.isinf(tokens):
            return math.inf
        if self.count is not None:
            return max(0.0, tokens - min(map(self.count, writings)))
        return max(0.0, tokens * (1 - min(map(len, writings)) / characters))

    def tokens_by(self, at: float) -> float:
        """Tokens that had come by a moment; estimated as in `ttfa`."""
        came = [arrival for arrival in self.arrivals if arrival.at <= at]
        return self._tokens_with(came[-1]) if came else 0.0

    def _tokens_with(self, last: Arrival) -> float:
        """Tokens up to and including an arrival; inf when nothing tells."""
        came = self.arrivals[: next(i for i, arrival in enumerate(self.arrivals) if arrival is last) + 1]
        counts = [arrival.tokens for arrival in self.arrivals]
        if None not in counts:
            return float(sum(arrival.tokens or 0 for arrival in came))
        whole = sum(map(_size, self.arrivals))
        if self.n is None or not whole:
            return math.inf
        return float(math.ceil(self.n * sum(map(_size, came)) / whole))

    def metrics(self, tools: Tools | None = None) -> dict[str, float | None]:
        """The figures that `aggregate` takes. tools: those the request should call one of; None: it should not, and its
        ttfa_* are None."""
        first = self.first_call(tools) if tools is not None else None
        return {
            "ttft_ms": 1e3 * self.ttft,
            "tps": self.tps,
            "ttfa_tokens": None if first is None else first.tokens,
            "ttfa_excess_tokens": None if first is None else first.excess,
            "ttfa_ms": None if first is None else 1e3 * first.seconds,
        }


class _Calls:
    """Calls put together from their streamed parts."""

    def __init__(self) -> None:
        self._parts: dict[int, CallPart] = {}

    def push(self, parts: Sequence[CallPart]) -> list[ToolCall]:
        """The calls among those these parts touch whose arguments are a complete JSON object by now."""
        for part in parts:
            had = self._parts.get(part.index, CallPart(part.index))
            joined = CallPart(part.index, had.name or part.name, had.arguments + part.arguments)
            self._parts[part.index] = joined
        touched = [self._parts[index] for index in dict.fromkeys(part.index for part in parts)]
        return [ToolCall(p.name, p.arguments) for p in touched if p.name and _is_object(p.arguments)]


def _is_object(text: str) -> bool:
    if not text.rstrip().endswith("}"):
        return False
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _size(arrival: Arrival) -> int:
    return len(arrival.text) + sum(len(part.name) + len(part.arguments) for part in arrival.calls)


def record(
    events: Iterable[StepEvent],
    *,
    sent: float,
    clock: Callable[[], float] = time.monotonic,
    tokenizer: Tokenizer | None = None,
    skip_special: bool = True,
    shown: Collection[int] = (),
) -> ToolTimeline:
    """The timeline of one request of our own engine, from its events as they come. sent: what `clock` showed when it
    was submitted. With a tokenizer the text is known token by token, so that TTFA's index is exact inside a block.
    skip_special, shown: which special tokens the text leaves out, see `text.Detokenizer`."""
    arrivals: list[Arrival] = []
    blocks: list[float] = []
    decoder = count = None
    if tokenizer is not None:
        decoder = Detokenizer(tokenizer, skip_special=skip_special, shown=shown)
        count = partial(_tokens_of, tokenizer)
    began, end = 0.0, 0.0
    for event in events:
        at = clock() - sent
        if decoder is not None:
            arrivals += [Arrival(at, 1, decoder.push([token])) for token in event.token_ids]
        elif event.token_ids or event.text:
            arrivals.append(Arrival(at, len(event.token_ids), event.text))
        if event.canvas is not None and event.canvas.block_done:
            blocks.append(at)
        if event.finish is not None:
            began, end = event.finish.usage.queue_s, at
    if decoder is not None and (rest := decoder.flush()):
        arrivals.append(Arrival(end, 0, rest))
    return ToolTimeline(tuple(arrivals), end, began=began, blocks=tuple(blocks), count=count)


def _tokens_of(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text))


def measure(
    ask: Callable[[Any], tuple[ToolTimeline, Tools | None]], requests: Sequence[Any], *, warmups: int = 2
) -> list[dict[str, float | None]]:
    """The figures of each request, asked one after the other, after `warmups` unmeasured ones (the first requests over
    again). `ask` sends one and returns its timeline and the tools it should call one of."""
    for i in range(warmups if requests else 0):
        ask(requests[i % len(requests)])
    return [timeline.metrics(tools) for timeline, tools in map(ask, requests)]


def aggregate(metrics: Iterable[Mapping[str, float | None]]) -> dict[str, Any]:
    """Percentiles over requests: ttft_ms {p50, p90, p95}, tps {p50, p90, p95, p05}, ttfa_tokens and ttfa_ms {p50, p95},
    ttfa_excess_tokens {p50, p95} where a request tells its own, ttfa_hit_rate, n.

    Percentiles are linear over the finite values; inf when there are values and none is finite, 0 when there are none.
    ttfa_hit_rate: the share of the requests that should call a tool (ttfa_tokens is there and not None) which did; None
    when no request should."""
    rows = list(metrics)
    out: dict[str, Any] = {}
    for name, wanted in PERCENTILES.items():
        values = [value for row in rows if (value := row.get(name)) is not None]
        if values or name != "ttfa_excess_tokens":
            out[name] = percentiles(values, wanted)
    asked = [value for row in rows if (value := row.get("ttfa_tokens")) is not None]
    out["ttfa_hit_rate"] = sum(map(math.isfinite, asked)) / len(asked) if asked else None if rows else 0.0
    out["n"] = len(rows)
    return out
