"""Masked diffusion beyond the published loops: spans, endings, infilling, sampling options, refusals."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from dfastllm.core import Commit, DecodeParams, SequenceState, Span
from dfastllm.decode.presets import complete
from dfastllm.decode.registry import POLICIES
from dfastllm.errors import UnsupportedError, ValidationError
from tests.kit import published_loops as published
from tests.kit.driver import FakeModel, info, request, run, start

torch.set_num_threads(1)
DIFFUSION = POLICIES["diffusion"]
FAKE = FakeModel(info("diffusion"), seed=3, sharp=4)
SHIFTED = FakeModel(info("diffusion", shift=1), seed=3, sharp=4)
MASK = 36


def generate(model: Any = FAKE, prompt: tuple[int, ...] = (5, 6, 7), **kwargs: Any) -> Any:
    decode = {k: kwargs.pop(k) for k in list(kwargs) if k in DecodeParams.__dataclass_fields__}
    return run(DIFFUSION, model, request(prompt, decode=DecodeParams(**decode), **kwargs))


# ---- spans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [FAKE, SHIFTED], ids=["plain", "shifted"])
def test_spans_of_each_cache(model: FakeModel) -> None:
    """Rows run per step, as the caches are described; the head only on rows of masked positions of the active block."""
    shift, prompt, total = model.info.shift, 3, 19
    for cache in ("none", "prefix", "dual", "windowed"):
        options: dict[str, Any] = {"window": 2, "refresh": 3, "warmup": 0} if cache == "windowed" else {}
        if shift and cache in ("prefix", "dual"):
            options = {"first_token": "by_rule"}  # alone: tests/decode/test_published.py
        result = generate(
            model, max_tokens=16, block_length=8, cache=cache, options=options, ignore_eos=True, early_stop=False
        )
        tokens = [5, 6, 7, *[MASK] * 16]
        for i, (span, commit) in enumerate(zip(result.spans, result.commits, strict=True)):
            first = prompt + 8 * (i // 8)
            masked = [p for p in range(first, first + 8) if tokens[p] == MASK]
            assert [span.start + w for w in span.want] == [p - shift for p in masked]
            refresh = i % 8 == 0 or (cache == "windowed" and i % 8 % 3 == 0)
            if cache == "none":
                expected = (0, total, "none")
            elif refresh:
                expected = (0, total, "keep")
            elif cache == "prefix":
                expected = (first - shift, total, "scratch")
            elif cache == "dual":
                expected = (first - shift, first + 8, "replace")
            else:
                expected = (max(0, first - 2), min(total, first + 10), "replace")
            assert (span.start, span.stop, span.store) == expected
            assert span.attend == "full"
            for p, t in commit.fixed.items():
                tokens[p] = t


@pytest.mark.parametrize("model", [FAKE, SHIFTED], ids=["plain", "shifted"])
def test_spans_of_the_delayed_cache(model: FakeModel) -> None:
    """Rows are the masked positions, those committed at the last step, and the rows that predict the former."""
    shift, total = model.info.shift, 22
    result = generate(
        model, suffix=(9, 9, 9), max_tokens=16, block_length=8, cache="delayed", options={"refresh": 4},
        ignore_eos=True, early_stop=False, threshold=0.9,
    )  # fmt: skip
    tokens, late, step = [5, 6, 7, *[MASK] * 16, 9, 9, 9], set[int](), 0
    for span, commit in zip(result.spans, result.commits, strict=True):
        full = step % 4 == 0 or (step == 1 and not shift)
        run_ = {p for p in range(total) if tokens[p] == MASK} | late
        run_ |= {p - shift for p in run_}
        assert (span.store, list(span.positions)) == (
            ("keep", list(range(total))) if full else ("replace", sorted(run_))
        )
        assert span.ids == tuple(tokens[p] for p in span.positions)
        late = set(commit.fixed)
        for p, t in commit.fixed.items():
            tokens[p] = t
        step = 0 if commit.block_done else step + 1
    assert any(span.places for span in result.spans)


@pytest.mark.parametrize("model", [FAKE, SHIFTED], ids=["plain", "shifted"])
def test_the_delayed_cache_is_made_again_forward_by_forward(model: FakeModel) -> None:
    """Preempted before any forward, those that restore K,V included: the same commits."""
    decode = DecodeParams(cache="delayed", block_length=16, options={"refresh": 8})
    asked = request((5, 6, 7), decode=decode, max_tokens=16, ignore_eos=True)
    plain = run(DIFFUSION, model, asked)
    again: list[Span] = []
    for seed in range(4):
        rng = random.Random(seed)
        result = run(DIFFUSION, model, asked, drop=lambda step, rng=rng: rng.random() < 0.2)
        assert [c.fixed for c in result.commits if c.fixed] == [c.fixed for c in plain.commits]
        again += [s for s in result.spans if not s.want]
    assert {s.store for s in again} == {"keep", "replace"}


def test_windowed_warms_up_and_wide_open_is_exact() -> None:
    """With a window over everything each step sees fresh keys only: the same text as without a cache."""
    kwargs: dict[str, Any] = {"max_tokens": 16, "block_length": 8, "ignore_eos": True}
    wide = generate(cache="windowed", options={"window": 64}, **kwargs)
    assert wide.output == generate(**kwargs).output
    assert [s.store for s in wide.spans[:5]] == ["keep"] * 4 + ["replace"]
    narrow = generate(cache="windowed", options={"window": 0, "warmup": 0, "refresh": 99}, **kwargs)
    assert narrow.output == generate(cache="dual", **kwargs).output


# ---- endings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["none", "dual"])
@pytest.mark.parametrize("rule", ["schedule", "threshold", "factor"])
def test_early_stop_is_lossless(rule: str, cache: str) -> None:
    """The same visible text with fewer forwards, over many models that do write EOS."""
    saved = ended = 0
    for seed in range(12):
        model = FakeModel(info("diffusion"), seed=seed, sharp=4, eos_bias=4.0)
        kwargs: dict[str, Any] = {"max_tokens": 32, "block_length": 8, "rule": rule, "cache": cache}
        fast, slow = generate(model, **kwargs), generate(model, early_stop=False, **kwargs)
        assert fast.output == slow.output
        assert fast.finish == slow.finish
        assert fast.forwards <= slow.forwards
        saved += slow.forwards - fast.forwards
        ended += fast.finish == "stop"
    assert ended >= 3
    assert saved >= 10


def test_text_ends_at_the_first_ending_token() -> None:
    free = generate(max_tokens=16, block_length=16, ignore_eos=True)
    stop = next(t for t in free.output[3:] if t not in free.output[:3])
    cut = free.output[: free.output.index(stop) + 1]
    by_id = generate(max_tokens=16, block_length=16, ignore_eos=True, stop_token_ids=(stop,))
    assert (by_id.output, by_id.finish) == (cut, "stop")
    model = FakeModel(info("diffusion", eos_ids=(stop,), pad_id=stop), seed=3, sharp=4)
    by_eos = generate(model, max_tokens=16, block_length=16)
    assert (by_eos.output, by_eos.finish) == (cut, "stop")
    assert generate(model, max_tokens=16, block_length=16, ignore_eos=True).output == free.output
    for result in (by_id, by_eos):
        assert result.seq.stable == 3 + len(cut)
        assert MASK not in result.seq.tokens


@pytest.mark.parametrize("length", [1, 7, 8, 9, 200])
def test_canvas_is_rounded_up_and_the_text_is_not(length: int) -> None:
    """max_tokens is what the user sees: `stable` of the last commit marks its end. No mask is left for large ones."""
    result = generate(max_tokens=length, block_length=8, ignore_eos=True, threshold=0.5)
    assert len(result.seq.tokens) == 3 + -(-length // 8) * 8
    assert len(result.output) == length
    assert (result.seq.stable, result.finish) == (3 + length, "length")
    assert MASK not in result.seq.tokens
    whole = generate(max_tokens=-(-length // 8) * 8, block_length=8, ignore_eos=True, threshold=0.5, early_stop=False)
    assert whole.output[:length] == result.output


def test_min_tokens_bars_eos_by_position() -> None:
    model = FakeModel(info("diffusion"), seed=3, sharp=4, eos_bias=30.0)
    assert len(generate(model, max_tokens=16, block_length=8).output) == 1
    result = generate(model, max_tokens=16, block_length=8, min_tokens=5)
    assert len(result.output) == 6
    assert result.output[-1] in (1, 2)
    assert not {1, 2} & set(result.output[:5])


def test_stable_follows_the_frontier_and_waits_for_revisions() -> None:
    def ends(rule: str) -> list[int]:
        stables: list[int] = []

        def watch(seq: SequenceState, span: Span, commit: Commit) -> None:
            stables.append(commit.stable)

        decode = DecodeParams(rule=rule, block_length=8)
        run(DIFFUSION, FAKE, request(decode=decode, max_tokens=24, ignore_eos=True), watch=watch)
        return stables

    assert len(set(ends("threshold"))) > 4
    assert set(ends("wino")) <= {3, 11, 19, 27}


# ---- infilling -------------------------------------------------------------------------------------------------------


def test_infilling_keeps_both_sides_and_the_exact_length() -> None:
    result = generate(max_tokens=10, block_length=4, suffix=(11, 12, 13), threshold=0.5, ignore_eos=True)
    assert len(result.seq.tokens) == 3 + 10 + 3
    assert result.seq.tokens[:3] == [5, 6, 7]
    assert result.seq.tokens[-3:] == [11, 12, 13]
    assert result.seq.canvas_stop == 13
    assert len(result.output) == 10


# ---- sampling options on canvas tokens -------------------------------------------------------------------------------


def raw_rows(model: FakeModel, tokens: list[int]) -> torch.Tensor:
    """log-softmax float64 [length, vocab] of every position, mask excluded."""
    logits, _ = published.forward(model, tokens, 0, len(tokens), None)
    logits[:, MASK] = -math.inf
    return torch.log_softmax(logits, dim=-1)


def test_logprobs_of_canvas_tokens_are_raw() -> None:
    result = generate(max_tokens=8, block_length=8, logprobs=3, temperature=0.8, seed=2, threshold=0.6, ignore_eos=True)
    tokens = [5, 6, 7, *[MASK] * 8]
    for commit in result.commits:
        raw = raw_rows(FAKE, tokens)
        assert set(commit.logprobs) == set(commit.fixed)
        for p, record in commit.logprobs.items():
            assert record.logprob == pytest.approx(raw[p, record.token].item(), abs=1e-5)
            assert [t for t, _ in record.top] == raw[p].topk(3).indices.tolist()
        for p, t in commit.fixed.items():
            tokens[p] = t


def test_credit_does_not_leak_into_logprobs() -> None:
    result = generate(rule="credit", max_tokens=8, block_length=8, logprobs=0, ignore_eos=True)
    tokens = [5, 6, 7, *[MASK] * 8]
    for commit in result.commits:
        raw = raw_rows(FAKE, tokens)
        for p, t in commit.fixed.items():
            assert commit.logprobs[p].logprob == pytest.approx(raw[p, t].item(), abs=1e-5)
            tokens[p] = t


def test_options_reach_canvas_tokens() -> None:
    plain: dict[str, Any] = {"max_tokens": 16, "block_length": 8, "ignore_eos": True}
    free = generate(**plain).output
    common = max(set(free), key=free.count)
    assert common not in generate(logit_bias={common: -100.0}, **plain).output
    assert set(generate(allowed_token_ids=(3, 4, MASK), **plain).output) <= {3, 4}
    assert set(generate(logit_bias={9: 100.0}, **plain).output) == {9}
    assert generate(temperature=1.3, top_k=1, **plain).output == free
    assert generate(temperature=1.3, top_p=1e-6, **plain).output == free
    assert generate(temperature=1.3, min_p=1.0, **plain).output == free
    hot = [generate(temperature=1.5, seed=s, **plain).output for s in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    repeats = lambda out: len(out) - len(set(out))  # noqa: E731
    assert repeats(generate(frequency_penalty=2.0, presence_penalty=2.0, **plain).output) < repeats(free)


def test_repetition_penalty_sees_prompt_suffix_and_canvas() -> None:
    """One step on a block of one: the penalised logits by hand."""
    prompt, suffix = (5, 9, 9), (12,)
    result = generate(
        prompt=prompt, suffix=suffix, max_tokens=1, block_length=1, repetition_penalty=1.8, ignore_eos=True
    )
    logits, _ = published.forward(FAKE, [*prompt, MASK, *suffix], 0, 5, None)
    row = logits[3]
    row[MASK] = -math.inf
    for t in {*prompt, *suffix}:
        row[t] = row[t] / 1.8 if row[t] > 0 else row[t] * 1.8
    assert result.output == [int(row.argmax())]


def test_provisional_tokens_are_the_best_guesses_of_what_is_left() -> None:
    shown = generate(max_tokens=8, block_length=8, provisional=True, ignore_eos=True)
    plain = generate(max_tokens=8, block_length=8, ignore_eos=True)
    assert shown.output == plain.output
    tokens = [5, 6, 7, *[MASK] * 8]
    for commit, other in zip(shown.commits, plain.commits, strict=True):
        raw = raw_rows(FAKE, tokens)
        left = {p for p in range(3, 11) if tokens[p] == MASK} - set(commit.fixed)
        expected = {p: int(raw[p].argmax()) for p in left}
        assert dict(commit.provisional) == ({} if commit.finish else expected)
        assert not other.provisional
        for p, t in commit.fixed.items():
            tokens[p] = t


def test_mask_token_is_never_committed() -> None:
    """A model that would rather say the mask than anything else."""
    model = FakeModel(info("diffusion"), seed=3, sharp=4)
    model.bias[MASK] = 50.0
    for kwargs in ({}, {"temperature": 2.0, "seed": 1}, {"rule": "wino"}, {"rule": "credit"}):
        result = generate(model, max_tokens=16, block_length=8, ignore_eos=True, **kwargs)
        assert MASK not in result.seq.tokens
        assert result.output == generate(max_tokens=16, block_length=8, ignore_eos=True, **kwargs).output


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "decode", "error", "param"),
    [
        ({"max_tokens": 64}, {"steps": 3, "block_length": 16}, ValidationError, "steps"),
        ({"max_tokens": 16}, {"cache": "dual", "options": {"warmup": 2}}, UnsupportedError, "warmup"),
        ({"max_tokens": 16}, {"cache": "windowed", "options": {"refresh": 0}}, ValidationError, "refresh"),
        ({"max_tokens": 16}, {"cache": "sub_block"}, UnsupportedError, "cache"),
        ({"max_tokens": 16}, {"cache": "dual", "options": {"first_token": "by_rule"}}, UnsupportedError, "first_token"),
        ({"max_tokens": 16}, {"cache": "dual", "cfg_scale": 1.0}, UnsupportedError, "cfg_scale"),
        ({"max_tokens": 16}, {"cfg_scale": 1.0, "rule": "wino"}, UnsupportedError, "cfg_scale"),
        ({"max_tokens": 16}, {"cfg_scale": 1.0, "rule": "free_dave"}, UnsupportedError, "cfg_scale"),
        ({"max_tokens": 16}, {"cfg_scale": 1.0, "options": {"draft_steps": 2}}, UnsupportedError, "cfg_scale"),
        ({"max_tokens": 16}, {"cache": "delayed", "rule": "free_dave"}, UnsupportedError, "cache"),
        (
            {"max_tokens": 16},
            {"steps": 1, "options": {"max_parallel_tokens": 4}},
            ValidationError,
            "max_parallel_tokens",
        ),
    ],
)
def test_refused_by_name(
    sampling: dict[str, Any], decode: dict[str, Any], error: type[ValidationError], param: str
) -> None:
    with pytest.raises(error) as e:
        DIFFUSION.compile(request(decode=DecodeParams(**decode), **sampling), FAKE.info)
    assert e.value.param == param


def test_missing_mask() -> None:
    with pytest.raises(UnsupportedError):
        DIFFUSION.compile(request(), info("diffusion", mask_id=None))


def test_defaults_without_decode_params() -> None:
    seq = start(DIFFUSION, request(max_tokens=40), FAKE.info)
    choice = seq.policy.choice
    assert (choice.rule, choice.cache, choice.block_length, choice.early_stop) == ("schedule", "none", 32, True)
    assert DIFFUSION.compile(request(), FAKE.info).tier == "reference"
    assert DIFFUSION.compile(request(decode=DecodeParams(cache="dual")), FAKE.info).tier == "approximate"
    assert DIFFUSION.compile(request(decode=DecodeParams(cache="delayed")), FAKE.info).tier == "approximate"
    assert DIFFUSION.compile(request(decode=DecodeParams(cfg_scale=2.0)), FAKE.info).tier == "reference"


def test_a_default_cache_gives_way_to_guidance() -> None:
    """What a preset or a model's kind chose is no demand: the request's own is."""
    asked = complete(DecodeParams(cfg_scale=1.0, mode="fast"), FAKE.info)
    assert asked.cache == "dual"
    assert start(DIFFUSION, request(decode=asked), FAKE.info).policy.choice.cache == "none"


def test_confidence_where_nothing_but_ends_is_allowed() -> None:
    """All candidates doubted: confidence 0 for all, and the canvas fills all the same."""
    for temperature in (0.0, 1.0):
        result = generate(
            max_tokens=8, block_length=8, confidence_eos_eot_inf=True, allowed_token_ids=(1, 2), seed=1,
            temperature=temperature, ignore_eos=True, options={"confidence": "drawn"}, threshold=0.5,
        )  # fmt: skip
        assert set(result.output) <= {1, 2}
        assert len(result.output) == result.forwards == 8  # 0 is below every threshold


def test_logprobs_under_guidance_are_of_the_guided_distribution() -> None:
    result = generate(max_tokens=8, block_length=8, cfg_scale=1.5, logprobs=1, ignore_eos=True)
    first = next(iter(result.commits[0].logprobs.items()))
    x = [5, 6, 7, *[MASK] * 8]
    logits, _ = published.forward(FAKE, x, 0, len(x), None)
    unguided, _ = published.forward(FAKE, [MASK] * len(x), 0, len(x), None)
    logits = unguided + 2.5 * (logits - unguided)
    logits[:, MASK] = -math.inf
    want = torch.log_softmax(logits, dim=-1)[first[0], first[1].token]
    assert first[1].logprob == pytest.approx(float(want), abs=1e-4)
