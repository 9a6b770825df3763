"""LLaDA, Dream, SDAR, Fast-dLLM v2, LLaDA-MoE and LLaDA2 against plain forwards over the same raw tensors."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dfastllm import models
from tests.kit import plain_forward as plain
from tests.kit import published_configs as published

IDS = [3, 17, 38, 38, 5, 38, 9, 22, 38, 1, 30]


def _plain_block(c: dict, w: dict, ids: list[int]) -> Tensor:
    return plain.qwen(w, c, ids, plain.block_causal(4))


def _plain_moe_block(c: dict, w: dict, ids: list[int]) -> Tensor:
    return plain.qwen(w, c, ids, plain.block_causal(4), plain.softmax_mixture(c))


CASES: dict[str, tuple[Callable, Callable, str, int]] = {
    "llada": (published.llada, lambda c, w, ids: plain.llada(w, c, ids), "full", 0),
    "llada-tied": (lambda: published.llada(tied=True), lambda c, w, ids: plain.llada(w, c, ids), "full", 0),
    "llada-grouped": (lambda: published.llada(kv_heads=2), lambda c, w, ids: plain.llada(w, c, ids), "full", 0),
    "dream": (published.dream, lambda c, w, ids: plain.qwen(w, c, ids, plain.full), "full", 0),
    "sdar": (published.sdar, _plain_block, "block", 4),
    "sdar-moe": (published.sdar_moe, _plain_moe_block, "block", 4),
    "fast-dllm-v2": (published.fast_dllm_v2, _plain_block, "block", 4),
    "fast-dllm-v2-untied": (lambda: published.fast_dllm_v2(tied=False), _plain_block, "block", 4),
    "llada-moe": (
        published.llada_moe,
        lambda c, w, ids: plain.qwen(w, c, ids, plain.full, plain.softmax_mixture(c)),
        "full",
        0,
    ),
    "llada-moe-some-dense": (
        lambda: published.llada_moe(freq=[0, 1]),
        lambda c, w, ids: plain.qwen(w, c, ids, plain.full, plain.softmax_mixture(c)),
        "full",
        0,
    ),
    "llada2": (published.llada2, lambda c, w, ids: plain.llada2(w, c, ids, plain.block_causal(4)), "block", 4),
}


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, tmp_path: Path) -> None:
    describe, forward, kind, block = CASES[case]
    config, shapes = describe()
    weights = published.filled(shapes, seed=sum(map(ord, case)))
    model = models.load(published.write(tmp_path, config, weights))

    wanted = forward(config, {name: tensor.double() for name, tensor in weights.items()}, IDS)
    attend = models.dense_attention(1, len(IDS), kind, block=block)  # type: ignore[arg-type]
    got = model.head(model(torch.tensor(IDS), torch.arange(len(IDS)), attend))

    assert wanted.abs().max() > 0.5  # the comparison is of numbers that matter
    assert (got.double() - wanted).abs().max() <= 1e-4


def test_capabilities(tmp_path: Path) -> None:
    """What each published config.json says about decoding."""
    wanted = {
        "llada": ("llada", "diffusion", 0, 0, False, 38, (37,), 64),
        "dream": ("dream", "diffusion", 1, 0, False, 38, (36,), 64),
        "sdar": ("sdar", "block", 0, 4, False, 38, (37,), 64),
        "sdar_moe": ("sdar_moe", "block", 0, 4, False, 38, (37,), 64),
        "fast_dllm_v2": ("fast_dllm_v2", "block", 1, 4, True, 38, (37,), 64),
        "llada_moe": ("llada_moe", "diffusion", 0, 0, False, 38, (37,), 64),
        "llada2": ("llada2_moe", "block", 0, 32, False, 38, (37,), 64),
    }
    for case, expected in wanted.items():
        config, shapes = getattr(published, case)()
        info = models.load(published.write(tmp_path / case, config, published.filled(shapes, 0))).info
        got = (info.family, info.kind, info.shift, info.block, info.ar_first, info.mask_id, info.eos_ids, info.max_len)
        assert got == expected, case


@pytest.mark.parametrize("seed", range(20))
def test_sigmoid_router(seed: int) -> None:
    """Mixture routing row by row against the plain rule, on scores where the bias changes who is chosen."""
    from dfastllm.models.mixture import Router

    draw = random.Random(seed)
    groups, kept, top_k = draw.choice([(1, 1, 3), (4, 2, 4), (8, 4, 8), (4, 1, 2)])
    experts = groups * draw.choice([4, 8])
    config = models.MoEConfig(experts, top_k, 8, "sigmoid", True, 2.5, groups, kept)
    router = Router(16, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        router.weight.copy_(torch.randn(experts, 16, generator=generator) * 0.3)
        router.bias.copy_(torch.randn(experts, generator=generator) * 0.3)  # type: ignore[union-attr]
    x = torch.randn(9, 16, generator=generator)
    weights, chosen = router(x)
    fields = {"n_group": groups, "topk_group": kept, "num_experts_per_tok": top_k, "routed_scaling_factor": 2.5}
    biased_matters = False
    for row in range(9):
        scores = torch.sigmoid(router.weight.double() @ x[row].double()).tolist()
        wanted = plain.llada2_routing(scores, router.bias.tolist(), fields)  # type: ignore[union-attr]
        got = dict(zip(chosen[row].tolist(), weights[row].tolist(), strict=True))
        assert got.keys() == wanted.keys()
        assert all(abs(got[e] - wanted[e]) < 1e-5 for e in wanted)
        biased_matters |= wanted.keys() != plain.llada2_routing(scores, [0.0] * experts, fields).keys()
    assert biased_matters
