"""A GGUF file served end to end by the packed decoder: llama.cpp's logits and tokens, held packed, memory bounded."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dfastllm.core import SamplingParams, Span
from dfastllm.engine.batch import pack
from dfastllm.engine.pages import Pages, PageTable
from dfastllm.engine.runners.native import NativeRunner
from dfastllm.llm import LLM, SHIPPED
from dfastllm.models import Ids, PackedDecoder, build, describe, pack_decoder, tiny, tiny_config
from dfastllm.models.gguf import open_gguf, write_gguf
from dfastllm.text.gguf import tokenizer_metadata

DEMO = SHIPPED / "demo-ar"
PROMPT = list(range(3, 60, 3))
QUESTIONS = [
    "What is 22 + 39?",
    "Extract city, age as JSON: My friend David Khan from Berlin just turned 75.",
    "Python function guitar(value: int) -> int: returns the smaller of value and 43.",
    "Write the date 2016-10-13 in words.",
]
# GGML type -> llama.cpp's file type that writes it; the formats of the packed matrices.
WRITTEN = {
    "F16": ("F16", "f32"),
    "BF16": ("BF16", "bf16"),
    "Q8_0": ("Q8_0", "w8g"),
    "Q4_0": ("Q4_0", "w4g"),
    "Q4_1": ("Q4_1", "w4g"),
    "Q5_0": ("Q5_0", "w6g"),
    "Q5_1": ("Q5_1", "w6g"),
    "Q2_K": ("Q2_K", "w6g"),
    "Q3_K": ("Q3_K_M", "w6g"),
    "Q4_K": ("Q4_K_M", "w4g"),
    "Q5_K": ("Q5_K_M", "w6g"),
    "Q6_K": ("Q6_K", "w6g"),
    "IQ4_NL": ("IQ4_NL", "w8g"),
    "IQ4_XS": ("IQ4_XS", "w8g"),
    "TQ2_0": ("TQ2_0", "w4g"),
    "MXFP4": ("MXFP4_MOE", "w8g"),
}


def packed(path: Path) -> PackedDecoder:
    with open_gguf(path) as opened:
        parts = ((name, value) for name, value, _ in opened.tensors())
        return pack_decoder(opened.config, opened.info, parts, torch.float32)


def logits(model: PackedDecoder, ids: list[int]) -> np.ndarray:
    """[len(ids), vocabulary] through the runner that serves."""
    table = PageTable(Pages(8, 16))
    table.grow(len(ids))
    attend = "causal" if model.info.kind == "ar" else "full"
    span = Span(0, tuple(ids), attend, "keep" if attend == "causal" else "none", want=tuple(range(len(ids))))
    return NativeRunner(model, 8 * 16, torch.float32, 16).run(pack([(span, table, 0)])).logits().numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))


@pytest.mark.parametrize("kind", WRITTEN)
def test_logits_of_packed_types(kind: str, small: tuple[Path, dict[str, int]], llama: Any, tmp_path: Path) -> None:
    """Both round activations to 8 bits for quantised types, each in its own way."""
    ftype, format = WRITTEN[kind]
    number = getattr(llama.llama_cpp, f"LLAMA_FTYPE_MOSTLY_{ftype}")
    assert llama.quantise(small[0], tmp_path / "q.gguf", number, small[1])
    model, reference = packed(tmp_path / "q.gguf"), llama.Reference(tmp_path / "q.gguf")
    assert set(model.formats) == {format}
    assert cosine(logits(model, PROMPT), reference.logits(PROMPT)) >= 0.999
    reference.close()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "llada", "dream"])
def test_logits_of_every_architecture(family: str, llama: Any, tmp_path: Path) -> None:
    model = tiny(family, hidden_size=64, heads=4, intermediate_size=96)
    path = write_gguf(model, tmp_path / "m.gguf", "F32")
    reference = llama.Reference(path)
    assert cosine(logits(packed(path), PROMPT), reference.logits(PROMPT)) >= 0.99999
    reference.close()


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q5_1", "Q4_0"])
def test_the_shipped_model_answers_as_in_llama_cpp(kind: str, llama: Any, tmp_path: Path) -> None:
    path = write_gguf(DEMO, tmp_path / "demo.gguf", kind, tokenizer=tokenizer_metadata(DEMO, 1280))
    reference = llama.Reference(path)
    with LLM(path) as llm:
        prompts = [llm.render([{"role": "user", "content": question}]) for question in QUESTIONS]
        outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=12))
    for prompt, output in zip(prompts, outputs, strict=True):
        found = list(output.outputs[0].token_ids)
        wanted = reference.greedy(prompt, 12)
        assert found == wanted[: len(found)]
        assert len(found) == 12 or wanted[len(found)] == 2  # it ended where llama.cpp says <|end|>
        assert len(found) > 3
    reference.close()


def test_the_shipped_model_needs_no_other_file(tmp_path: Path) -> None:
    """Tokenizer, chat template and ids come from the GGUF file alone."""
    path = write_gguf(DEMO, tmp_path / "demo.gguf", "Q8_0", tokenizer=tokenizer_metadata(DEMO, 1280))
    with LLM(path) as llm:
        assert (
            "61"
            in llm.chat([{"role": "user", "content": QUESTIONS[0]}], SamplingParams(temperature=0.0, max_tokens=24))[
                0
            ].text
        )


SCRIPT = """
import json, resource, sys
from dfastllm import assemble
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
assemble.load(sys.argv[1])
before = resident()
model = assemble.load(sys.argv[2]).model
print(json.dumps([resident() - before, model.nbytes]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny file, and one of 43 MB with many layers, as real ones have."""
    directory = tmp_path_factory.mktemp("large")
    config = tiny_config("llama", hidden_size=512, heads=8, intermediate_size=1536, vocab_size=4096, layers=12)
    model = build(config, describe("llama", config, Ids()))
    first = tiny("llama", hidden_size=64, heads=4, vocab_size=4096)
    tokenizer = tokenizer_metadata(DEMO, 4096)
    return (
        write_gguf(first, directory / "tiny.gguf", "Q8_0", tokenizer=tokenizer),
        write_gguf(model, directory / "large.gguf", "Q8_0", tokenizer=tokenizer),
    )


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_loading_holds_little_more_than_the_file(large: tuple[Path, Path]) -> None:
    """Weights stay packed: resident memory grows by at most 1.2 times the file."""
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, large)], capture_output=True, text=True, check=True
    )
    grown, nbytes = json.loads(result.stdout)
    size = large[1].stat().st_size
    assert 0.9 * size < nbytes < 1.1 * size
    assert grown <= 1.2 * size, (grown / size, nbytes / size)
