"""Whole checkpoints: every family and kind through every format and calibration, and what must be refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dfastllm import assemble
from dfastllm.convert import Options, measure, quantise_gguf, quantise_model
from dfastllm.convert.samples import rows_of, task_examples
from dfastllm.core import ModelInfo
from dfastllm.errors import (
    CheckpointError,
    ModelLoadError,
    ModelNotFoundError,
    UnsupportedError,
    ValidationError,
)
from dfastllm.kernels.packed import QTensor
from dfastllm.llm import SHIPPED
from dfastllm.models import Decoder, PackedDecoder, check, dense_attention, load, save, tiny
from dfastllm.models.checkpoint import read_model, read_weights, skeleton
from dfastllm.quant import FORMATS, quantise
from dfastllm.text import Tokenizer
from tests.kit.convert_models import grouped, write_tiny

OWN_BASIS = [name for name, format in FORMATS.items() if not format.turned]  # the others: tests/models/test_basis.py


def weights_of(directory: Path) -> dict[str, QTensor | torch.Tensor]:
    family, config, info = read_model(directory)
    return dict(read_weights(directory, family, skeleton(config, info, torch.float32)))


@pytest.mark.parametrize("format", OWN_BASIS)
def test_every_format(llama: Path, tmp_path: Path, format: str) -> None:
    """What is read back is what rounding each tensor gives; norms stay bit for bit; the report counts the file."""
    report = quantise_model(llama, tmp_path / "out", Options(format))
    original = load(llama)
    found = weights_of(tmp_path / "out")
    assert list(found) == [name for name, _ in original.named_parameters()]
    for name, parameter in original.named_parameters():
        weight = found[name]
        if parameter.ndim == 1:
            assert isinstance(weight, torch.Tensor)
            assert weight.equal(parameter)
            continue
        head = name in ("embed.weight", "lm_head.weight")
        wanted = quantise(parameter, ("w8" if format == "w8" else "w8g") if head else format)
        assert isinstance(weight, QTensor)
        assert weight.codes.equal(wanted.codes)
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert report.bytes_after < size < report.bytes_after + 20_000  # the header
    assert report.bits_per_weight == pytest.approx(8 * report.bytes_after / report.parameters)
    assert report.parameters == sum(p.numel() for p in original.parameters())
    assert json.loads((tmp_path / "out" / "quantization_report.json").read_text())["format"] == format
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "quantization_report.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize("calibration", ["none", "aware", "gptq"])
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"tied": True}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("llada", {}),
        ("dream", {}),
        ("sdar", {}),
        ("fast_dllm_v2", {}),
    ],
)
def test_every_wiring(tmp_path: Path, family: str, overrides: dict[str, Any], calibration: Any) -> None:
    """Loads back, close to the original's logits; tied matrices once; biases untouched."""
    source = write_tiny(tmp_path / "source", family, **overrides)
    report = quantise_model(source, tmp_path / "out", Options("w8g", calibration=calibration, samples=4))
    assert check(tmp_path / "out").ok
    assert check(tmp_path / "out").quantised == "w8g"
    before, after = load(source), load(tmp_path / "out")
    assert before.info.kind == after.info.kind
    for name, parameter in before.named_parameters():
        if parameter.ndim == 1:
            assert dict(after.named_parameters())[name].equal(parameter), name
    ids, positions = torch.arange(24) * 7 % 250, torch.arange(24)
    logits = [m.head(m(ids, positions, dense_attention(1, 24))) for m in (before, after)]
    assert float((logits[0] - logits[1]).norm() / logits[0].norm()) < 0.1
    assert len({w.name for w in report.weights}) == len(list(before.named_parameters()))
    if calibration != "none":
        seen = {w.name: w.rows for w in report.weights if w.format != "float"}
        assert sum(rows > 0 for rows in seen.values()) > len(seen) // 2
        assert calibration == report.calibration


def test_calibration_weighs_and_gptq_beats_it(tmp_path: Path) -> None:
    """On a trained model, at 4 bits, the outputs of the layers that follow: GPTQ < aware < neither, by the loss of the
    held-out mix against the float model's own distribution (a trained model's targets say too little at this size)."""
    examples = task_examples(Tokenizer.load(SHIPPED / "demo-ar"), "test", 40)
    model = load(SHIPPED / "demo-ar", dtype=torch.float32)
    rows = rows_of(model, examples)
    from dfastllm.train.objectives import short_attention

    def hidden(m: Any) -> torch.Tensor:
        return torch.cat([m(r.ids, r.positions, short_attention(r))[r.wanted] for r in rows])

    wanted = hidden(model)
    errors = {}
    for calibration in ("none", "aware", "gptq"):
        quantise_model(SHIPPED / "demo-ar", tmp_path / calibration, Options("w4", calibration=calibration, samples=64))  # type: ignore[arg-type]
        found = hidden(load(tmp_path / calibration))
        errors[calibration] = float((found - wanted).norm() / wanted.norm())
    assert errors["gptq"] < 0.95 * errors["aware"] < errors["none"]


def test_the_same_again(llama: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        quantise_model(llama, tmp_path / name, Options("w4", calibration="gptq", samples=4))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all(one[name].equal(two[name]) for name in one)


def test_head_formats(llama: Path, tmp_path: Path) -> None:
    for head, kind in (("float", None), ("w4", "w4g"), ("", "w8g")):
        quantise_model(llama, tmp_path / "out", Options("w4", head=head), force=True)
        for name in ("embed.weight", "lm_head.weight"):
            weight = weights_of(tmp_path / "out")[name]
            assert (weight.format if isinstance(weight, QTensor) else None) == kind
        assert check(tmp_path / "out").ok


def test_shards(llama: Path, tmp_path: Path) -> None:
    quantise_model(llama, tmp_path / "one", Options("w4"))
    quantise_model(llama, tmp_path / "many", Options("w4"), shard_bytes=10_000)
    assert (tmp_path / "many" / "model.safetensors.index.json").is_file()
    one, many = weights_of(tmp_path / "one"), weights_of(tmp_path / "many")
    assert all(
        w.codes.equal(many[n].codes)  # type: ignore[union-attr]
        for n, w in one.items()
        if isinstance(w, QTensor)
    )


def test_progress_names_every_weight(llama: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    quantise_model(llama, tmp_path / "out", Options("w8"), progress=lambda *at: seen.append(at))
    names = [name for name, _ in load(llama).named_parameters()]
    assert [name for _, _, name in seen] == names
    assert [done for done, _, _ in seen] == list(range(1, len(names) + 1))
    assert {total for _, total, _ in seen} == {len(names)}


# What must be refused, before anything is written.


@pytest.mark.parametrize("calibration", ["none", "gptq"])
@pytest.mark.parametrize("family", ["qwen3_moe", "llada_moe", "llada2_moe", "sdar_moe"])
def test_a_mixture(tmp_path: Path, family: str, calibration: Any) -> None:
    """Experts are rounded, each by what calibration showed it; routers stay as they are. What was written is served."""
    source = write_tiny(tmp_path / "source", family, **grouped(family))
    experts = grouped(family)["moe"].experts
    options = Options("w4", calibration=calibration, samples=2)
    report = quantise_model(source, tmp_path / "out", options)
    before, found = load(source), weights_of(tmp_path / "out")
    for name, parameter in before.named_parameters():
        weight = found[name]
        if parameter.ndim == 1 or "router" in name:
            assert isinstance(weight, torch.Tensor)
            assert weight.equal(parameter)
        else:
            assert isinstance(weight, QTensor), name
            assert (weight.dequantise() - parameter).norm() < 0.2 * parameter.norm(), name
    assert sum("experts" in weight.name for weight in report.weights) >= 3 * experts
    assert check(tmp_path / "out").ok
    served = assemble.load(tmp_path / "out").model
    assert isinstance(served, PackedDecoder)
    assert served.formats["w4g"] >= 2 * experts
    with pytest.raises(UnsupportedError, match="backend native or auto, not torch"):
        assemble.load(tmp_path / "out", backend="torch")


@pytest.mark.parametrize("family", ["qwen3_moe", "llada_moe"])
def test_a_mixture_in_every_way(tmp_path: Path, family: str) -> None:
    """A float directory and a file of blocks, on either backend, quantised while loading too."""
    source = write_tiny(tmp_path / "source", family)
    file = quantise_gguf(source, tmp_path / "m.gguf", "gguf-q8_0")
    for path in (source, file):
        assert isinstance(assemble.load(path, backend="torch").model, Decoder)
        for backend in ("auto", "native"):
            assert isinstance(assemble.load(path, backend=backend).model, PackedDecoder)  # type: ignore[arg-type]
            assert isinstance(assemble.load(path, backend=backend, quantization="w8").model, PackedDecoder)  # type: ignore[arg-type]
        with pytest.raises(UnsupportedError, match="quantised weights"):
            assemble.load(path, backend="torch", quantization="w8")


def test_out_that_must_not_be_overwritten(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    quantise_model(llama, out, Options("w8"))  # empty: fine
    with pytest.raises(ValidationError, match=r"is not empty.*--force"):
        quantise_model(llama, out, Options("w4"))
    quantise_model(llama, out, Options("w4"), force=True)
    assert check(out).quantised == "w4"
    with pytest.raises(ValidationError, match="is the source itself"):
        quantise_model(llama, llama, Options("w4"), force=True)
    with pytest.raises(ValidationError, match="is a file"):
        quantise_model(llama, llama / "config.json", Options("w4"), force=True)


def test_sources_that_are_none(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no model 'nowhere'"):
        quantise_model("nowhere", tmp_path / "out", Options("w8"))
    with pytest.raises(ModelNotFoundError, match=r"model\.gguf is no GGUF file"):
        quantise_model("model.gguf", tmp_path / "out", Options("w8"))
    with pytest.raises(ModelLoadError, match=r"config\.json is missing"):
        quantise_model(tmp_path, tmp_path / "out", Options("w8"))
    quantise_model(llama, tmp_path / "small", Options("w8"))
    with pytest.raises(UnsupportedError, match=r"is already quantised \(w8\)"):
        quantise_model(tmp_path / "small", tmp_path / "out", Options("w4"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": "w3"}, "format must be w8, w8r, w8g, w8gr, w6, w4m, w4, w4r, 8bit, got 'w3'"),
        ({"format": "w4", "head": "int8"}, "head must be w8,"),
        ({"format": "w4", "calibration": "awq"}, "calibrate must be none, aware, gptq, got 'awq'"),
        ({"format": "w4", "samples": 0}, "samples must be at least 1"),
        ({"format": "w4", "text": Path("x.txt")}, "calibrate is none"),
    ],
)
def test_bad_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Options(**options)


@pytest.mark.parametrize("calibration", ["none", "gptq"])
def test_groups_that_do_not_divide_are_refused_at_once(tmp_path: Path, calibration: Any) -> None:
    source = write_tiny(tmp_path / "source", intermediate_size=48)
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0\.mlp\.down_proj\.weight has 48 inputs.*Use w8"):
        quantise_model(source, tmp_path / "out", Options("w4", calibration=calibration))
    assert not (tmp_path / "out").exists()
    quantise_model(source, tmp_path / "out", Options("w8", calibration=calibration, samples=2))


@pytest.mark.parametrize("calibration", ["none", "aware"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_weights_that_are_no_numbers(tmp_path: Path, calibration: Any, value: float, name: str) -> None:
    source = write_tiny(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors[name][3] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} holds"):
        quantise_model(source, tmp_path / "out", Options("w4", calibration=calibration, samples=2))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_directory_that_says_one_thing_and_holds_another(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantise_model(llama, out, Options("w4"))
    config = json.loads((out / "config.json").read_text())

    def written(**changes: Any) -> str:
        (out / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ModelLoadError) as caught:
            load(out)
        assert not check(out).ok
        return str(caught.value)

    assert "quantised (w4g), but config.json has no quantization_config" in written(quantization_config=None)
    assert "quantised by 'hqq'" in written(quantization_config={"quant_method": "hqq", "bits": 4})
    other = {**config["quantization_config"], "format": "w6", "head": "w6"}
    assert "quantised as w4g, but config.json says w6" in written(quantization_config=other)
    assert "has shape [260, 32]" in written(vocab_size=300)
    tensors = load_file(out / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    tensors |= {"model.norm.weight.codes": norm.to(torch.int8), "model.norm.weight.scales": norm}
    save_file(tensors, out / "model.safetensors")
    assert "model.norm.weight: its parts fit no format" in written()


# Quality, through the engine.


def test_measured_quality(tmp_path: Path) -> None:
    report = quantise_model("demo-draft", tmp_path / "out", Options("w4"))
    found = measure("demo-draft", tmp_path / "out", report, per_task=2)
    quality = found.quality
    assert quality is not None
    assert 0 < quality.loss_before < 0.2
    assert abs(quality.loss_after - quality.loss_before) < 0.05
    assert quality.loss_after != quality.loss_before
    assert 0 < quality.divergence < 0.1
    assert 0.95 < quality.agreement <= 1
    assert quality.total_before > 0.7
    assert quality.accuracy_before.keys() == quality.accuracy_after.keys()
    written = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert written["quality"]["loss_after"] == quality.loss_after


# Memory: a subprocess each, so that the peak is this work's.

PEAK = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from dfastllm.convert import Options, quantise_model
from dfastllm.models import load

def peak():  # of this program alone: getrusage's also counts the parent's before exec
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

small, big, out, how = sys.argv[1:]
def work(model):
    return load(model) if how == "load" else quantise_model(model, out, Options(how), force=True)

work(small)  # every import and buffer is there
before = peak()
kept = work(big)
print(peak() - before)
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """42 MB in float32 in 70 matrices of at most 1 MB."""
    shape = {"hidden_size": 256, "intermediate_size": 1024, "heads": 8, "kv_heads": 8, "layers": 10, "vocab_size": 260}
    model = tiny("llama", **shape, max_len=256)  # type: ignore[arg-type]
    return save(model, tmp_path_factory.mktemp("source") / "big")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_peak_memory_is_about_one_tensor(llama: Path, big: Path, tmp_path: Path) -> None:
    """Against the control that loads the model: quantising holds a fraction of it. Large blocks go back to the system
    at once, so what is read is what is held and not what the allocator keeps for later."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    total = (big / "model.safetensors").stat().st_size
    grown = {}
    for how in ("load", "w4", "w8r"):
        command = [sys.executable, "-c", PEAK, str(llama), str(big), str(tmp_path / "out"), how]
        grown[how] = int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert grown["load"] > 0.9 * total, "the measurement sees nothing"
    for how in ("w4", "w8r"):
        assert grown[how] < 0.6 * total, f"{grown[how] / 1e6:.0f} MB for a file of {total / 1e6:.0f} MB"


def test_info_survives(llama: Path, tmp_path: Path) -> None:
    quantise_model(llama, tmp_path / "out", Options("w4"))
    before: ModelInfo = load(llama).info
    assert replace(load(tmp_path / "out").info, name=before.name) == before
