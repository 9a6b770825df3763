"""A plain driver: one step of one or many sequences, with dense K,V, no pages, no scheduler.

It honours Span.attend, store, shadows and want literally, so a policy that passes here passes under any engine that
keeps the same contract. `FakeModel` is a two-layer random float64 transformer: what a row sees changes its logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dfastllm.core import Commit, DecodeParams, ModelInfo, Request, SamplingParams, SequenceState, Span
from dfastllm.kernels.rows import DenseRows
from dfastllm.models import Attend

AttendFunction = Callable[[int, Attend, Tensor, Tensor, Tensor], Tensor]


def info(kind: str = "diffusion", **changes: Any) -> ModelInfo:
    base = ModelInfo(
        name=f"fake-{kind}",
        family="fake",
        kind=kind,  # type: ignore[arg-type]
        vocab_size=37,
        max_len=512,
        layers=2,
        kv_heads=2,
        head_dim=8,
        eos_ids=(1, 2),
        mask_id=None if kind == "ar" else 36,
        pad_id=1,
        block=4 if kind == "block" else 0,
    )
    return replace(base, **changes)


class FakeModel:
    """Same face as a built model: model(ids, positions, attend) -> hidden, head(hidden) -> logits. Seeded.

    `sharp` scales the logits: large makes confident rows, so that thresholds have something to accept.
    """

    def __init__(self, info: ModelInfo, seed: int = 0, sharp: float = 6.0, eos_bias: float = 0.0) -> None:
        self.info = info
        g = torch.Generator().manual_seed(seed)
        heads, dim, width = info.kv_heads, info.head_dim, info.kv_heads * info.head_dim

        def matrix(a: int, b: int) -> Tensor:
            return torch.randn(a, b, generator=g, dtype=torch.float64) / math.sqrt(a)

        self.heads, self.dim = heads, dim
        self.op = Attend(heads, heads, dim, dim**-0.5)
        self.embed = torch.randn(info.vocab_size, width, generator=g, dtype=torch.float64)
        self.place = torch.randn(info.max_len, width, generator=g, dtype=torch.float64)
        self.layers = [{n: matrix(width, width) for n in "qkvo"} for _ in range(info.layers)]
        self.out = matrix(width, info.vocab_size) * sharp
        self.bias = torch.zeros(info.vocab_size, dtype=torch.float64)
        self.bias[list(info.eos_ids)] = eos_bias

    def __call__(self, ids: Tensor, positions: Tensor, attend: AttendFunction) -> Tensor:
        x = self.embed[ids] + self.place[positions]
        for n, layer in enumerate(self.layers):
            h = x / x.pow(2).mean(dim=-1, keepdim=True).sqrt()
            q, k, v = ((h @ layer[w] * 1.7).view(-1, self.heads, self.dim) for w in "qkv")
            x = x + 2.0 * attend(n, self.op, q, k, v).reshape(x.shape) @ layer["o"]
        return x / x.pow(2).mean(dim=-1, keepdim=True).sqrt()

    def head(self, hidden: Tensor) -> Tensor:
        return hidden @ self.out + self.bias


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """q [rows, heads, dim], k, v [keys, kv_heads, dim], seen bool [rows, keys] -> [rows, heads, dim]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("rhd,khd->hrk", q, k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~seen[None], float("-inf"))
    return torch.einsum("hrk,khd->rhd", scores.softmax(dim=-1), v)


@dataclass
class Store:
    """Dense K,V of one sequence: per layer [positions, kv_heads, dim]."""

    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)


def run_span(model: Any, seq: SequenceState, span: Span, store: Store) -> Tensor:
    """Logits float32 [len(want), vocab]; updates the store and seq.kv_len as `span.store` says."""
    assert span.start >= 0
    assert span.store == "none" or span.start <= seq.kv_len or span.start == 0, "span starts past the cached K,V"
    assert list(span.want) == sorted(set(span.want))
    assert all(0 <= w < span.rows for w in span.want)
    n, held = len(span.ids), seq.kv_len
    if span.store == "replace":
        assert list(span.positions) == sorted(set(span.positions))
        assert span.positions[0] == span.start
        assert span.positions[-1] < held
    else:
        assert not span.places
    ids = torch.tensor([*span.ids, *(t for _, t in span.shadows)])
    places = torch.tensor([*span.positions, *(p for p, _ in span.shadows)])
    if span.store == "none":
        outside: list[int] = []
    elif span.store == "replace":
        outside = sorted(set(range(held)) - set(span.positions))
    else:
        outside = list(range(span.start))
    old = torch.tensor(outside, dtype=torch.long)
    key_places = torch.cat([old, places])
    seen = torch.ones(len(places), len(key_places), dtype=torch.bool)
    if span.attend == "causal":
        seen = key_places[None] <= places[:, None]
    elif span.attend == "block":
        seen = key_places[None] < (places[:, None] // span.block + 1) * span.block
    first = len(old) + n  # only shadows see shadows; a shadow does not see the ordinary key of its own position
    seen[:n, first:] = False
    seen[n:, :first] &= key_places[None, :first] != places[n:, None]

    fresh: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(layer: int, _: object, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        fresh[layer] = (k[:n], v[:n])
        if len(old):
            k = torch.cat([store.keys[layer][old], k])
            v = torch.cat([store.values[layer][old], v])
        return attention(q, k, v, seen)

    with torch.no_grad():
        hidden = model(ids, places, attend)
        logits = model.head(hidden[list(span.want)]).float()
    for layer, (k, v) in fresh.items():
        if span.store == "keep":
            store.keys[layer] = torch.cat([store.keys[layer][: span.start], k]) if span.start else k
            store.values[layer] = torch.cat([store.values[layer][: span.start], v]) if span.start else v
        elif span.store == "replace":
            store.keys[layer] = store.keys[layer].clone()
            store.values[layer] = store.values[layer].clone()
            store.keys[layer][list(span.positions)] = k
            store.values[layer][list(span.positions)] = v
    if span.store == "keep":
        seq.kv_len = span.stop
    parts = [logits]
    for b in span.branches:  # after the span's K,V are stored
        assert span.store != "replace"
        assert span.start <= b.start < span.stop or b.start == seq.kv_len
        beside: Any = "none" if span.store == "none" else "scratch"
        parts.append(run_span(model, seq, Span(b.start, b.ids, span.attend, beside, b.want, block=span.block), store))
    return torch.cat(parts)


def apply(seq: SequenceState, commit: Commit) -> None:
    for p in sorted(commit.fixed):
        if p == len(seq.tokens):
            seq.tokens.append(commit.fixed[p])
        else:
            seq.tokens[p] = commit.fixed[p]
    for p in commit.masked:
        assert seq.model.mask_id is not None
        seq.tokens[p] = seq.model.mask_id
    if commit.kv_len is not None:
        assert commit.kv_len <= seq.kv_len, "a commit can only truncate K,V"
        seq.kv_len = commit.kv_len
    seq.policy = commit.state
    assert commit.stable >= seq.stable, "stable went back"
    seq.stable = commit.stable


@dataclass
class Result:
    """output: the visible ids, the ending token included. commits: one per step. spans: one per forward."""

    seq: SequenceState
    output: list[int]
    commits: list[Commit]
    spans: list[Span]

    @property
    def finish(self) -> str:
        assert self.commits[-1].finish is not None
        return self.commits[-1].finish.value

    @property
    def forwards(self) -> int:
        return len(self.spans)


def request(
    prompt: Sequence[int] = (5, 6, 7),
    *,
    name: str = "r",
    suffix: Sequence[int] = (),
    decode: DecodeParams | None = None,
    **sampling: Any,
) -> Request:
    sampling = {"temperature": 0.0, "max_tokens": 16, **sampling}
    return Request(name, tuple(prompt), SamplingParams(**sampling), decode, tuple(suffix))


def start(policy: Any, req: Request, model: ModelInfo) -> SequenceState:
    tokens, state = policy.begin(req, model, policy.compile(req, model))
    seed = req.sampling.seed if req.sampling.seed is not None else 1234
    return SequenceState(req, model, tokens, seed, policy=state)


def run(
    policy: Any,
    model: Any,
    req: Request,
    *,
    limit: int = 1 << 20,
    drop: Callable[[int], bool] = lambda step: False,
    watch: Callable[[SequenceState, Span, Commit], None] = lambda *_: None,
) -> Result:
    """Run one request to its end. `drop(step)` says before which steps the K,V are thrown away (preemption)."""
    seq, store = start(policy, req, model.info), Store()
    commits: list[Commit] = []
    spans: list[Span] = []
    for step in range(100_000):
        if drop(step):
            seq.kv_len, store = 0, Store()
        span = policy.plan(seq, limit)
        logits = run_span(model, seq, span, store)
        seq.forwards += span.passes
        (commit,) = policy.absorb([(seq, span)], DenseRows(logits))
        watch(seq, span, commit)
        apply(seq, commit)
        spans.append(span)
        commits.append(commit)
        if commit.finish is not None:
            return Result(seq, seq.tokens[seq.canvas_start : seq.stable], commits, spans)
    raise AssertionError("the policy does not end")
