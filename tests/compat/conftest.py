"""A deterministic model that writes readable tokens with very different certainty, and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dfastllm import models
from dfastllm.compat.generator import build_engine
from dfastllm.llm import LLM
from dfastllm.text import Tokenizer
from tests.kit.fake import FakeModel, _mix
from tests.text.conftest import byte_level

VOCAB, MASK, EOS = 330, 3, 2
IDS = models.Ids(eos=(EOS,), mask=MASK)


class Writer(FakeModel):
    """As FakeModel (each row depends on all it sees), over the tokenizer's vocabulary. A row favours one printable
    token with a probability anywhere from 0.3 % to 99.8 %, so that thresholds have something to tell apart."""

    def __init__(self, kind: str = "diffusion", eos_every: int = 0, **info: Any) -> None:
        super().__init__(kind, name=f"writer-{kind}", vocab_size=VOCAB, eos_ids=(EOS,), **info)
        self.eos_every = eos_every

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        base = hidden[:, :1].nan_to_num(0).long()
        token = 4 + 30 + _mix(base, 5) % 60
        if self.eos_every:
            token = torch.where(_mix(base, 6) % self.eos_every == 0, EOS, token)
        logits = torch.zeros(hidden.shape[0], VOCAB, dtype=torch.float64)
        return logits.scatter_(1, token, (_mix(base, 9) % 1000).double() / 1000 * 12)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_level(), special_tokens={"eos_token": "<|im_end|>", "mask_token": "<|mask|>"})


@pytest.fixture(scope="session")
def model() -> Writer:
    torch.set_num_threads(1)
    return Writer(mask_id=MASK)


@pytest.fixture(scope="session")
def ending_model() -> Writer:
    """Sometimes it ends a text."""
    return Writer(eos_every=12, mask_id=MASK)


@pytest.fixture(scope="session")
def block_model() -> Writer:
    return Writer("block", mask_id=MASK)


@pytest.fixture(scope="session")
def ar_model() -> Writer:
    return Writer("ar")


@pytest.fixture(scope="session")
def llm(model: Writer, tokenizer: Tokenizer) -> Iterator[LLM]:
    with LLM(engine=build_engine(model, tokenizer)) as opened:
        yield opened
