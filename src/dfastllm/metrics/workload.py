"""What is measured on: held-out samples of the task mix, graded, so that no speed is reported without its accuracy.

The samples of speed gates are such that every other request should call a tool, so that TTFA means something; the rest
are the other graded tasks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from dfastllm.core import DecodeParams, SamplingParams
from dfastllm.llm import LLM, Completion
from dfastllm.tasks import MIXED, Sample, draw
from dfastllm.text import Tokenizer, taught

__all__ = ["call_tokens", "complete", "gradable", "speed_samples"]


def gradable(n: int, seed: int = 0) -> list[Sample]:
    """n samples of the test split that have a grader, every gradable task of the default mix equally often."""
    names = [name for name in MIXED if draw("test", seed, 0, name).grader is not None]
    return [draw("test", seed, i // len(names), names[i % len(names)]) for i in range(n)]


def speed_samples(n: int, seed: int = 0) -> list[Sample]:
    """n held-out samples, every other one to be answered by a tool call."""
    calls = _tool_calls(seed)
    others = iter([s for s in gradable(2 * n, seed) if not s.tools])
    return [next(calls) if i % 2 == 0 else next(others) for i in range(n)]


def _tool_calls(seed: int) -> Iterator[Sample]:
    index = 0
    while True:
        sample = draw("test", seed, index, "tools")
        index += 1
        if sample.grader == "tool_call":
            yield sample


def call_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Special tokens that the tool calls of this tokenizer's models are made of, which must stay in an answer's text
    for a call to be found in it."""
    return taught(tokenizer.templates).shown_ids(tokenizer)


def complete(
    llm: LLM,
    samples: Sequence[Sample],
    sampling: SamplingParams,
    decode: DecodeParams | None = None,
    *,
    together: bool = True,
) -> tuple[list[Completion], float]:
    """The model's answers to the samples, in order, all in flight at once or one after the other, and the seconds that
    took. Raises what `LLM.generate` raises."""
    prompts = [llm.render(sample.messages, sample.tools or None) for sample in samples]
    shown = call_tokens(llm.tokenizer)
    began = time.perf_counter()
    if together:
        outputs = llm.generate(prompts, sampling, decode, shown=shown)
    else:
        outputs = [llm.generate([prompt], sampling, decode, shown=shown)[0] for prompt in prompts]
    seconds = time.perf_counter() - began
    return [output.outputs[0] for output in outputs], seconds
