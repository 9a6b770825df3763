"""A GGUF file into a quantised directory: the same as from the directory the file was made of, and as rounding while
the file is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dfastllm import assemble
from dfastllm.convert import Options, measure, quantise_gguf, quantise_model
from dfastllm.core import Span
from dfastllm.engine import EngineConfig
from dfastllm.engine.batch import pack
from dfastllm.engine.pages import Pages, PageTable
from dfastllm.engine.runners import runner_for
from dfastllm.errors import CheckpointError, ModelNotFoundError, UnsupportedError
from dfastllm.llm import LLM, SHIPPED
from dfastllm.models import check
from dfastllm.models.gguf import write_gguf
from dfastllm.quant import FORMATS
from dfastllm.text import Tokenizer
from dfastllm.text.gguf.export import tokenizer_metadata
from tests.kit.convert_models import SIZES, grouped, write_tiny


def logits(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    config = EngineConfig()
    pages = Pages(8, config.page_size)
    runner = runner_for(model, 8 * config.page_size, model.dtype, "cpu", 16, config.page_size)
    table = PageTable(pages)
    table.grow(len(ids))
    span = Span(0, ids, "causal", "keep", tuple(range(len(ids))))
    return runner.run(pack([(span, table, 0)], runner.block_size)).logits().clone()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe", "gemma2", "llada"])
def test_it_is_what_the_directory_gives(tmp_path: Path, family: str) -> None:
    """An F32 file holds the directory's weights, in other row orders, its norms with an offset: the same codes."""
    source = write_tiny(tmp_path / "source", family, **grouped(family))
    file = write_gguf(source, tmp_path / "m.gguf", "F32", tokenizer=tokenizer_metadata(source, SIZES["vocab_size"]))
    names = ("w8g", "w4") if family == "gemma2" else ("w8r", "w4")
    for format in names:
        quantise_model(source, tmp_path / f"a-{format}", Options(format))
        quantise_model(file, tmp_path / f"b-{format}", Options(format))
        assert check(tmp_path / f"b-{format}").quantised == format
        one, other = (assemble.load(tmp_path / f"{side}-{format}") for side in "ab")
        ids = tuple(range(3, 40))
        assert logits(one.model, ids).equal(logits(other.model, ids))
        assert other.tokenizer.encode("a cat, 12") == one.tokenizer.encode("a cat, 12")
        assert other.model.info.eos_ids == one.model.info.eos_ids
        assert other.model.info.mask_id == one.model.info.mask_id


@pytest.mark.parametrize("format", ["w8", "w8r", "w8g", "w8gr"])
def test_a_file_of_blocks_becomes_what_its_floats_become(tmp_path: Path, format: str) -> None:
    """The blocks' own values are what is rounded; turned formats are what loading with --quantization makes."""
    file = quantise_gguf("demo-ar", tmp_path / "demo.gguf", "gguf-q8_0")
    out = tmp_path / "out"
    report = quantise_model(file, out, Options(format))
    assert report.bytes_before == pytest.approx(file.stat().st_size, rel=0.1)
    floats = assemble.dequantised(file, torch.float32).model
    ids = tuple(range(5, 60))
    found = logits(assemble.load(out).model, ids)
    assert found.equal(logits(assemble.pack(floats, format), ids))  # type: ignore[arg-type]
    if FORMATS[format].turned:
        assert found.equal(logits(assemble.load(file, quantization=format).model, ids))


def test_it_answers_as_the_model_does(tmp_path: Path) -> None:
    """Chat template, ends of the text and tokenizer come along; calibration and the report work as from a directory."""
    file = quantise_gguf("demo-ar", tmp_path / "demo.gguf", "gguf-q8_0")
    asked = [{"role": "user", "content": "What is 12 + 30?"}]
    said = []
    for name, options in (("turned", Options()), ("calibrated", Options("w8g", calibration="gptq", samples=8))):
        report = quantise_model(file, tmp_path / name, options)
        with LLM(tmp_path / name) as llm:
            said.append(llm.chat([asked])[0].outputs[0].text)
    with LLM("demo-ar") as llm:
        said.append(llm.chat([asked])[0].outputs[0].text)
    assert set(said) == {"12 + 30 = 42\nAnswer: 42"}
    assert measure(file, tmp_path / "calibrated", report, per_task=2).quality is not None
    assert (
        Tokenizer.load(tmp_path / "calibrated").templates.names == Tokenizer.load(SHIPPED / "demo-ar").templates.names
    )


def test_fewer_bits_of_fewer_bits_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    file = quantise_gguf("demo-ar", tmp_path / "demo.gguf", "gguf-q4_0")
    for options in (Options("w4"), Options("w6"), Options("w4m", head="float")):
        with pytest.raises(UnsupportedError, match=r"holds blk\.0\.\S+ in Q4_0; rounding it to w\w+ too.*w8r"):
            quantise_model(file, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
    assert quantise_model(file, tmp_path / "out", Options()).format == "w8r"
    eight = quantise_gguf("demo-ar", tmp_path / "eight.gguf", "gguf-q8_0")
    assert quantise_model(eight, tmp_path / "four", Options("w4")).bits_per_weight < 6


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"nothing\.gguf is no GGUF file"):
        quantise_model(tmp_path / "nothing.gguf", tmp_path / "out", Options())
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(CheckpointError, match="is not a GGUF file: it starts with"):
        quantise_model(tmp_path / "cut.gguf", tmp_path / "out", Options())
    with pytest.raises(UnsupportedError, match=r"is a GGUF file; this starts from.*dfastllm quantize"):
        quantise_gguf(tmp_path / "cut.gguf", tmp_path / "out.gguf", "gguf-q8_0")
    assert not (tmp_path / "out").exists()
