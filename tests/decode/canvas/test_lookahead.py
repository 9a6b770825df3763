"""Free draft-and-verify: the steps of the plain rule, one by one, in fewer forwards; how far it looks; refusals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from dfastllm import assemble
from dfastllm.core import Branch, Commit, DecodeParams, Request, SequenceState, Span
from dfastllm.decode.canvas.lookahead import branches_worth
from dfastllm.decode.registry import POLICIES, RULES
from dfastllm.engine import Engine, EngineConfig
from dfastllm.engine.batch import pack
from dfastllm.engine.pages import Pages, PageTable
from dfastllm.engine.runners.native import NativeRunner
from dfastllm.errors import UnsupportedError, ValidationError
from dfastllm.models import tiny
from tests.kit import published_loops as published
from tests.kit.driver import FakeModel, Result, info, request, run, start

torch.set_num_threads(1)
CHEAP = {"draft_steps": 6, "forward_rows": 1e6}  # rows cost nothing: every guess is run
FAKES: dict[str, dict[str, Any]] = {
    "diffusion": {"kind": "diffusion"},
    "shifted": {"kind": "diffusion", "shift": 1},
    "block4": {"kind": "block", "block": 4},
    "block8": {"kind": "block", "block": 8},
    "block-shifted": {"kind": "block", "block": 8, "shift": 1, "ar_first": True},
}
FAMILIES = {"llada": {}, "dream": {}, "sdar": {}, "fast_dllm_v2": {"block": 8}, "llada2_moe": {"block": 8}}


@cache
def fake(name: str, seed: int) -> FakeModel:
    return FakeModel(info(**FAKES[name]), seed=seed, sharp=3 + seed % 4, eos_bias=(seed % 3) * 1.5)


@cache
def small(family: str, seed: int) -> Any:
    return tiny(family, seed=seed, **FAMILIES[family])


def steps_of(result: Result) -> list[tuple[int, int]]:
    """(position, token) of the text in the order in which they were committed."""
    return [(p, t) for c in result.commits for p, t in c.fixed.items() if p < result.seq.stable]


def both(model: Any, rule: str = "schedule", **kwargs: Any) -> tuple[Result, Result]:
    """The same request plain and with guesses."""
    fields = {k: kwargs.pop(k) for k in list(kwargs) if k in DecodeParams.__dataclass_fields__}
    options = fields.pop("options", {})
    prompt = kwargs.pop("prompt", (5, 6, 7))
    results = []
    for more in ({}, CHEAP):
        decode = DecodeParams(rule=rule, options={**options, **more}, **fields)
        results.append(run(POLICIES[model.info.kind], model, request(prompt, decode=decode, **kwargs)))
    return results[0], results[1]


def check(plain: Result, fast: Result) -> tuple[int, int]:
    assert fast.output == plain.output
    assert fast.finish == plain.finish
    assert steps_of(fast) == steps_of(plain)
    one, two = ({p: r for c in x.commits for p, r in c.logprobs.items()} for x in (plain, fast))
    for p, record in two.items():
        if p < fast.seq.stable:
            assert record.token == one[p].token
            assert record.logprob == pytest.approx(one[p].logprob, abs=1e-5)
            assert [t for t, _ in record.top] == [t for t, _ in one[p].top]
    assert fast.forwards <= plain.forwards
    return plain.forwards, fast.forwards


def variants(seed: int, full: bool) -> Iterator[dict[str, Any]]:
    """Requests that differ in rule, order, temperature, rate, length and everything that edits rows."""
    prompt = tuple(range(3, 6 + seed % 7))
    base: dict[str, Any] = {"prompt": prompt, "max_tokens": 13 + seed % 9}
    orders = ("low_confidence", "random", "entropy", "margin")
    yield {**base, "options": {"remasking": orders[seed % 4]}, "ignore_eos": True}
    yield {**base, "options": {"remasking": orders[(seed + 1) % 4]}, "temperature": 0.7, "seed": seed, "logprobs": 2}
    yield {**base, "steps": 8, "logprobs": 1, "provisional": True, "early_stop": seed % 2 == 0}
    yield {**base, "temperature": 1.1, "top_k": 5, "seed": seed, "repetition_penalty": 1.3, "min_tokens": 4}
    yield {**base, "options": {"max_parallel_tokens": 2}, "steps": 20 if full else None}
    dream = ("origin", "maskgit_plus", "topk_margin", "entropy")[seed % 4]
    yield {**base, "rule": "dream", "options": {"ordering": dream, "alg_temp": 0.3 * (seed % 2)}, "seed": seed}
    others = ("threshold", "factor", "entropy_bound", "hierarchy", "local_leap")
    yield {**base, "rule": others[seed % 5], "temperature": 0.5 * (seed % 2), "seed": seed}
    if full:
        yield {**base, "cache": "prefix", "block_length": 8}
        yield {**base, "suffix": (9, 8, 7), "block_length": 5, "ignore_eos": True}
    else:
        yield {**base, "block_length": 4}


@pytest.mark.parametrize("name", FAKES)
def test_equals_the_plain_rule_on_random_models(name: str) -> None:
    plain = fast = 0
    for seed in range(10):
        model = fake(name, seed)
        for kwargs in variants(seed, model.info.kind == "diffusion"):
            a, b = check(*both(model, **{"block_length": None, **kwargs}))
            plain, fast = plain + a, fast + b
    assert fast < 0.85 * plain


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_plain_rule_on_every_family(family: str) -> None:
    plain = fast = 0
    for seed in range(2):
        model = small(family, seed)
        for kwargs in variants(seed, model.info.kind == "diffusion"):
            a, b = check(*both(model, **{"block_length": None, **kwargs}))
            plain, fast = plain + a, fast + b
    assert fast < 0.9 * plain


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_published_loops(seed: int) -> None:
    """LLaDA's and SDAR's own loops, which know nothing of guesses."""
    params: dict[str, Any] = {"rule": "free_dave", "options": CHEAP, "early_stop": False}
    for shift in (0, 1):
        model = FakeModel(info("diffusion", shift=shift), seed=seed, sharp=4)
        for steps in (8, 3):
            decode = DecodeParams(block_length=8, steps=3 * steps, **params)
            result = run(POLICIES["diffusion"], model, request(decode=decode, max_tokens=24, ignore_eos=True))
            expected, forwards = published.canvas(model, (5, 6, 7), 24, 8, "none", published.quota(steps))
            assert result.output == expected
            assert result.forwards <= forwards - (steps == 8)
    model = FakeModel(info("block", block=4), seed=seed, sharp=4)
    result = run(POLICIES["block"], model, request(decode=DecodeParams(**params), max_tokens=21, ignore_eos=True))
    expected, forwards = published.blocks(model, (5, 6, 7), 21, 4, published.quota(4))
    assert result.output == expected
    assert result.forwards < forwards


class Steady(FakeModel):
    """Rows that say the same whatever they see: every guess is right."""

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        n = hidden.shape[0]
        return torch.eye(self.info.vocab_size, dtype=torch.float64)[torch.full((n,), 9)] * 5


def test_right_guesses_leave_a_forward_for_as_many_steps_as_run() -> None:
    """16 steps of one token, four guesses beside each but the first, across the ends of blocks."""
    decode = DecodeParams(rule="free_dave", block_length=16, options={"draft_steps": 4, "forward_rows": 1e6})
    model = Steady(info("diffusion"))
    result = run(POLICIES["diffusion"], model, request(decode=decode, max_tokens=16))
    assert [len(c.fixed) for c in result.commits] == [1, 5, 5, 5]
    block = Steady(info("block", block=4))
    result = run(
        POLICIES["block"], block, request((5,) * 4, decode=DecodeParams(rule="free_dave", options=CHEAP), max_tokens=16)
    )
    assert [len(c.fixed) for c in result.commits] == [1, 4, 4, 4, 3]
    assert [(s.start, s.stop, s.store, len(s.branches)) for s in result.spans] == [
        (0, 8, "keep", 0),  # the prompt and the first step
        (4, 8, "scratch", 3),  # the last branch is the finished block and the next one's first step
        (4, 12, "keep", 3),  # stores the finished block
        (8, 16, "keep", 3),
        (12, 20, "keep", 2),  # nothing follows the last block
    ]
    assert [c.kv_len for c in result.commits] == [4, None, 8, 12, 16]
    assert (sum(c.drafted for c in result.commits), sum(c.accepted for c in result.commits)) == (11, 11)


class Fickle(FakeModel):
    """Another best token for every number of tokens decided: a guess is never right."""

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, attend: Any) -> torch.Tensor:
        decided = (ids != self.info.mask_id).sum()
        return torch.full((len(ids), 1), float(decided), dtype=torch.float64)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.eye(self.info.vocab_size, dtype=torch.float64)[3 + hidden[:, 0].long() % 30] * 5


def test_wrong_guesses_are_soon_not_run() -> None:
    decode = DecodeParams(rule="free_dave", options={"draft_steps": 8, "forward_rows": 40})
    result = run(POLICIES["diffusion"], Fickle(info("diffusion")), request(decode=decode, max_tokens=32))
    branches = [len(s.branches) for s in result.spans]
    assert result.forwards == 32
    assert branches[1] > 0
    assert not any(branches[8:])
    assert result.commits[-2].state.ahead.rate < 0.2


def test_branches_worth_is_the_best_of_all() -> None:
    for rate in (0.0, 0.2, 0.5, 0.7, 0.9, 0.99, 1.0):
        for rows in (4, 32, 200):
            for fixed in (0.0, 16.0, 300.0, 1e6):
                speeds = [sum(rate**j for j in range(k + 1)) / math.hypot(fixed, (k + 1) * rows) for k in range(7)]
                k = branches_worth(rate, 6, rows, fixed)
                assert speeds[k] == pytest.approx(max(speeds))
    assert branches_worth(0.99, 4, 32, 0.0) == 0  # every branch costs as much as the step
    assert branches_worth(0.6, 4, 4, 16.0) >= 1
    assert branches_worth(0.6, 4, 128, 16.0) == 0


class Crowded:
    """The policy as it plans when so many sequences run."""

    def __init__(self, policy: Any, company: int) -> None:
        self.policy, self.company = policy, company

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def plan(self, seq: SequenceState, limit: int) -> Span:
        seq.company = self.company
        return self.policy.plan(seq, limit)


def test_in_company_fewer_branches_run_and_the_text_stays() -> None:
    policy, model = POLICIES["block"], fake("block4", 1)
    decode = DecodeParams(rule="free_dave", options={"draft_steps": 6, "forward_rows": 60})
    results = {}
    for company in (1, 4, 64):
        results[company] = run(Crowded(policy, company), model, request(decode=decode, max_tokens=40, ignore_eos=True))
    assert len({tuple(r.output) for r in results.values()}) == 1
    alone, few, many = (sum(len(s.branches) for s in r.spans) for r in results.values())
    assert alone > few > many == 0


def test_branches_keep_to_the_limit() -> None:
    """A span is never longer than the chunk for its branches, and the tokens do not depend on it."""
    model = fake("block8", 3)
    decode = DecodeParams(rule="free_dave", options=CHEAP)
    results = {
        n: run(POLICIES["block"], model, request(decode=decode, max_tokens=24), limit=n) for n in (8, 24, 40, 999)
    }
    assert len({tuple(r.output) for r in results.values()}) == 1
    for limit, result in results.items():
        assert all(s.rows <= max(limit, 16) for s in result.spans)
    assert all(not s.branches for s in results[8].spans)
    assert results[999].forwards < results[8].forwards


def test_guesses_survive_a_preemption() -> None:
    model = fake("block8", 2)
    req = request(decode=DecodeParams(rule="free_dave", options=CHEAP), max_tokens=24, ignore_eos=True)
    dropped: list[Span] = []

    def watch(seq: SequenceState, span: Span, commit: Commit) -> None:
        dropped.append(span)

    calm = run(POLICIES["block"], model, req)
    wild = run(POLICIES["block"], model, req, drop=lambda step: step % 2 == 1, watch=watch)
    assert wild.output == calm.output
    assert [c.fixed for c in wild.commits if c.fixed] == [c.fixed for c in calm.commits]  # the others rebuild
    assert any(s.branches and s.start < s.branches[0].start for s in dropped)


@pytest.mark.parametrize("family", ["llada", "sdar", "fast_dllm_v2", "llada2_moe"])
@pytest.mark.parametrize("native", [False, True])
def test_in_the_engine_among_others(family: str, native: bool) -> None:
    """Many requests at once, half of them with guesses, on pages that are taken away: the tokens of the plain ones."""
    if native and family == "llada2_moe":
        pytest.skip("mixtures of experts run on torch")
    net = tiny(family, seed=2, **FAMILIES[family])
    model = assemble.pack(net, None) if native else net
    engine = Engine(model, config=EngineConfig(max_batch_rows=256, kv_tokens=192, page_size=16))
    got: dict[str, list[int]] = {}
    asked: list[Request] = []
    for i in range(8):
        for name, more in (("plain", {}), ("fast", CHEAP)):
            cache: Any = "none" if net.info.kind == "diffusion" else None
            decode = DecodeParams(rule="schedule", cache=cache, block_length=4, options=more)
            options: dict[str, Any] = {"temperature": 0.6 * (i % 2), "seed": i, "max_tokens": 12, "ignore_eos": i > 4}
            asked.append(request(range(3, 5 + i), name=f"{name}{i}", decode=decode, **options))
    forwards = {"plain": 0, "fast": 0}
    accepted = 0
    while engine.has_work or asked:
        if asked:
            engine.add(asked.pop(0))
        for event in engine.step():
            got.setdefault(event.request_id, []).extend(event.token_ids)
            if event.finish is not None:
                assert event.finish.error is None
                usage = event.finish.usage
                forwards[event.request_id[:-1]] += usage.forwards
                accepted += usage.accepted_tokens
                full = net.info.kind == "diffusion" and event.request_id.startswith("plain")
                assert usage.exactness == ("reference" if full else "exact-fast")
    for i in range(8):
        assert got[f"fast{i}"] == got[f"plain{i}"]
    assert forwards["fast"] < forwards["plain"]
    assert accepted > 0


@pytest.mark.parametrize("quantization", [None, "w8"])
def test_a_branch_within_a_block_gives_the_bits_of_the_plain_step(quantization: str | None) -> None:
    wide = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 160, "heads": 4, "kv_heads": 2}
    model = assemble.pack(tiny("sdar", seed=5, **wide), quantization)  # type: ignore[arg-type]
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        base = 4 * int(torch.randint(1, 20, (1,), generator=g))
        known, one, other = (tuple(torch.randint(3, 150, (n,), generator=g).tolist()) for n in (base, 4, 4))
        pool = Pages(8, 16)
        table = PageTable(pool)
        table.grow(base + 4)
        runner = NativeRunner(model, 128, torch.float32, 16)
        runner.run(pack([(Span(0, known, "block", "keep", block=4), table, 0)]))
        rows = (0, 1, 2, 3)
        plain = runner.run(pack([(Span(base, other, "block", "scratch", rows, 4), table, base)])).logits().clone()
        beside = Span(base, one, "block", "scratch", (0,), 4, branches=(Branch(base, other, rows),))
        assert torch.equal(runner.run(pack([(beside, table, base)])).logits()[1:], plain)


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"cache": "dual"}, UnsupportedError, "cache"),
        ({"cache": "windowed"}, UnsupportedError, "cache"),
        ({"options": {"draft_steps": -1}}, ValidationError, "draft_steps"),
        ({"options": {"draft_steps": 2.5}}, ValidationError, "draft_steps"),
        ({"options": {"forward_rows": -3}}, ValidationError, "forward_rows"),
        ({"rule": "klass", "options": {"draft_steps": 2}}, UnsupportedError, "draft_steps"),
        ({"rule": "wino", "options": {"draft_steps": 2}}, UnsupportedError, "draft_steps"),
        ({"threshold": 0.5}, UnsupportedError, "threshold"),
    ],
)
def test_refused_by_name(fields: dict[str, Any], error: type[ValidationError], param: str) -> None:
    decode = DecodeParams(**{"rule": "free_dave", **fields})
    with pytest.raises(error) as e:
        start(POLICIES["diffusion"], request(decode=decode, max_tokens=8), info("diffusion"))
    assert e.value.param == param


def test_without_guesses_it_is_the_schedule() -> None:
    policy = POLICIES["diffusion"]

    def tier(**fields: Any) -> str:
        return policy.compile(request(decode=DecodeParams(**fields)), info("diffusion")).tier

    assert tier(rule="free_dave") == "exact-fast"
    assert tier(rule="schedule") == tier(rule="free_dave", options={"draft_steps": 0}) == "reference"
    assert tier(rule="schedule", options={"draft_steps": 2}) == "exact-fast"
    assert tier(rule="free_dave", cache="prefix") == "approximate"
    dual = DecodeParams(rule="free_dave", cache="dual", options={"draft_steps": 0})
    result = run(policy, fake("diffusion", 1), request(decode=dual, max_tokens=9))
    assert not any(s.branches for s in result.spans)
    assert {r for r in RULES if "draft_steps" in RULES[r].options} == {
        "schedule", "free_dave", "dream", "threshold", "factor", "entropy_bound", "hierarchy", "local_leap",
    }  # fmt: skip
