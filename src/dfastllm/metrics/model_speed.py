"""Speed metrics (of `metrics.speed` and `metrics.timelines`) of a model in this process.

Requests are sent one after the other: this is what one reader feels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dfastllm.core import DecodeParams, SamplingParams
from dfastllm.llm import LLM
from dfastllm.metrics.timelines import ToolTimeline, measure, record
from dfastllm.tasks import Sample

__all__ = ["measure_speed"]


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

    def ask(sample: Sample) -> tuple[ToolTimeline, Sequence[Mapping[str, Any]] | None]:
        prompt = llm.render(sample.messages, sample.tools or None)
        sent = clock()
        events = llm.stream(prompt, sampling, decode)
        timeline = record(
            events, sent=sent, clock=clock, tokenizer=llm.tokenizer, skip_special=sampling.skip_special_tokens
        )
        return timeline, sample.tools if sample.grader == "tool_call" else None

    return measure(ask, samples, warmups=warmups)
