"""Speed metrics (of `metrics.speed` and `metrics.timelines`) of a model in this process.

Requests are sent one after the other: this is what one reader feels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dfastllm.core import DecodeParams, SamplingParams
from dfastllm.llm import LLM
from dfastllm.metrics.gates import SpeedReport, make_report
from dfastllm.metrics.timelines import ToolTimeline, aggregate, measure, record
from dfastllm.metrics.workload import call_tokens, speed_samples
from dfastllm.tasks import Sample

__all__ = ["measure_speed", "speed_report"]


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
    sampling = sampling or SamplingParams(temperature=0.0, max_tokens=64)
    shown = call_tokens(llm.tokenizer)

    def ask(sample: Sample) -> tuple[ToolTimeline, Sequence[Mapping[str, Any]] | None]:
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

    return measure(ask, samples, warmups=warmups)


def speed_report(
    llm: LLM, n: int, *, max_tokens: int = 64, seed: int = 0, decode: DecodeParams | None = None
) -> SpeedReport:
    """The speed of a loaded model on n held-out samples of the task mix (`workload.speed_samples`), greedy, as the
    report that gates compare. Raises ValidationError for n < 1."""
    samples = speed_samples(n, seed)
    rows = measure_speed(llm, samples, SamplingParams(temperature=0.0, max_tokens=max_tokens), decode)
    workload = {"name": "task mix", "requests": n, "max_tokens": max_tokens, "seed": seed, "model": llm.info.name}
    if decode is not None:
        workload["decode"] = {name: str(getattr(decode, name)) for name in sorted(decode.given)}
    return make_report(aggregate(rows), workload=workload)
