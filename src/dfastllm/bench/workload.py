"""Answering samples of the task mix for a benchmark: totals, so that no speed is reported without its accuracy."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from dfastllm.core import DecodeParams, SamplingParams
from dfastllm.llm import LLM, Completion
from dfastllm.tasks import Sample, grade

__all__ = ["Outcome", "run"]


@dataclass(frozen=True)
class Outcome:
    """Totals over a set of samples. tokens: committed, EOS not counted. forwards: summed over requests (nfe)."""

    samples: int
    correct: int
    tokens: int
    forwards: int
    seconds: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.samples

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / self.forwards

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def run(
    llm: LLM, samples: Sequence[Sample], sampling: SamplingParams, decode: DecodeParams | None, *, together: bool = True
) -> tuple[Outcome, list[Completion]]:
    """Answer the samples, all in flight at once or one after the other, and grade them."""
    prompts = [llm.render(s.messages, s.tools or None) for s in samples]
    began = time.perf_counter()
    if together:
        outputs = llm.generate(prompts, sampling, decode)
    else:
        outputs = [llm.generate([prompt], sampling, decode)[0] for prompt in prompts]
    seconds = time.perf_counter() - began
    done = [output.outputs[0] for output in outputs]
    correct = sum(grade(sample, completion.text) for sample, completion in zip(samples, done, strict=True))
    return (
        Outcome(
            len(samples),
            correct,
            sum(c.usage.completion_tokens for c in done),
            sum(c.usage.forwards for c in done),
            seconds,
        ),
        done,
    )
