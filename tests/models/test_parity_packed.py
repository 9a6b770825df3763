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


@pytest.mark.parametrize("case", CASES)
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


SCALED = {
    "linear": models.RopeScaling("linear", 4.0),
    "llama3": models.RopeScaling("llama3", 8.0, 4096, low_freq_factor=1.0, high_freq_factor=4.0),
    "yarn": models.RopeScaling("yarn", 8.0, 4096, attention_factor=1.25),
    "yarn-own-factor": models.RopeScaling("yarn", 8.0, 4096),
}


@pytest.mark.parametrize("native", [True, False], ids=["native", "plain"])
@pytest.mark.parametrize("kind", SCALED)
def test_scaled_positions(kind: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch model, which transformers vouches for, at a real head size and trained length: tables of the packed
    forwards are their own. 600 positions, so that frequencies turn which scaling stretches."""
    scaling = SCALED[kind]
    shape = {"hidden_size": 128, "heads": 2, "kv_heads": 1, "head_dim": 64, "layers": 2, "max_len": 32768}
    model = models.tiny("llama", 3, **shape, rope_scaling=scaling)
    if not native:
        monkeypatch.setattr("dfastllm.models.packed.native", lambda: None)
    ids = torch.randint(3, 60, (600,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model.head(model(ids, torch.arange(600), models.dense_attention(1, 600, "causal")))
        unscaled = models.tiny("llama", 3, **shape)
        other = unscaled.head(unscaled(ids, torch.arange(600), models.dense_attention(1, 600, "causal")))
    assert (wanted - other).abs().max() > 0.05  # what is looked for can be seen
    runner = NativeRunner(assemble.pack(model), 640, torch.float32, 16)
    table = PageTable(Pages(40, 16))
    table.grow(600)
    span = Span(0, tuple(ids.tolist()), "causal", "keep", want=tuple(range(600)))
    got = runner.run(pack([(span, table, 0)])).logits()
    assert (got - wanted).abs().max() <= 2e-4
