"""Batch invariance on real (small random) models: the same tokens and, in float32 on a CPU, the same bits of every
logprob, alone or beside any neighbours."""

from __future__ import annotations

from typing import Any

import pytest

from dfastllm.core import DecodeParams, Request, SamplingParams, StepEvent
from dfastllm.engine import Engine, EngineConfig
from dfastllm.models import tiny


def requests(kind: str, n: int = 12) -> list[Request]:
    out = []
    for i in range(n):
        sampling = SamplingParams(
            temperature=(0.0, 0.8, 1.3)[i % 3],
            seed=i,
            max_tokens=6 + 3 * i,
            logprobs=2,
            top_p=(1.0, 0.9)[i % 2],
            repetition_penalty=(1.0, 1.2)[i % 4 == 0],
            ignore_eos=i % 5 == 0,
        )
        decode = None
        if kind == "diffusion":
            decode = DecodeParams(
                cache=("none", "prefix", "dual", "windowed", "delayed", "none")[i % 6],
                block_length=(4, 8, 16)[i % 3],
                threshold=(None, 0.02)[i % 2],
                cfg_scale=(0.0, 1.5)[i % 6 == 5 or i == 6],
                logits_eos_inf=i % 5 == 2,
                confidence_eos_eot_inf=i % 7 == 3,
            )
        elif kind == "block":
            decode = DecodeParams(cache=(None, "sub_block")[i % 2], block_length=(4, 2)[i % 3 == 1])
        prompt = tuple((7 * i + 3 * j) % 90 + 1 for j in range(3 + 5 * i))
        out.append(Request(f"r{i}", prompt, sampling, decode))
    return out


def answers(engine: Engine) -> dict[str, Any]:
    events: dict[str, list[StepEvent]] = {}
    while engine.has_work:
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
    return {
        name: ([t for e in seen for t in e.token_ids], [p for e in seen for p in e.logprobs])
        for name, seen in events.items()
    }


@pytest.mark.parametrize("family", ["llama", "llada", "dream", "sdar"])
def test_same_bits_alone_and_together(family: str) -> None:
    model = tiny(family, seed=3)
    kind = model.info.kind
    config = EngineConfig(max_batch_rows=256, prefill_chunk=16, kv_tokens=2048)
    together = Engine(model, config=config)
    for request in requests(kind):
        together.add(request)
    batch = answers(together)
    compared = 0
    for request in requests(kind):
        alone = Engine(model, config=config)
        alone.add(request)
        tokens, logprobs = answers(alone)[request.request_id]
        assert batch[request.request_id] == (tokens, logprobs)
        compared += len(logprobs)
    assert compared > 100
