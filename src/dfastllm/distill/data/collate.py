"""Samples of different lengths to one batch, and a batch to the rows of its logits.

A batch is token-aligned: what stands at t is about the token at t. Row t of the logits predicts the token at t + 1, so
`to_rows` shifts once, and no loss shifts again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dfastllm.errors import ValidationError

__all__ = ["OWN_AXIS", "TOKEN_ALIGNED", "collate_kd_batch", "to_rows"]

Batch = dict[str, Any]

# Keys with an entry a token that are about predicting that token, and what stands where nothing is predicted.
TOKEN_ALIGNED: Mapping[str, float] = {
    "labels": -100,
    "ground_truth_labels": -100,
    "teacher_topk_ids": 0,
    "teacher_topk_logprobs": -math.inf,
    "tool_name_mask": 0,
    "json_args_mask": 0,
    "integration_mask": 0,
}
OWN_AXIS = frozenset({"teacher_prefix_ids", "teacher_attention_mask"})  # their dim 1 is not the batch's tokens
# Further sequences of a row, padded to the batch's tokens, or to the longest where they have an axis of their own.
_PADDED: Mapping[str, float] = {
    "attention_mask": 0,
    **TOKEN_ALIGNED,
    "teacher_prefix_ids": -100,
    "teacher_attention_mask": 0,
}
_FLAGS = ("tool_should_be_used", "required_fields_present")


def collate_kd_batch(rows: Sequence[Mapping[str, Any]], pad_id: int = 0) -> Batch:
    """One batch of samples of `KDDataset`, or of rows made by hand, whose sequences may be lists; T is its longest row.

    input_ids [B, T] int64 (padded by `pad_id`), attention_mask [B, T] int64, labels and ground_truth_labels [B, T]
    int64 (-100), response_start [B] int64, tool_should_be_used and required_fields_present [B] bool,
    teacher_prefix_ids [B, P] int64 (-100), teacher_attention_mask [B, Tt] int64, teacher_topk_ids [B, T, K] int64,
    teacher_topk_logprobs [B, T, K] float32 (-inf), tool_name_mask, json_args_mask and integration_mask [B, T] bool,
    metadata: a list of the rows' dicts. An optional key is absent if no row has it; a row without it is padding, or
    False. A row that does not say where its response begins begins it with its first label. Raises ValidationError for
    no rows, for a row without input_ids or labels, and for sequences of a row that are of unequal length.
    """
    if not rows:
        raise ValidationError("a batch needs at least one row, got none.", param="rows")
    rows = [_checked(at, row) for at, row in enumerate(rows)]
    out: Batch = {"input_ids": _padded([row["input_ids"] for row in rows], pad_id)}
    present = {name for row in rows for name in row}
    width = out["input_ids"].shape[1]
    for name, fill in _PADDED.items():
        if name in present:
            out[name] = _padded([row.get(name) for row in rows], fill, 0 if name in OWN_AXIS else width)
    out["response_start"] = torch.tensor([_response_start(row) for row in rows], dtype=torch.int64)
    for name in _FLAGS:
        if name in present:
            out[name] = torch.tensor([bool(row.get(name, False)) for row in rows])
    if "metadata" in present:
        out["metadata"] = [dict(row.get("metadata") or {}) for row in rows]
    return out


def to_rows(batch: Mapping[str, Any]) -> Batch:
    """The batch with every token-aligned key (`TOKEN_ALIGNED`) moved one to the left: entry t is then about what row t
    of the logits predicts, and the last one is about nothing. All other keys are as they were: input_ids is what the
    model reads, and the row that predicts the response's first token is response_start - 1."""
    out = dict(batch)
    for name, fill in TOKEN_ALIGNED.items():
        if name in out:
            value = out[name]
            out[name] = torch.cat((value[:, 1:], torch.full_like(value[:, :1], fill)), dim=1)
    return out


def _checked(at: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its sequences as tensors and an attention mask, without what is None."""
    row = {name: value for name, value in given.items() if value is not None}
    missing = [name for name in ("input_ids", "labels") if name not in row]
    if missing:
        raise ValidationError(
            f"row {at} of the batch has no {missing[0]}; it has {', '.join(map(str, row)) or 'nothing'}.",
            param=missing[0],
            hint="Rows are samples of KDDataset.",
        )
    row |= {name: torch.as_tensor(row[name]) for name in ("input_ids", *_PADDED) if name in row}
    row.setdefault("attention_mask", torch.ones_like(row["input_ids"]))
    length = len(row["input_ids"])
    for name in ("attention_mask", *TOKEN_ALIGNED):
        if name in row and len(row[name]) != length:
            raise ValidationError(f"{name} of row {at} has {len(row[name])} entries for {length} tokens.", param=name)
    return row


def _response_start(row: Mapping[str, Any]) -> int:
    if "response_start" in row:
        return int(row["response_start"])
    supervised = torch.nonzero(row["labels"] != -100).flatten().tolist()
    return supervised[0] if supervised else len(row["labels"])


def _padded(values: Sequence[torch.Tensor | None], fill: float, width: int = 0) -> torch.Tensor:
    """[B, longest, ...] of tensors [n, ...], each at its beginning, at least `width` long; None is a row of nothing.
    Where later dimensions differ (top-k of another k), the largest is taken. One dtype: the first one's."""
    there = [value for value in values if value is not None]
    tail = [max(sizes) for sizes in zip(*(value.shape[1:] for value in there), strict=True)]
    out = there[0].new_full((len(values), max(width, *map(len, there)), *tail), fill)
    for at, value in enumerate(values):
        if value is not None:
            place: tuple[int | slice, ...] = (at, *(slice(size) for size in value.shape))
            out[place] = value
    return out
