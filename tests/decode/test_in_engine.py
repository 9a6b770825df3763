"""Every rule x cache in the real engine (pages, packed batches, preemption) gives what the plain driver gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dfastllm.core import DecodeParams, Request, StepStats
from dfastllm.decode.registry import CACHES, POLICIES, RULES
from dfastllm.engine import Engine, EngineConfig
from dfastllm.errors import UnsupportedError
from dfastllm.models import tiny
from tests.kit.driver import request, run

torch.set_num_threads(1)


def requests(model: Any) -> list[Request]:
    """One request per rule and cache that the model can serve, all different in prompt, temperature and seed."""
    policy = POLICIES[model.info.kind]
    full = model.info.kind == "diffusion"
    out: list[Request] = []
    for rule in RULES:
        for cache in CACHES if full else (None, "sub_block") if rule in ("schedule", "threshold", "wino") else (None,):
            i = len(out)
            decode = DecodeParams(rule=rule, cache=cache, block_length=6 if full else 4)  # type: ignore[arg-type]
            options: dict[str, Any] = {"temperature": 0.5 * (i % 3), "seed": i, "ignore_eos": bool(i % 2)}
            r = request(range(3, 5 + i % 9), name=f"{rule}-{cache}", max_tokens=8, decode=decode, **options)
            try:
                policy.compile(r, model.info)
            except UnsupportedError:
                continue
            out.append(r)
    if full:
        guided = DecodeParams(cfg_scale=0.8, block_length=6, confidence_eos_eot_inf=True)
        out.append(request(range(3, 9), name="guided", max_tokens=8, decode=guided))
    return out


@pytest.mark.parametrize("family", ["llada", "dream", "sdar", "fast_dllm_v2", "llada2_moe"])
def test_engine_equals_plain_driver(family: str) -> None:
    extra = {"fast_dllm_v2": {"block": 8}, "llada2_moe": {"block": 8, "edit": True}}.get(family, {})
    model = tiny(family, **extra)
    asked = requests(model)
    assert len(asked) >= 9
    # room for a few sequences only, so that running ones are preempted, at any of their steps
    engine = Engine(model, config=EngineConfig(max_batch_rows=128, kv_tokens=64, page_size=8))
    steps: list[StepStats] = []
    engine.subscribe(steps.append)
    waiting = [replace(r, priority=-i) for i, r in enumerate(asked)]  # each is more urgent than those that run
    got: dict[str, list[int]] = {r.request_id: [] for r in asked}
    forwards: dict[str, int] = {}
    while engine.has_work or waiting:
        if waiting:
            engine.add(waiting.pop(0))
        for event in engine.step():
            got[event.request_id] += event.token_ids
            assert event.finish is None or event.finish.error is None
            if event.finish is not None:
                forwards[event.request_id] = event.finish.usage.forwards
    for r in asked:
        result = run(POLICIES[model.info.kind], model, r)
        text = result.output[:-1] if result.finish == "stop" else result.output  # the engine drops the ending token
        assert got[r.request_id] == text, r.request_id
        if r.request_id == "guided":  # keeps no K,V, so a preemption costs no forward
            assert forwards["guided"] == result.seq.forwards == 2 * len(result.spans)
    assert sum(s.preempted for s in steps) >= 3
