"""The law of decode/policy.py, for every registered policy x rule x cache, on fake and on tiny random models."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from dfastllm.core import Commit, DecodeParams, Request, SequenceState, Span, SpeculativeParams
from dfastllm.decode.canvas.choice import KEEPS, caches_of
from dfastllm.decode.registry import CACHES, POLICIES, RULES, policies, policy_for
from dfastllm.errors import UnsupportedError
from dfastllm.kernels.rows import DenseRows
from dfastllm.models import tiny
from tests.kit.driver import FakeModel, Result, Store, apply, info, request, run, run_span, start

torch.set_num_threads(1)


class FakeScorer:
    """An autoregressive opinion that depends on the last two tokens only. Pure."""

    def __init__(self, vocab: int) -> None:
        self.vocab_size = vocab
        g = torch.Generator().manual_seed(5)
        self.table = torch.randn(vocab, vocab, generator=g)

    def score(self, tokens: Any, count: int) -> torch.Tensor:
        at = range(len(tokens) - count, len(tokens))
        rows = torch.stack([self.table[tokens[i - 1]] + 0.5 * self.table[tokens[max(0, i - 2)]] for i in at])
        return torch.log_softmax(rows * 2, dim=-1)


MODELS: dict[str, Callable[[], Any]] = {
    "ar": lambda: FakeModel(info("ar"), sharp=3),
    "diffusion": lambda: FakeModel(info("diffusion", edit=True), sharp=5),
    "shifted": lambda: FakeModel(info("diffusion", shift=1, confidence="filtered"), sharp=5),
    "block": lambda: FakeModel(info("block", edit=True, block=8, confidence="drawn"), sharp=5),
    "block-shifted": lambda: FakeModel(info("block", shift=1, ar_first=True, block=8), sharp=5),
    "self": lambda: FakeModel(info("ar", mask_id=36, causal=True, shift=1), sharp=2),
    "llama": lambda: tiny("llama"),
    "llada": lambda: tiny("llada"),
    "dream": lambda: tiny("dream"),
    "sdar": lambda: tiny("sdar"),
    "fast_dllm_v2": lambda: tiny("fast_dllm_v2", block=8),
    "llada2_moe": lambda: tiny("llada2_moe", block=8, edit=True),
}
FAKES = ("ar", "diffusion", "shifted", "block", "block-shifted")

model = cache(lambda name: MODELS[name]())


@cache
def scorer(vocab: int) -> FakeScorer:
    return FakeScorer(vocab)


@dataclass(frozen=True)
class Case:
    model: str
    rule: str | None = None
    cache: str | None = None
    guided: bool = False
    first: str = ""

    def __str__(self) -> str:
        more = ("guided" if self.guided else "", self.first)
        return "-".join(str(part) for part in (self.model, self.rule, self.cache, *more) if part)

    @property
    def limit(self) -> int:
        """Rows of a chunk: few, but for rules that run guesses as far as they fit into it."""
        return 96 if self.rule == "free_dave" else 8

    @property
    def policy(self) -> Any:
        info = model(self.model).info
        return policies(scorer(info.vocab_size))["self" if self.model == "self" else info.kind]

    def requests(self) -> list[Request]:
        """Different prompts, lengths and options, so that a group of them is as mixed as it gets."""
        if self.rule is None:
            drafts = SpeculativeParams("self", num_speculative_tokens=4) if self.model == "self" else None
            asked = [
                request((5, 6, 7), name="greedy", max_tokens=9),
                request((9, 8), name="hot", max_tokens=12, temperature=0.9, top_p=0.8, seed=3, logprobs=2),
                request(range(3, 20), name="few", max_tokens=7, temperature=1.2, top_k=4, seed=4, min_tokens=5),
                request((4,) * 5, name="pen", max_tokens=9, repetition_penalty=1.3, frequency_penalty=0.5),
            ]
            return [replace(r, speculative=drafts) for r in asked]
        block = 4 if model(self.model).info.kind == "block" else 6

        options: dict[str, Any] = {"forward_rows": 200} if self.rule == "free_dave" else {}
        options |= {"first_token": self.first} if self.first else {}
        guided = {"cfg_scale": 0.7, "logits_eos_inf": True, "confidence_eos_eot_inf": True} if self.guided else {}

        def decode(**changes: Any) -> DecodeParams:
            fields = {"block_length": block, "options": options, **guided, **changes}
            return DecodeParams(rule=self.rule, cache=self.cache, **fields)  # type: ignore[arg-type]

        out = [
            request((5, 6, 7), name="greedy", decode=decode(), max_tokens=12),
            request((9, 8), name="hot", decode=decode(provisional=True), max_tokens=9, temperature=0.8, seed=3),
            request(range(3, 13), name="steps", decode=decode(steps=8, early_stop=False), max_tokens=12, logprobs=1),
            request(
                (4,) * 5, name="odd", decode=decode(), max_tokens=7, temperature=0.5, top_k=6, seed=4, min_tokens=6
            ),
        ]
        if model(self.model).info.kind == "diffusion":
            out.append(request((5, 3), name="infill", suffix=(7, 8, 9), decode=decode(), max_tokens=8))
        return out


def cases() -> Iterator[Case]:
    yield Case("ar")
    yield Case("self")
    yield Case("llama")
    for name in ("diffusion", "shifted", "block", "block-shifted"):
        for rule in RULES:
            info = model(name).info
            needs = RULES[rule].needs
            if ("edit" in needs and not info.edit) or ("shadow" in needs and info.shift):
                continue
            if "held" in needs and info.ar_first:
                continue
            every = caches_of(info.kind)
            shifted = every if rule in ("schedule", "free_dave", "threshold") else ("dual",)
            blocks = (None, *every) if rule in ("schedule", "threshold", "klass", "wino", "edit") else (None,)
            for kept in {"diffusion": every, "shifted": shifted}.get(name, blocks):
                if rule == "free_dave" and kept in KEEPS:  # refused: tests/decode/test_dave.py
                    continue
                yield Case(name, rule, kept)
    for name in ("llada", "dream"):
        for rule, kept in (("schedule", "none"), ("threshold", "dual"), ("factor", "prefix"), ("credit", "windowed")):
            yield Case(name, rule, kept)
        yield Case(name, "free_dave", "none")
    yield Case("llada", "wino", "dual")
    for name in ("sdar", "fast_dllm_v2", "llada2_moe"):
        yield Case(name, "threshold")
        yield Case(name, "free_dave")
        yield Case(name, "schedule")
        yield Case(name, "threshold", "sub_block")
    yield Case("llada2_moe", "edit")
    yield Case("diffusion", "threshold", "none", guided=True)
    yield Case("shifted", "schedule", "none", guided=True)
    yield Case("llada", "schedule", "none", guided=True)
    yield Case("shifted", "threshold", "prefix", first="by_rule")
    yield Case("dream", "schedule", "dual", first="by_rule")


ALL = list(cases())


@cache
def solo(case: Case) -> dict[str, Result]:
    """Every request of a case alone, with the law on purity, stability and positions watched at each step."""
    return {
        r.request_id: run(case.policy, model(case.model), r, limit=case.limit, watch=watch) for r in case.requests()
    }


def watch(seq: SequenceState, span: Span, commit: Commit) -> None:
    mask, first = seq.model.mask_id, seq.canvas_start
    assert commit.stable >= seq.stable
    assert all(p >= first for p in (*commit.fixed, *commit.masked))
    assert all(p >= seq.stable for p in (*commit.fixed, *commit.masked)), "a stable token changed"
    assert all(token != mask for token in commit.fixed.values())
    assert all(token != mask for token in commit.provisional.values())
    assert not set(commit.fixed) & set(commit.masked)
    assert not set(commit.fixed) & set(commit.provisional)
    if seq.sampling.logprobs is not None:
        decided = set(commit.fixed) - ({p for p in commit.fixed if p >= commit.stable} if commit.finish else set())
        assert decided <= set(commit.logprobs)
    drafting = span.attend == "full" and seq.model.kind == "ar"  # self-speculation's first phase
    if span.want and not drafting:
        assert commit.fixed or commit.masked or commit.block_done, "a step decided nothing"


def visible(result: Result) -> list[int]:
    return result.output


@pytest.mark.parametrize("case", ALL, ids=str)
def test_ends_in_bounds_and_leaves_no_mask(case: Case) -> None:
    for r in case.requests():
        result = solo(case)[r.request_id]
        steps = sum(bool(span.want) for span in result.spans)
        assert steps <= case.policy.bound(case.policy.compile(r, result.seq.model))
        assert all(c.finish is None for c in result.commits[:-1])
        assert result.seq.model.mask_id not in result.seq.tokens
        assert 1 <= len(result.output) <= r.sampling.max_tokens
        if result.finish == "length":
            assert len(result.output) == r.sampling.max_tokens
        assert tuple(result.seq.tokens[: len(r.prompt)]) == r.prompt
        assert tuple(result.seq.tokens[len(result.seq.tokens) - len(r.suffix) :]) == r.suffix


@pytest.mark.parametrize("case", ALL, ids=str)
def test_pure(case: Case) -> None:
    """plan and absorb write nothing and answer the same when asked again."""
    for r in case.requests()[:2]:
        seq, store = start(case.policy, r, model(case.model).info), Store()
        for _ in range(1000):
            before = copy.deepcopy((seq.tokens, seq.kv_len, seq.stable, seq.forwards)), seq.policy
            span = case.policy.plan(seq, case.limit)
            assert case.policy.plan(seq, case.limit) == span
            logits = run_span(model(case.model), seq, span, store) if span.store in ("none", "scratch") else None
            if logits is None:
                kept = seq.kv_len
                logits = run_span(model(case.model), seq, span, store)
                after, seq.kv_len = seq.kv_len, kept
            else:
                after = seq.kv_len
            (one,) = case.policy.absorb([(seq, span)], DenseRows(logits.clone()))
            (two,) = case.policy.absorb([(seq, span)], DenseRows(logits.clone()))
            assert plain(one) == plain(two)
            assert before == ((seq.tokens, seq.kv_len, seq.stable, seq.forwards), seq.policy)
            seq.kv_len = after
            apply(seq, one)
            if one.finish:
                break
        assert seq.tokens[seq.canvas_start : seq.stable] == solo(case)[r.request_id].output


def plain(c: Commit) -> tuple[Any, ...]:
    """A commit without its state (which may hold tensors)."""
    return c.fixed, c.masked, c.kv_len, c.stable, c.finish, c.logprobs, c.provisional, c.block_done


@pytest.mark.parametrize("case", ALL, ids=str)
def test_independent_of_the_group(case: Case) -> None:
    """Random subsets of all requests, absorbed together in random order, end as they do alone."""
    rng = random.Random(str(case))
    policy, net = case.policy, model(case.model)
    alive = [(start(policy, r, net.info), Store()) for r in case.requests()]
    done: dict[str, list[int]] = {}
    commits: dict[str, list[Any]] = {}
    while alive:
        chosen = rng.sample(alive, rng.randint(1, len(alive)))
        items = [(seq, policy.plan(seq, case.limit)) for seq, _ in chosen]
        logits = torch.cat(
            [run_span(net, seq, span, store) for (seq, span), (_, store) in zip(items, chosen, strict=True)]
        )
        for (seq, _), commit in zip(items, policy.absorb(items, DenseRows(logits)), strict=True):
            apply(seq, commit)
            commits.setdefault(seq.request.request_id, []).append(plain(commit))
            if commit.finish is not None:
                done[seq.request.request_id] = seq.tokens[seq.canvas_start : seq.stable]
        alive = [(seq, store) for seq, store in alive if seq.request.request_id not in done]
    for name, result in solo(case).items():
        assert done[name] == result.output
        assert commits[name] == [plain(c) for c in result.commits]


class CountedRows(DenseRows):
    """Notes of which rows logits were made, over a whole step."""

    def __init__(self, logits: torch.Tensor, numbers: Any = None, dense: set[int] | None = None) -> None:
        super().__init__(logits)
        self.numbers = np.arange(self.count) if numbers is None else numbers
        self.dense: set[int] = set() if dense is None else dense

    def _logits(self) -> Any:
        self.dense.update(self.numbers.tolist())
        return super()._logits()

    def _take(self, index: Any) -> CountedRows:
        return CountedRows(self._values[torch.from_numpy(index)], self.numbers[index], self.dense)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_a_row_takes_its_own_way_and_spoils_no_other(case: Case) -> None:
    """Logits are made of the same rows alone and in a group; rows of NaN and infinity raise nothing and leave the
    commits of others as they were."""
    policy, net = case.policy, model(case.model)
    alive = [(start(policy, r, net.info), Store()) for r in case.requests()]
    for step in range(4):
        items = [(seq, policy.plan(seq, max(64, case.limit))) for seq, _ in alive]
        parts = [run_span(net, seq, span, store) for (seq, span), (_, store) in zip(items, alive, strict=True)]
        ends = np.cumsum([len(part) for part in parts])
        rows = CountedRows(torch.cat(parts))
        together = policy.absorb(items, rows)
        assert rows.finite().all()
        for item, part, end, commit in zip(items, parts, ends, together, strict=True):
            alone = CountedRows(part.clone())
            assert plain(policy.absorb([item], alone)[0]) == plain(commit)
            first = int(end) - len(part)
            assert {first + r for r in alone.dense} == {r for r in rows.dense if first <= r < end}
        bad = step % len(parts)
        spoiled = torch.cat(
            [part.fill_((float("nan"), float("inf"))[step % 2]) if i == bad else part for i, part in enumerate(parts)]
        )
        broken = DenseRows(spoiled)
        answers = policy.absorb(items, broken)
        sick = set(range(int(ends[bad]) - len(parts[bad]), int(ends[bad])))
        assert set(np.flatnonzero(~broken.finite()).tolist()) == sick
        assert [plain(c) for i, c in enumerate(answers) if i != bad] == [
            plain(c) for i, c in enumerate(together) if i != bad
        ]
        for (seq, _), commit in zip(items, together, strict=True):
            apply(seq, commit)
        alive = [pair for pair, commit in zip(alive, together, strict=True) if commit.finish is None]
        if not alive:
            break


@pytest.mark.parametrize("case", ALL, ids=str)
def test_recovers_from_preemption_at_every_step(case: Case) -> None:
    """K,V thrown away before every deciding step, and before random ones: the decisions are unchanged."""
    for r in case.requests():
        expected = [
            (c.fixed, c.masked, c.stable, c.finish) for c in solo(case)[r.request_id].commits if c.fixed or c.masked
        ]
        for often in (1.0, 0.3)[: 2 if r.request_id == "hot" else 1]:
            rng = random.Random(f"{case}{often}")
            last: list[Span] = []

            def drop(step: int, rng: random.Random = rng, often: float = often, last: list[Span] = last) -> bool:
                return bool(last and last[-1].want and rng.random() < often)

            result = run(
                case.policy,
                model(case.model),
                r,
                limit=case.limit,
                drop=drop,
                watch=lambda seq, span, commit, last=last: last.append(span),
            )
            assert [(c.fixed, c.masked, c.stable, c.finish) for c in result.commits if c.fixed or c.masked] == expected


@pytest.mark.parametrize("case", [c for c in ALL if c.model in FAKES and c.cache in (None, "none")], ids=str)
def test_draws_are_keyed_by_the_seed(case: Case) -> None:
    """Another seed gives another text for some request; the same seed the same text."""
    net = model(case.model)
    changed = 0
    for seed in range(3):
        first, second = (
            run(
                case.policy,
                net,
                request(
                    (9, 8), decode=case.requests()[1].decode, max_tokens=7, temperature=1.5, seed=s, ignore_eos=True
                ),
            ).output
            for s in (seed, seed + 1)
        )
        changed += first != second
    assert changed >= 2


def test_every_policy_is_here() -> None:
    assert {c.policy.name for c in ALL} == set(POLICIES)
    assert {c.rule for c in ALL} - {None} == set(RULES)
    assert {c.cache for c in ALL} - {None} == set(CACHES)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_policy_for_picks_by_kind(name: str) -> None:
    info = model(name).info
    policy = policy_for(request(), info)
    assert policy is POLICIES[info.kind]
    assert policy.name == info.kind
    with pytest.raises(UnsupportedError):
        next(p for kind, p in POLICIES.items() if kind != info.kind).compile(request(), info)
