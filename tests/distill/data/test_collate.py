"""Batches: every key's padding, dtype and shape, keys that no row has, and what is refused."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from dfastllm.distill import KDDataset, collate_kd_batch
from dfastllm.distill.data.collate import to_rows
from dfastllm.errors import ValidationError
from dfastllm.text import Tokenizer
from tests.distill.data.conftest import Write
from tests.distill.data.test_dataset import CALLS, SAYS, TELLS


def sample(length: int, start: int, **more: Any) -> dict[str, Any]:
    ids = torch.arange(10, 10 + length)
    labels = ids.clone()
    labels[:start] = -100
    return {"input_ids": ids, "labels": labels, "response_start": start, **more}


def test_every_key_is_padded_by_what_means_nothing() -> None:
    full = sample(
        4,
        2,
        tool_should_be_used=True,
        required_fields_present=True,
        teacher_prefix_ids=torch.tensor([12, 13, 14]),
        teacher_attention_mask=torch.tensor([1, 1]),
        ground_truth_labels=torch.tensor([-100, -100, 12, 13]),
        teacher_topk_ids=torch.ones(4, 2, dtype=torch.long),
        teacher_topk_logprobs=torch.full((4, 2), -1.0),
        tool_name_mask=torch.tensor([False, False, True, False]),
        metadata={"id": "a"},
    )
    wide = sample(
        6,
        1,
        teacher_prefix_ids=torch.tensor([11]),
        teacher_attention_mask=torch.tensor([1] * 5),
        teacher_topk_ids=torch.ones(6, 3, dtype=torch.long),
        teacher_topk_logprobs=torch.full((6, 3), -2.0),
    )
    batch = collate_kd_batch([full, wide, sample(3, 2)], pad_id=9)
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13, 9, 9], [10, 11, 12, 13, 14, 15], [10, 11, 12, 9, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1] * 4 + [0] * 2, [1] * 6, [1] * 3 + [0] * 3]
    assert batch["labels"][2].tolist() == [-100, -100, 12, -100, -100, -100]
    assert batch["ground_truth_labels"].tolist() == [[-100, -100, 12, 13, -100, -100], [-100] * 6, [-100] * 6]
    assert batch["response_start"].tolist() == [2, 1, 2]
    assert batch["tool_should_be_used"].tolist() == [True, False, False]
    assert batch["required_fields_present"].tolist() == [True, False, False]
    assert batch["teacher_prefix_ids"].tolist() == [[12, 13, 14], [11, -100, -100], [-100] * 3]
    assert batch["teacher_attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1] * 5, [0] * 5]
    assert batch["teacher_topk_ids"].shape == (3, 6, 3)
    assert batch["teacher_topk_logprobs"][0, 0].tolist() == [-1.0, -1.0, -math.inf]
    assert torch.isneginf(batch["teacher_topk_logprobs"][2]).all()
    assert batch["tool_name_mask"].tolist() == [[False, False, True, False, False, False], [False] * 6, [False] * 6]
    assert batch["metadata"] == [{"id": "a"}, {}, {}]
    kinds = {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "labels": torch.int64,
        "response_start": torch.int64,
        "tool_should_be_used": torch.bool,
        "required_fields_present": torch.bool,
        "teacher_prefix_ids": torch.int64,
        "teacher_attention_mask": torch.int64,
        "teacher_topk_ids": torch.int64,
        "teacher_topk_logprobs": torch.float32,
        "tool_name_mask": torch.bool,
    }
    assert {name: batch[name].dtype for name in kinds} == kinds


def test_a_key_that_no_row_has_is_absent() -> None:
    batch = collate_kd_batch([sample(3, 1), sample(2, 1)])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "response_start"}
    assert set(to_rows(batch)) == set(batch)


def test_rows_made_by_hand_may_be_lists() -> None:
    rows = [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "teacher_prefix_ids": [2], "tool_should_be_used": True},
        {"input_ids": [4], "labels": [-100], "attention_mask": [1], "teacher_prefix_ids": None},
    ]
    batch = collate_kd_batch(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["response_start"].tolist() == [1, 1]
    assert batch["teacher_prefix_ids"].tolist() == [[2], [-100]]
    assert batch["tool_should_be_used"].tolist() == [True, False]


def test_the_row_before_the_response_predicts_its_first_token() -> None:
    batch = collate_kd_batch([sample(5, 2, json_args_mask=torch.tensor([False, False, True, False, False]))])
    rows = to_rows(batch)
    assert rows["labels"].tolist() == [[-100, 12, 13, 14, -100]]
    assert rows["json_args_mask"].tolist() == [[False, True, False, False, False]]
    assert rows["input_ids"] is batch["input_ids"]
    assert batch["labels"].tolist() == [[-100, -100, 12, 13, 14]]  # the batch itself is as it was


def test_what_makes_no_batch_is_refused() -> None:
    with pytest.raises(ValidationError, match="at least one row"):
        collate_kd_batch([])
    for name in ("input_ids", "labels"):
        with pytest.raises(ValidationError, match=f"row 1 of the batch has no {name}"):
            collate_kd_batch([sample(2, 1), {k: v for k, v in sample(2, 1).items() if k != name}])
    with pytest.raises(ValidationError, match="tool_name_mask of row 0 has 2 entries for 3 tokens"):
        collate_kd_batch([sample(3, 1, tool_name_mask=torch.tensor([True, False]))])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_gives_the_batches_of_the_dataset(workers: int, tokenizer: Tokenizer, write: Write) -> None:
    found = KDDataset(write(CALLS, SAYS, TELLS, SAYS), tokenizer)
    collate = partial(collate_kd_batch, pad_id=found.pad_id)
    batches = list(DataLoader(found, batch_size=3, collate_fn=collate, num_workers=workers))
    assert [len(batch["input_ids"]) for batch in batches] == [3, 1]
    again = found.collate([found[0], found[1], found[2]])
    assert again.keys() == batches[0].keys()
    for name, value in again.items():
        same = torch.equal(value, batches[0][name]) if isinstance(value, torch.Tensor) else value == batches[0][name]
        assert same, name
