"""Autoregressive families, packed, against transformers: the checkpoints of test_parity_transformers on the native
runner, a text in two chunks and greedy tokens one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dfastllm import assemble, models
from dfastllm.core import Span
from dfastllm.engine.batch import pack
from dfastllm.engine.pages import Pages, PageTable
from dfastllm.engine.runners.native import NativeRunner

pytest.importorskip("transformers")

from tests.models.test_parity_transformers import CASES, _published

DENSE = [case for case, (kind, _) in CASES.items() if kind != "Qwen3Moe"]


class Text:
    """One sequence on a runner of its own."""

    def __init__(self, model: models.PackedDecoder) -> None:
        self.runner = NativeRunner(model, 128, torch.float32, 16)
        self.table = PageTable(Pages(8, 16))
        self.length = 0

    def more(self, ids: list[int]) -> Tensor:
        """These ids at the text's end -> logits of all of them."""
        span = Span(self.length, tuple(ids), "causal", "keep", want=tuple(range(len(ids))))
        self.table.grow(span.stop)
        step = pack([(span, self.table, self.length)])
        self.length = span.stop
        return self.runner.run(step).logits()


@pytest.mark.parametrize("case", DENSE)
def test_logits_and_greedy_tokens(case: str, tmp_path: Path) -> None:
    theirs = _published(case, tmp_path)
    packed = assemble.pack(models.load(tmp_path))
    ids = torch.randint(3, 120, (60,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = theirs(ids[None]).logits[0]
        tokens = theirs.generate(ids[None, :20], max_new_tokens=20, do_sample=False, eos_token_id=None)[0].tolist()
    text = Text(packed)
    got = torch.cat([text.more(ids[:37].tolist()), text.more(ids[37:].tolist())])
    assert (got - wanted).abs().max() <= 1e-4
    text, answer = Text(packed), []
    row = text.more(tokens[:20])[-1]
    for _ in range(20):
        answer.append(int(row.argmax()))
        row = text.more(answer[-1:])[-1]
    assert answer == tokens[20:]
