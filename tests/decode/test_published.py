"""The decoders give the published loops' tokens, one by one, on small random checkpoints of the families."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from dfastllm.core import DecodeParams
from dfastllm.decode.registry import POLICIES
from dfastllm.models import tiny
from tests.kit import published_loops as published
from tests.kit.driver import FakeModel, info, request, run

torch.set_num_threads(1)

MODELS: dict[str, Any] = {
    "llada": lambda: tiny("llada", seed=1),
    "dream": lambda: tiny("dream", seed=1),
    "sdar": lambda: tiny("sdar", seed=1, block=4),
    "llada2": lambda: tiny("llada2_moe", seed=1, block=8),
    "fast_v2": lambda: tiny("fast_dllm_v2", seed=1, block=8),
    "fake": lambda: FakeModel(info("diffusion"), seed=3, sharp=4),
    "fake-shifted": lambda: FakeModel(info("diffusion", shift=1), seed=3, sharp=4),
    "fake-block": lambda: FakeModel(info("block", block=8), seed=3, sharp=4),
    "fake-fast-v2": lambda: FakeModel(info("block", block=8, shift=1, ar_first=True), seed=3, sharp=4),
}
model = cache(lambda name: MODELS[name]())
PROMPTS = ((5, 6, 7), tuple(range(3, 19)), (9,) * 12)


def ours(name: str, prompt: tuple[int, ...], length: int, suffix: tuple[int, ...] = (), **decode: Any) -> Any:
    net = model(name)
    params = DecodeParams(early_stop=False, **decode)
    req = request(prompt, decode=params, max_tokens=length, ignore_eos=True, suffix=suffix)
    return run(POLICIES[net.info.kind], net, req)


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("name", ["llada", "fake", "dream", "fake-shifted"])
def test_llada_and_fast_dllm(name: str, cache: str, prompt: tuple[int, ...]) -> None:
    for block, steps in ((8, 8), (8, 3), (24, 10), (8, 1)):
        result = ours(name, prompt, 24, cache=cache, block_length=block, steps=steps * 24 // block)
        want, forwards = published.canvas(model(name), prompt, 24, block, cache, published.quota(steps))
        assert (result.output, result.forwards) == (want, forwards)
    for threshold in (0.9, 0.3):
        result = ours(name, prompt, 24, cache=cache, block_length=8, threshold=threshold)
        want, forwards = published.canvas(model(name), prompt, 24, 8, cache, published.above(threshold))
        assert (result.output, result.forwards) == (want, forwards)


@pytest.mark.parametrize("name", ["llada", "fake"])
def test_infilling_sees_both_sides(name: str) -> None:
    prompt, suffix = (5, 6, 7), (11, 12, 13, 14)
    for kept in ("none", "prefix", "dual"):
        result = ours(name, prompt, 10, suffix, cache=kept, block_length=4, threshold=0.5)
        want, _ = published.canvas(model(name), prompt, 10, 4, kept, published.above(0.5), suffix)
        assert result.output == want
    assert ours(name, prompt, 10, suffix).output != ours(name, prompt, 10, (20, 21, 22, 23)).output


def test_the_caches_are_different_approximations() -> None:
    """The comparison above would prove nothing if every cache gave the same text."""
    texts = {
        cache: ours("fake", PROMPTS[0], 24, cache=cache, block_length=8, steps=24).output
        for cache in ("none", "prefix", "dual")
    }
    assert len({tuple(t) for t in texts.values()}) == 3


@pytest.mark.parametrize("ordering", ["maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize("name", ["dream", "fake-shifted"])
def test_dream(name: str, ordering: str) -> None:
    for steps in (24, 10, 3, 1):
        result = ours(name, PROMPTS[0], 24, rule="dream", steps=steps, options={"ordering": ordering})
        assert result.output == published.dream(model(name), PROMPTS[0], 24, steps, ordering)
        assert result.forwards <= steps


@pytest.mark.parametrize("prompt", [*PROMPTS, (4,)], ids=len)
@pytest.mark.parametrize("name", ["sdar", "llada2", "fake-block"])
def test_sdar(name: str, prompt: tuple[int, ...]) -> None:
    net = model(name)
    block = net.info.block
    for pick, decode in (
        (published.quota(block), {"rule": "schedule"}),
        (published.dynamic(block, 0.5), {"threshold": 0.5}),
    ):
        result = ours(name, prompt, 21, **decode)
        want, forwards = published.blocks(net, prompt, 21, block, pick)
        assert result.output == want[:21]
        assert result.seq.tokens[len(prompt) :] == want
        # one more forward than denoising alone at most: prefill; the published loop adds one per block
        assert result.forwards <= forwards + 1


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_sdar_with_few_steps(steps: int) -> None:
    """The per-step quota is a floor under the threshold, as in the published dynamic strategy."""
    net = model("fake-block")
    prompt = PROMPTS[1]  # whole blocks, so that every block has 8 masks
    result = ours("fake-block", prompt, 24, threshold=0.6, steps=3 * steps)
    want, _ = published.blocks(net, prompt, 24, 8, published.dynamic(steps, 0.6))
    assert result.output == want


@pytest.mark.parametrize("prompt", [*PROMPTS, (4,) * 8, (4,)], ids=len)
@pytest.mark.parametrize("small", [8, 4, 2])
@pytest.mark.parametrize("name", ["fast_v2", "fake-fast-v2"])
def test_fast_dllm_v2(name: str, small: int, prompt: tuple[int, ...]) -> None:
    for threshold in (0.9, 0.3):
        result = ours(name, prompt, 20, threshold=threshold, block_length=small)
        assert result.seq.tokens[len(prompt) :] == published.shifted_blocks(
            model(name), prompt, 20, 8, small, threshold
        )
