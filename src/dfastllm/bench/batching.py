"""Continuous batching against one request at a time: the same requests, interleaved runs in one process, a ratio."""

from __future__ import annotations

from typing import Any

from dfastllm.bench.workload import run
from dfastllm.core import DecodeParams, SamplingParams
from dfastllm.llm import LLM
from dfastllm.metrics.records import spread
from dfastllm.metrics.workload import gradable

__all__ = ["batching_gain"]


def batching_gain(model: str, requests: int = 32, repeats: int = 3, max_tokens: int = 64) -> dict[str, Any]:
    """Throughput of `requests` sent at once over the throughput of the same sent one by one, and whether every answer
    was the same both ways."""
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
    with LLM(model) as llm:
        decode = DecodeParams(cache="dual", threshold=0.9) if llm.info.kind == "diffusion" else None
        samples = gradable(requests)
        run(llm, samples[:4], sampling, decode)  # warm-up
        ratios, together, alone, same = [], [], [], True
        for _ in range(repeats):
            batch, batch_answers = run(llm, samples, sampling, decode)
            single, single_answers = run(llm, samples, sampling, decode, together=False)
            same &= [a.token_ids for a in batch_answers] == [a.token_ids for a in single_answers]
            together.append(batch.tokens_per_second)
            alone.append(single.tokens_per_second)
            ratios.append(batch.tokens_per_second / single.tokens_per_second)
    return {
        "model": model,
        "requests": requests,
        "tokens": batch.tokens,
        "accuracy": batch.accuracy,
        "forwards": batch.forwards,
        "batched_tokens_per_s": spread(together),
        "one_at_a_time_tokens_per_s": spread(alone),
        "throughput_ratio": spread(ratios),
        "same_tokens": same,
    }
