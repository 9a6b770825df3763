"""Every unmasking rule against its float64 twin, step by step until the block is done, on adversarial random logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfastllm.core import DecodeParams, SequenceState
from dfastllm.decode.canvas.candidates import active_rows
from dfastllm.decode.canvas.denoise import denoise, settle
from dfastllm.decode.canvas.diffusion import MaskedDiffusion
from dfastllm.decode.canvas.layout import CanvasState
from dfastllm.decode.canvas.rules import quota
from dfastllm.decode.registry import RULES
from dfastllm.decode.sampling import row_keys, uniform
from dfastllm.errors import UnsupportedError, ValidationError
from dfastllm.kernels.rows import DenseRows
from tests.kit.driver import apply, info, request, start
from tests.kit.twins import TWINS, Ask, best, softmax

MODEL = info("diffusion", vocab_size=11, mask_id=10, edit=True, eos_ids=(1,))
VOCAB, MASK = MODEL.vocab_size, 10

# Ranges that make a rule's thresholds matter on random rows.
VARIED: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "schedule": {"remasking": st.sampled_from(["low_confidence", "random", "entropy", "margin"])},
    "dream": {
        "ordering": st.sampled_from(["origin", "maskgit_plus", "topk_margin", "entropy"]),
        "alg_temp": st.sampled_from([0.0, 0.3]),
        "eps": st.sampled_from([1e-3, 0.1]),
    },
    "threshold": {"threshold": st.floats(0.2, 0.95)},
    "factor": {"factor": st.floats(0.3, 3), "last_rank": st.integers(0, 1)},
    "entropy_bound": {"gamma": st.floats(0.05, 3), "order": st.sampled_from(["entropy", "confidence", "margin"])},
    "credit": {"threshold": st.floats(0.3, 0.95)},
    "hierarchy": {"threshold": st.floats(0.5, 0.95), "low_threshold": st.floats(0.1, 0.6)},
    "hierarchy_remask": {
        "threshold": st.floats(0.5, 0.95),
        "low_threshold": st.floats(0.1, 0.6),
        "remask_threshold": st.floats(0.1, 0.7),
    },
    "klass": {
        "threshold": st.floats(0.2, 0.8),
        "kl_threshold": st.floats(0.1, 3),
        "kl_history_length": st.integers(1, 3),
    },
    "local_leap": {
        "threshold": st.floats(0.5, 0.9),
        "relaxed_threshold": st.floats(0.2, 0.6),
        "radius": st.integers(0, 4),
    },
    "wino": {"threshold": st.floats(0.2, 0.7), "threshold_back": st.floats(0.2, 0.99), "min_accept": st.integers(1, 4)},
    "edit": {
        "threshold": st.floats(0.3, 0.7),
        "edit_threshold": st.floats(0.3, 0.9),
        "max_post_steps": st.integers(1, 5),
    },
    "apd": {"apd_mixture_weight": st.floats(0.2, 0.9), "max_lookahead": st.integers(1, 12)},
}
VARIED["free_dave"] = VARIED["schedule"]


class Opinion:
    """Pure random scores of a token given the one before."""

    vocab_size = VOCAB

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(1)
        self.table = torch.log_softmax(2 * torch.randn(VOCAB, VOCAB, generator=g), dim=-1)

    def score(self, tokens: Sequence[int], count: int) -> torch.Tensor:
        return torch.stack([self.table[tokens[i - 1]] for i in range(len(tokens) - count, len(tokens))])


OPINION = Opinion()
POLICY = MaskedDiffusion(OPINION)


def logits_of(seed: int, step: int, length: int, scale: float, twins: bool, calm: bool = False) -> np.ndarray:
    """float32 [length, VOCAB]; with `twins` some rows are equal, so that ties must be broken; with `calm` rows change
    little from step to step."""
    rng = np.random.default_rng([seed, step])
    rows = (rng.standard_normal((length, VOCAB)) * scale).astype(np.float32)
    if calm:
        rows = 0.2 * rows + logits_of(seed, 1 << 20, length, scale, False)
    if twins and length > 2:
        rows[length // 2] = rows[0]
        rows[length - 1] = rows[0]
    return rows


def by_twin(
    name: str, seq: SequenceState, a: Any, rows: np.ndarray, memory: Any
) -> tuple[dict[int, int], set[int], Any, Any]:
    """What the twin commits: (fixed, remasked, memory, closed), positions absolute."""
    state: CanvasState = seq.policy
    held = [None if t == MASK else t for t in seq.tokens[a.start : a.stop]]
    drawn = state.step - state.block_step if state.choice.options.get("ordering") == "origin" else state.step
    keys = row_keys(seq.seed, drawn, range(a.start, a.stop), salt=1)
    size, steps = a.stop - a.start, state.layout.share(state.block)
    if name == "dream" and state.layout.steps is not None:
        steps = state.layout.steps // state.layout.count + (state.block < state.layout.steps % state.layout.count)
    first = next((p for p in range(a.start, a.stop) if seq.tokens[p] == MASK), a.stop)
    answer = TWINS[name](
        Ask(
            held,
            rows.astype(np.float64).tolist(),
            MASK,
            dict(state.choice.options),
            state.block_step,
            steps,
            size,
            memory,
            uniform(keys).tolist(),
            lambda tokens, count: OPINION.score(tokens, count).double().tolist(),
            seq.tokens[:first],
        )
    )
    due = max(1, quota(size, steps, min(state.block_step, steps - 1)))
    if name in ("dream", "klass", "hierarchy_remask"):  # their own business
        due = 0
    accept = answer.accept | set(answer.ranking[:due])
    token = {j: best(softmax(rows[j].astype(np.float64).tolist(), MASK)) for j in accept}
    if name == "credit":
        token = {j: answer.rewrite[j] for j in accept}
    else:
        token.update(answer.rewrite)
    return (
        {a.start + j: t for j, t in token.items()},
        {a.start + j for j in answer.remask},
        answer.memory,
        answer.closed,
    )


Said = tuple[dict[int, int], set[int], Any]  # fixed, masked again, closed


def beside_its_twin(name: str, data: st.DataObject) -> Iterator[tuple[Said, Said]]:
    """What the rule and its twin say at each step of a random canvas."""
    length = data.draw(st.integers(1, 9), label="block")
    steps = data.draw(st.one_of(st.none(), st.integers(2, 2 * length + 2)), label="steps")
    options = {k: data.draw(v, label=k) for k, v in VARIED[name].items()}
    seed, scale = data.draw(st.integers(0, 10_000), label="seed"), data.draw(st.floats(0.5, 4), label="scale")
    ties, calm = data.draw(st.booleans(), label="ties"), data.draw(st.booleans(), label="calm")
    order = options.pop("remasking", "low_confidence")
    decode = DecodeParams(
        rule=name, block_length=length, steps=steps, remasking=order, options=options, early_stop=False
    )
    seq = start(POLICY, request((3, 4, 5), decode=decode, max_tokens=2 * length, ignore_eos=True, seed=seed), MODEL)
    memory: Any = None
    for step in range(40 * length):
        state: CanvasState = seq.policy
        a = active_rows(seq, *state.bounds)
        rows = logits_of(seed, step, a.stop - a.start, scale, ties, calm)
        fixed, again, memory, closed = by_twin(name, seq, a, rows, memory)
        logits = torch.from_numpy(rows[[p - a.start for p in a.positions]])
        (decision,) = denoise([a], DenseRows(logits), OPINION)
        yield (dict(decision.fixed), set(decision.remask), decision.closed), (fixed, again, closed)
        commit = settle(a, decision, kv_len=None)
        apply(seq, commit)
        if commit.block_done:
            memory = None
        if commit.finish is not None:
            assert MASK not in seq.tokens
            return
    raise AssertionError("the block is never done")


@pytest.mark.parametrize("name", sorted(RULES))
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_rule_equals_its_twin(name: str, data: st.DataObject) -> None:
    for said, twin in beside_its_twin(name, data):
        assert said == twin


def test_every_rule_has_a_twin() -> None:
    assert set(TWINS) == set(RULES) == set(VARIED)


@pytest.mark.parametrize(("size", "steps"), [(8, 1), (8, 3), (8, 8), (5, 2), (1, 1), (32, 7)])
def test_quota_sums_to_the_block(size: int, steps: int) -> None:
    shares = [quota(size, steps, i) for i in range(steps)]
    assert sum(shares) == size
    assert max(shares) - min(shares) <= 1
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("last_rank", [0, 1])
def test_factor_takes_a_last_rank_that_fails_only_where_it_is_asked_to(last_rank: int) -> None:
    """The published loop accepts rank n when only rank n fails."""
    rows = torch.full((3, VOCAB), -20.0)
    rows[0, 2], rows[1, 3] = 20.0, 20.0  # two certain rows
    rows[2, 4] = rows[2, 5] = 1.0  # c = 0.5 < 1 - 1/4
    decode = DecodeParams(rule="factor", factor=1.0, block_length=3, options={"last_rank": last_rank})
    seq = start(POLICY, request(decode=decode, max_tokens=3), MODEL)
    (decision,) = denoise([active_rows(seq, 3, 6)], DenseRows(rows))
    assert dict(decision.fixed) == {3: 2, 4: 3, **({5: 4} if last_rank else {})}


def test_entropy_bound_excludes_the_largest_from_the_sum() -> None:
    """Two rows of 0.69 nats each: the sum less the largest is 0.69, so both go at gamma 0.7 and one at 0.6."""
    rows = torch.full((2, VOCAB), -30.0)
    rows[0, 2] = rows[0, 3] = rows[1, 4] = rows[1, 5] = 0.0
    for gamma, count in ((0.7, 2), (0.6, 1)):
        decode = DecodeParams(rule="entropy_bound", options={"gamma": gamma}, block_length=2)
        seq = start(POLICY, request(decode=decode, max_tokens=2), MODEL)
        (decision,) = denoise([active_rows(seq, 3, 5)], DenseRows(rows.clone()))
        assert len(decision.fixed) == count


def test_dream_positions_follow_alg_temp() -> None:
    """The first position chosen is distributed as softmax(confidence / alg_temp)."""
    rows = torch.zeros(4, VOCAB)
    rows[torch.arange(4), torch.tensor([2, 3, 4, 5])] = torch.tensor([0.0, 1.0, 2.0, 3.0])
    confidence = torch.softmax(rows[:, :MASK].double(), dim=-1).amax(dim=-1)
    expected = torch.softmax(confidence / 0.2, dim=-1).numpy()
    decode = DecodeParams(rule="dream", options={"alg_temp": 0.2}, block_length=4, steps=4)
    counts = np.zeros(4)
    trials = 2000
    for seed in range(trials):
        seq = start(POLICY, request(decode=decode, max_tokens=4, seed=seed), MODEL)
        (decision,) = denoise([active_rows(seq, 3, 7)], DenseRows(rows.clone()))
        (chosen,) = decision.fixed
        counts[chosen - 3] += 1
    chi2 = ((counts - trials * expected) ** 2 / (trials * expected)).sum()
    assert chi2 < 16.3  # 3 degrees of freedom, p = 0.001


def test_steps_are_a_minimum_rate_for_every_rule() -> None:
    """Flat rows convince no rule, yet a block of 8 in 2 steps takes 2."""
    for name in sorted(set(RULES) - {"edit"}):
        decode = DecodeParams(rule=name, steps=2, block_length=8)
        seq = start(POLICY, request(decode=decode, max_tokens=8, ignore_eos=True), MODEL)
        for step in range(2):
            a = active_rows(seq, 3, 11)
            logits = torch.from_numpy(logits_of(1, step, len(a.positions), 0.01, False))
            (decision,) = denoise([a], DenseRows(logits), OPINION)
            apply(seq, settle(a, decision, kv_len=None))
        assert MASK not in seq.tokens, name


def test_max_parallel_tokens_and_early_stop_confidence() -> None:
    rows = torch.full((6, VOCAB), -20.0)
    rows[:, 2] = 20.0
    for options, count in (
        ({}, 6),
        ({"max_parallel_tokens": 2}, 2),
        ({"max_parallel_tokens": 4, "early_stop_confidence": 0.5}, 4),
    ):
        decode = DecodeParams(rule="threshold", block_length=6, options=options)
        seq = start(POLICY, request(decode=decode, max_tokens=6), MODEL)
        (decision,) = denoise([active_rows(seq, 3, 9)], DenseRows(rows.clone()))
        assert len(decision.fixed) == count
    decode = DecodeParams(rule="schedule", block_length=6, options={"early_stop_confidence": 0.9})
    seq = start(POLICY, request(decode=decode, max_tokens=6), MODEL)
    (decision,) = denoise([active_rows(seq, 3, 9)], DenseRows(rows.clone()))
    assert len(decision.fixed) == 6


@pytest.mark.parametrize(
    ("decode", "param"),
    [
        (DecodeParams(rule="nonsense"), "rule"),
        (DecodeParams(rule="threshold", options={"gamma": 0.1}), "gamma"),
        (DecodeParams(rule="threshold", options={"window": 3}, cache="dual"), "window"),
        (DecodeParams(rule="entropy_bound", threshold=0.9), "threshold"),
        (DecodeParams(rule="threshold", factor=1.0), "factor"),
        (DecodeParams(rule="threshold", remasking="random"), "remasking"),
        (DecodeParams(rule="threshold", threshold=0.9, options={"threshold": 0.5}), "threshold"),
        (DecodeParams(rule="apd"), "rule"),
    ],
)
def test_refused_by_name(decode: DecodeParams, param: str) -> None:
    with pytest.raises(
        UnsupportedError if param != "threshold" or decode.rule != "threshold" else ValidationError
    ) as e:
        MaskedDiffusion().compile(request(decode=decode), MODEL)
    assert e.value.param == param


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("local_leap", {"radius": 1.5}),
        ("local_leap", {"radius": -1}),
        ("klass", {"kl_history_length": 0}),
        ("dream", {"ordering": "best"}),
        ("threshold", {"threshold": 2}),
        ("threshold", {"threshold": "high"}),
        ("threshold", {"max_parallel_tokens": True}),
        ("threshold", {"threshold": float("nan")}),
    ],
)
def test_bad_values_are_refused(rule: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as e:
        MaskedDiffusion().compile(request(decode=DecodeParams(rule=rule, options=options)), MODEL)
    assert e.value.param in options


def test_rule_is_chosen_from_threshold_and_factor() -> None:
    for decode, rule in (
        (DecodeParams(), "schedule"),
        (DecodeParams(threshold=0.8), "threshold"),
        (DecodeParams(threshold=0.8, factor=1.5), "factor"),
    ):
        seq = start(MaskedDiffusion(), request(decode=decode), MODEL)
        assert seq.policy.choice.rule == rule


def test_rules_that_need_something_of_the_model_are_refused() -> None:
    plain = info("diffusion")
    with pytest.raises(UnsupportedError, match="edit"):
        POLICY.compile(request(decode=DecodeParams(rule="edit")), plain)
    with pytest.raises(UnsupportedError, match="row before"):
        POLICY.compile(request(decode=DecodeParams(rule="wino")), info("diffusion", shift=1))
    with pytest.raises(UnsupportedError, match="vocabulary"):
        POLICY.compile(request(decode=DecodeParams(rule="apd")), plain)
