"""Options that only bar ids (min_tokens, allowed_token_ids): best tokens without logits, the same as by the logits."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch

from dfastllm.core import DecodeParams, SequenceState
from dfastllm.decode.canvas.candidates import active_rows, by_logits, by_stats
from dfastllm.decode.canvas.layout import CanvasState
from dfastllm.decode.draft.proposal import pick
from dfastllm.decode.draft.verify import Cell, choose, draw_of
from dfastllm.decode.registry import POLICIES
from dfastllm.decode.sampling import barred, draw
from dfastllm.kernels.rows import DenseRows
from tests.kit.driver import FakeModel, info, request, run, start

torch.set_num_threads(1)

OPTIONS: list[dict[str, Any]] = [
    {"min_tokens": 3},
    {"allowed_token_ids": (1, 2, 5, 9)},
    {"allowed_token_ids": (1, 2, 9), "min_tokens": 2},
    {"allowed_token_ids": tuple(range(37)), "min_tokens": 4, "stop_token_ids": (7, 8)},
    {},
]


class NoLogits(DenseRows):
    """Rows of which nobody may make logits."""

    def _logits(self) -> Any:
        raise AssertionError("logits were made of a row whose options only bar ids")

    def _take(self, index: Any) -> NoLogits:
        return NoLogits(self._values[torch.from_numpy(index)])


def sequences(kind: str = "ar", **more: Any) -> list[SequenceState]:
    policy = POLICIES["ar" if kind == "ar" else "diffusion"]
    model = info(kind)
    found = []
    for made in range(5):
        for options in OPTIONS:
            seq = start(policy, request(max_tokens=16, **{**options, **more}), model)
            if kind == "ar":
                seq.tokens += [5] * made
            found.append(seq)
    return found


def rows_of(count: int, seed: int, ending: float = 4.0) -> torch.Tensor:
    """Logits among which what ends a text is often the best."""
    values = torch.randn(count, 37, generator=torch.Generator().manual_seed(seed))
    values[:, [1, 2, 7]] += ending
    return values


@pytest.mark.parametrize("logprobs", [None, 3])
def test_autoregressive_rows(logprobs: int | None) -> None:
    cells = [Cell(seq) for seq in sequences(logprobs=logprobs)]
    values = rows_of(len(cells), 1)
    tokens, records = choose(cells, NoLogits(values.clone()))
    assert tokens == draw(values, [draw_of(cell) for cell in cells]).tolist()
    assert tokens != values.argmax(dim=-1).tolist()
    if logprobs is None:
        return
    logp = torch.log_softmax(values.double(), dim=-1)  # of the raw distribution, barred ids included
    for row, (token, record) in enumerate(zip(tokens, records, strict=True)):
        assert record is not None
        assert record.token == token
        assert record.logprob == pytest.approx(logp[row, token].item(), abs=1e-6)
        assert [t for t, _ in record.top] == logp[row].topk(3).indices.tolist()


@pytest.mark.parametrize("rule", ["schedule", "threshold", "entropy_bound"])
def test_rows_of_a_canvas(rule: str) -> None:
    group = []
    for seq in sequences("diffusion", decode=DecodeParams(rule=rule, block_length=8)):
        state = cast(CanvasState, seq.policy)
        assert not state.choice.way[0]
        group.append(active_rows(seq, *state.bounds))
    values = rows_of(sum(len(a.columns) for a in group), 2)
    fast, slow = by_stats(group, NoLogits(values.clone())), by_logits(group, DenseRows(values.clone()), None)
    assert np.array_equal(fast.token, slow.token)
    np.testing.assert_allclose(fast.confidence, slow.confidence, rtol=1e-6)
    assert fast.planes.keys() <= slow.planes.keys()
    for name, plane in fast.planes.items():
        np.testing.assert_allclose(plane, slow.planes[name], atol=1e-6)


def test_what_a_draft_proposes() -> None:
    """Of a drafting model with fewer ids than the target too."""
    cells = [Cell(seq) for seq in sequences()]
    values = rows_of(len(cells), 3)
    wanted = draw(values, [draw_of(cell) for cell in cells]).tolist()
    assert [p.token for p in pick(cells, NoLogits(values.clone()))] == wanted
    narrow = [Cell(seq) for seq in sequences() if seq.sampling.allowed_token_ids is None]
    few = rows_of(len(narrow), 4)[:, :8]
    padded = torch.cat([few, torch.full((len(few), 29), -1e30)], dim=1)
    wanted = draw(padded, [draw_of(cell) for cell in narrow]).tolist()
    assert [p.token for p in pick(narrow, NoLogits(few.clone()))] == wanted


def test_a_set_is_made_once_and_only_where_something_is_barred() -> None:
    seq = start(POLICIES["ar"], request(max_tokens=16, min_tokens=3), info("ar"))
    first = seq.canvas_start
    early = barred(seq.sampling, seq.ends, first, 37)
    assert early is not None
    assert early is barred(seq.sampling, seq.ends, first + 2, 37)
    assert [i for i in range(37) if i in early] == [1, 2]
    assert barred(seq.sampling, seq.ends, first + 3, 37) is None


def test_a_whole_answer() -> None:
    """A model that would end at once goes on to min_tokens, and ends there."""
    net = FakeModel(info("ar"), sharp=2.0, eos_bias=50.0)
    result = run(POLICIES["ar"], net, request(max_tokens=16, min_tokens=6))
    assert len(result.output) == 7
    assert not {1, 2} & set(result.output[:6])
    assert result.output[6] in (1, 2)
