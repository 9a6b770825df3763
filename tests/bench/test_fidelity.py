"""How faithful formats are: what is computed, against transformers and a divergence written out; how the file is
got."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dfastllm import assemble
from dfastllm.bench.fidelity import AS_STORED, faithfulness, logits_of, reference_of
from dfastllm.convert.gguf import quantise_gguf
from dfastllm.llm import SHIPPED
from dfastllm.models import Decoder
from dfastllm.models.gguf import write_gguf
from dfastllm.text.gguf import tokenizer_metadata

TEXTS = ("What is 12 + 30?", "A small cat sat on the mat.")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantise_gguf("demo-draft", tmp_path_factory.mktemp("gguf") / "demo.gguf", "gguf-q8_0")


def test_the_reference_is_the_float_model_of_the_file(tmp_path: Path) -> None:
    model = SHIPPED / "demo-draft"
    file = write_gguf(model, tmp_path / "demo.gguf", "F32", tokenizer=tokenizer_metadata(model, 1280))
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ours = assemble.dequantised(file, torch.float32)
    assert isinstance(ours.model, Decoder)
    ids = ours.tokenizer.encode(TEXTS[0])
    with torch.inference_mode():
        wanted = theirs(torch.tensor([list(ids)])).logits[0]
        found = logits_of(ours.model, ids, 1)
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-4)


def test_the_figures_are_the_mean_divergence_over_every_token(file: Path) -> None:
    [coarse, kept] = faithfulness({AS_STORED: file}, reference_of(file, TEXTS, 1), ["w4", AS_STORED], 1)
    plain = assemble.dequantised(file, torch.float32)
    assert isinstance(plain.model, Decoder)
    packed = assemble.pack(plain.model, "w4")
    total, same, count = 0.0, 0, 0
    for text in TEXTS:
        ids = plain.tokenizer.encode(text)
        p, q = (torch.log_softmax(logits_of(m, ids, 1).double(), -1) for m in (plain.model, packed))
        for row in range(len(ids)):
            total += sum(float(p[row, i].exp() * (p[row, i] - q[row, i])) for i in range(p.shape[1]))
            same += int(p[row].argmax() == q[row].argmax())
            count += 1
    assert (coarse.format, coarse.tokens) == ("w4", count)
    assert coarse.kl == pytest.approx(total / count, rel=1e-3)
    assert coarse.agreement == pytest.approx(same / count)
    assert 0 < kept.kl < coarse.kl  # only the rounding of activations is left
    assert coarse.bytes < kept.bytes


def test_a_format_is_the_same_after_another_one(file: Path) -> None:
    reference = reference_of(file, TEXTS, 1)
    [alone] = faithfulness({}, reference, ["w8g"], 1)
    assert list(faithfulness({}, reference, ["bf16", "w8g"], 1))[1] == alone
