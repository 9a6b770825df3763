"""`check`: the same verdicts as `load`, from headers, and a tokenizer that belongs to another model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dfastllm import models
from dfastllm.errors import DFastLLMError, ModelLoadError, ValidationError
from dfastllm.models.gguf import open_gguf, write_gguf
from tests.kit import published_configs as published
from tests.kit.convert_models import grouped


@pytest.fixture
def sdar(tmp_path: Path) -> Path:
    config, shapes = published.sdar()
    return published.write(tmp_path / "sdar", config, published.filled(shapes, 0))


def tokenizer(size: int, added: dict[str, int] | None = None) -> str:
    tokens = [{"id": token, "content": content, "special": True} for content, token in (added or {}).items()]
    return json.dumps({"model": {"type": "BPE", "vocab": {f"t{i}": i for i in range(size)}}, "added_tokens": tokens})


def test_good(sdar: Path) -> None:
    (sdar / "tokenizer.json").write_text(tokenizer(37, {"<|MASK|>": 38}))
    report = models.check(sdar)
    model = models.load(sdar)
    assert report.ok
    assert report.notes == ()
    assert report.info == model.info
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.weight_bytes == sum(p.nbytes for p in model.parameters()) == 4 * report.parameters
    assert report.dtype == "float32"
    assert report.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4  # k and v, layers, kv heads, head_dim, bytes
    assert report.memory_bytes(100) == report.weight_bytes + 100 * report.kv_bytes_per_token
    assert (report.tensors, report.files) == (len(list(model.parameters())), 1)
    assert "would load" in str(report)


def test_memory_at_another_dtype(sdar: Path) -> None:
    at_file, at_half = models.check(sdar), models.check(sdar, dtype="bfloat16")
    assert at_half.weight_bytes == at_file.weight_bytes // 2  # type: ignore[operator]
    assert at_half.kv_bytes_per_token == at_file.kv_bytes_per_token // 2  # type: ignore[operator]
    with pytest.raises(ValidationError):
        models.check(sdar, dtype="int4")


def test_reads_no_weights(sdar: Path) -> None:
    """A file whose data are holes (nothing was ever written there) passes: only headers are read. And a model far
    larger than this machine's memory is checked."""
    raw = json.loads((sdar / "config.json").read_text())
    raw |= {"hidden_size": 8192, "intermediate_size": 29568, "num_attention_heads": 64, "num_key_value_heads": 8}
    raw |= {"num_hidden_layers": 80, "head_dim": 128, "vocab_size": 151936}
    (sdar / "config.json").write_text(json.dumps(raw))
    (sdar / "model.safetensors").unlink()  # which is of another shape
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in models.Decoder(*_described(sdar)).named_parameters()}
    names = models.find_family("sdar").names
    header, end = {}, 0
    for own, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[names.published(own)] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (sdar / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    report = models.check(sdar)
    assert report.ok, str(report)
    assert report.weight_bytes == end > 100 * 2**30


def _described(directory: Path) -> tuple[models.DecoderConfig, object]:
    from dfastllm.models.checkpoint import read_model

    _, config, info = read_model(directory)
    return config, info


def test_wrong_tokenizer(sdar: Path) -> None:
    (sdar / "tokenizer.json").write_text(tokenizer(41))
    report = models.check(sdar)
    assert [p.code for p in report.problems] == ["bad_tokenizer"]
    assert "ids up to 40, the model has 40 embedding rows" in report.problems[0].message
    (sdar / "tokenizer.json").write_text(tokenizer(30, {"<far>": 4000}))
    assert models.check(sdar).ok  # a token that stands for itself alone is no part of ordinary text
    unigram = {"model": {"type": "Unigram", "vocab": [["a", 0.0]] * 50}, "added_tokens": []}
    (sdar / "tokenizer.json").write_text(json.dumps(unigram))
    assert "ids up to 49" in models.check(sdar).problems[0].message


def test_unreadable_tokenizer(sdar: Path) -> None:
    (sdar / "tokenizer.json").write_text("{")
    assert "bad_tokenizer" in {p.code for p in models.check(sdar).problems}


def test_notes(sdar: Path) -> None:
    assert models.check(sdar).notes == ("no tokenizer.json: the model takes token ids only.",)
    models.save(models.tiny("llama", ids=models.Ids()), sdar)
    assert any("no end-of-text id" in note for note in models.check(sdar).notes)


def test_several_problems_at_once(sdar: Path) -> None:
    (sdar / "config.json").write_text("not json")
    (sdar / "model.safetensors").write_bytes(b"short")
    assert {p.code for p in models.check(sdar).problems} == {"model_load_failed", "bad_checkpoint"}
    assert [p.code for p in models.check(sdar / "nowhere").problems] == ["model_load_failed"]


@pytest.mark.parametrize("change", ["config", "weights", "tensor", "family", "none"])
def test_verdict_is_loads(sdar: Path, change: str) -> None:
    raw = json.loads((sdar / "config.json").read_text())
    if change == "config":
        (sdar / "config.json").write_text(json.dumps({**raw, "num_attention_heads": 3}))
    if change == "weights":
        (sdar / "model.safetensors").unlink()
    if change == "tensor":
        (sdar / "config.json").write_text(json.dumps({**raw, "num_hidden_layers": 3}))
    if change == "family":
        (sdar / "config.json").write_text(json.dumps({**raw, "architectures": ["Nobody"]}))
    report = models.check(sdar)
    error: DFastLLMError | None = None
    try:
        models.load(sdar)
    except ModelLoadError as caught:
        error = caught
    assert report.ok == (error is None)
    if error is not None:
        assert error.code in {p.code for p in report.problems}
        assert str(error)[:60] in str(report) or report.problems[0].message.rstrip(".") in str(error)


@pytest.mark.parametrize("kind", ["F32", "BF16", "F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_gguf_file(family: str, kind: str, tmp_path: Path) -> None:
    """The fields of a directory; memory is that of the file's blocks, float16 and routers held as float32."""
    shape = {**grouped(family), "hidden_size": 64, "heads": 4, "intermediate_size": 96, "vocab_size": 96}
    model = models.tiny(family, **shape)
    report = models.check(write_gguf(model, tmp_path / "m.gguf", kind, head=kind))
    assert report.ok, str(report)
    with open_gguf(tmp_path / "m.gguf") as opened:
        assert report.info == opened.info
        assert report.tensors == len(opened.file.tensors)
    parameters = sum(p.numel() for p in model.parameters())
    vectors = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 1 or "router" in name)
    bytes_of = {"F32": 4, "BF16": 2, "F16": 4, "Q8_0": 34 / 32, "Q4_0": 18 / 32}[kind]
    assert report.parameters == parameters
    packed = 4 * vectors + bytes_of * (parameters - vectors)
    assert report.weight_bytes == packed
    assert report.dtype == "bfloat16"
    assert report.kv_bytes_per_token == 2 * model.config.layers * model.config.kv_heads * model.config.head_dim * 2
    assert report.files == 1
    assert report.quantised == (f"gguf-{kind.lower()}" if kind.startswith("Q") else None)
    assert models.check(tmp_path / "m.gguf", dtype="float32").kv_bytes_per_token == 2 * report.kv_bytes_per_token


def test_a_gguf_file_that_would_not_load(tmp_path: Path) -> None:
    path = write_gguf(models.tiny("llama"), tmp_path / "m.gguf", "F32")
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"GGUF", b"text", whole.replace(b"llama", b"lorem")):
        path.write_bytes(damaged)
        with pytest.raises(ModelLoadError) as caught:
            open_gguf(path)
        report = models.check(path)
        assert [(p.code, p.message) for p in report.problems] == [(caught.value.code, caught.value.message)]
        assert report.info is None
