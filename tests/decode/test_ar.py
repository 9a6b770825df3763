"""Autoregressive decoding against the plain loop: one full forward per token, sampling by lists."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dfastllm.core import DecodeParams
from dfastllm.decode.registry import POLICIES
from dfastllm.errors import UnsupportedError, ValidationError
from dfastllm.models import tiny
from tests.kit.driver import FakeModel, attention, info, request, run

torch.set_num_threads(1)
AR = POLICIES["ar"]
FAKE = FakeModel(info("ar"), sharp=2.0)


def full_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """float64 [vocab] of the next token, by one causal forward over everything."""

    def attend(layer: int, _: object, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, torch.ones(len(q), len(k), dtype=torch.bool).tril())

    with torch.no_grad():
        hidden = model(torch.tensor(tokens), torch.arange(len(tokens)), attend)
        return model.head(hidden[-1:])[0].double()


def plain(
    model: Any, prompt: list[int], count: int, *, rep: float = 1.0, freq: float = 0.0, pres: float = 0.0
) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        row = full_logits(model, tokens).tolist()
        made = tokens[len(prompt) :]
        for t in set(tokens):
            row[t] = row[t] / rep if row[t] > 0 else row[t] * rep
        for t in set(made):
            row[t] -= freq * made.count(t) + pres
        tokens.append(max(range(len(row)), key=lambda t: (row[t], -t)))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("limit", [1, 3, 100])
@pytest.mark.parametrize("net", [FAKE, tiny("llama")], ids=["fake", "llama"])
def test_greedy_equals_the_plain_loop(net: Any, limit: int) -> None:
    prompt = [5, 6, 7, 8, 9, 3, 4]
    result = run(AR, net, request(prompt, max_tokens=12, ignore_eos=True), limit=limit)
    assert result.output == plain(net, prompt, 12)
    prefill = -(-len(prompt) // limit)
    assert [len(s.ids) for s in result.spans] == [min(limit, len(prompt) - limit * i) for i in range(prefill)] + [
        1
    ] * 11
    assert all(s.attend == "causal" and s.store == "keep" for s in result.spans)


def test_penalties_equal_the_plain_loop() -> None:
    kwargs = {"repetition_penalty": 1.4, "frequency_penalty": 0.6, "presence_penalty": 0.3}
    result = run(AR, FAKE, request([5, 6, 7], max_tokens=20, ignore_eos=True, **kwargs))
    assert result.output == plain(FAKE, [5, 6, 7], 20, rep=1.4, freq=0.6, pres=0.3)
    assert result.output != plain(FAKE, [5, 6, 7], 20)


def test_ends_at_eos_stop_token_length_and_context() -> None:
    free = run(AR, FAKE, request(max_tokens=12, ignore_eos=True)).output
    assert len(set(free)) > 3
    stop = next(t for t in free[2:] if t not in free[:2])
    at = free.index(stop)
    result = run(AR, FAKE, request(max_tokens=12, ignore_eos=True, stop_token_ids=(stop,)))
    assert (result.output, result.finish) == (free[: at + 1], "stop")
    eos = FakeModel(info("ar", eos_ids=(stop,)), sharp=2.0)
    assert run(AR, eos, request(max_tokens=12)).output == free[: at + 1]
    assert run(AR, eos, request(max_tokens=12, ignore_eos=True)).output == free
    assert run(AR, FAKE, request(max_tokens=5, ignore_eos=True)).finish == "length"
    short = FakeModel(info("ar", max_len=9), sharp=2.0)
    result = run(AR, short, request((5, 6, 7), max_tokens=50, ignore_eos=True))
    assert (len(result.output), result.finish) == (6, "length")


def test_min_tokens_bars_every_ending() -> None:
    free = run(AR, FAKE, request(max_tokens=12, ignore_eos=True)).output
    eos = FakeModel(info("ar", eos_ids=(free[0],)), sharp=2.0)
    assert run(AR, eos, request(max_tokens=12)).output == free[:1]
    result = run(AR, eos, request(max_tokens=12, min_tokens=4))
    assert free[0] not in result.output[:4]
    assert len(result.output) >= 4


def test_seeds_and_steps() -> None:
    def text(**options: Any) -> list[int]:
        return run(AR, FAKE, request(max_tokens=12, temperature=1.5, ignore_eos=True, **options)).output

    assert text(seed=1) == text(seed=1)
    assert text(seed=1) != text(seed=2)
    assert text(seed=1, top_k=1) == run(AR, FAKE, request(max_tokens=12, ignore_eos=True)).output


def test_logprobs_are_the_raw_ones() -> None:
    result = run(AR, FAKE, request([5, 6], max_tokens=6, temperature=0.7, seed=3, logprobs=2, ignore_eos=True))
    tokens = [5, 6]
    for commit in (c for c in result.commits if c.fixed):
        ((position, token),) = commit.fixed.items()
        raw = torch.log_softmax(full_logits(FAKE, tokens), dim=-1)
        record = commit.logprobs[position]
        assert record.token == token
        assert record.logprob == pytest.approx(raw[token].item(), abs=1e-5)
        assert [t for t, _ in record.top] == raw.topk(2).indices.tolist()
        tokens.append(token)
    assert not run(AR, FAKE, request(max_tokens=3)).commits[-1].logprobs


@pytest.mark.parametrize(
    ("change", "error", "param"),
    [
        ({"decode": DecodeParams(cache="none")}, UnsupportedError, "cache"),
        ({"decode": DecodeParams(options={"gamma": 1})}, UnsupportedError, "options"),
        ({"suffix": (3,)}, UnsupportedError, "suffix"),
    ],
)
def test_refused_by_name(change: dict[str, Any], error: type[ValidationError], param: str) -> None:
    with pytest.raises(error) as e:
        AR.compile(request(**change), FAKE.info)
    assert e.value.param == param
