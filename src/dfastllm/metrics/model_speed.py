"""Speed metrics (of `metrics.speed` and `metrics.timelines`) of a model in this process.

Requests are sent one after the other: this is what one reader feels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dfastllm.core import DecodeParams, SamplingParams
from dfastllm.errors import ValidationError
from dfastllm.llm import LLM
from dfastllm.metrics.gates import SpeedReport, make_report
from dfastllm.metrics.timelines import ToolTimeline, aggregate, measure, record
from dfastllm.metrics.workload import call_tokens, speed_samples
from dfastllm.tasks import Sample

__all__ = ["measure_speed", "speed_report", "speed_reports"]


Asked = tuple[ToolTimeline, Sequence[Mapping[str, Any]] | None]


def measure_speed(
    llm: LLM,
    samples: Sequence[Sample],
    sampling: SamplingParams | None = None,
    decode: DecodeParams | None = None,
    *,
    warmups: int = 2,
    clock: Callable[[], float] = time.monotonic,
) -> list[dict[str, float | None]]:
    """The figures of each sample, asked one after the other on a loaded model, after `warmups` unmeasured ones. A
    sample that should be answered by a tool call is held to its own tools' schemas."""
    return measure(_asking(llm, sampling, decode, clock), samples, warmups=warmups)


def _asking(
    llm: LLM, sampling: SamplingParams | None, decode: DecodeParams | None, clock: Callable[[], float]
) -> Callable[[Sample], Asked]:
    """What sends one sample and returns its timeline and the tools it should call one of."""
    sampling = sampling or SamplingParams(temperature=0.0, max_tokens=64)
    shown = call_tokens(llm.tokenizer)

    def ask(sample: Sample) -> Asked:
        prompt = llm.render(sample.messages, sample.tools or None)
        sent = clock()
        timeline = record(
            llm.stream(prompt, sampling, decode, shown=shown),
            sent=sent,
            clock=clock,
            tokenizer=llm.tokenizer,
            skip_special=sampling.skip_special_tokens,
            shown=shown,
        )
        return timeline, sample.tools if sample.grader == "tool_call" else None

    return ask


def speed_report(
    llm: LLM, n: int, *, max_tokens: int = 64, seed: int = 0, decode: DecodeParams | None = None
) -> SpeedReport:
    """The speed of a loaded model on n held-out samples of the task mix (`workload.speed_samples`), greedy, as the
    report that gates compare. Raises ValidationError for n < 1."""
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    rows = measure_speed(llm, speed_samples(n, seed), sampling, decode)
    return make_report(aggregate(rows), workload=_workload(llm, n, max_tokens, seed, decode))


def speed_reports(
    first: LLM,
    second: LLM,
    n: int,
    *,
    max_tokens: int = 64,
    seed: int = 0,
    decode: DecodeParams | None = None,
    rounds: int = 3,
    warmups: int = 2,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[SpeedReport, SpeedReport]:
    """`speed_report` of two loaded models, each asked all samples in a row, `rounds` times in turns; the figures of a
    sample are their medians, so that neither a slow moment nor a slow round is in them. Not request by request: a
    model that has waited while the other gave a long answer is woken some milliseconds late on many machines, and the
    one with the shorter answers would pay for the longer ones. Raises ValidationError for rounds < 1."""
    if rounds < 1:
        raise ValidationError(f"rounds must be at least 1, got {rounds}.", param="rounds")
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    samples = speed_samples(n, seed)
    asks = [_asking(llm, sampling, decode, clock) for llm in (first, second)]
    found: tuple[list[list[dict[str, float | None]]], ...] = ([[] for _ in samples], [[] for _ in samples])
    for turn in range(rounds):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            for sample in samples[:warmups]:
                asks[side](sample)
            for sample, kept in zip(samples, found[side], strict=True):
                timeline, tools = asks[side](sample)
                kept.append(timeline.metrics(tools))
    rows = [[_medians(kept) for kept in side] for side in found]
    before, after = (
        make_report(aggregate(figures), workload=_workload(llm, n, max_tokens, seed, decode))
        for llm, figures in zip((first, second), rows, strict=True)
    )
    return before, after


def _medians(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """The median of each figure over rows of one sample; None where any row has none."""
    out: dict[str, float | None] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        known = [value for value in values if value is not None]
        out[name] = statistics.median(known) if len(known) == len(values) else None
    return out


def _workload(llm: LLM, n: int, max_tokens: int, seed: int, decode: DecodeParams | None) -> dict[str, Any]:
    """The fingerprint of what was asked of a model."""
    asked: dict[str, Any] = {"name": "task mix", "requests": n, "max_tokens": max_tokens, "seed": seed}
    given = {name: str(getattr(decode, name)) for name in sorted(decode.given)} if decode is not None else {}
    return {**asked, "model": llm.info.name, **({"decode": given} if given else {})}
