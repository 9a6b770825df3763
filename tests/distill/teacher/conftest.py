from __future__ import annotations

import pytest

from dfastllm.distill.teacher.clock import Clock
from dfastllm.text import Tokenizer
from tests.kit.served import TEMPLATE, byte_tokenizer

OPENED = TEMPLATE.replace("[assistant]", "{% if add_generation_prompt %}[assistant]{% endif %}")


class FakeTime:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.at = 1000.0
        self.slept: list[float] = []

    def now(self) -> float:
        return self.at

    def wall(self) -> float:
        return self.at + 1_700_000_000 - 1000

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.at += seconds

    @property
    def clock(self) -> Clock:
        return Clock(self.now, self.wall, self.sleep)


@pytest.fixture
def time() -> FakeTime:
    return FakeTime()


@pytest.fixture(scope="session")
def bytes_tokenizer() -> Tokenizer:
    """A token for each byte: every text is cut in one way only."""
    return byte_tokenizer(OPENED)
