"""Answering samples of the task mix for a benchmark: totals, so that no speed is reported without its accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dfastllm.core import DecodeParams, SamplingParams
from dfastllm.llm import LLM, Completion
from dfastllm.metrics.workload import complete
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
    done, seconds = complete(llm, samples, sampling, decode, together=together)
    correct = sum(grade(sample, completion.text) for sample, completion in zip(samples, done, strict=True))
    tokens = sum(completion.usage.completion_tokens for completion in done)
    forwards = sum(completion.usage.forwards for completion in done)
    return Outcome(len(samples), correct, tokens, forwards, seconds), done
