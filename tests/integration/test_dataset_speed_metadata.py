"""From a set's file to a batch, as the distillation document asks before the first paid call: metadata is loaded,
batches hold it, and optional fields may be missing. The whole path: file, KDDataset, DataLoader, collate_kd_batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from dfastllm.distill import KDDataset, collate_kd_batch, fit_batch_to_shape
from dfastllm.distill.data import to_rows, write_rows
from dfastllm.distill.data.generate import generate

TOOL = {
    "type": "function",
    "function": {
        "name": "set_timer",
        "parameters": {"type": "object", "properties": {"minutes": {"type": "integer"}}, "required": ["minutes"]},
    },
}
CALL = '<tool_call>{"name": "set_timer", "arguments": {"minutes": 5}}</tool_call>'
PLAIN = {"prompt": "Hello!", "teacher_text": "Hello! How can I help you?"}
TIMER = {"prompt": "Set a timer for 5 minutes.", "tools": [TOOL], "teacher_text": CALL}
EXPLICIT = {
    **TIMER,
    "tool_should_be_used": True,
    "teacher_prefix_ids": [4, 5, 6],
    "required_fields_present": False,
    "teacher_attention_mask": [1, 1, 1, 0],
}


def load(tmp_path: Path, *rows: dict[str, Any], **options: Any) -> KDDataset:
    write_rows(tmp_path / "kd_mix.jsonl", rows, {"teacher": "by hand"}, force=True)
    return KDDataset(tmp_path / "kd_mix.jsonl", tokenizer_path="demo-ar", max_seq_length=2048, **options)


class TestDatasetLoading:
    @pytest.mark.parametrize("inner", [False, True], ids=["top level", "metadata"])
    def test_tool_should_be_used_is_loaded(self, tmp_path: Path, inner: bool) -> None:
        row = {**PLAIN, **({"metadata": {"tool_should_be_used": True}} if inner else {"tool_should_be_used": True})}
        dataset = load(tmp_path, row, PLAIN, TIMER)
        assert [dataset[i]["tool_should_be_used"] for i in range(3)] == [True, False, True]

    @pytest.mark.parametrize("inner", [False, True], ids=["top level", "metadata"])
    def test_teacher_prefix_ids_is_loaded(self, tmp_path: Path, inner: bool) -> None:
        ids = {"teacher_prefix_ids": [4, 5, 6]}
        dataset = load(tmp_path, {**PLAIN, **({"metadata": ids} if inner else ids)}, TIMER, prefix_tokens=5)
        assert dataset[0]["teacher_prefix_ids"].tolist() == [4, 5, 6]
        start = dataset[1]["response_start"]
        assert dataset[1]["teacher_prefix_ids"].tolist() == dataset[1]["input_ids"][start : start + 5].tolist()

    def test_required_fields_present_is_computed(self, tmp_path: Path) -> None:
        lacking = {**TIMER, "teacher_text": CALL.replace("minutes", "seconds")}
        dataset = load(tmp_path, TIMER, lacking, EXPLICIT)
        assert [dataset[i]["required_fields_present"] for i in range(3)] == [True, False, False]

    def test_teacher_attention_mask_is_loaded(self, tmp_path: Path) -> None:
        dataset = load(tmp_path, EXPLICIT, TIMER)
        assert dataset[0]["teacher_attention_mask"].tolist() == [1, 1, 1, 0]
        assert int(dataset[1]["teacher_attention_mask"].sum()) == int((dataset[1]["labels"] != -100).sum())


class TestBatchCollation:
    def test_new_fields_are_padded(self, tmp_path: Path) -> None:
        dataset = load(tmp_path, EXPLICIT, PLAIN)
        batch = collate_kd_batch([dataset[0], dataset[1]], dataset.pad_id)
        assert batch["teacher_prefix_ids"].tolist() == [[4, 5, 6], [-100] * 3]
        answer = int((batch["labels"][1] != -100).sum())
        assert batch["teacher_attention_mask"][0].tolist() == [1, 1, 1, 0] + [0] * (answer - 4)
        assert batch["tool_should_be_used"].tolist() == [True, False]
        assert batch["required_fields_present"].tolist() == [False, False]

    def test_shapes_are_consistent(self, tmp_path: Path) -> None:
        dataset = load(tmp_path, EXPLICIT, PLAIN, TIMER)
        batch = dataset.collate([dataset[i] for i in range(3)])
        assert {len(value) for value in batch.values()} == {3}
        width = batch["input_ids"].shape[1]
        for name in ("attention_mask", "labels", "tool_name_mask", "json_args_mask"):
            assert batch[name].shape == (3, width)

    def test_optional_fields_are_handled(self, tmp_path: Path) -> None:
        """A batch has a key if any row has it: none is made up."""
        dataset = load(tmp_path, PLAIN, TIMER)
        without, some = dataset.collate([dataset[0]]), dataset.collate([dataset[0], dataset[1]])
        optional = {"teacher_prefix_ids", "required_fields_present", "tool_name_mask", "json_args_mask"}
        assert not optional & without.keys()
        assert optional <= some.keys()
        assert not {"teacher_topk_ids", "integration_mask", "ground_truth_labels"} & some.keys()


def test_full_dataset_dataloader_batch_pipeline(tmp_path: Path) -> None:
    """A generated set of every task, through a loader, to batches and to a shape: each response is there once, whole,
    supervised to its EOS, and its metadata beside it."""
    count = 48
    generate(tmp_path / "set.jsonl", count, seed=3, style="verbose", mix={"tools": 3.0})
    dataset = KDDataset(tmp_path / "set.jsonl", tokenizer_path="demo-ar", max_seq_length=160)
    assert dataset.skipped == {}
    assert dataset.header["style"] == "verbose"
    loader = DataLoader(
        dataset, batch_size=8, shuffle=True, collate_fn=dataset.collate, generator=torch.Generator().manual_seed(0)
    )
    seen: list[str] = []
    for batch in loader:
        fitted, dropped = fit_batch_to_shape(batch, 160, pad_id=dataset.pad_id)
        assert dropped == 0
        rows = to_rows(fitted)
        assert fitted["input_ids"].shape == (8, 160)
        for at, about in enumerate(fitted["metadata"]):
            seen.append(about["id"])
            start = int(fitted["response_start"][at])
            stop = int(fitted["attention_mask"][at].sum())
            assert rows["labels"][at, start - 1 : stop - 1].tolist() == fitted["input_ids"][at, start:stop].tolist()
            assert int((rows["labels"][at] != -100).sum()) == stop - start
            assert bool(fitted["tool_should_be_used"][at]) == (about.get("grader") == "tool_call_within")
            assert int(fitted["teacher_attention_mask"][at].sum()) == stop - start
    assert sorted(seen) == sorted(
        json.loads(line)["id"] for line in (tmp_path / "set.jsonl").read_text().splitlines()[1:]
    )
    assert len(seen) == count
