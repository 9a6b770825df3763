"""Drawing tokens: the distribution, the order of the options, per-row parameters, keyed noise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfastllm.core import SamplingParams
from dfastllm.decode.sampling import Draw, distribution, draw, gumbel, row_keys, uniform
from dfastllm.kernels.statistics import log_normaliser, spread

torch.set_num_threads(1)
CHI2_001 = {4: 18.5, 7: 24.3, 9: 27.9, 15: 37.7, 19: 43.8, 63: 103.4}  # p = 0.001 by degrees of freedom


def rows_of(params: SamplingParams, count: int, seed: int = 1, **changes: Any) -> Draw:
    return Draw(params, range(count), seed, step=0, first=0, **changes)


def frequencies(logits: torch.Tensor, params: SamplingParams, trials: int = 20_000, **changes: Any) -> np.ndarray:
    """How often each token comes, over `trials` positions."""
    tokens = draw(logits.expand(trials, -1), [rows_of(params, trials, **changes)])
    return np.bincount(tokens.numpy(), minlength=logits.shape[-1])


def expected(logits: torch.Tensor, params: SamplingParams) -> np.ndarray:
    """The distribution after temperature, top_k, top_p, min_p, by sorting lists."""
    scaled = [x / params.temperature for x in logits.double().tolist()]
    top = max(scaled)
    weights = {t: math.exp(x - top) for t, x in enumerate(scaled)}
    ranked = sorted(weights, key=lambda t: (-weights[t], t))
    if params.top_k > 0:
        ranked = ranked[: params.top_k]
    total, mass, kept = sum(weights[t] for t in ranked), 0.0, []
    for t in ranked:
        if params.top_p < 1 and mass >= params.top_p:
            break
        kept.append(t)
        mass += weights[t] / total
    kept = [t for t in kept if weights[t] >= params.min_p * weights[kept[0]]]
    total = sum(weights[t] for t in kept)
    return np.asarray([weights[t] / total if t in kept else 0.0 for t in range(len(scaled))])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_draws_follow_the_distribution(options: dict[str, Any]) -> None:
    logits = 1.5 * torch.randn(20, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(**options)
    p, counts = expected(logits, params), frequencies(logits, params)
    assert counts[p == 0].sum() == 0
    seen = p > 0
    trials = counts.sum()
    chi2 = ((counts[seen] - trials * p[seen]) ** 2 / (trials * p[seen])).sum()
    limit = CHI2_001.get(int(seen.sum()) - 1, 1.3 * seen.sum() + 15)
    assert chi2 < limit


def test_draws_are_fresh_for_each_step_and_seed() -> None:
    """Positions, steps and seeds are independent: pairs of draws are uniform over the square."""
    logits = torch.zeros(1, 8)
    params = SamplingParams()
    n = 4000
    base = draw(logits.expand(n, -1), [rows_of(params, n)]).numpy()
    for other in (
        draw(logits.expand(n, -1), [Draw(params, range(n), 1, step=1, first=0)]),
        draw(logits.expand(n, -1), [Draw(params, range(n), 2, step=0, first=0)]),
        draw(logits.expand(n, -1), [Draw(params, range(1, n + 1), 1, step=0, first=0)]),
    ):
        table = np.zeros((8, 8))
        np.add.at(table, (base, other.numpy()), 1)
        chi2 = ((table - n / 64) ** 2 / (n / 64)).sum()
        assert chi2 < CHI2_001[63]


def test_same_argmax_as_the_published_float64_form() -> None:
    """argmax(exp(l) / (-log U)^T), with the U that our noise stands for."""
    g = torch.Generator().manual_seed(2)
    logits = 4 * torch.randn(200, 50, generator=g)
    keys = row_keys(9, 3, range(200))
    noise = gumbel(keys, 50, torch.device("cpu")).double()
    u = torch.exp(-torch.exp(-noise))
    for temperature in (0.3, 1.0, 1.7):
        published = (logits.double().exp() / (-torch.log(u)) ** temperature).argmax(dim=-1)
        ours = draw(logits, [Draw(SamplingParams(temperature=temperature), range(200), 9, step=3, first=0)])
        assert torch.equal(ours, published)


def test_tiny_temperature_is_greedy_without_overflow() -> None:
    logits = 50 * torch.randn(64, 40, generator=torch.Generator().manual_seed(3))
    hot = draw(logits, [rows_of(SamplingParams(temperature=1e-6), 64)])
    assert torch.equal(hot, logits.argmax(dim=-1))
    filtered = draw(logits, [rows_of(SamplingParams(temperature=1e-6, top_p=0.9, top_k=5, min_p=0.1), 64)])
    assert torch.equal(filtered, logits.argmax(dim=-1))


def test_noise_is_standard_gumbel() -> None:
    noise = gumbel(row_keys(1, 2, range(500)), 400, torch.device("cpu"))
    assert torch.isfinite(noise).all()
    assert abs(noise.mean().item() - 0.5772) < 0.01
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.02
    grid = torch.linspace(-2, 8, 21)
    empirical = (noise.reshape(-1, 1) <= grid).double().mean(dim=0)
    assert (empirical - torch.exp(-torch.exp(-grid.double()))).abs().max() < 4e-3
    far = gumbel(row_keys(1, 2, range(2000)), 4096, torch.device("cpu")).max().item()
    assert far > math.log(2000 * 4096) - 2.5  # the upper tail is not cut at 2^-24


def test_uniform_is_uniform_and_keyed() -> None:
    u = uniform(row_keys(5, 0, range(20_000), salt=1))
    counts = np.histogram(u, bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < CHI2_001[19]
    assert not np.any(uniform(row_keys(5, 0, range(50), salt=0)) == uniform(row_keys(5, 0, range(50), salt=1)))
    assert np.array_equal(u[100:110], uniform(row_keys(5, 0, range(100, 110), salt=1)))
    assert len({int(k) for s in range(20) for t in range(20) for k in row_keys(s, t, range(20))}) == 8000


params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.8]),
    top_k=st.sampled_from([0, 1, 3, 30]),
    top_p=st.sampled_from([1.0, 0.9, 0.4]),
    min_p=st.sampled_from([0.0, 0.2]),
    repetition_penalty=st.sampled_from([1.0, 1.4]),
    frequency_penalty=st.sampled_from([0.0, 0.7]),
    presence_penalty=st.sampled_from([0.0, -0.5]),
    max_tokens=st.just(16),
    min_tokens=st.sampled_from([0, 3]),
    logit_bias=st.sampled_from([{}, {4: 5.0, 7: -100.0}]),
    allowed_token_ids=st.sampled_from([None, (1, 3, 5, 7, 9)]),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(params_strategy, st.integers(0, 3), st.integers(0, 99)), min_size=1, max_size=6), st.randoms()
)
def test_a_row_depends_on_no_other(specs: list[tuple[SamplingParams, int, int]], rng: Any) -> None:
    """Any mixture of parameters in any order: each sequence's rows are drawn as if alone."""
    g = torch.Generator().manual_seed(4)
    parts, draws = [], []
    for params, count, seed in specs:
        parts.append(3 * torch.randn(count, 33, generator=g))
        ids = [seed % 33, 4, 5, 5]
        draws.append(
            Draw(params, range(seed, seed + count), seed, 7, first=seed, prompt=ids, output=ids[1:], enders=(1,))
        )
    alone = [draw(part, [d]).tolist() for part, d in zip(parts, draws, strict=True)]
    order = list(range(len(specs)))
    rng.shuffle(order)
    together = draw(torch.cat([parts[i] for i in order]), [draws[i] for i in order]).tolist()
    for i in order:
        assert together[: len(alone[i])] == alone[i]
        together = together[len(alone[i]) :]


def test_the_input_is_left_alone() -> None:
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    draw(logits, [rows_of(SamplingParams(top_p=0.5, logit_bias={3: 9.0}, repetition_penalty=2.0), 3, prompt=(1, 2))])
    assert torch.equal(logits, before)


def test_penalties_in_their_order() -> None:
    """Repetition divides positive and multiplies negative logits of prompt and output; frequency and presence subtract
    for output only; the bias comes after."""
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5, 0.0, 3.0]])
    params = SamplingParams(
        temperature=0.0,
        repetition_penalty=2.0,
        frequency_penalty=0.25,
        presence_penalty=0.5,
        logit_bias={3: 0.6},
    )
    prompt, output = (0, 1), (5, 5, 2)
    want = {0: 1.0, 1: -4.0, 2: 0.5 - 0.25 - 0.5, 3: 1.1, 4: 0.0, 5: 1.5 - 0.5 - 0.5}
    seen = []
    scores = dict(want)
    while scores:  # ban the best again and again: the order of all tokens shows every value's place
        bias = {3: 0.6, **dict.fromkeys(seen, -100.0)}
        bias[3] = 0.6 if 3 not in seen else -100.0
        d = rows_of(SamplingParams(**{**vars(params), "logit_bias": bias}), 1, prompt=prompt, output=output)
        (token,) = draw(logits, [d]).tolist()
        assert token == max(scores, key=lambda t: scores[t])
        seen.append(token)
        del scores[token]


def test_allowed_ids_and_min_tokens() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0]]).expand(3, -1)
    params = SamplingParams(temperature=0.0, allowed_token_ids=(1, 3), max_tokens=4, min_tokens=2)
    tokens = draw(logits, [rows_of(params, 3, enders=(1,))]).tolist()
    assert tokens == [3, 3, 1]  # 1 ends the text: barred at the first two positions


def test_top_k_ties_keep_the_lowest_ids() -> None:
    counts = frequencies(torch.zeros(6), SamplingParams(top_k=2), trials=500)
    assert (counts[:2] > 0).all()
    assert counts[2:].sum() == 0


def test_top_p_applies_to_every_row() -> None:
    """Known fault elsewhere: top-p cut row 0 only."""
    logits = torch.tensor([[3.0, 2.9, 0.0, 0.0, 0.0]]).expand(400, -1)
    tokens = draw(logits, [rows_of(SamplingParams(top_p=0.5), 400)])
    assert set(tokens.tolist()) <= {0, 1}
    one = draw(torch.tensor([[3.0, 0.0, 0.0]]).expand(200, -1), [rows_of(SamplingParams(top_p=0.5), 200)])
    assert set(one.tolist()) == {0}


def test_each_row_has_its_own_temperature() -> None:
    """Known fault elsewhere: the first request's temperature served the whole batch."""
    logits = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(300, -1)
    cold, hot = SamplingParams(temperature=0.0), SamplingParams(temperature=3.0)
    for first, second in ((cold, hot), (hot, cold)):
        tokens = draw(torch.cat([logits, logits]), [rows_of(first, 300), rows_of(second, 300)])
        a, b = (len(set(half.tolist())) for half in tokens.split(300))
        assert (a, b) == ((1, 4) if first is cold else (4, 1))


@pytest.mark.parametrize("vocab", [37, 151, 2047, 50_257])
@pytest.mark.parametrize("threads", [1, 2])
def test_statistics_have_the_same_bits_alone_and_in_a_batch(vocab: int, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        logits = 4 * torch.randn(17, vocab, generator=torch.Generator().manual_seed(vocab))
        norm = log_normaliser(logits)
        entropy, margin = spread(logits, norm)
        for i in range(17):
            one = log_normaliser(logits[i : i + 1].clone())
            e, m = spread(logits[i : i + 1].clone(), one)
            assert (one.item(), e.item(), m.item()) == (norm[i].item(), entropy[i].item(), margin[i].item())
    finally:
        torch.set_num_threads(1)


def test_statistics_are_right() -> None:
    logits = 3 * torch.randn(5, 30, generator=torch.Generator().manual_seed(7))
    logits[:, 3] = float("-inf")  # an excluded token has no part in anything
    p = torch.softmax(logits.double(), dim=-1)
    norm = log_normaliser(logits)
    assert torch.allclose(norm.double(), torch.logsumexp(logits.double(), dim=-1), atol=1e-6)
    entropy, margin = spread(logits, norm)
    assert torch.allclose(entropy.double(), -(p * p.clamp_min(1e-300).log()).sum(dim=-1), atol=1e-5)
    best = p.sort(dim=-1, descending=True).values
    assert torch.allclose(margin.double(), best[:, 0] - best[:, 1], atol=1e-6)


def test_a_repetition_penalty_makes_every_seen_token_less_likely() -> None:
    """Whatever the sign of its logit (Keskar et al. 2019): positive ones are divided, negative ones multiplied."""
    logits = torch.tensor([[2.0, -2.0, 0.5, -0.5, 1.0]])
    draws = [rows_of(SamplingParams(repetition_penalty=2.0), 1, prompt=(0,), output=(1,))]
    wanted = torch.softmax(torch.tensor([[1.0, -4.0, 0.5, -0.5, 1.0]]).double(), dim=-1)
    torch.testing.assert_close(distribution(logits, draws), wanted)
