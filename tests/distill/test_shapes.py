"""Shapes: the draw against its rule and its discrepancy bound, and fitting against a row-by-row rewrite."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfastllm.distill.shapes import (
    DEFAULT_MIXES,
    fit_batch_to_shape,
    sample_enumerated_shape,
    shape_probabilities,
    truncate_batch_to_shape,
)
from dfastllm.errors import ValidationError

LENGTHS = (16, 32, 64, 128)


def test_the_draw_of_seed_0_is_the_rule_as_it_is_written() -> None:
    """u = frac(step * 0.618034) against the running sums of the shares, written out here."""
    ends = {16: 0.5, 32: 0.8, 64: 0.95, 128: 1.0}
    for step in (1, 2, 3, 57, 1999, 123_457):
        u = math.fmod(step * 0.618034, 1.0)
        assert sample_enumerated_shape(LENGTHS, step=step) == next(n for n, end in ends.items() if u < end), step


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_the_shares_of_every_beginning_of_a_run_are_within_the_bound_of_the_sequence(seed: int) -> None:
    """N D_N <= 3 + (1 / log(golden ratio) + 1 / log 2) log N for multiples of a number whose partial quotients are 1,
    as those of 0.618034 are for some thousands (Kuipers and Niederreiter, Uniform Distribution of Sequences, theorem
    2.3.4); a shift changes no interval's share modulo 1. Independent draws would be off by some 1 / sqrt(N)."""
    slope = 1 / math.log((1 + math.sqrt(5)) / 2) + 1 / math.log(2)
    for n in (50, 500, 5000):
        counts = Counter(
            sample_enumerated_shape(LENGTHS, step=s, seed=seed, periodic_upweight_rare=False) for s in range(1, n + 1)
        )
        bound = (3 + slope * math.log(n)) / n
        total = seen = 0.0
        for length, share in zip(LENGTHS, DEFAULT_MIXES[4], strict=True):
            total, seen = total + share, seen + counts[length] / n
            assert abs(seen - total) <= bound, (n, length)
    assert bound < 0.5 / math.sqrt(n)


def test_a_step_draws_the_same_whatever_was_drawn_before() -> None:
    forward = [sample_enumerated_shape(LENGTHS, step=step, seed=3) for step in range(300)]
    assert forward == [sample_enumerated_shape(LENGTHS, step=step, seed=3) for step in reversed(range(300))][::-1]
    assert forward != [sample_enumerated_shape(LENGTHS, step=step, seed=4) for step in range(300)]


def test_without_a_step_torchs_generator_draws() -> None:
    torch.manual_seed(5)
    one = [sample_enumerated_shape(LENGTHS) for _ in range(200)]
    torch.manual_seed(5)
    assert one == [sample_enumerated_shape(LENGTHS) for _ in range(200)]
    assert set(one) >= set(LENGTHS[:3])


def test_a_shape_without_a_share_is_never_drawn_nor_raised() -> None:
    drawn = {sample_enumerated_shape((8, 16, 32), [0.9, 0.1, 0.0], step=step) for step in range(0, 50_000, 100)}
    assert drawn == {8, 16}
    assert shape_probabilities((8, 16, 32), [0.9, 0.1, 0.0], raise_rarest=True) == pytest.approx([9 / 11, 2 / 11, 0])
    assert sample_enumerated_shape((8, 16), [0.0, 1.0], step=0) == 16


@pytest.mark.parametrize("count", [1, 5, 9])
def test_other_numbers_of_shapes_have_equal_shares(count: int) -> None:
    assert shape_probabilities(range(1, count + 1)) == pytest.approx([1 / count] * count)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lengths", "probabilities", "says"),
    [
        ((), None, "no shape"),
        ((8, 8), None, "twice"),
        ((8, 0), None, "above 0, got 0"),
        ((8, 1.5), None, "got 1.5"),
        ((8, True), None, "got True"),
        ((8, 16), [1.0], "1 shares for 2 lengths"),
        ((8, 16), [0.5, 0.4], "sum to 1, got 0.9"),
        ((8, 16), [0.0, 0.0], "sum to 1, got 0"),
        ((8, 16), [1.5, -0.5], "got -0.5"),
        ((8, 16), [math.nan, 1.0], "got nan"),
        ((8, 16), [math.inf, 1.0], "got inf"),
        ((8, 16), ["a", 1.0], "got 'a'"),
    ],
)
def test_what_is_no_mix_is_refused(lengths: Any, probabilities: Any, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        sample_enumerated_shape(lengths, probabilities, step=1)


@pytest.mark.parametrize("step", [-1, 1.0, True])
def test_what_is_no_step_is_refused(step: Any) -> None:
    with pytest.raises(ValidationError, match="whole number from 0"):
        sample_enumerated_shape((8, 16), step=step)


def batch_of(rows: list[tuple[int, int]], width: int) -> dict[str, Any]:
    """Rows of (prompt, response) tokens, padded to `width`; every value of a row tells its place in it."""
    count = len(rows)
    ids = torch.full((count, width), 99)
    batch: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.zeros(count, width, dtype=torch.long),
        "labels": torch.full((count, width), -100),
        "json_args_mask": torch.zeros(count, width, dtype=torch.bool),
        "teacher_topk_logprobs": torch.full((count, width, 2), -math.inf),
        "hidden": torch.zeros(count, width, 3),  # a sequence under a name that nobody knows
        "response_start": torch.tensor([prompt for prompt, _ in rows]),
        "teacher_attention_mask": torch.ones(count, 5, dtype=torch.long),
        "metadata": [{"row": row} for row in range(count)],
        "note": "kept",
    }
    for row, (prompt, response) in enumerate(rows):
        stop = prompt + response
        ids[row, :stop] = torch.arange(stop) + 1000 * row
        batch["attention_mask"][row, :stop] = 1
        batch["labels"][row, prompt:stop] = ids[row, prompt:stop]
        batch["json_args_mask"][row, stop - 1] = True
        batch["teacher_topk_logprobs"][row, prompt:stop] = -torch.arange(response).float()[:, None]
        batch["hidden"][row, :stop] = ids[row, :stop, None].float()
    return batch


def test_fit_cuts_the_prompt_from_the_left_pads_and_drops() -> None:
    batch = batch_of([(6, 3), (2, 2), (1, 5), (3, 6)], 12)
    fitted, dropped = fit_batch_to_shape(batch, 6, pad_id=7)
    assert dropped == 1  # six tokens of response leave no prompt
    assert fitted["input_ids"].tolist() == [
        [3, 4, 5, 6, 7, 8],
        [1000, 1001, 1002, 1003, 7, 7],
        [2000, 2001, 2002, 2003, 2004, 2005],
    ]
    assert fitted["labels"].tolist() == [
        [-100] * 3 + [6, 7, 8],
        [-100, -100, 1002, 1003, -100, -100],
        [-100, 2001, 2002, 2003, 2004, 2005],
    ]
    assert fitted["attention_mask"].sum(1).tolist() == [6, 4, 6]
    assert fitted["response_start"].tolist() == [3, 2, 1]
    assert fitted["metadata"] == [{"row": 0}, {"row": 1}, {"row": 2}]
    assert fitted["teacher_attention_mask"].shape == (3, 5)
    assert fitted["note"] == "kept"
    assert fitted.keys() == batch.keys()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    st.integers(0, 4),
    st.integers(1, 24),
)
def test_fit_keeps_whole_responses_and_nothing_else_of_a_row_is_mixed(
    rows: list[tuple[int, int]], more: int, length: int
) -> None:
    """Against a rewrite with Python lists: each row is its last `length` tokens, or is not there."""
    batch = batch_of(rows, max(map(sum, rows)) + more)
    fitted, dropped = fit_batch_to_shape(batch, length, pad_id=55)
    expected = []
    for row, (prompt, response) in enumerate(rows):
        if response + 1 <= length:
            tokens = [1000 * row + i for i in range(prompt + response)][-length:]
            labels = [-100] * (len(tokens) - response) + tokens[-response:]
            expected.append((tokens, labels, len(tokens) - response))
    assert dropped == len(rows) - len(expected)
    assert fitted["input_ids"].shape == (len(expected), length)
    for at, (tokens, labels, start) in enumerate(expected):
        pad = length - len(tokens)
        assert fitted["input_ids"][at].tolist() == tokens + [55] * pad
        assert fitted["labels"][at].tolist() == labels + [-100] * pad
        assert fitted["attention_mask"][at].tolist() == [1] * len(tokens) + [0] * pad
        assert int(fitted["response_start"][at]) == start
        assert fitted["json_args_mask"][at].nonzero().flatten().tolist() == [len(tokens) - 1]
        assert fitted["hidden"][at, : len(tokens), 0].tolist() == tokens
        assert fitted["teacher_topk_logprobs"][at, start, 0] == 0
        assert torch.isneginf(fitted["teacher_topk_logprobs"][at, len(tokens) :]).all()


def test_a_batch_of_which_nothing_fits_has_no_rows() -> None:
    fitted, dropped = fit_batch_to_shape(batch_of([(2, 8), (3, 9)], 12), 4)
    assert dropped == 2
    assert fitted["input_ids"].shape == (0, 4)
    assert fitted["response_start"].shape == (0,)
    assert fitted["metadata"] == []


def test_truncate_keeps_the_beginning_of_every_sequence() -> None:
    batch = batch_of([(6, 3), (2, 2)], 12)
    cut = truncate_batch_to_shape(batch, 5)
    for name in ("input_ids", "labels", "attention_mask", "json_args_mask", "teacher_topk_logprobs", "hidden"):
        assert torch.equal(cut[name], batch[name][:, :5])
    assert cut["response_start"].tolist() == [5, 2]
    assert torch.equal(cut["teacher_attention_mask"], batch["teacher_attention_mask"])
    assert batch["input_ids"].shape == (2, 12)
    same = truncate_batch_to_shape(batch, 12)
    assert all(same[name] is batch[name] for name in batch)


@pytest.mark.parametrize("shape", [0, -1, 2.0, True])
def test_what_is_no_shape_is_refused(shape: Any) -> None:
    for cut in (truncate_batch_to_shape, fit_batch_to_shape):
        with pytest.raises(ValidationError, match="whole number above 0"):
            cut(batch_of([(1, 1)], 4), shape)  # type: ignore[operator]


def test_what_is_no_batch_is_refused() -> None:
    with pytest.raises(ValidationError, match="no sequence"):
        truncate_batch_to_shape({"metadata": []}, 4)
    batch = batch_of([(1, 1)], 4)
    with pytest.raises(ValidationError, match=r"labels is \[1, 3\] rows by tokens, but input_ids is \[1, 4\]"):
        truncate_batch_to_shape({**batch, "labels": batch["labels"][:, :3]}, 2)
    for name in ("attention_mask", "response_start"):
        with pytest.raises(ValidationError, match=f"no {name}"):
            fit_batch_to_shape({key: value for key, value in batch.items() if key != name}, 2)
