"""The decoders give the published loops' tokens, one by one, on small random checkpoints of the families."""

from __future__ import annotations

from dataclasses import replace
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
    "llada-ends": lambda: _ending(),
    "fake": lambda: FakeModel(info("diffusion"), seed=3, sharp=4),
    "fake-ends": lambda: FakeModel(info("diffusion"), seed=3, sharp=4, eos_bias=4.0),
    "fake-shifted": lambda: FakeModel(info("diffusion", shift=1), seed=3, sharp=4),
    "fake-block": lambda: FakeModel(info("block", block=8), seed=3, sharp=4),
    "fake-fast-v2": lambda: FakeModel(info("block", block=8, shift=1, ar_first=True), seed=3, sharp=4),
}


def _ending() -> Any:
    """A model whose favourite tokens end a text."""
    net = tiny("llada", seed=1)
    net.info = replace(net.info, eos_ids=(23, 36))
    return net


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
    shifted = model(name).info.shift and cache != "none"
    own = {"options": {"first_token": "by_rule"}} if shifted else {}  # the published way: test_fast_dllm_for_dream
    for block, steps in ((8, 8), (8, 3), (24, 10), (8, 1)):
        result = ours(name, prompt, 24, cache=cache, block_length=block, steps=steps * 24 // block, **own)
        want, forwards = published.canvas(model(name), prompt, 24, block, cache, published.quota(steps))
        assert (result.output, result.forwards) == (want, forwards)
    for threshold in (0.9, 0.3):
        result = ours(name, prompt, 24, cache=cache, block_length=8, threshold=threshold, **own)
        want, forwards = published.canvas(model(name), prompt, 24, 8, cache, published.above(threshold))
        assert (result.output, result.forwards) == (want, forwards)


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("name", ["dream", "fake-shifted"])
def test_fast_dllm_for_dream(name: str, cache: str, prompt: tuple[int, ...]) -> None:
    """A block's full forward commits its first token alone; the steps after it never run the row before the block."""
    for threshold in (0.9, 0.3, 0.05):
        result = ours(name, prompt, 24, cache=cache, block_length=8, threshold=threshold)
        want, forwards = published.dream_cached(model(name), prompt, 24, 8, cache, threshold=threshold)
        assert (result.output, result.forwards) == (want, forwards)
        assert {span.start for span in result.spans} == {0, *range(len(prompt), len(prompt) + 24, 8)}
        firsts = [c.fixed for s, c in zip(result.spans, result.commits, strict=True) if s.store == "keep"]
        assert [list(fixed) for fixed in firsts] == [[len(prompt) + b] for b in (0, 8, 16)]
    for steps in (8, 5, 2):
        result = ours(
            name,
            prompt,
            24,
            cache=cache,
            rule="dream",
            block_length=8,
            steps=3 * steps,
            options={"ordering": "entropy"},
        )
        want, forwards = published.dream_cached(model(name), prompt, 24, 8, cache, steps=steps)
        assert result.output == want
        assert result.forwards <= forwards  # the published loop runs the points that commit nothing
    one = ours(name, prompt, 24, cache=cache, rule="dream", block_length=8, steps=3, options={"ordering": "entropy"})
    assert one.forwards == 6  # where the published loop leaves masks: the full forward, and all the rest


def test_the_two_ways_of_a_first_token_differ() -> None:
    texts = {
        first: ours("fake-shifted", PROMPTS[0], 24, cache="dual", block_length=8, threshold=0.3, options=options).output
        for first, options in (("alone", {}), ("by_rule", {"first_token": "by_rule"}))
    }
    assert texts["alone"] != texts["by_rule"]


@pytest.mark.parametrize("scale", [0.5, 2.0])
@pytest.mark.parametrize("name", ["llada", "fake", "fake-shifted"])
def test_guidance(name: str, scale: float) -> None:
    """LLaDA's cfg_scale; both forwards of a step count."""
    for prompt in PROMPTS:
        for pick, decode in (
            (published.quota(3), {"steps": 9}),
            (published.above(0.4), {"threshold": 0.4}),
        ):
            result = ours(name, prompt, 24, cache="none", block_length=8, cfg_scale=scale, **decode)
            want, forwards = published.guided(model(name), prompt, 24, 8, pick, scale)
            assert (result.output, result.seq.forwards) == (want, forwards)
            assert all(span.passes == 2 for span in result.spans)
    plain = ours(name, PROMPTS[0], 24, cache="none", block_length=8, steps=9).output
    assert plain != ours(name, PROMPTS[0], 24, cache="none", block_length=8, steps=9, cfg_scale=scale).output


@pytest.mark.parametrize("name", ["llada-ends", "fake-ends"])
def test_ends_kept_back(name: str) -> None:
    """LLaDA's logits_eos_inf and confidence_eos_eot_inf, on models that would end at once."""
    net, prompt = model(name), PROMPTS[0]
    eos = net.info.eos_ids
    plain = ours(name, prompt, 24, cache="none", block_length=12, steps=8).output
    assert eos[0] in plain
    for pick, decode in ((published.quota(4), {"steps": 8}), (published.above(0.4), {"threshold": 0.4})):
        for scale in (0.0, 1.0):
            asked = {"cache": "none", "block_length": 12, "cfg_scale": scale, **decode}
            barred = ours(name, prompt, 24, logits_eos_inf=True, **asked)
            want, _ = published.guided(net, prompt, 24, 12, pick, scale, eos=eos[0])
            assert barred.output == want
            assert eos[0] not in want
            late = ours(name, prompt, 24, confidence_eos_eot_inf=True, **asked)
            want, forwards = published.guided(net, prompt, 24, 12, pick, scale, doubted=eos)
            assert (late.output, late.seq.forwards) == (want, forwards)
            both = ours(name, prompt, 24, logits_eos_inf=True, confidence_eos_eot_inf=True, **asked)
            assert both.output == published.guided(net, prompt, 24, 12, pick, scale, eos=eos[0], doubted=eos)[0]
    first = []
    for late in (False, True):
        result = ours(name, prompt, 24, cache="none", block_length=24, confidence_eos_eot_inf=late)
        drawn = [token for c in result.commits for token in c.fixed.values()]
        first.append(next(i for i, token in enumerate(drawn) if token in eos))
    assert first[1] > first[0]


@pytest.mark.parametrize("refresh", [1, 3, 8])
@pytest.mark.parametrize("name", ["llada", "fake", "dream", "fake-shifted"])
def test_dkv_cache(name: str, refresh: int) -> None:
    for prompt in PROMPTS:
        for block, steps in ((8, 8), (24, 24), (24, 7), (8, 3)):
            result = ours(
                name,
                prompt,
                24,
                cache="delayed",
                block_length=block,
                steps=steps * 24 // block,
                options={"refresh": refresh},
            )
            want, rows = published.delayed(model(name), prompt, 24, block, refresh, published.quota(steps))
            assert (result.output, sum(span.rows for span in result.spans)) == (want, rows)
    if refresh == 1:
        assert result.output == ours(name, PROMPTS[2], 24, cache="none", block_length=8, steps=9).output


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
        for cache in ("none", "prefix", "dual", "delayed")
    }
    assert len({tuple(t) for t in texts.values()}) == 4


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
        (published.sequential(block), {"rule": "schedule", "remasking": "sequential"}),
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
    for order, pick in (("low_confidence", published.quota(steps)), ("sequential", published.sequential(steps))):
        result = ours("fake-block", prompt, 24, rule="schedule", remasking=order, steps=3 * steps)
        assert result.output == published.blocks(net, prompt, 24, 8, pick)[0]
    if steps == 1:
        assert result.forwards <= 4  # a whole block a step


@pytest.mark.parametrize("gamma", [0.2, 1.0, 4.0])
@pytest.mark.parametrize("name", ["sdar", "fake-block"])
def test_sdar_entropy_bounded(name: str, gamma: float) -> None:
    net, prompt = model(name), PROMPTS[1]
    options = {"gamma": gamma, "bound": "sum"}
    result = ours(name, prompt, 24, rule="entropy_bound", options=options)
    block, mask, held = net.info.block, net.info.mask_id, published.Cache()
    x = [*prompt, *[mask] * 24]
    _, held = published.forward(net, x, 0, len(prompt), None, block=block)
    for start in range(len(prompt), len(x), block):
        while masks := [p for p in range(start, start + block) if x[p] == mask]:
            logits, _ = published.forward(net, x, start, start + block, held, block=block)
            tokens, _, p = published.decide(logits, mask)
            for j in published.entropy_sum(gamma)(masks, [p[j - start] for j in masks]):
                x[j] = tokens[j - start]
        _, held = published.forward(net, x, start, start + block, held, block=block)
    assert result.output == x[len(prompt) :]


@pytest.mark.parametrize("prompt", [*PROMPTS, (4,) * 8, (4,)], ids=len)
@pytest.mark.parametrize("small", [8, 4, 2])
@pytest.mark.parametrize("name", ["fast_v2", "fake-fast-v2"])
def test_fast_dllm_v2(name: str, small: int, prompt: tuple[int, ...]) -> None:
    for threshold in (0.9, 0.3):
        for kept in (None, "sub_block"):
            result = ours(name, prompt, 20, threshold=threshold, block_length=small, cache=kept)
            assert result.seq.tokens[len(prompt) :] == published.shifted_blocks(
                model(name), prompt, 20, 8, small, threshold, cached=kept is not None
            )
            apart = [span for span in result.spans if span.store == "replace"]
            assert not (apart and kept is None)
            assert all(len(span.ids) == small for span in apart)


def test_the_sub_block_cache_is_an_approximation() -> None:
    """Else the comparison above would not show that it is used."""
    texts = [
        ours("fake-fast-v2", PROMPTS[0], 40, threshold=0.9, block_length=4, cache=cache).output
        for cache in (None, "sub_block")
    ]
    assert texts[0] != texts[1]
