"""What is measured on: held-out samples of the task mix, graded, so that no speed is reported without its accuracy.

The samples of speed gates are such that every other request should call a tool, so that TTFA means something; the rest
are the other graded tasks.
"""

from __future__ import annotations

from collections.abc import Iterator

from dfastllm.tasks import MIXED, Sample, draw

__all__ = ["gradable", "speed_samples"]


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
