"""Mixtures of experts and adapters under Triton's interpreter: the twins' numbers, and rows of their own."""

from __future__ import annotations

import pytest
import torch
from tests.kit.interpreter import device_weight, lent, needs_interpreter, random_weight
from torch import Tensor

from dfastllm.kernels.triton import plain, weight

pytestmark = [needs_interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
module = lent(pytest.importorskip("dfastllm.kernels.triton.experts"))
adapters = lent(pytest.importorskip("dfastllm.kernels.triton.low_rank"))


def routing(rows: int, count: int, top_k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.rand(rows, count, generator=draw).argsort(dim=1)[:, :top_k].int()
    return chosen.contiguous(), torch.rand(rows, top_k, generator=draw)


@pytest.mark.parametrize(("rows", "count", "top_k", "height"), [(1, 1, 1, 16), (5, 8, 2, 16), (40, 3, 3, 16)])
def test_pairs_lie_in_the_order_of_their_experts(rows: int, count: int, top_k: int, height: int) -> None:
    chosen, _ = routing(rows, count, top_k)
    order = module.sort_pairs(chosen, count, height)
    flat = chosen.view(-1).long()
    wanted = flat.sort(stable=True).indices
    assert torch.equal(order.pair.long(), wanted)
    assert torch.equal(order.place[wanted].long(), torch.arange(len(flat)))
    seen = []
    for expert, first, some in order.tiles.tolist():
        assert 0 <= some <= height
        members = order.pair[first : first + some].long()
        assert (flat[members] == expert).all()
        seen += members.tolist()
    assert seen == wanted.tolist()


@pytest.mark.parametrize("format", ["f32", "f16", "fp8", "w8", "w8g", "w4g", "w4m", "w6g"])
def test_agrees_with_the_twin(format: str) -> None:
    """An expert that nobody chose, one that all did, and one with rows for several tiles."""
    rows, count, hidden, inner = 37, 3, 64, 32
    chosen, weights = routing(rows, count, 2)
    chosen[:, 0], chosen[:, 1] = 0, 2
    gated = weight.stack([device_weight(format, random_weight(format, 2 * inner, hidden, i)) for i in range(count)])
    down = weight.stack([device_weight(format, random_weight(format, hidden, inner, 9 + i)) for i in range(count)])
    kind = weight.kind_of(down.format)
    x = plain.prepare(torch.randn(rows, hidden) / 8, weight.kind_of(gated.format))
    got = module.experts(x, chosen, weights, gated, down, kind=kind)
    wanted = plain.experts(x, chosen, weights, gated, down, kind=kind)
    close = {"f32": 1e-5, "f16": 2e-3, "fp8": 0.08}.get(format, 0.02)  # a code may move by one step
    torch.testing.assert_close(got, wanted, rtol=0, atol=close * wanted.abs().max().item())
    assert (got - wanted).abs().mean() < 1e-3 * wanted.abs().mean()


@pytest.mark.parametrize("format", ["w8", "f16"])
def test_a_row_alone_has_the_same_bits(format: str) -> None:
    count, hidden, inner = 2, 32, 32  # together the rows are enough for high tiles
    chosen, weights = routing(19, count, 2)
    gated = weight.stack([device_weight(format, random_weight(format, 2 * inner, hidden, i)) for i in range(count)])
    down = weight.stack([device_weight(format, random_weight(format, hidden, inner, 9 + i)) for i in range(count)])
    rows, kind = torch.randn(19, hidden), weight.kind_of(down.format)

    def run(some: slice) -> Tensor:
        chosen_of, weights_of = chosen[some].contiguous(), weights[some].contiguous()
        x = plain.prepare(rows[some], kind)
        out: Tensor = module.experts(x, chosen_of, weights_of, gated, down, kind=kind, invariant=True)
        return out

    together = run(slice(None))
    for row in (0, 18):
        assert torch.equal(run(slice(row, row + 1))[0], together[row])


@pytest.mark.parametrize(("rank", "n", "k"), [(1, 5, 33), (8, 300, 64), (24, 40, 600)])
@pytest.mark.parametrize(("dtype", "full"), [(torch.float32, False), (torch.float16, True)])
def test_adapters(rank: int, n: int, k: int, dtype: torch.dtype, full: bool) -> None:
    x, y = torch.randn(6, k + 3)[:, :k].to(dtype), torch.randn(6, n + 2)[:, :n].to(dtype)
    adapter = torch.tensor([0, 2, 1, 0, 2, 2], dtype=torch.int32)
    a, b = torch.randn(3, rank, k).half() / 8, torch.randn(3, rank, n).half() / 8
    sides = [torch.rand(3, n) if full else None for _ in range(2)]
    scale = torch.rand(3)
    mine, theirs, before = y.clone(), y.clone(), y.clone()
    adapters.add_low_rank(mine, x, adapter, a, b, scale, *sides)
    plain.add_low_rank(theirs, x, adapter, a, b, scale, *sides)
    torch.testing.assert_close(mine, theirs, rtol=2e-3 if full else 1e-5, atol=2e-3 if full else 1e-5)
    assert torch.equal(mine[[0, 3]], before[[0, 3]])
    alone = y[1:2].clone()
    adapters.add_low_rank(alone, x[1:2], adapter[1:2].clone(), a, b, scale, *sides)
    assert torch.equal(alone[0], mine[1])
