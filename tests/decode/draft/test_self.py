"""Self-speculation: the checkpoint's own autoregressive text, drafted by its bidirectional rows; what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from dfastllm import assemble
from dfastllm.core import DecodeParams, FinishReason, ModelInfo, Request, SpeculativeParams
from dfastllm.decode.draft.self_draft import SelfState
from dfastllm.decode.policy import Policy
from dfastllm.decode.registry import POLICIES, policy_for, seen_by
from dfastllm.engine import Engine, EngineConfig
from dfastllm.errors import UnsupportedError, ValidationError
from dfastllm.models import tiny
from tests.kit.driver import FakeModel, Result, info, request, run

torch.set_num_threads(1)
SELF = SpeculativeParams(method="self", num_speculative_tokens=5)
FIXED = replace(SELF, adaptive=False)
AR = DecodeParams(rule="ar")


def policy_of(req: Request, model: ModelInfo) -> Policy:
    """The policy that serves a request on a model, its options checked."""
    seen = seen_by(req, model)
    policy = policy_for(req, seen)
    policy.compile(req, seen)
    return policy


class Seen:
    """A model as a causal request sees it, for the plain driver."""

    def __init__(self, net: Any, req: Request) -> None:
        self.info: ModelInfo = seen_by(req, net.info)
        self.net = net

    def __call__(self, *args: Any) -> Any:
        return self.net(*args)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net.head(hidden)
        return out


class Local(FakeModel):
    """The next token hangs on the last one alone, mostly: drafts are right up to the first mask, sometimes beyond."""

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, attend: Any) -> torch.Tensor:
        return super().__call__(ids, positions * 0, attend) * 0.3 + self.embed[ids]


@cache
def dual(seed: int, shift: int = 1, eos_bias: float = 0.0) -> FakeModel:
    return Local(
        info("block", block=8, shift=shift, ar_first=bool(shift), causal=True), seed=seed, sharp=3, eos_bias=eos_bias
    )


def go(net: Any, speculative: SpeculativeParams | None, limit: int = 8, drop: Any = None, **kwargs: Any) -> Result:
    req = replace(request(kwargs.pop("prompt", (5, 6, 7)), **kwargs), decode=AR, speculative=speculative)
    extra = {"drop": drop} if drop else {}
    return run(policy_of(req, net.info), Seen(net, req), req, limit=limit, **extra)


def records(result: Result) -> dict[int, Any]:
    return {p: r for c in result.commits for p, r in c.logprobs.items()}


OPTIONS: list[dict[str, Any]] = [
    {"ignore_eos": True},
    {"logprobs": 2},
    {"temperature": 0.8, "top_p": 0.9, "logprobs": 1},
    {"temperature": 1.3, "top_k": 6, "min_tokens": 6},
    {"repetition_penalty": 1.4, "frequency_penalty": 0.5},
    {"temperature": 0.6, "presence_penalty": 0.7, "logit_bias": {4: 3.0}},
]


@pytest.mark.parametrize("kwargs", OPTIONS, ids=range(len(OPTIONS)))
@pytest.mark.parametrize("speculative", [SELF, FIXED], ids=["adaptive", "fixed"])
def test_equals_plain_autoregression(speculative: SpeculativeParams, kwargs: dict[str, Any]) -> None:
    stood = 0
    for seed in range(12):
        net = dual(seed, shift=1 - seed % 2, eos_bias=1.5 * (seed % 3))
        options = {"max_tokens": 24, "seed": seed, "prompt": tuple(range(3, 5 + seed)), **kwargs}
        plain, fast = go(net, None, **options), go(net, speculative, **options)
        assert (fast.output, fast.finish) == (plain.output, plain.finish)
        one, two = records(plain), records(fast)
        assert one.keys() == two.keys()
        assert all(
            two[p].token == r.token and two[p].logprob == pytest.approx(r.logprob, abs=1e-5) for p, r in one.items()
        )
        stood += sum(c.accepted for c in fast.commits)
    assert stood >= 8


@pytest.mark.parametrize("seed", range(3))
def test_equals_plain_autoregression_on_fast_dllm_v2(seed: int) -> None:
    net = tiny("fast_dllm_v2", seed=seed, block=8)
    for kwargs in OPTIONS:
        plain, fast = (go(net, s, max_tokens=16, seed=seed, **kwargs) for s in (None, FIXED))
        assert fast.output == plain.output


def test_plain_mode_is_next_token_prediction() -> None:
    """Rule "ar" against the definition: the causal row of the last token gives the next one, the mask never."""
    net = tiny("fast_dllm_v2", seed=1, block=8)
    tokens = [5, 6, 7]
    for _ in range(8):
        seen = torch.tril(torch.ones(len(tokens), len(tokens), dtype=torch.bool))

        def attend(_: int, op: Any, q: Any, k: Any, v: Any, seen: torch.Tensor = seen) -> Any:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            scores = torch.einsum("rhd,khd->hrk", q, k) / q.shape[-1] ** 0.5
            return torch.einsum("hrk,khd->rhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)

        with torch.no_grad():
            hidden = net(torch.tensor(tokens), torch.arange(len(tokens)), attend)
            logits = net.head(hidden[-1:])[0]
        logits[net.info.mask_id] = -torch.inf
        tokens.append(int(logits.argmax()))
    assert go(net, None, max_tokens=8, ignore_eos=True).output == tokens[3:]


def test_a_draft_and_its_verification() -> None:
    """Prompt, then pairs of forwards: masks after the last token, bidirectional and not stored; the draft, causal."""
    result = go(dual(0), FIXED, max_tokens=20, ignore_eos=True, limit=64)
    shapes = [(s.attend, s.store, len(s.ids), len(s.want)) for s in result.spans]
    assert shapes[0] == ("causal", "keep", 3, 1)
    assert shapes[1] == ("full", "scratch", 6, 5)
    assert shapes[2] == ("causal", "keep", 6, 6)
    assert {s[:2] for s in shapes[1::2]} <= {("full", "scratch"), ("causal", "keep")}
    drafting = result.spans[1]
    assert drafting.ids[1:] == (36,) * 5
    assert drafting.want == (0, 1, 2, 3, 4)
    assert go(dual(0, shift=0), FIXED, max_tokens=20, limit=64).spans[1].want == (1, 2, 3, 4, 5)
    assert all(not c.fixed for c, s in zip(result.commits, result.spans, strict=True) if s.store == "scratch")


class Sure(FakeModel):
    """Every row says the same token, in both modes: drafts stand whole."""

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.eye(self.info.vocab_size, dtype=torch.float64)[torch.full((len(hidden),), 9)] * 9


class Unsure(FakeModel):
    """A row that sees a mask says another token than one that sees none: no draft stands."""

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, attend: Any) -> torch.Tensor:
        mixed = attend(0, self.op, *[(ids == 36).double()[:, None, None].expand(-1, self.heads, self.dim)] * 3)
        return (mixed.reshape(len(ids), -1).sum(1) > 0).double()[:, None]

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.eye(self.info.vocab_size, dtype=torch.float64)[9 + hidden[:, 0].long()] * 9


def test_drafts_that_stand_save_forwards_and_others_stop() -> None:
    both = {"block": 8, "shift": 1, "ar_first": True, "causal": True}
    sure = go(Sure(info("block", **both)), FIXED, max_tokens=25, limit=64)
    assert [len(c.fixed) for c in sure.commits] == [1, *[0, 6] * 4]
    assert (sum(c.drafted for c in sure.commits), sum(c.accepted for c in sure.commits)) == (20, 20)
    net = Unsure(info("block", **both))
    stubborn, wise = (go(net, s, max_tokens=120, ignore_eos=True, limit=64) for s in (FIXED, SELF))
    assert sum(c.accepted for c in (*stubborn.commits, *wise.commits)) == 0
    assert stubborn.forwards == 238  # a draft for each token but the first and the last
    assert wise.forwards < 130
    assert isinstance(wise.seq.policy, SelfState)
    assert wise.seq.policy.pause > 16


@pytest.mark.parametrize("seed", range(4))
def test_recovers_from_preemption(seed: int) -> None:
    net = dual(seed)
    for speculative in (SELF, FIXED):
        calm = go(net, speculative, max_tokens=20, ignore_eos=True)
        wild = go(net, speculative, 64, lambda step: step % 3 == 2, max_tokens=20, ignore_eos=True)
        assert wild.output == calm.output
        assert [c.fixed for c in wild.commits if c.fixed] == [c.fixed for c in calm.commits if c.fixed]


@pytest.mark.parametrize("native", [False, True])
def test_in_the_engine_beside_the_other_modes(native: bool) -> None:
    """Block diffusion, plain and speculative autoregression of one checkpoint in one batch, sharing nothing of a common
    prompt between the modes."""
    net = tiny("fast_dllm_v2", seed=3, block=8)
    model = assemble.pack(net, None) if native else net
    engine = Engine(model, config=EngineConfig(max_batch_rows=128, kv_tokens=256, page_size=16))
    prompt = tuple(range(3, 40))
    asked: list[Request] = []
    for i in range(4):
        for name, decode, speculative in (
            ("block", None, None),
            ("ar", AR, None),
            ("self", AR, FIXED),
            ("implied", None, SELF),
            ("ngram", AR, SpeculativeParams(method="ngram")),
        ):
            r = request(prompt[: 33 + i], name=f"{name}{i}", max_tokens=10, temperature=0.7 * (i % 2), seed=i)
            asked.append(replace(r, decode=decode, speculative=speculative))
    todo, got, finishes = list(asked), {r.request_id: [] for r in asked}, {}
    while engine.has_work or todo:
        if todo:
            engine.add(todo.pop(0))
        for event in engine.step():
            got[event.request_id] += event.token_ids
            if event.finish is not None:
                assert event.finish.error is None
                finishes[event.request_id] = event.finish
    for r in asked:
        result = run(policy_of(r, net.info), Seen(net, r), r)
        text = result.output[:-1] if result.finish == "stop" else result.output
        assert got[r.request_id] == text, r.request_id
    for i in range(4):
        assert got[f"ar{i}"] == got[f"self{i}"] == got[f"implied{i}"] == got[f"ngram{i}"]
        assert finishes[f"self{i}"].usage.exactness == "exact-fast"
        assert finishes[f"ar{i}"].usage.exactness == "reference"
        assert finishes[f"self{i}"].reason in (FinishReason.LENGTH, FinishReason.STOP)
    assert sum(f.usage.drafts for name, f in finishes.items() if name.startswith("self")) > 0
    assert any(got[f"block{i}"] != got[f"ar{i}"] for i in range(4))


@pytest.mark.parametrize(
    ("kind", "changes", "asked", "error", "param"),
    [
        ("block", {}, {"speculative": SELF}, UnsupportedError, "speculative_config"),
        ("block", {}, {"decode": AR}, UnsupportedError, "rule"),
        ("diffusion", {}, {"speculative": SELF}, UnsupportedError, "speculative_config"),
        ("diffusion", {}, {"decode": AR}, UnsupportedError, "rule"),
        ("ar", {}, {"speculative": SELF}, UnsupportedError, "speculative_config"),
        (
            "block",
            {"causal": True},
            {"speculative": SELF, "decode": DecodeParams(rule="threshold")},
            ValidationError,
            "rule",
        ),
        ("block", {"causal": True}, {"decode": DecodeParams(rule="ar", steps=4)}, UnsupportedError, "steps"),
        ("block", {"causal": True}, {"decode": AR, "suffix": (3,)}, UnsupportedError, "suffix"),
    ],
)
def test_refused_by_name(
    kind: str, changes: dict[str, Any], asked: dict[str, Any], error: type[ValidationError], param: str
) -> None:
    with pytest.raises(error) as e:
        policy_of(replace(request(), **asked), info(kind, **changes))
    assert e.value.param == param


def test_which_policy() -> None:
    both = info("block", causal=True)
    assert policy_of(request(), both) is POLICIES["block"]
    assert policy_of(replace(request(), decode=AR), both) is POLICIES["ar"]
    for decode in (None, DecodeParams(), AR):
        assert policy_of(replace(request(), speculative=SELF, decode=decode), both) is POLICIES["self"]
    assert policy_of(replace(request(), decode=DecodeParams()), info("ar")) is POLICIES["ar"], "it asks for nothing"
    assert policy_of(replace(request(), decode=AR), info("ar")) is POLICIES["ar"]
    assert tiny("fast_dllm_v2").info.causal
    assert not tiny("sdar").info.causal
