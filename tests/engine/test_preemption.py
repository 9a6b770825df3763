"""A request that loses its pages gives the same answer: on the native runner log probabilities too, to the bit."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from dfastllm.core import DecodeParams, Request, SamplingParams
from dfastllm.engine import Engine, EngineConfig
from dfastllm.kernels.extension import native
from dfastllm.llm import load_engine

PROMPT = "Henry ordered 3 of the tunnel at 77 dollars each.\nGive customer, item as JSON."
# Not here: block diffusion that guesses its next steps (rule free_dave). A block's first step may have run beside the
# last of the block before it, and after a preemption it runs alone: the tokens are the same, the last bits need not be.
CASES: tuple[tuple[str, dict[str, Any] | None], ...] = (
    ("demo-ar", None),
    ("demo-block", {}),
    ("demo-block", {"factor": 1.5}),
    ("demo-block", {"threshold": 0.8}),
    ("demo-block", {"rule": "schedule", "steps": 24, "block_length": 2}),
    ("demo-block", {"cache": "sub_block", "block_length": 2}),
    ("demo-diffusion", {"cache": "none"}),
    ("demo-diffusion", {"cache": "none", "rule": "free_dave"}),
    ("demo-diffusion", {"cache": "windowed", "block_length": 8}),
    ("demo-diffusion", {"cache": "prefix", "block_length": 8}),
    ("demo-diffusion", {"cache": "dual", "block_length": 8}),
    ("demo-diffusion", {"cache": "delayed", "block_length": 8}),
)


@functools.cache
def engine(model: str) -> Engine:
    return load_engine(model, config=EngineConfig(kv_tokens=512, max_sequences=4, prefill_chunk=16))


def answer(loaded: Engine, decode: dict[str, Any] | None, preempt: int | None) -> tuple[list[int], list[float], int]:
    """Token ids, their log probabilities, and engine steps; the pages are taken after `preempt` steps."""
    assert loaded.tokenizer is not None
    options = None if decode is None else DecodeParams(**decode)
    sampling = SamplingParams(temperature=0, max_tokens=24, logprobs=0, seed=1, ignore_eos=True)
    loaded.add(Request("r", tuple(loaded.tokenizer.encode(PROMPT)), sampling, options))
    ids: list[int] = []
    logprobs: list[float] = []
    steps = 0
    while loaded.has_work:
        for event in loaded.step():
            ids += event.token_ids
            logprobs += [token.logprob for token in event.logprobs]
        steps += 1
        live = loaded.scheduler.find("r")
        if steps == preempt and live is not None and live.held:
            loaded.scheduler._preempt(live)
    return ids, logprobs, steps


@pytest.mark.skipif(native() is None, reason="the torch runner promises tokens only")
@pytest.mark.parametrize(("model", "decode"), CASES, ids=lambda value: str(value))
def test_a_preemption_at_any_step_changes_no_bit(model: str, decode: dict[str, Any] | None) -> None:
    loaded = engine(model)
    ids, logprobs, steps = answer(loaded, decode, None)
    assert len(ids) == len(logprobs) == 24
    before = loaded.scheduler.preempted
    for preempt in range(1, steps):
        assert answer(loaded, decode, preempt)[:2] == (ids, logprobs), f"preempted after step {preempt} of {steps}"
    assert loaded.scheduler.preempted >= before + steps - 3  # in its last steps it may have no pages left to take
