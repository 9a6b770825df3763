"""The second opinion of `apd`: an autoregressive model's scores, and what they do to a canvas."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from dfastllm.core import DecodeParams
from dfastllm.decode import ModelScorer, policies, policy_for
from dfastllm.engine import Engine
from dfastllm.errors import UnsupportedError
from dfastllm.models import tiny
from tests.kit.driver import FakeModel, attention, info, request, run

torch.set_num_threads(1)
DRAFT = tiny("llama", seed=2)
TARGET = tiny("llada", seed=2)
SCORER = ModelScorer(DRAFT)


def test_scores_are_the_models_log_probabilities() -> None:
    tokens = [5, 6, 7, 8, 9, 10, 11]

    def attend(layer: int, _: object, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, torch.ones(len(q), len(k), dtype=torch.bool).tril())

    with torch.no_grad():
        whole = torch.log_softmax(DRAFT.head(DRAFT(torch.tensor(tokens), torch.arange(7), attend)).float(), dim=-1)
    for count in (1, 3, 6):
        got = SCORER.score(tokens, count)
        assert got.shape == (count, DRAFT.info.vocab_size)
        assert torch.allclose(got, whole[6 - count : 6], atol=1e-5)
        assert torch.equal(got, SCORER.score(tokens, count))


def apd(weight: float, **options: int) -> DecodeParams:
    return DecodeParams(rule="apd", block_length=8, options={"apd_mixture_weight": weight, **options})


def test_the_weight_trades_speed_for_agreement() -> None:
    """At weight 1 only the diffusion model speaks: every draft agrees with itself, a block is one step. With the other
    model's word steps get shorter, and never empty."""
    forwards = {}
    for weight in (1.0, 0.9, 0.5, 0.0):
        result = run(policies(SCORER)["diffusion"], TARGET, request(max_tokens=24, decode=apd(weight), ignore_eos=True))
        forwards[weight] = result.forwards
        decided = [p for commit in result.commits for p in sorted(commit.fixed)]
        assert decided == list(range(3, 27))  # strictly left to right
    assert forwards[1.0] == 3
    assert 3 < forwards[0.5] <= 24
    assert forwards[0.0] >= forwards[0.9]


def test_lookahead_bounds_a_step() -> None:
    decode = apd(1.0, max_lookahead=3)
    result = run(policies(SCORER)["diffusion"], TARGET, request(max_tokens=8, decode=decode, ignore_eos=True))
    assert [len(c.fixed) for c in result.commits] == [3, 3, 2]


def test_in_an_engine() -> None:
    """An engine takes the scorer through its choice of policy."""
    asked = request(max_tokens=16, decode=apd(0.7), ignore_eos=True)
    engine = Engine(TARGET, choose=partial(policy_for, scorer=SCORER))
    engine.add(asked)
    got: list[int] = []
    while engine.has_work:
        got += [t for event in engine.step() for t in event.token_ids]
    assert got == run(policies(SCORER)["diffusion"], TARGET, asked).output
    with pytest.raises(UnsupportedError, match="draft model"):
        Engine(TARGET).add(asked)


def test_unfit_models_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="autoregressive"):
        ModelScorer(TARGET)
    other = ModelScorer(FakeModel(info("ar")))
    with pytest.raises(UnsupportedError, match="vocabulary"):
        policies(other)["diffusion"].compile(request(decode=apd(0.7)), TARGET.info)
