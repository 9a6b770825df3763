"""A model in another basis: the same function for every wiring that allows it, a named reason for every other;
adapters, files and the way back; and why it is done: one scale a row survives outlier channels."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from dfastllm import assemble, models
from dfastllm.convert import Options, measure, quantise_model
from dfastllm.convert.report import divergence
from dfastllm.engine.runners.native import NativeRunner
from dfastllm.errors import CheckpointError, ModelLoadError, UnsupportedError, ValidationError
from dfastllm.kernels import native
from dfastllm.models import Decoder, PackedDecoder, find_family
from dfastllm.models.basis import Basis, Turn, basis_of, format_for
from dfastllm.models.gguf import write_gguf
from tests.kit.adapters import model_of, step_of, turned
from tests.kit.cli_models import write_tokenizer
from tests.kit.convert_models import SIZES, grouped
from tests.kit.without_native import without_native

REFUSED = {  # what keeps a wiring from it
    "exaone4": "attn_post_norm.*mlp_post_norm",
    "gemma2": "attn_post_norm.*mlp_post_norm",
    "gemma3": "attn_post_norm.*mlp_post_norm",
    "olmo2": "attn_post_norm.*mlp_post_norm",
}
TURNED = [name for name in sorted(models.FAMILIES) if name not in REFUSED]
SEQUENCES = ([5, 9, 11, 3, 17, 2, 8, 30, 31, 7, 7, 12], [4, 4, 7])


def logits(model: PackedDecoder, sequences: Any = SEQUENCES) -> Tensor:
    runner = NativeRunner(model, 64, torch.float32, 16)
    return runner.run(step_of(sequences, [0] * len(sequences))).logits().clone()


@pytest.mark.parametrize("size", [1, 9, 40, 64, 576, 896, 1536, 3584])
def test_a_turn_is_orthogonal_and_comes_back(size: int) -> None:
    x = torch.randn(5, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    turn = Turn.whole(size, 3)
    assert (turn.undo(turn.apply(x)) - x).abs().max() < 1e-12
    assert (turn.apply(x) @ turn.apply(x).T - x @ x.T).abs().max() < 1e-10
    one = turn.apply(torch.eye(size, dtype=torch.float64))
    assert one.abs().max() <= (2 / size) ** 0.5 + 1e-12  # nothing stands out: Hartley's entries reach sqrt(2)


def test_a_seed_names_the_basis() -> None:
    """The file says no more than the seed, so these numbers may never change."""
    x = torch.arange(12, dtype=torch.float64)
    got = Turn.whole(12, 0).apply(x)
    assert torch.equal(got, Turn.whole(12, 0).apply(x))
    assert not torch.equal(got, Turn.whole(12, 1).apply(x))
    bits = hashlib.shake_128(b"dfastllm basis 0").digest(2)
    signed = [i * (-1) ** (bits[i // 8] >> i % 8 & 1) for i in range(12)]

    def entry(p: int, i: int, q: int, j: int) -> float:
        angle = 2 * math.pi * p * q / 3
        return float((math.cos(angle) + math.sin(angle)) * (-1) ** (i & j).bit_count() / 12**0.5)

    places = [(p, i) for p in range(3) for i in range(4)]
    wanted = [sum(signed[4 * p + i] * entry(p, i, q, j) for p, i in places) for q, j in places]
    assert got.tolist() == pytest.approx(wanted, abs=1e-9)
    assert got[:2].tolist() == pytest.approx([2 * 3**0.5, -4 * 3**0.5])


@pytest.mark.parametrize("family", TURNED)
def test_the_function_stays(family: str) -> None:
    model = model_of(family)
    found = turned(model)
    assert (logits(found) - logits(assemble.pack(model))).abs().max() <= 1e-4
    assert found.basis is not None
    assert found.head is not None  # of its own, also where it was tied
    norms = [norm for norm in found._norms() if len(norm.weight) == model.config.hidden_size]
    factor = model.program.logits_factor
    assert all(bool((norm.weight == 1).all()) or bool((norm.weight == factor).all()) for norm in norms)


@pytest.mark.parametrize("family", REFUSED)
def test_a_wiring_that_does_not_allow_it_says_why(family: str) -> None:
    model = models.tiny(family)
    with pytest.raises(UnsupportedError, match=f"cannot be held in another basis.*{REFUSED[family]}"):
        basis_of(model.program, family, tied=model.config.tied)
    assert format_for("8bit", model.program, family) == "w8g"


def test_every_wiring_has_an_answer() -> None:
    assert set(TURNED) | set(REFUSED) == set(models.FAMILIES)
    assert all(format_for("8bit", models.tiny(name).program, name) == "w8r" for name in TURNED)


@pytest.mark.parametrize(
    "shape",
    [
        {"hidden_size": 36, "heads": 3, "kv_heads": 1, "head_dim": 12, "intermediate_size": 88},
        {"hidden_size": 28, "heads": 2, "kv_heads": 2, "head_dim": 14, "intermediate_size": 57},
        {"hidden_size": 72, "heads": 3, "kv_heads": 3, "head_dim": 24, "intermediate_size": 192, "tied": True},
        {"hidden_size": 64, "heads": 2, "kv_heads": 1, "head_dim": 48, "intermediate_size": 1024},
    ],
    ids=["36", "28", "72 tied", "64"],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_sizes_that_are_no_power_of_two(family: str, shape: dict[str, Any]) -> None:
    model = model_of(family, **shape)
    wanted = logits(assemble.pack(model))
    assert (logits(turned(model)) - wanted).abs().max() <= 1e-4
    packed = assemble.pack(model, "w8r")
    assert packed.formats == {"w8": sum(packed.formats.values())}
    assert (logits(packed) - wanted).abs().max() <= 0.2 * wanted.abs().max()


@pytest.mark.skipif(native() is None, reason="no native kernels")
@pytest.mark.parametrize("form", [None, "w8r", "w8gr", "w4r"])
@pytest.mark.parametrize("family", ["llama", "llada2_moe"])
def test_the_twin_is_the_native_forward(family: str, form: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(family, **grouped(family))
    packed = turned(model) if form is None else assemble.pack(model, form)
    got = logits(packed)
    without_native(monkeypatch)
    assert (logits(packed) - got).abs().max() <= (1e-4 if form is None else 5e-2)


def with_outliers(model: Decoder, factor: float = 100.0) -> Decoder:
    """The same function with three channels of every norm so much larger, and what reads them smaller."""
    channels = torch.tensor([3, 11, 24])
    with torch.no_grad():
        layers: Any = model.layers
        for layer in layers:
            for norm, linears in (
                (layer.attn_norm, (layer.attn.q_proj, layer.attn.k_proj, layer.attn.v_proj)),
                (layer.mlp_norm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
            ):
                norm.weight[channels] *= factor
                for linear in linears:
                    linear.weight[:, channels] /= factor
    return model


def test_outlier_channels_cost_the_turned_model_nothing() -> None:
    """A trained model, and the same function with channels 100 times larger: one scale a row becomes useless, groups
    suffer, the turned model does not notice."""
    plain = models.load(Path(assemble.__file__).parent / "shipped" / "demo-ar", dtype=torch.float32)
    ids = [list(range(40, 60)), [7, 9, 100, 250, 31, 8, 8, 90]]

    def rows(model: PackedDecoder) -> list[Tensor]:
        return [logits(model, ids).log_softmax(-1)]

    def cost(model: Decoder, form: str) -> float:
        return divergence(reference, rows(assemble.pack(model, form)))[0]

    reference = rows(assemble.pack(plain))
    before = {form: cost(plain, form) for form in ("w8", "w8r", "w8g", "w8gr")}
    assert before["w8r"] < 1.5 * before["w8"]
    model = with_outliers(plain)
    assert divergence(reference, rows(assemble.pack(model)))[0] < 1e-6
    after = {form: cost(model, form) for form in before}
    assert after["w8"] > 50 * after["w8r"]
    assert after["w8g"] > 3 * after["w8r"]
    for form in ("w8r", "w8gr"):
        assert after[form] == pytest.approx(before[form], rel=0.5)


# Files.


def saved(tmp_path: Path, family: str = "qwen2", **shape: Any) -> tuple[Decoder, Path]:
    directory = tmp_path / "float"
    ids = write_tokenizer(directory)
    model = model_of(family, ids=ids, **{**grouped(family), **shape})
    return model, models.save(model, directory)


@pytest.mark.parametrize("form", ["w8r", "w8gr", "w4r"])
@pytest.mark.parametrize(("family", "tied"), [("qwen2", False), ("qwen2", True), ("qwen3_moe", False)])
def test_a_directory_loads_as_what_loading_would_make(form: str, family: str, tied: bool, tmp_path: Path) -> None:
    _, source = saved(tmp_path, family, tied=tied)
    out = tmp_path / "out"
    report = quantise_model(source, out, Options(form))
    assert (report.format, report.head) == (form, "w8r" if form == "w4r" else form)
    said = json.loads((out / "config.json").read_text())
    assert said["quantization_config"]["rotation"] == {"kind": "hadamard", "seed": 0, "block": 256}
    assert said["tie_word_embeddings"] is tied
    loaded = assemble.load(out).model
    asked = assemble.load(source, quantization=form).model
    assert isinstance(loaded, PackedDecoder)
    assert isinstance(asked, PackedDecoder)
    assert torch.equal(logits(loaded), logits(asked))
    assert models.check(out).ok
    assert models.check(out).quantised == form
    assert models.check(out).weight_bytes == pytest.approx(report.bytes_after, rel=0.02)


def test_eight_bits_are_the_most_faithful_that_the_model_allows(tmp_path: Path) -> None:
    _, source = saved(tmp_path)
    assert quantise_model(source, tmp_path / "turned", Options()).format == "w8r"
    other = tmp_path / "gemma"
    models.save(models.tiny("gemma2", ids=write_tokenizer(other), **SIZES), other)
    assert quantise_model(other, tmp_path / "grouped", Options()).format == "w8g"
    assert assemble.load(other, quantization="8bit").model.basis is None  # type: ignore[union-attr]
    with pytest.raises(UnsupportedError, match=r"attn_post_norm.*Use w8g"):
        quantise_model(other, tmp_path / "refused", Options("w8r"))
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("family", ["qwen2", "llada2_moe"])
def test_the_torch_model_of_a_turned_directory_is_in_its_own_basis(family: str, tmp_path: Path) -> None:
    """So that merging, exporting and training know nothing of it."""
    model, source = saved(tmp_path, family)
    out = tmp_path / "out"
    quantise_model(source, out, Options("w8gr"))
    back = models.load(out)
    for name, value in model.named_parameters():
        found = back.get_parameter(name)
        assert (found - value).norm() <= 0.02 * value.norm(), name
    assert torch.equal(back.norm.weight, model.norm.weight)


def test_loss_is_measured_on_the_turned_model(tmp_path: Path) -> None:
    """The report's simulation rounds what the kernels round: as far from float as they are."""
    out = tmp_path / "out"
    report = quantise_model("demo-draft", out, Options("w8r"))
    measured = measure("demo-draft", out, report, per_task=1)
    assert measured.quality is not None
    assert 0 < measured.quality.divergence < 1e-3


def test_a_gguf_file_is_turned_while_it_is_read(tmp_path: Path) -> None:
    model, _ = saved(tmp_path, "llama", tied=True)
    path = write_gguf(model, tmp_path / "model.gguf", "Q8_0", tokenizer=_gguf_tokenizer(tmp_path / "float"))
    found = assemble.load(path, quantization="w8r").model
    plain = assemble.dequantised(path, torch.float32).model
    assert isinstance(found, PackedDecoder)
    assert isinstance(plain, Decoder)
    assert found.formats == {"w8": sum(found.formats.values())}
    assert torch.equal(logits(found), logits(assemble.pack(plain, "w8r")))


def _gguf_tokenizer(directory: Path) -> dict[str, Any]:
    from dfastllm.text.gguf.export import tokenizer_metadata

    return tokenizer_metadata(directory, 260)


@pytest.mark.parametrize(
    ("rotation", "says"),
    [
        (None, "rotation must be"),
        ({"kind": "cayley", "seed": 0, "block": 256}, "rotation must be"),
        ({"kind": "hadamard", "seed": 0, "block": 48}, "rotation must be"),
        ({"kind": "hadamard", "seed": "0", "block": 64}, "rotation must be"),
    ],
)
def test_a_directory_must_name_its_basis(rotation: Any, says: str, tmp_path: Path) -> None:
    _, source = saved(tmp_path)
    out = tmp_path / "out"
    quantise_model(source, out, Options("w8r"))
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["rotation"] = rotation
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=says):
        assemble.load(out)


def test_a_format_without_a_basis_names_none(tmp_path: Path) -> None:
    _, source = saved(tmp_path)
    quantise_model(source, tmp_path / "out", Options("w8"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "rotation" not in config["quantization_config"]
    config["quantization_config"]["rotation"] = {"kind": "hadamard", "seed": 0, "block": 64}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match="format w8 has no turned matrices"):
        assemble.load(tmp_path / "out")


def test_a_turned_directory_needs_the_head_of_its_own(tmp_path: Path) -> None:
    _, source = saved(tmp_path, tied=True)
    out = tmp_path / "out"
    quantise_model(source, out, Options("w8r"))
    with safe_open(out / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"lm_head.weight.codes", "model.embed_tokens.weight.codes", "model.norm.weight"} <= names
    config = json.loads((out / "config.json").read_text())
    other = tmp_path / "w8"
    quantise_model(source, other, Options("w8"))
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"missing tensor lm_head\.weight"):
        assemble.load(other)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"format": "w8r", "calibration": "gptq"}, "written without calibration"),
        ({"format": "w8", "head": "w8r"}, "head w8r is of a model in another basis"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Options(**options)


def test_a_float_head_is_turned_too(tmp_path: Path) -> None:
    model, source = saved(tmp_path, tied=True)
    quantise_model(source, tmp_path / "out", Options("w8r", head="float"))
    found = assemble.load(tmp_path / "out").model
    assert isinstance(found, PackedDecoder)
    assert found.head_weights.format == "f32"
    wanted = logits(assemble.pack(model))
    assert (logits(found) - wanted).abs().max() <= 0.2 * wanted.abs().max()


def test_a_turned_router_is_kept_in_float32(tmp_path: Path) -> None:
    """Rounded to bfloat16 it would choose other experts than the float model does, oftener than 8 bits make it."""
    directory = tmp_path / "float"
    ids = write_tokenizer(directory)
    models.save(models.tiny("qwen3_moe", ids=ids, dtype=torch.bfloat16, **SIZES), directory)
    quantise_model(directory, tmp_path / "out", Options("w8r"))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  (no mapping)
    assert {kind for name, kind in kinds.items() if name.endswith("mlp.gate.weight")} == {"F32"}
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"BF16"}
    asked = assemble.load(directory, quantization="w8r").model
    loaded = assemble.load(tmp_path / "out").model
    assert isinstance(asked, PackedDecoder)
    assert isinstance(loaded, PackedDecoder)
    assert torch.equal(logits(loaded), logits(asked))


def test_parts_in_any_order() -> None:
    """A file may give a matrix before the norm that is folded into it."""
    model = model_of("smollm3")
    basis: Basis = basis_of(model.program, "x", tied=model.config.tied)
    given = [(name, p.detach()) for name, p in model.named_parameters()]
    straight, reverse = dict(basis.turned(given)), dict(basis.turned(given[::-1]))
    assert straight.keys() == reverse.keys()
    assert "lm_head.weight" in straight
    assert all(torch.equal(straight[name], reverse[name]) for name in straight)
    back = dict(basis.undone(straight.items()))
    assert all((back[name] - p).abs().max() <= 1e-5 for name, p in given)
    assert find_family(model.info.family).name == "smollm3"
