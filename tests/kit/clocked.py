"""A stand-in for a loaded model that says what it is told to, token by token, under a clock of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dfastllm.core import Finish, FinishReason, StepEvent, Usage
from dfastllm.llm import resolve
from dfastllm.tasks import Sample
from dfastllm.text import Tokenizer


class Clocked:
    """now: what its clock shows, in seconds. The first token of an answer takes `first`, each other `gap`, and the
    first token of the first two answers `warm_up` more."""

    def __init__(self, first: float, gap: float, warm_up: float = 0.0) -> None:
        self.tokenizer = Tokenizer.load(resolve("demo-ar"))
        self.now, self.asked = 0.0, 0
        self.first, self.gap, self.warm_up = first, gap, warm_up
        self.answers: dict[str, str] = {}

    def answer(self, samples: Sequence[Sample], before: str = "") -> None:
        """Answer these samples rightly, after the words `before`."""
        for sample in samples:
            prompt = self.render(sample.messages, sample.tools or None)
            self.answers[self.tokenizer.decode(list(prompt))] = before + sample.response

    def render(self, messages: Any, tools: Any = None) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(self.tokenizer.apply_chat_template(messages, tools), add_special=False))

    def stream(self, prompt: Any, sampling: Any, decode: Any, **options: Any) -> Iterator[StepEvent]:
        self.asked += 1
        slow = self.warm_up if self.asked <= 2 else 0.0
        ids = self.tokenizer.encode(self.answers[self.tokenizer.decode(list(prompt))], add_special=False)
        for i, token in enumerate(ids):
            self.now += slow + self.first if i == 0 else self.gap
            yield StepEvent("r", (token,))
        usage = Usage(prompt_tokens=1, completion_tokens=len(ids), forwards=1, exactness="reference")
        yield StepEvent("r", finish=Finish(FinishReason.STOP, usage))
