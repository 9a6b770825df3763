"""Block diffusion: exact K,V, the fused keep pass, alignment, sub-blocks, editing, refusals."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from dfastllm.core import Commit, DecodeParams, SequenceState, Span
from dfastllm.decode.registry import POLICIES
from dfastllm.errors import UnsupportedError, ValidationError
from tests.kit import published_loops as published
from tests.kit.driver import FakeModel, info, request, run, start

torch.set_num_threads(1)
BLOCK = POLICIES["block"]
FAKE = FakeModel(info("block", block=4), seed=3, sharp=4)
EDITOR = FakeModel(info("block", block=8, edit=True), seed=3, sharp=6)
SHIFTED = FakeModel(info("block", block=8, shift=1, ar_first=True), seed=3, sharp=4)
MASK = 36


def generate(model: Any = FAKE, prompt: tuple[int, ...] = (5, 6, 7), **kwargs: Any) -> Any:
    decode = {k: kwargs.pop(k) for k in list(kwargs) if k in DecodeParams.__dataclass_fields__}
    extra = {k: kwargs.pop(k) for k in ("limit", "drop", "watch") if k in kwargs}
    kwargs.setdefault("ignore_eos", True)
    return run(BLOCK, model, request(prompt, decode=DecodeParams(**decode), **kwargs), **extra)


def shapes(result: Any) -> list[tuple[int, int, str]]:
    return [(s.start, s.stop, s.store) for s in result.spans]


def test_a_finished_block_is_kept_together_with_the_next_first_step() -> None:
    """Prompt of 6, blocks of 4: the prompt's tail opens the block [4, 8)."""
    result = generate(prompt=(5, 6, 7, 8, 9, 3), max_tokens=10, rule="schedule")
    assert len(result.seq.tokens) == 16
    assert shapes(result) == [
        (0, 8, "keep"),  # the prompt's whole block, fused with the first step of [4, 8)
        (4, 8, "scratch"),
        (4, 12, "keep"),
        *[(8, 12, "scratch")] * 3,
        (8, 16, "keep"),
        *[(12, 16, "scratch")] * 3,
    ]
    assert all(s.attend == "block" and s.block == 4 for s in result.spans)
    assert [c.kv_len for c in result.commits] == [4, None, 8, None, None, None, 12, None, None, None]
    assert sum(c.block_done for c in result.commits) == 3


def test_one_forward_per_step_and_none_for_keeping() -> None:
    """The published loop spends a forward per finished block on storing it; here none is spent."""
    for prompt in ((5, 6, 7), (5, 6, 7, 8)):
        result = generate(prompt=prompt, max_tokens=13, threshold=0.5, early_stop=False)
        _, denoising = published.blocks(FAKE, prompt, 13, 4, published.above(0.5))
        assert result.forwards == denoising


@pytest.mark.parametrize("limit", [1, 4, 6, 9, 64])
def test_prefill_in_whole_blocks_up_to_the_limit(limit: int) -> None:
    prompt = tuple(range(3, 22))  # 19 tokens: four whole blocks and a tail
    result = generate(prompt=prompt, max_tokens=5, limit=limit)
    assert result.output == generate(prompt=prompt, max_tokens=5).output
    for low, high, store in shapes(result):
        assert low % 4 == 0
        assert high % 4 == 0
        assert high - low <= max(limit // 4 * 4, 8 if store == "keep" else 4)
    assert all(not s.want for s in result.spans if s.stop <= 16)


def test_stored_keys_are_those_of_the_final_tokens() -> None:
    """The trap: a last write after the K,V-storing forward would leave K,V of other ids. Every keep span that stays
    holds final ids, also when tokens are edited until the end."""
    for model, decode in ((FAKE, {"threshold": 0.4}), (EDITOR, {"rule": "edit", "options": {"edit_threshold": 0.3}})):
        kept: dict[int, int] = {}

        def watch(seq: SequenceState, span: Span, commit: Commit, kept: dict[int, int] = kept) -> None:
            if span.store == "keep":
                end = span.stop if commit.kv_len is None else commit.kv_len
                kept.update({p: span.ids[p - span.start] for p in range(span.start, end)})

        result = generate(model, max_tokens=32, watch=watch, **decode)
        assert len(kept) >= 24
        assert all(result.seq.tokens[p] == t for p, t in kept.items())


def test_edit_overwrites_and_ends_when_nothing_changes() -> None:
    edits = 0
    for seed in range(6):
        model = FakeModel(info("block", block=8, edit=True), seed=seed, sharp=6)
        overwritten: list[int] = []

        def watch(seq: SequenceState, span: Span, commit: Commit, overwritten: list[int] = overwritten) -> None:
            overwritten += [p for p in commit.fixed if seq.tokens[p] != MASK]
            if commit.block_done and not commit.finish:
                assert not commit.fixed or seq.policy.memory is not None  # closed by no change, or edits used up

        options = {"edit_threshold": 0.4, "max_post_steps": 3}
        result = generate(model, max_tokens=24, rule="edit", options=options, watch=watch, provisional=True)
        assert MASK not in result.seq.tokens
        assert result.forwards <= BLOCK.bound(BLOCK.compile(result.seq.request, model.info))
        edits += len(overwritten)
    assert edits > 5


def test_edit_early_stop_waits_for_the_block() -> None:
    """A token behind an EOS may still be edited, so a revising rule stops only with a finished block."""
    model = FakeModel(info("block", block=8, edit=True), seed=1, sharp=6, eos_bias=6.0)
    result = generate(model, max_tokens=24, rule="edit", ignore_eos=False)
    assert result.finish == "stop"
    assert result.commits[-1].block_done
    assert all(c.stable in (3, 8, 16, 24, result.seq.stable) for c in result.commits)


def test_sub_blocks_fill_left_to_right_inside_a_block() -> None:
    model = FakeModel(info("block", block=8), seed=3, sharp=4)
    order: list[int] = []
    result = generate(
        model, (5,) * 8, max_tokens=16, block_length=2, watch=lambda seq, span, commit: order.extend(commit.fixed)
    )
    assert [p // 2 for p in order] == sorted(p // 2 for p in order)
    assert {(s.start % 8, s.stop % 8) for s in result.spans} == {(0, 0)}
    assert result.output != generate(model, (5,) * 8, max_tokens=16).output


def test_first_token_of_a_block_comes_from_the_one_before() -> None:
    result = generate(SHIFTED, (5,) * 8, max_tokens=16, rule="schedule")
    assert shapes(result)[0] == (0, 8, "keep")
    assert result.spans[0].want == (7,)
    assert list(result.commits[0].fixed) == [8]
    keeps = [s for s in result.spans if s.store == "keep"]
    assert [(s.start, s.stop, s.want) for s in keeps] == [(0, 8, (7,)), (8, 16, (7,))]
    inside = [s for s in result.spans if s.store == "scratch"]
    assert all(min(s.want) >= 0 and max(s.want) <= 6 for s in inside)


def test_early_stop_is_lossless() -> None:
    saved = 0
    for seed in range(8):
        model = FakeModel(info("block", block=4), seed=seed, sharp=4, eos_bias=3.0)
        fast, slow = (generate(model, max_tokens=24, ignore_eos=False, early_stop=e) for e in (True, False))
        assert (fast.output, fast.finish) == (slow.output, slow.finish)
        saved += slow.forwards - fast.forwards
    assert saved > 10


def test_exact_keys_make_caching_invisible() -> None:
    """The same text when every other forward recomputes everything before the block; the one after it has the step."""
    result = generate(max_tokens=16, threshold=0.5)
    dropped = generate(max_tokens=16, threshold=0.5, drop=lambda step: step % 2 == 0, limit=1 << 20)
    assert dropped.output == result.output
    assert all(s.start == 0 for s in dropped.spans[::2])
    assert any(s.start > 0 and s.store == "scratch" for s in dropped.spans[1::2])


@pytest.mark.parametrize(
    ("model", "kwargs", "error", "param"),
    [
        (FAKE, {"decode": {"cache": "dual"}}, UnsupportedError, "cache"),
        (FAKE, {"decode": {"cache": "delayed"}}, UnsupportedError, "cache"),
        (FAKE, {"decode": {"cfg_scale": 1.0}}, UnsupportedError, "cfg_scale"),
        (FAKE, {"decode": {"rule": "free_dave", "cache": "sub_block"}}, UnsupportedError, "cache"),
        (FAKE, {"decode": {"block_length": 3}}, ValidationError, "block_length"),
        (FAKE, {"decode": {"block_length": 8}}, ValidationError, "block_length"),
        (FAKE, {"decode": {"steps": 2}, "max_tokens": 16}, ValidationError, "steps"),
        (FAKE, {"suffix": (3,)}, UnsupportedError, "suffix"),
        (FAKE, {"decode": {"rule": "edit"}}, UnsupportedError, "rule"),
        (SHIFTED, {"decode": {"rule": "wino"}}, UnsupportedError, "rule"),
    ],
)
def test_refused_by_name(model: FakeModel, kwargs: dict[str, Any], error: type[ValidationError], param: str) -> None:
    decode = DecodeParams(**kwargs.pop("decode", {}))
    with pytest.raises(error) as e:
        start(BLOCK, request(decode=decode, **kwargs), model.info)
    assert e.value.param == param


def test_shift_without_a_first_token_is_refused() -> None:
    with pytest.raises(UnsupportedError):
        BLOCK.compile(request(), info("block", shift=1))
    shifted_editor = info("block", shift=1, ar_first=True, edit=True)
    with pytest.raises(UnsupportedError, match="outside"):
        BLOCK.compile(request(decode=DecodeParams(rule="edit")), shifted_editor)


def test_exactness() -> None:
    assert BLOCK.compile(request(), info("block")).tier == "exact-fast"
    assert BLOCK.compile(request(decode=DecodeParams(cache="sub_block")), info("block")).tier == "approximate"


@pytest.mark.parametrize("limit", [8, 64])
def test_the_sub_block_cache_is_made_again_from_what_it_was_made_from(limit: int) -> None:
    kwargs: dict[str, Any] = {"max_tokens": 24, "block_length": 4, "cache": "sub_block", "threshold": 0.9}
    plain = generate(SHIFTED, tuple(range(3, 16)), **kwargs)
    again: list[int] = []
    for seed in range(4):
        rng = random.Random(seed)
        drop = lambda step, rng=rng: rng.random() < 0.3  # noqa: E731
        result = generate(SHIFTED, tuple(range(3, 16)), drop=drop, limit=limit, **kwargs)
        assert result.output == plain.output
        assert [c.fixed for c in result.commits if c.fixed] == [c.fixed for c in plain.commits if c.fixed]
        again += [s.stop for s in result.spans if not s.want]
    assert max(again) > 16


def test_sub_block_cache_runs_the_sub_block_alone() -> None:
    """The model's block at a sub-block's first step, then its own rows; the finished block is stored once more."""
    result = generate(FakeModel(info("block", block=8), seed=3, sharp=4), tuple(range(8)), max_tokens=8, block_length=4,
                      cache="sub_block", early_stop=False)  # fmt: skip
    block = [(8, 16, "keep")]
    assert shapes(result) == [(0, 16, "keep"), *[(8, 12, "replace")] * 3, *block, *[(12, 16, "replace")] * 3]
