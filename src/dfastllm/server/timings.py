"""When the parts of one engine request's answer came: for the metrics of every request, and in the response on request.

A tool call counts here as soon as it is complete and names one of the request's tools. Its arguments are not held
against the tool's schema: a server runs no schema, with its regular expressions, that a stranger sent (`bench` does).
"""

from __future__ import annotations

import math

from dfastllm.core import Request, StepEvent
from dfastllm.metrics import Metrics
from dfastllm.metrics.speed import Arrival, Timeline, percentiles
from dfastllm.server.replies import Percentiles, Timings
from dfastllm.text import CallReading, ToolCall

__all__ = ["RequestTimings"]


class RequestTimings:
    """Follows one request. calls: how its answer's calls are read, None for a request without tools. Times are on
    time.monotonic(), as its arrival."""

    def __init__(self, request: Request, calls: CallReading | None = None) -> None:
        self._sent = request.arrival
        self._calls = calls
        self._parser = calls.parser() if calls is not None else None
        self._arrivals: list[Arrival] = []
        self._blocks: list[float] = []
        self.tokens = 0  # so far
        self.timeline: Timeline | None = None
        self.first_call: tuple[int, float] | None = None  # tokens so far, seconds

    def see(self, event: StepEvent, now: float) -> None:
        at = now - self._sent
        if event.token_ids:
            self.tokens += len(event.token_ids)
            self._arrivals.append(Arrival(at, len(event.token_ids)))
        if self._calls is not None and self._parser is not None and self.first_call is None:
            pieces = self._parser.push(event.text)
            if event.finish is not None:
                pieces += self._parser.flush()
            if any(isinstance(piece, ToolCall) and self._calls.fits(piece) for piece in pieces):
                self.first_call = (self.tokens, at)
        if event.canvas is not None and event.canvas.block_done:
            self._blocks.append(at)
        if event.finish is not None:
            self.timeline = Timeline(self._arrivals, at, began=event.finish.usage.queue_s, blocks=self._blocks)

    def report(self, metrics: Metrics, model: str) -> None:
        """Tell the metrics, once the request has ended."""
        if self.timeline is not None:
            metrics.blocks(model, self.timeline.block_seconds)
        if self.first_call is not None:
            metrics.tool_call(model, *self.first_call)

    def out(self) -> Timings:
        """As the response says it; the request has ended."""
        assert self.timeline is not None
        gaps, speed = self.timeline.itl, self.timeline.tps
        tokens, seconds = self.first_call or (None, None)
        return Timings(
            tokens_per_second=speed if speed is not None and math.isfinite(speed) else None,
            time_per_output_token_seconds=self.timeline.tpot,
            inter_token_seconds=Percentiles(**percentiles(gaps)) if gaps else None,
            block_seconds=self.timeline.block_seconds,
            first_tool_call_tokens=tokens,
            first_tool_call_seconds=seconds,
        )
