"""Every response names its tier, and the first two are held to their word: a request that says reference or exact-fast
gives, in the engine among others, the tokens of its plain form computed without any cache, draft or guess.

The plain form runs in the driver of tests/decode with dense K,V that are thrown away before every step: every forward
computes everything it sees from the tokens. approximate and exact-distribution each have a counterexample here, so an
answer of theirs that claimed a better tier would fail.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, get_args

import pytest
import torch

from dfastllm.core import DecodeParams, ModelInfo, Request, SpeculativeMethod, SpeculativeParams
from dfastllm.decode.registry import CACHES, POLICIES, RULES, policies, policy_for, seen_by
from dfastllm.engine import Engine, EngineConfig
from dfastllm.engine.speculate.canvas import DraftCanvas
from dfastllm.engine.speculate.model import DraftModel
from dfastllm.errors import UnsupportedError
from dfastllm.models import tiny
from tests.decode.test_conformance import FakeScorer
from tests.kit.driver import request, run

torch.set_num_threads(1)
CONFIG = EngineConfig(max_batch_rows=192, kv_tokens=512, page_size=16)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llada": {},
    "dream": {},
    "sdar": {},
    "fast_dllm_v2": {"block": 8},
    "llada2_moe": {"block": 8, "edit": True},
}
TIERS = ("reference", "exact-fast", "exact-distribution", "approximate")


@cache
def model(family: str, seed: int = 2) -> Any:
    return tiny(family, seed=seed, **FAMILIES[family])


@cache
def scorer(vocab: int) -> FakeScorer:
    return FakeScorer(vocab)


class Seen:
    """A model as a request sees it, for the driver."""

    def __init__(self, net: Any, info: ModelInfo) -> None:
        self.info, self.net = info, net

    def __call__(self, *args: Any) -> Any:
        return self.net(*args)

    def head(self, hidden: torch.Tensor) -> Any:
        return self.net.head(hidden)


def variants() -> Iterator[tuple[str, dict[str, Any]]]:
    """Sampling options and a prompt, greedy and drawn."""
    yield "cold", {"prompt": (5, 6, 7, 5, 6, 7, 5, 6), "max_tokens": 14, "ignore_eos": True}
    yield "hot", {"prompt": tuple(range(3, 14)), "max_tokens": 13, "temperature": 0.9, "seed": 11}


def canvas_requests(info: ModelInfo) -> Iterator[Request]:
    """Rule x cache x guesses, as far as this model takes them."""
    caches = tuple(CACHES) if info.kind == "diffusion" else (None, "sub_block")
    for rule in RULES:
        drafts: tuple[Mapping[str, Any], ...] = ({},)
        if "draft_steps" in RULES[rule].options:
            drafts = ({"draft_steps": 0}, {"draft_steps": 3, "forward_rows": 1e6})
        for kept in caches:
            for options in drafts:
                for name, kwargs in variants():
                    decode = DecodeParams(rule=rule, cache=kept, block_length=4, options=options)  # type: ignore[arg-type]
                    label = f"{rule}-{kept}-{options.get('draft_steps', 0)}-{name}"
                    yield request(**{"prompt": (), **kwargs}, name=label, decode=decode)


def drafted_requests(info: ModelInfo) -> Iterator[Request]:
    """Speculation method x acceptance, of a model that decodes autoregressively."""
    decode = None if info.kind == "ar" else DecodeParams(rule="ar")
    for method in get_args(SpeculativeMethod):
        for acceptance in ("coupled", "rejection"):
            for name, kwargs in variants():
                asked = SpeculativeParams(method, 4, acceptance=acceptance, adaptive=False)  # type: ignore[arg-type]
                yield replace(request(**kwargs, name=f"{method}-{acceptance}-{name}", decode=decode), speculative=asked)


def plain(req: Request) -> Request:
    """The request without what is there to make it fast."""
    decode = req.decode
    if decode is not None and decode.rule != "ar":
        kept = None if decode.cache in (None, "sub_block") else "none"
        options = {k: v for k, v in decode.options.items() if k not in ("draft_steps", "forward_rows")}
        if decode.rule == "free_dave":
            decode = replace(decode, rule="schedule")
        decode = replace(decode, cache=kept, options=options)  # type: ignore[arg-type]
    return replace(req, decode=decode, speculative=None)


def reference(family: str, req: Request) -> list[int]:
    net = model(family)
    req = plain(req)
    info = seen_by(req, net.info)
    policy = policy_for(req, info, scorer(info.vocab_size))
    result = run(policy, Seen(net, info), req, drop=lambda step: step % 2 == 0)  # a forward between may only rebuild
    return result.output[:-1] if result.finish == "stop" else result.output


def answers(family: str) -> dict[str, tuple[Request, list[int], str]]:
    """Every request that the model takes, served together: (request, tokens, tier)."""
    net = model(family)
    vocab = net.info.vocab_size
    drafters: dict[str, Any] = {}
    if net.info.kind == "ar" or net.info.causal:
        drafters["draft_model"] = DraftModel(model("llama", 9 if family == "llama" else 2), CONFIG)
        drafters["diffusion"] = DraftCanvas(model("llada"), CONFIG)

    def chosen(req: Request, info: ModelInfo) -> Any:
        return policy_for(req, info, scorer(vocab))

    engine = Engine(net, config=CONFIG, drafters=drafters, choose=chosen)
    asked = [] if net.info.kind == "ar" else list(canvas_requests(net.info))
    if drafters:
        asked += drafted_requests(net.info)
    served: list[Request] = []
    for req in asked:
        try:
            engine.add(req)
        except UnsupportedError:
            continue
        served.append(req)
    tokens: dict[str, list[int]] = {r.request_id: [] for r in served}
    tiers: dict[str, str] = {}
    while engine.has_work:
        for event in engine.step():
            tokens[event.request_id] += event.token_ids
            if event.finish is not None:
                assert event.finish.error is None
                tiers[event.request_id] = event.finish.usage.exactness
    return {r.request_id: (r, tokens[r.request_id], tiers[r.request_id]) for r in served}


@cache
def judged(family: str) -> tuple[tuple[str, str, bool], ...]:
    """(request, tier, whether it gave the tokens of its plain form)."""
    return tuple((name, tier, got == reference(family, r)) for name, (r, got, tier) in answers(family).items())


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_tiers_give_the_plain_tokens(family: str) -> None:
    rows = judged(family)
    assert len(rows) >= 20
    assert {tier for _, tier, _ in rows} <= set(TIERS)
    wrong = [name for name, tier, same in rows if tier in ("reference", "exact-fast") and not same]
    assert not wrong


def test_inexact_tiers_are_needed() -> None:
    """Each cache that claims to be approximate differs somewhere, and so does rejection sampling."""
    differs = Counter()
    for family in ("llada", "dream", "llama", "fast_dllm_v2"):
        for name, tier, same in judged(family):
            if tier == "approximate":
                differs[name.split("-")[1]] += not same
            if tier == "exact-distribution":
                differs["rejection"] += not same
                assert name.endswith("rejection-hot")
    assert set(differs) == {*CACHES, "rejection"} - {"none"}
    assert all(count > 0 for count in differs.values())


def test_every_decoder_is_judged() -> None:
    seen = {family: [name for name, _, _ in judged(family)] for family in FAMILIES}
    names = [name for rows in seen.values() for name in rows]
    assert {name.split("-")[0] for name in names} == set(RULES) | set(get_args(SpeculativeMethod))
    canvases = {n.split("-")[1] for family in FAMILIES if model(family).info.kind != "ar" for n in seen[family]}
    assert canvases - {"coupled", "rejection"} >= set(CACHES) - {"none"}
    kinds = {model(family).info.kind for family in FAMILIES}
    assert kinds | {"self"} == set(POLICIES) == set(policies(scorer(8)))
    assert {tier for family in FAMILIES for _, tier, _ in judged(family)} == set(TIERS)
