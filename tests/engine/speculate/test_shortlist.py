"""Drafts of a model whose head has some tokens only: they are tokens of the list, and the answers plain decoding's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dfastllm import assemble
from dfastllm.core import Draft, Request, SamplingParams, SpeculativeParams
from dfastllm.engine import Engine, EngineConfig
from dfastllm.engine.speculate.model import DraftModel
from dfastllm.engine.speculate.shortlist import NEVER, Shortlisted
from dfastllm.kernels import linear
from dfastllm.kernels.packed import Packed, QTensor
from dfastllm.kernels.rows import DenseRows
from dfastllm.kernels.token_set import TokenSet
from dfastllm.models import Decoder, tiny

VOCAB = 50
IDS = torch.tensor([3, 4, 11, 20, 21, 22, 48])


def by_hand(rows: Tensor) -> Tensor:
    """Logits of the whole vocabulary, minus infinity where a token is not listed."""
    whole = torch.full((len(rows), VOCAB), -torch.inf)
    for column, id in enumerate(IDS.tolist()):
        whole[:, id] = rows[:, column]
    return whole


def test_rows_speak_of_the_whole_vocabulary() -> None:
    short = torch.randn(5, len(IDS), generator=torch.Generator().manual_seed(1))
    rows, whole = Shortlisted(DenseRows(short.clone()), IDS, VOCAB), by_hand(short)
    assert (rows.count, rows.vocab) == (5, VOCAB)
    found = rows.stats(norm=True, spread=True, top=3)
    best = whole.sort(dim=-1, descending=True, stable=True)
    assert found.token.tolist() == best.indices[:, 0].tolist()
    assert found.ids.tolist() == best.indices[:, :3].tolist()
    assert np.allclose(found.logits, best.values[:, :3])
    assert np.allclose(found.norm, whole.logsumexp(-1))
    dense = rows.logits()
    assert torch.equal(dense[:, IDS], short)
    assert int((dense == NEVER).sum()) == 5 * (VOCAB - len(IDS))
    assert rows.finite().all()


def test_banned_and_barred_tokens_are_those_of_the_vocabulary() -> None:
    short = torch.randn(4, len(IDS), generator=torch.Generator().manual_seed(2))
    whole = by_hand(short)
    closed = [TokenSet([11, 21, 30], VOCAB), None, TokenSet.outside([3, 48, 7], VOCAB), TokenSet([0], VOCAB)]
    ban = (20, 33)
    whole[:, list(ban)] = -torch.inf
    wanted = []
    for row, shut in zip(whole, closed, strict=True):
        left = [id for id in range(VOCAB) if shut is None or id not in shut]
        wanted.append(left[int(row[left].argmax())])
    rows = Shortlisted(DenseRows(short), IDS, VOCAB)
    assert rows.stats(ban=ban, barred=closed).token.tolist() == wanted
    part = rows.select([1, 3])
    assert part.stats(ban=ban, barred=[closed[1], closed[3]]).token.tolist() == [wanted[1], wanted[3]]
    assert part.logits().shape == (2, VOCAB)


def test_a_row_that_is_not_finite_is_told() -> None:
    short = torch.zeros(2, len(IDS))
    short[1, 2] = torch.nan
    rows = Shortlisted(DenseRows(short), IDS, VOCAB)
    rows.logits()
    assert rows.finite().tolist() == [True, False]


class Overheard(DraftModel):
    """Keeps what it drafted."""

    said: set[int]

    def propose(self, wanted: Any) -> list[Draft]:
        drafts = super().propose(wanted)
        self.said |= {token for draft in drafts for token in draft.tokens}
        return drafts


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9},
    {"min_tokens": 6},
    {"allowed_token_ids": tuple(range(0, 60, 2)), "temperature": 0.7},
    {"repetition_penalty": 1.3},
]


@pytest.mark.parametrize("acceptance", ["coupled", "rejection"])
def test_answers_are_plain_decodings(acceptance: str) -> None:
    """The draft is the target itself with a head of every third token: it is right where the answer is listed."""
    config = EngineConfig(kv_tokens=2048)
    model = tiny("llama", seed=3)
    assert isinstance(model, Decoder)
    target = assemble.pack(model)
    ids = torch.arange(0, target.info.vocab_size, 3)
    draft = assemble.pack(model)
    draft.head = short_head(model, ids)
    draft.shortlist = ids
    drafter = Overheard(draft, config)
    drafter.said = set()
    engine = Engine(target, None, config, drafters={"draft_model": drafter})
    asked = SpeculativeParams("draft_model", 4, adaptive=False, acceptance=acceptance)  # type: ignore[arg-type]
    plain, drafted = (answers(engine, speculative) for speculative in (None, asked))
    greedy = [n for n, options in enumerate(OPTIONS) if not options.get("temperature")]
    for n in range(len(OPTIONS)) if acceptance == "coupled" else greedy:
        assert drafted[n] == plain[n]
    assert drafter.said
    assert drafter.said <= set(ids.tolist())


def short_head(model: Decoder, ids: Tensor) -> Packed:
    """The packed head of these tokens."""
    weight = (model.embed.weight if model.lm_head is None else model.lm_head.weight).detach()
    return linear.pack(QTensor("f32", weight.float()[ids]))


def answers(engine: Engine, speculative: SpeculativeParams | None) -> list[tuple[int, ...]]:
    found: dict[str, list[int]] = {}
    for n, options in enumerate(OPTIONS):
        sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 12, "seed": n, "ignore_eos": True, **options})
        engine.add(Request(f"r{n}", (5, 6, 7 + n), sampling, speculative=speculative))
    while engine.has_work:
        for event in engine.step():
            found.setdefault(event.request_id, []).extend(event.token_ids)
    return [tuple(found[f"r{n}"]) for n in range(len(OPTIONS))]
