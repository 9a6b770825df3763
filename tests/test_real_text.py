"""A real model on real text, where it is on this machine: it talks, alone as beside others, and predicts text as well
as the records say."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from dfastllm.core import SamplingParams
from dfastllm.llm import LLM
from tests.kit.real import require_real

QUESTIONS = ("What is the capital of France?", "Name a colour of the rainbow.", "Say hello in one word.")
GREEDY = SamplingParams(temperature=0, max_tokens=12)
TEXT = (
    "The sun is a star. It is the centre of our solar system, and the planets travel around it. The Earth takes one "
    "year to go around the sun, and the moon takes about a month to go around the Earth."
)


@pytest.fixture(scope="module")
def real() -> Iterator[LLM]:
    with LLM(str(require_real())) as llm:
        yield llm


def test_it_answers_alone_as_beside_others(real: LLM) -> None:
    talks = [[{"role": "user", "content": question}] for question in QUESTIONS]
    together = real.chat(talks, GREEDY)
    assert "Paris" in together[0].text
    alone = real.chat(talks[0], GREEDY)[0]
    assert alone.outputs[0].token_ids == together[0].outputs[0].token_ids


def test_it_predicts_text(real: LLM) -> None:
    """Each next token of the text among what the model holds likely: perplexity by the logprobs of what it would say.
    Uniform guessing would have 49,152."""
    ids = real.encode(TEXT)
    found = real.generate(
        [ids[:at] for at in range(8, len(ids))], SamplingParams(temperature=0, max_tokens=1, logprobs=5)
    )
    hits = [
        dict(one.outputs[0].logprobs[0].top).get(ids[at], -math.inf)
        for at, one in zip(range(8, len(ids)), found, strict=True)
    ]
    assert sum(hit > -math.inf for hit in hits) / len(hits) > 0.7
