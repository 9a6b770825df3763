"""Each objective against a slow plain computation, one sequence and one row at a time."""

from __future__ import annotations

import math

import pytest
import torch

from dfastllm import models
from dfastllm.models.decoder import Decoder
from dfastllm.train.data import Example
from dfastllm.train.objectives import BlockDiffusion, MaskedDiffusion, block_mask, draw_masked, loss, make_objective

EXAMPLES = [
    Example((5, 6, 7), (8, 9, 10, 94), 0),
    Example((5, 6, 7, 11, 12), (13, 94), 1),
    Example((5,), (20, 21, 22, 23, 24, 94), 2),
]


def model(family: str) -> Decoder:
    return models.tiny(family, seed=1, block=4 if family == "sdar" else None)


def plain_nll(net: Decoder, ids: list[int], visible: list[list[int]], row: int, target: int, at: list[int]) -> float:
    """-log p(target) at `row`, every row r attending to visible[r] only, by explicit loops."""

    def attend(layer: int, _: object, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(q)
        group = q.shape[1] // k.shape[1]
        for r in range(len(q)):
            for h in range(q.shape[1]):
                keys = torch.stack([k[j, h // group] for j in visible[r]])
                weights = ((keys @ q[r, h]) * q.shape[2] ** -0.5).softmax(0)
                out[r, h] = weights @ torch.stack([v[j, h // group] for j in visible[r]])
        return out

    with torch.no_grad():
        hidden = net(torch.tensor(ids), torch.tensor(at), attend)
        return -net.head(hidden[row : row + 1])[0].log_softmax(0)[target].item()


def test_causal_is_the_mean_over_response_tokens_of_the_next_token_loss() -> None:
    net = model("llama")
    rows = make_objective("causal", net).rows(EXAMPLES, torch.Generator())
    expected = []
    for e in EXAMPLES:
        ids = [*e.prompt, *e.response]
        visible = [list(range(r + 1)) for r in range(len(ids))]
        for i in range(len(e.prompt), len(ids)):
            expected.append(plain_nll(net, ids, visible, i - 1, ids[i], list(range(len(ids)))))
    assert loss(net, rows).item() == pytest.approx(sum(expected) / len(expected), abs=1e-5)


def masks_of(objective: MaskedDiffusion, seed: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [draw_masked(objective.canvas(e), draw) for e in EXAMPLES]


def test_masked_diffusion_weighs_masked_tokens_by_one_over_their_share() -> None:
    net = model("llada")
    objective = make_objective("masked_diffusion", net)
    assert isinstance(objective, MaskedDiffusion)
    assert [objective.canvas(e) for e in EXAMPLES] == [8, 32, 64]
    expected = 0.0
    for e, masked in zip(EXAMPLES, masks_of(objective, 3), strict=True):
        size = objective.canvas(e)
        clean = [*e.response, *[objective.eos] * (size - len(e.response))]
        weight = [1.0 if i < len(e.response) else objective.tail for i in range(size)]
        share = masked.sum().item() / size
        ids = [*e.prompt, *(objective.mask if m else t for m, t in zip(masked.tolist(), clean, strict=True))]
        everything = [list(range(len(ids)))] * len(ids)
        for i in range(size):
            if masked[i]:
                row = len(e.prompt) + i
                nll = plain_nll(net, ids, everything, row, clean[i], list(range(len(ids))))
                expected += weight[i] / sum(weight) / share * nll / len(EXAMPLES)
    rows = objective.rows(EXAMPLES, torch.Generator().manual_seed(3))
    assert loss(net, rows).item() == pytest.approx(expected, abs=1e-5)


def test_canvases_take_turns() -> None:
    sizes = MaskedDiffusion(0, 1, 2, slack=(-1, 0, 3))
    assert [sizes.canvas(Example((5,), (6,) * n, n)) for n in (3, 1, 32, 33, 34, 35)] == [8, 32, 128, 40, 64, 160]


def test_block_diffusion_equals_one_pass_per_block() -> None:
    """Training sees all blocks in one forward; here each block is run on its own, after the clean blocks before it."""
    net = model("sdar")
    objective = make_objective("block_diffusion", net)
    assert isinstance(objective, BlockDiffusion)
    size, draw, expected = objective.block, torch.Generator().manual_seed(5), 0.0
    for e in EXAMPLES:
        stop = math.ceil(e.length / size) * size
        whole = [*e.prompt, *e.response, *[objective.eos] * (stop - e.length)]
        for start in range(len(e.prompt) // size * size, stop, size):
            low = max(start, len(e.prompt))
            masked = draw_masked(start + size - low, draw)
            ids = whole[: start + size]
            for i, hidden in enumerate(masked.tolist()):
                if hidden:
                    ids[low + i] = objective.mask
            visible = [list(range((r // size + 1) * size)) for r in range(len(ids))]
            for i, hidden in enumerate(masked.tolist()):
                if hidden:
                    nll = plain_nll(net, ids, visible, low + i, whole[low + i], list(range(len(ids))))
                    weight = len(masked) / masked.sum().item() / (stop - len(e.prompt))
                    expected += weight * nll / len(EXAMPLES)
    rows = objective.rows(EXAMPLES, torch.Generator().manual_seed(5))
    assert loss(net, rows).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("clean", "noisy", "size"), [(8, 4, 4), (6, 6, 2), (4, 8, 4), (3, 3, 1)])
def test_block_mask_against_brute_force(clean: int, noisy: int, size: int) -> None:
    position = [*range(clean), *range(clean + size - noisy, clean + size)]
    is_noisy = [False] * clean + [True] * noisy
    found = block_mask(torch.tensor(position) // size, torch.tensor(is_noisy))
    for r in range(len(position)):
        for k in range(len(position)):
            row, key = position[r] // size, position[k] // size
            if is_noisy[r]:
                expected = row == key if is_noisy[k] else key < row
            else:
                expected = not is_noisy[k] and key <= row
            assert bool(found[r, k]) is expected, (r, k)


def test_masks_are_never_empty_and_shares_are_uniform() -> None:
    draw = torch.Generator().manual_seed(0)
    counts = torch.tensor([draw_masked(4, draw).sum().item() for _ in range(4000)])
    shares = torch.bincount(counts.long(), minlength=5) / 4000
    assert shares[0] == 0
    assert (shares[1:] - 0.25).abs().max() < 0.03
    skewed = torch.tensor([draw_masked(4, draw, power=2.0).sum().item() for _ in range(4000)])
    expected = torch.tensor([(1 - k / 4) ** 0.5 for k in range(5)]).diff().neg()  # P(share <= x) = 1 - (1 - x)^(1/2)
    assert (torch.bincount(skewed.long(), minlength=5)[1:] / 4000 - expected).abs().max() < 0.03


@pytest.mark.parametrize(
    ("name", "family"), [("causal", "llama"), ("masked_diffusion", "llada"), ("block_diffusion", "sdar")]
)
def test_an_examples_rows_do_not_depend_on_its_neighbours(name: str, family: str) -> None:
    """Padding is inert: the gradient of a batch is the weighted mean of its examples' gradients."""
    net = model(family)
    objective = make_objective(name, net)
    draw = torch.Generator().manual_seed(9)
    alone = []
    for e in EXAMPLES:  # one generator for all, as in the batch: the same masks are drawn
        rows = objective.rows([e], draw)
        share = len(e.response) / sum(len(x.response) for x in EXAMPLES) if name == "causal" else 1 / len(EXAMPLES)
        alone.append(loss(net, rows).item() * share)
    together = loss(net, objective.rows(EXAMPLES, torch.Generator().manual_seed(9))).item()
    assert together == pytest.approx(sum(alone), abs=1e-5)


def test_rows_stay_within_the_cost_that_buckets_are_cut_by() -> None:
    for name, family in (("causal", "llama"), ("masked_diffusion", "llada"), ("block_diffusion", "sdar")):
        objective = make_objective(name, model(family))
        rows = objective.rows(EXAMPLES, torch.Generator())
        assert rows.length == max(map(objective.cost, EXAMPLES))
        assert len(rows.ids) == len(rows.positions) == rows.batch * rows.length


def test_canvases_of_a_model_that_says_nothing() -> None:
    """The tightest multiple of 8, of a whole canvas, and one canvas more, in turn."""
    sizes = MaskedDiffusion(0, 1, 2)
    assert [sizes.canvas(Example((5,), (6,) * 33, n)) for n in range(4)] == [40, 64, 96, 40]
