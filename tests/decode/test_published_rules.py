"""The rules that look beyond one step's logits, and those that draw, give the published loops' tokens step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dfastllm.core import DecodeParams, SamplingParams
from dfastllm.decode.canvas.field import Field
from dfastllm.decode.canvas.rules import decide
from dfastllm.decode.registry import POLICIES, RULES
from dfastllm.decode.sampling import Draw, draw, row_keys
from dfastllm.models import tiny
from tests.kit import published_rules as published
from tests.kit.driver import FakeModel, Result, info, request, run
from tests.kit.twins import grid_counts

torch.set_num_threads(1)

MODELS: dict[str, Any] = {
    "llada": lambda: tiny("llada", seed=1),
    "dream": lambda: tiny("dream", seed=1),
    "sdar": lambda: tiny("sdar", seed=1, block=4),
    "llada2": lambda: tiny("llada2_moe", seed=1, block=8),
    "fake": lambda: FakeModel(info("diffusion"), seed=3, sharp=4),
    "mild": lambda: FakeModel(info("diffusion"), seed=5, sharp=2),
    "fake-shifted": lambda: FakeModel(info("diffusion", shift=1, confidence="filtered"), seed=3, sharp=4),
    "fake-block": lambda: FakeModel(info("block", block=8, confidence="drawn"), seed=3, sharp=4),
}
model = cache(lambda name: MODELS[name]())
PROMPTS = ((5, 6, 7), tuple(range(3, 19)), (9,) * 12)
SEED = 1234


def ours(
    name: str, prompt: Sequence[int], length: int, sampling: dict[str, Any] | None = None, **decode: Any
) -> Result:
    net = model(name)
    params = DecodeParams(early_stop=False, **decode)
    req = request(prompt, decode=params, max_tokens=length, ignore_eos=True, **(sampling or {}))
    return run(POLICIES[net.info.kind], net, req)


def noise(sampling: dict[str, Any]) -> published.Draw:
    """Our draw, which test_sampling holds to its distribution."""
    params = SamplingParams(**{"temperature": 0.0, **sampling})

    def drawn(logits: Tensor, positions: Sequence[int], step: int) -> list[int]:
        return draw(logits, [Draw(params, positions, SEED, step, positions[0])]).tolist()

    return drawn


def test_the_families_say_what_their_code_takes_for_confidence() -> None:
    told = {name: tiny(name).info.confidence for name in ("llada", "dream", "sdar", "llada2_moe", "fast_dllm_v2")}
    assert told == {
        "llada": "raw",
        "dream": "filtered",
        "sdar": "drawn",
        "llada2_moe": "drawn",
        "fast_dllm_v2": "drawn",
    }


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
@pytest.mark.parametrize("name", ["llada", "fake", "mild"])
def test_klass(name: str, prompt: tuple[int, ...]) -> None:
    """With the memory over the canvas: the divergence of a block's first step is from the last step before it."""
    ready = 0
    for block, steps, history, threshold, bound in (
        (8, 8, 2, 0.1, 1.0),
        (8, 3, 2, 0.3, 0.2),
        (12, 12, 1, 0.02, 0.05),
        (4, 4, 3, 0.1, 1.0),
    )[: 1 if name == "llada" else 4]:
        result = ours(
            name,
            prompt,
            24,
            rule="klass",
            block_length=block,
            steps=steps * 24 // block,
            threshold=threshold,
            cache="none",
            options={"kl_threshold": bound, "kl_history_length": history},
        )
        want, used = published.klass(model(name), prompt, 24, block, steps, threshold, bound, history)
        assert (result.output, result.forwards) == (want, used)
        ready += used < steps * 24 // block
    assert ready  # the rule did find rows that were calm


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
@pytest.mark.parametrize("name", ["llada", "fake", "mild"])
def test_wino(name: str, prompt: tuple[int, ...]) -> None:
    masked = 0
    for block, threshold, back in ((8, 0.1, 0.5), (12, 0.3, 0.9), (24, 0.02, 0.03))[: 1 if name == "llada" else 3]:
        result = ours(
            name,
            prompt,
            24,
            rule="wino",
            block_length=block,
            threshold=threshold,
            cache="none",
            options={"threshold_back": back},
        )
        want, used = published.wino(model(name), prompt, 24, block, threshold, back)
        assert (result.output, result.forwards) == (want, used)
        masked += sum(len(c.masked) for c in result.commits)
    assert masked


@pytest.mark.parametrize("cuts", [{}, {"top_k": 5}, {"top_p": 0.6}, {"top_k": 6, "top_p": 0.8}], ids=str)
@pytest.mark.parametrize("heat", [0.0, 0.7])
def test_confidence_after_temperature_and_cuts(heat: float, cuts: dict[str, Any]) -> None:
    sampling = {"temperature": heat, **cuts, "seed": SEED}
    real = heat == 0.7 and len(cuts) == 2  # once on the families' own wirings
    for name in ("sdar", "llada2", "fake-block")[0 if real else 2 :]:
        net = model(name)
        block = net.info.block
        way = published.Sampling(noise(sampling), heat, cuts.get("top_k", 0), cuts.get("top_p", 1.0))
        for prompt in (PROMPTS[0], PROMPTS[2]):
            blocks = -(-(len(prompt) + 20) // block) - len(prompt) // block
            for steps, threshold in ((block, None), (3, 0.2))[: 1 if name == "llada2" else 2]:
                decode = {"rule": "schedule"} if threshold is None else {"threshold": threshold}
                result = ours(name, prompt, 20, sampling, steps=steps * blocks, **decode)
                want = published.sampled_blocks(net, prompt, 20, block, steps, way, threshold)
                assert result.seq.tokens[len(prompt) :] == want
    if {"top_k", "top_p"} <= set(cuts):
        return  # Dream's code cuts by top_p first; here one order holds everywhere
    for name in ("dream", "fake-shifted")[0 if heat == 0.7 and "top_p" in cuts else 1 :]:
        way = published.Sampling(noise(sampling), heat, cuts.get("top_k", 0), cuts.get("top_p", 1.0), cut_greedy=True)
        for how, threshold in (("low_confidence", None), ("margin", None), ("entropy", None), ("low_confidence", 0.4)):
            decode = {"rule": "schedule", "remasking": how} if threshold is None else {"threshold": threshold}
            result = ours(name, PROMPTS[0], 16, sampling, block_length=8, cache="none", **decode)
            want = published.sampled_canvas(model(name), PROMPTS[0], 16, 8, way, how, threshold)
            assert result.output == want


def test_what_confidence_is_read_from_can_be_chosen() -> None:
    """LLaDA's code takes the raw softmax at every temperature; a request may ask for the other, and back."""
    net, heat = model("fake"), 0.4
    sampling = {"temperature": heat, "top_p": 0.9, "seed": SEED}
    texts = {}
    for told in ("model", "raw", "drawn"):
        options = {"confidence": told}
        texts[told] = ours(
            "fake", PROMPTS[0], 24, sampling, threshold=0.5, block_length=8, cache="none", options=options
        )
    raw = published.Sampling(noise(sampling))
    drawn = published.Sampling(noise(sampling), heat, 0, 0.9)
    assert texts["model"].output == texts["raw"].output
    assert texts["raw"].output == published.sampled_canvas(net, PROMPTS[0], 24, 8, raw, "low_confidence", 0.5)
    assert texts["drawn"].output == published.sampled_canvas(net, PROMPTS[0], 24, 8, drawn, "low_confidence", 0.5)
    assert texts["raw"].forwards > texts["drawn"].forwards
    plain = request(PROMPTS[0], decode=DecodeParams(threshold=0.5), max_tokens=8, top_p=0.9)
    shifted = model("fake-shifted").info
    for told, dense in ((shifted, True), (replace(shifted, confidence="drawn"), False), (info("diffusion"), False)):
        choice, _ = POLICIES["diffusion"].compile(plain, told).plan
        assert choice.way[0] == choice.drawn == dense  # greedy rows of the others stay on the fused pass


@pytest.mark.parametrize(
    ("size", "steps"), [(24, 24), (24, 48), (24, 100), (7, 3), (1, 9), (64, 64), (30, 4000), (5, 1)]
)
def test_dream_with_as_many_steps_as_tokens_or_more(size: int, steps: int) -> None:
    """The numbers of tokens that the published steps commit, without the steps that commit none."""
    counts = grid_counts(size, steps, 1e-3)
    assert sum(counts) == size
    result = ours(
        "fake-shifted", PROMPTS[0], size, rule="dream", steps=steps, cache="none", options={"ordering": "entropy"}
    )
    assert [len(c.fixed) for c in result.commits] == [n for n in counts if n]


def test_a_random_order_spreads_over_dreams_grid() -> None:
    """How many of 16 masks each of 4 points commits, over 1000 seeds: a fourth each, as when every mask goes with
    probability 1 - t[i+1] / t[i] at each point; and the points draw the positions anew for each seed."""
    steps, size, seeds = 4, 16, 1000
    rule, shape = RULES["dream"], (seeds, size)
    options = {name: option.default for name, option in rule.options.items()} | {"ordering": "origin"}
    keys = np.stack([row_keys(seed, 0, range(size), salt=1) for seed in range(seeds)])
    masked, zeros, no = np.ones(shape, dtype=bool), np.zeros(shape), np.zeros(shape, dtype=bool)
    counts = np.zeros((seeds, steps), dtype=int)
    for step in range(steps):
        whole = {"size": np.full(seeds, size), "step": np.full(seeds, step), "steps": np.full(seeds, steps)}
        planes = dict.fromkeys(("confidence", "entropy", "margin", "kept"), zeros)
        flags = dict.fromkeys(("held", "differs", "ready"), no)
        field = Field(
            masked=masked,
            keys=keys,
            begun=np.zeros(seeds, dtype=int),
            options=[options] * seeds,
            memory=[None] * seeds,
            **whole,
            **planes,
            **flags,
        )
        accept = decide(rule, field)
        counts[:, step] = accept.sum(axis=1)
        masked = masked & ~accept
        if step == 0:
            assert abs(accept.mean(axis=0) - 0.25).max() < 0.06  # every position alike
    full = counts[(counts > 0).all(axis=1)]
    assert len(full) > 0.95 * seeds  # a point without any is rare with 16 masks
    assert abs(full.mean(axis=0) / size - 0.25).max() < 0.01
    assert abs(full.var(axis=0) - size * 0.25 * 0.75).max() < 0.6
