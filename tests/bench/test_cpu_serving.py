"""Serving against vLLM: the checkpoint both servers read, the floor's arithmetic, a wave against a server of ours."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import transformers

from dfastllm.bench.cpu.ceilings import Ceilings
from dfastllm.bench.cpu.serving import Traffic, _measure, _Side, ensure_checkpoint, wave_floor
from dfastllm.bench.cpu.shapes import Shape
from dfastllm.bench.cpu.wire import PeerError
from dfastllm.core import SamplingParams
from dfastllm.llm import LLM, load_engine
from tests.kit.live import serving

QWEN = Shape("tiny-qwen", "qwen2", 64, 2, 4, 2, 96, 600, True, 1e4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_checkpoint(QWEN, tmp_path_factory.mktemp("cache"))


def test_the_checkpoint_is_the_same_model_for_transformers(checkpoint: Path) -> None:
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = list(range(300, 340))
    with torch.inference_mode():
        wanted = theirs.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
    with LLM(checkpoint, dtype="float32") as llm:
        [answer] = llm.generate([ids], SamplingParams(temperature=0.0, max_tokens=8))
    assert list(answer.outputs[0].token_ids) == wanted
    assert ensure_checkpoint(QWEN, checkpoint.parent.parent) == checkpoint  # not made again


def test_the_floor_by_hand() -> None:
    """Two requests of 8 and 3 tokens at 1 GB/s and 2 GFLOP/s."""
    ceilings, traffic = Ceilings(stream=1.0, f32=1.0, bf16=2.0, int8=9.0), Traffic(prompt=8, tokens=3, in_flight=2)
    body, head = QWEN.body, QWEN.vocab * QWEN.hidden
    prompts = 2 * body * 16 + 2 * head * 2 + 4 * 2 * 64 * 16 * 4
    later = 2 * body * 2 + 2 * head * 2 + 4 * 2 * 64 * 2 * 9
    size = 10**5
    wanted = max(prompts / 2e9, size / 1e9) + 2 * max(later / 2e9, size / 1e9)
    assert wave_floor(QWEN, traffic, ceilings, size) == pytest.approx(wanted)


def test_a_wave_is_answered_to_the_last_token_and_compared_turn_by_turn(checkpoint: Path) -> None:
    traffic = Traffic(prompt=5, tokens=4, in_flight=3, rounds=2, seconds=0.01)
    with serving({"m": load_engine(checkpoint, name="m")}) as live, asyncio.Runner() as runner:
        sides = {
            name: _Side(live.url, os.getpid(), "m", QWEN.vocab, traffic, Random(name)) for name in ("ours", "peer")
        }
        row = _measure(QWEN, "bf16", traffic, sides, runner, Ceilings(10.0, 10.0, 10.0, 10.0), 10**5)
        short = _Side(live.url, os.getpid(), "m", QWEN.vocab, Traffic(prompt=300, tokens=4000), Random(0))
        with pytest.raises(PeerError, match="wanted 4000"):
            short.wave(runner)
    assert len(sides["ours"].seen) % 3 == 0
    assert {answer.prompt_tokens for answer in sides["ours"].seen} == {5}
    assert row.ours_tok_s == pytest.approx(12 / row.ours_seconds.median)
    assert row.of_possible == pytest.approx(row.ratio.median / row.possible)
    assert 0 < row.ours_ttft < 1e3 * row.ours_seconds.median * 10
