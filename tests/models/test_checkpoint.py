"""Reading and writing directories: round trips, shards, dtypes, and a named error for everything that can be wrong."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dfastllm import models
from dfastllm.errors import CheckpointError, ModelLoadError, ValidationError
from tests.kit import published_configs as published

FAMILIES = sorted(models.FAMILIES)


def logits(model: models.Decoder, length: int = 12) -> torch.Tensor:
    ids = torch.arange(length) * 7 % 40
    with torch.no_grad():
        hidden = model(ids, torch.arange(length), models.dense_attention(1, length))
        return model.head(hidden)


def edit_config(directory: Path, **fields: Any) -> None:
    file = directory / "config.json"
    raw = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in raw.items() if value is not ...}))


def edit_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    file = directory / "model.safetensors"
    tensors = {**load_file(file), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


@pytest.fixture
def llada(tmp_path: Path) -> Path:
    config, shapes = published.llada()
    return published.write(tmp_path / "llada", config, published.filled(shapes, 0))


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family: str, tmp_path: Path) -> None:
    """Same shape, capabilities and logits to the last bit, in one file and in shards."""
    model = models.tiny(family, seed=5)
    for directory, shard_bytes in ((tmp_path / "one", 10**9), (tmp_path / "many", 20_000)):
        models.save(model, directory, shard_bytes=shard_bytes)
        again = models.load(directory)
        assert again.config == model.config
        assert replace(again.info, name="") == replace(model.info, name="")
        assert torch.equal(logits(again), logits(model))
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "many" / "model.safetensors").exists()


def test_options_of_info_survive(tmp_path: Path) -> None:
    ids = models.Ids(eos=(7, 9), mask=11, bos=1, pad=9)
    model = models.tiny("llada2_moe", ids=ids, block=8, edit=True)
    info = models.load(models.save(model, tmp_path)).info
    assert (info.eos_ids, info.mask_id, info.bos_id, info.pad_id) == ((7, 9), 11, 1, 9)
    assert (info.block, info.edit) == (8, True)
    assert models.load(tmp_path, edit=False).info.edit is False


def test_rope_and_shape_options_survive(tmp_path: Path) -> None:
    for scaling in (
        models.RopeScaling("linear", 2.0),
        models.RopeScaling("llama3", 8.0, 64, low_freq_factor=1.5, high_freq_factor=5.0),
        models.RopeScaling("yarn", 4.0, 64, beta_fast=16.0, attention_factor=1.2, truncate=False),
    ):
        model = models.tiny("llama", rope_scaling=scaling, tied=True, rope_dim=4, qkv_bias=True, out_bias=True)
        assert models.load(models.save(model, tmp_path)).config == model.config


def test_shape_a_family_cannot_have() -> None:
    with pytest.raises(ValidationError, match="family llada cannot have head_dim=16"):
        models.tiny("llada", head_dim=16)
    with pytest.raises(ValidationError, match="qkv_bias"):
        models.tiny("qwen2", qkv_bias=False)
    with pytest.raises(ValidationError, match="no_such_field"):
        models.tiny("llama", no_such_field=1)


def test_same_seed_same_model() -> None:
    a, b, c = models.tiny("sdar", 1), models.tiny("sdar", 1), models.tiny("sdar", 2)
    assert torch.equal(logits(a), logits(b))
    assert not torch.equal(logits(a), logits(c))


def test_random_like_needs_no_weights(llada: Path) -> None:
    (llada / "model.safetensors").unlink()
    model = models.random_like(llada, dtype="float32")
    assert model.info.mask_id == 38
    assert model.config.vocab_size == published.VOCAB
    assert logits(model).isfinite().all()


def test_extra_files_are_copied(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("a card")
    models.save(models.tiny("llama"), tmp_path / "out", files=[card])
    assert (tmp_path / "out" / "README.md").read_text() == "a card"


def test_saving_over_its_own_directory(tmp_path: Path) -> None:
    """Shards of an earlier save do not linger, and the loaded model survives its files being replaced."""
    model = models.tiny("llama", seed=1)
    models.save(model, tmp_path, shard_bytes=20_000)
    loaded = models.load(tmp_path)
    before = logits(loaded)
    (tmp_path / "model-of-mine.safetensors").touch()
    models.save(loaded, tmp_path)
    kept = {"config.json", "model.safetensors", "model-of-mine.safetensors"}
    assert {p.name for p in tmp_path.iterdir()} == kept
    assert torch.equal(logits(loaded), before)
    assert torch.equal(logits(models.load(tmp_path)), before)


def test_a_file_overwritten_in_place_does_not_reach_a_loaded_model(llada: Path) -> None:
    before = logits(models.load(llada))
    model = models.load(llada)
    assert all(parameter.data_ptr() % 64 == 0 for parameter in model.parameters())
    with (llada / "model.safetensors").open("r+b") as file:
        file.write(b"\0" * (llada / "model.safetensors").stat().st_size)
    assert torch.equal(logits(model), before)


def test_training_a_loaded_model_leaves_the_file_alone(llada: Path) -> None:
    file = llada / "model.safetensors"
    before = file.read_bytes()
    model = models.load(llada).requires_grad_(True)
    attend = models.dense_attention(1, 5)
    model.head(model(torch.arange(5), torch.arange(5), attend)).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad)
    assert file.read_bytes() == before


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [None, "float32", torch.bfloat16, "float16"])
def test_dtypes(stored: torch.dtype, wanted: torch.dtype | str | None, tmp_path: Path) -> None:
    """None keeps the file's dtype; conversion stays within the coarser format's precision; the router's bias, which
    decides between nearly equal experts, is float32 in every model."""
    model = models.tiny("llada2_moe", seed=2)
    models.save(model.to(stored), tmp_path)
    loaded = models.load(tmp_path, dtype=wanted)
    expected = stored if wanted is None else getattr(torch, wanted) if isinstance(wanted, str) else wanted
    assert loaded.dtype == expected
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith("router.bias") else expected)
    assert logits(loaded).isfinite().all()
    coarse = torch.finfo(expected).eps + torch.finfo(stored).eps
    exact = logits(models.tiny("llada2_moe", seed=2))
    assert (logits(loaded).float() - exact).abs().mean() < 4 * coarse * exact.abs().mean()


def test_wrong_dtype_and_device(llada: Path) -> None:
    with pytest.raises(ValidationError, match="float32, bfloat16, float16"):
        models.load(llada, dtype="int3")
    with pytest.raises(ValidationError, match="float64"):
        models.load(llada, dtype=torch.float64)
    with pytest.raises(ModelLoadError, match="device 'nosuch'"):
        models.load(llada, device="nosuch")


def test_harmless_extras(llada: Path) -> None:
    """Rotary buffers of old files, and a head written beside a tied embedding."""
    before = logits(models.load(llada))
    edit_tensors(llada, **{"model.transformer.blocks.0.rotary_emb.inv_freq": torch.ones(4)})
    assert torch.equal(logits(models.load(llada)), before)
    edit_config(llada, weight_tying=True)
    tied = models.load(llada)
    assert tied.lm_head is None  # the authors' class has none then, whatever lies in the file
    assert any("not used" in note for note in tied.info.notes)


def test_every_fault_is_listed(llada: Path) -> None:
    edit_tensors(
        llada,
        **{
            "model.transformer.blocks.0.q_proj.weight": torch.zeros(16, 32),
            "model.transformer.blocks.1.ff_norm.weight": None,
            "model.transformer.blocks.2.ff_norm.weight": torch.ones(32),
            "adapter.weight": torch.ones(3),
            "model.transformer.ln_f.weight": torch.ones(32, dtype=torch.int64),
        },
    )
    with pytest.raises(CheckpointError) as caught:
        models.load(llada)
    for said in (
        "q_proj.weight has shape [16, 32], wanted [32, 32]",
        "missing tensor model.transformer.blocks.1.ff_norm.weight, wanted [32]",
        "unexpected tensor model.transformer.blocks.2.ff_norm.weight [32] (config.json describes no such layer",
        "unexpected tensor adapter.weight [3]",
        "ln_f.weight has dtype I64, wanted one of F32, BF16, F16",
    ):
        assert said in str(caught.value)


@pytest.mark.parametrize("family", ["llada", "llada2"])
def test_each_tensor_is_needed(family: str, tmp_path: Path) -> None:
    config, shapes = getattr(published, family)()
    weights = published.filled(shapes, 0)
    for name in weights:
        published.write(tmp_path, config, {n: t for n, t in weights.items() if n != name})
        with pytest.raises(CheckpointError, match="missing tensor"):
            models.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 8, 60, -4000, -1])
def test_truncated(llada: Path, keep: int) -> None:
    file = llada / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*(truncated|unreadable|empty)"):
        models.load(llada)


def test_overlong_and_garbled(llada: Path) -> None:
    file = llada / "model.safetensors"
    good = file.read_bytes()
    file.write_bytes(good + b"\0" * 8)
    with pytest.raises(CheckpointError, match="overlong"):
        models.load(llada)
    length = struct.unpack("<Q", good[:8])[0]
    file.write_bytes(good[:8] + b"\xff" * length + good[8 + length :])
    with pytest.raises(CheckpointError, match="unreadable safetensors header"):
        models.load(llada)
    file.write_bytes(struct.pack("<Q", 2**62) + good[8:])
    with pytest.raises(CheckpointError, match="corrupt or truncated"):
        models.load(llada)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ([], "malformed header entry"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0]}, "malformed header entry"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "malformed header entry"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "takes 8 bytes"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, "hole"),
        ({"dtype": "F32", "shape": [10**4000, 10**4000], "data_offsets": [0, 8]}, "malformed header entry"),
        ({"dtype": "F32", "shape": [2**62] * 400, "data_offsets": [0, 8]}, "malformed header entry"),
    ],
)
def test_malformed_header_entries(llada: Path, entry: Any, said: str) -> None:
    header = json.dumps({"a": entry}).encode()
    (llada / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 12)
    with pytest.raises(CheckpointError, match=said):
        models.load(llada)


def shard(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    models.save(models.tiny("llama"), tmp_path, shard_bytes=20_000)
    return tmp_path, json.loads((tmp_path / "model.safetensors.index.json").read_text())


def write_index(directory: Path, index: Any) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_missing_shard(tmp_path: Path) -> None:
    directory, index = shard(tmp_path)
    name = index["weight_map"]["lm_head.weight"]
    (directory / name).unlink()
    with pytest.raises(CheckpointError, match=f"shard {name} named by .* is missing"):
        models.load(directory)


@pytest.mark.parametrize("name", ["../evil.safetensors", "/tmp/evil.safetensors", "a/../../evil.safetensors", "x.bin"])
def test_index_must_not_leave_the_directory(tmp_path: Path, name: str) -> None:
    directory, index = shard(tmp_path / "model")
    save_file({"lm_head.weight": torch.zeros(96, 32)}, tmp_path / "evil.safetensors")
    index["weight_map"]["lm_head.weight"] = name
    write_index(directory, index)
    with pytest.raises(CheckpointError, match=r"not a \.safetensors file inside the directory"):
        models.load(directory)


def test_index_that_disagrees_with_its_shards(tmp_path: Path) -> None:
    directory, index = shard(tmp_path)
    names = sorted(set(index["weight_map"].values()))
    wrong = {**index["weight_map"], "lm_head.weight": names[-1], "model.embed_tokens.weight": names[-1]}
    write_index(directory, {"weight_map": wrong})
    with pytest.raises(CheckpointError, match="which does not hold it"):
        models.load(directory)
    os.link(directory / names[0], directory / "twin.safetensors")
    write_index(directory, {"weight_map": {**index["weight_map"], "other": "twin.safetensors"}})
    with pytest.raises(CheckpointError, match="is in two shards"):
        models.load(directory)
    for index in ({}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": {}}):
        write_index(directory, index)
        with pytest.raises(CheckpointError, match="weight_map must map"):
            models.load(directory)


def test_no_weights_and_other_formats(llada: Path) -> None:
    (llada / "model.safetensors").rename(llada / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no weights .* found pytorch_model.bin, which are not read"):
        models.load(llada)


def test_unreadable_config(llada: Path, tmp_path: Path) -> None:
    config = llada / "config.json"
    for text, said in (("{", "cannot be read as JSON"), ("[1]", "must hold a JSON object"), ("\x80", "cannot be read")):
        config.write_bytes(text.encode("latin-1"))
        with pytest.raises(ModelLoadError, match=said):
            models.load(llada)
    config.unlink()
    with pytest.raises(ModelLoadError, match=r"config\.json is missing"):
        models.load(llada)
    with pytest.raises(ModelLoadError, match="not a model directory"):
        models.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "no supported family.*gpt2"),
        ({"architectures": 5}, "architectures' must be list"),
        ({"architectures": [], "model_type": ["llada"]}, "no supported family"),
        ({"d_model": None}, "'d_model' is missing"),
        ({"d_model": "big"}, "'d_model' must be int, got 'big'"),
        ({"n_layers": True}, "'n_layers' must be int, got True"),
        ({"n_heads": 0}, "heads must be in"),
        ({"n_heads": 5}, "multiple of kv_heads"),
        ({"n_layers": 10**9}, "layers must be in"),
        ({"rope_theta": -1}, "rope_theta must be greater than 1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps. must be a finite number"),
        ({"layer_norm_type": "low_precision"}, "layer_norm_type='low_precision' is not supported; supported: 'rms'"),
        ({"alibi": True}, "alibi=True is not supported"),
        ({"mask_token_id": 4000}, "mask token id 4000 is outside the vocabulary of 40"),
        ({"mask_token_id": "[MASK]"}, "mask_token_id must be an integer"),
        ({"mask_token_id": None}, "needs a mask token id"),
        ({"quantization_config": {"quant_method": "hqq"}}, "checkpoints quantised by 'hqq' are not supported"),
    ],
)
def test_config_that_cannot_be_honoured(llada: Path, fields: dict[str, Any], said: str) -> None:
    edit_config(llada, **fields)
    with pytest.raises(ModelLoadError, match=said):
        models.load(llada)


def test_unsupported_rope(tmp_path: Path) -> None:
    models.save(models.tiny("llama"), tmp_path)
    edit_config(tmp_path, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(ModelLoadError, match="'dynamic' is not supported; supported: default, linear, llama3, yarn"):
        models.load(tmp_path)
    edit_config(tmp_path, rope_scaling={"rope_type": "llama3", "factor": 2.0})
    with pytest.raises(ModelLoadError, match="'low_freq_factor' is missing"):
        models.load(tmp_path)


def test_family_by_model_type_alone(llada: Path) -> None:
    edit_config(llada, architectures=...)
    assert models.load(llada).info.family == "llada"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), case=st.sampled_from(["llada", "sdar", "fast_dllm_v2", "sdar_moe", "llada_moe", "llada2"]))
def test_any_config_gives_a_model_or_a_named_error(data: st.DataObject, case: str, tmp_path: Path) -> None:
    """No value of any field ends in another exception, a hang or an allocation."""
    config, _ = getattr(published, case)()
    broken = dict(config)
    for name in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3)):
        broken[name] = data.draw(JSON)
    (tmp_path / "config.json").write_text(json.dumps(broken))
    report = models.check(tmp_path)
    assert not report.ok  # there are no weights
    assert all(problem.code in ("model_load_failed", "bad_checkpoint") for problem in report.problems)
