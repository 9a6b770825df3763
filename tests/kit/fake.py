"""A deterministic model whose logits are a hash of exactly which (token, position) keys each row could see.

Any fault in masks, pages, truncation or rebuilding changes the tokens. Attention is real: q and k are zero, so a row's
output is the mean of the visible values; the values carry integers, so sums are recovered exactly in float64.
"""

from __future__ import annotations

from typing import Any

import torch

from dfastllm.core import ModelInfo
from dfastllm.models import Attend

VOCAB, MASK, EOS = 48, 47, 46
_M = (1 << 61) - 1


def _mix(x: torch.Tensor, salt: int) -> torch.Tensor:
    x = (x + salt) * 0x9E3779B1 % _M
    x = (x ^ (x >> 17)) * 0x85EBCA6B % _M
    return (x ^ (x >> 13)) * 0xC2B2AE35 % _M


class FakeModel:
    """Face of dfastllm.models' Decoder. eos_bias > 0 makes EOS likelier, so that requests end at different times."""

    dtype = torch.float64

    def __init__(self, kind: str = "diffusion", eos_bias: float = 0.0, **info: Any) -> None:
        self.eos_bias = eos_bias
        self.fail_on: int | None = None  # a token id that makes the forward raise
        self.nan_on: int | None = None  # a token id whose rows give NaN logits
        self.forwards = 0
        self.heights: list[int] = []  # rows of each forward
        self.salts: torch.Tensor | None = None  # int64 [rows] of the next forward: what its adapter adds to each row
        fields: dict[str, Any] = {
            "name": "fake",
            "family": "fake",
            "kind": kind,
            "vocab_size": VOCAB,
            "max_len": 512,
            "layers": 2,
            "kv_heads": 1,
            "head_dim": 4,
            "eos_ids": (EOS,),
            "mask_id": None if kind == "ar" else MASK,
            "block": 4 if kind == "block" else 0,
        }
        self.info = ModelInfo(**(fields | info))

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, attend: Any) -> torch.Tensor:
        self.forwards += 1
        self.heights.append(len(ids))
        if self.fail_on is not None and (ids == self.fail_on).any():
            raise RuntimeError("told to fail")
        state = _mix(ids * 1024 + positions, 7)
        if self.salts is not None and self.salts.any():
            salts = torch.zeros_like(ids)  # rows after them are padding
            salts[: len(self.salts)] = self.salts
            state = torch.where(salts == 0, state, _mix(state + salts, 13))
        for layer in range(self.info.layers):
            v = torch.stack([positions == 0, state % 1009, torch.zeros_like(ids), torch.zeros_like(ids)], -1)
            v = v.double().unsqueeze(1)
            zero = torch.zeros_like(v)
            out = attend(layer, Attend(1, 1, 4, 0.5), zero, zero, v)[:, 0]
            count = (1 / out[:, 0].clamp_min(1e-9)).round()
            total = (out[:, 1] * count).round().long()
            state = _mix(state * 31 + total * 1013 + count.long(), 11 + layer) % (1 << 40)
        hidden = state.double()
        if self.nan_on is not None:
            hidden[ids == self.nan_on] = float("nan")
        return hidden.unsqueeze(-1)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        words = torch.arange(VOCAB)
        base = hidden[:, :1].nan_to_num(0).long()
        logits = (_mix(base * VOCAB + words, 5) % 8000).double() / 1000
        logits[:, EOS] += self.eos_bias
        return torch.where(hidden[:, :1].isnan(), float("nan"), logits)
