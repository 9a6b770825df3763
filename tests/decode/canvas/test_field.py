"""What goes wrong in the field with diffusion decoders, one test each (the rest are where their subject is tested:
top-p on row 0 only and the first request's temperature for all in test_sampling)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dfastllm.core import DecodeParams
from dfastllm.decode.registry import POLICIES, RULES
from dfastllm.kernels.rows import DenseRows
from dfastllm.models import tiny
from tests.kit.driver import FakeModel, Store, apply, info, request, run, run_span, start

torch.set_num_threads(1)
MASK = 36
DIFFUSION = POLICIES["diffusion"]
FAKE = FakeModel(info("diffusion", edit=True), seed=3, sharp=4)
FREE = sorted(set(RULES) - {"apd"})  # apd needs a second model


@pytest.mark.parametrize("rule", FREE)
def test_no_mask_left_for_a_large_canvas(rule: str) -> None:
    """Elsewhere: the loop ends on a step count and prints mask tokens when max_tokens is large."""
    decode = DecodeParams(rule=rule, steps=2 if rule != "edit" else None, block_length=300)
    result = run(DIFFUSION, FAKE, request(max_tokens=300, decode=decode, ignore_eos=True))
    assert MASK not in result.seq.tokens
    assert len(result.output) == 300
    if rule != "edit":
        assert result.forwards <= 2


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "windowed"])
def test_one_step_per_block(cache: str) -> None:
    """Elsewhere: the quota table has one entry, and the cached loop indexes the second."""
    decode = DecodeParams(steps=3, block_length=8, cache=cache)  # type: ignore[arg-type]
    result = run(DIFFUSION, FAKE, request(max_tokens=24, decode=decode, ignore_eos=True))
    assert result.forwards == 3
    assert MASK not in result.seq.tokens


def together(model: Any, requests: list[Any]) -> dict[str, list[int]]:
    """All requests stepped and absorbed as one group until each has ended."""
    policy = POLICIES[model.info.kind]
    alive = [(start(policy, r, model.info), Store()) for r in requests]
    done: dict[str, list[int]] = {}
    while alive:
        items = [(seq, policy.plan(seq, 64)) for seq, _ in alive]
        logits = torch.cat(
            [run_span(model, seq, span, store) for (seq, span), (_, store) in zip(items, alive, strict=True)]
        )
        for (seq, _), commit in zip(items, policy.absorb(items, DenseRows(logits)), strict=True):
            apply(seq, commit)
            if commit.finish:
                done[seq.request.request_id] = seq.tokens[seq.canvas_start : seq.stable]
        alive = [(seq, store) for seq, store in alive if seq.request.request_id not in done]
    return done


@pytest.mark.parametrize("name", ["fake", "llada", "llama"])
def test_batch_results_do_not_drift(name: str) -> None:
    """Elsewhere: padding to the longest neighbour changes answers (HumanEval 43.3 to 42.1)."""
    model = FAKE if name == "fake" else tiny(name)
    decode = None if name == "llama" else DecodeParams(threshold=0.4, block_length=8)
    requests = [
        request(range(3, 3 + 2 + 5 * i), name=str(i), max_tokens=6 + 3 * i, decode=decode, temperature=0.4 * i, seed=i)
        for i in range(5)
    ]
    group = together(model, requests)
    assert group == {r.request_id: run(POLICIES[model.info.kind], model, r).output for r in requests}


def test_padding_after_eos_is_no_output() -> None:
    """Elsewhere: EOS padding counts as generated tokens."""
    model = FakeModel(info("diffusion"), seed=3, sharp=4, eos_bias=30.0)
    for early in (True, False):
        decode = DecodeParams(block_length=8, early_stop=early)
        result = run(DIFFUSION, model, request(max_tokens=32, decode=decode))
        assert len(result.output) == 1
        assert result.finish == "stop"


def test_seed_is_honoured_in_a_batch() -> None:
    """Elsewhere: one generator serves the batch, so a seed means something else beside neighbours."""
    decode = DecodeParams(block_length=8)
    same = [
        request(name=str(i), max_tokens=8, temperature=1.2, seed=7, decode=decode, ignore_eos=True) for i in range(3)
    ]
    other = [request(name="x", max_tokens=8, temperature=1.2, seed=8, decode=decode, ignore_eos=True)]
    group = together(FAKE, same + other)
    assert group["0"] == group["1"] == group["2"] == run(DIFFUSION, FAKE, same[0]).output
    assert group["x"] != group["0"]


def test_stop_tokens_end_a_canvas() -> None:
    """Elsewhere: stop is ignored on the diffusion path. (Stop strings are cut on text, by the engine.)"""
    free = run(DIFFUSION, FAKE, request(max_tokens=16, decode=DecodeParams(block_length=4), ignore_eos=True))
    stop = free.output[5]
    at = free.output.index(stop)
    result = run(
        DIFFUSION,
        FAKE,
        request(max_tokens=16, decode=DecodeParams(block_length=4), ignore_eos=True, stop_token_ids=(stop,)),
    )
    assert result.output == free.output[: at + 1]
    assert result.forwards < free.forwards


def test_early_stop_saves_forwards() -> None:
    """Elsewhere: no early stop; 1,024 positions are denoised for a one-word answer."""
    model = FakeModel(info("diffusion"), seed=3, sharp=4, eos_bias=30.0)
    decode = DecodeParams(block_length=8, threshold=0.9)
    assert run(DIFFUSION, model, request(max_tokens=256, decode=decode)).forwards <= 8
