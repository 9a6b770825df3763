"""How people have checkpoints: shards without an index, files under other names, recipes, silences; and what of it is
refused. The right values are transformers' where it can load the thing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dfastllm import models
from dfastllm.engine import EngineConfig
from dfastllm.errors import CheckpointError, ModelLoadError, UnsupportedError, ValidationError
from dfastllm.llm import LLM, load_engine
from dfastllm.models.family import Fields, find_family
from tests.kit.convert_models import write_tiny


def logits(model: models.Decoder, length: int = 12) -> torch.Tensor:
    ids = torch.arange(length) * 7 % 40
    with torch.no_grad():
        hidden = model(ids, torch.arange(length), models.dense_attention(1, length, "causal"))
        return model.head(hidden)


def edit(directory: Path, **fields: Any) -> None:
    file = directory / "config.json"
    raw = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in raw.items() if value is not ...}))


def test_shards_need_no_index(tmp_path: Path) -> None:
    model = models.tiny("llama", seed=5)
    directory = models.save(model, tmp_path / "shards", shard_bytes=20_000)
    (directory / "model.safetensors.index.json").unlink()
    assert torch.equal(logits(models.load(directory)), logits(model))
    shards = sorted(directory.glob("*.safetensors"))
    shards[1].rename(tmp_path / "away")
    said = rf"has {len(shards) - 1} of {len(shards)} shards; missing: {shards[1].name}"
    with pytest.raises(CheckpointError, match=said):
        models.load(directory)
    (directory / "other.safetensors").write_bytes(shards[0].read_bytes())
    with pytest.raises(CheckpointError, match="several sets"):
        models.load(directory)


def test_one_file_may_have_any_name(tmp_path: Path) -> None:
    model = models.tiny("llama", seed=5)
    directory = models.save(model, tmp_path / "one")
    (directory / "model.safetensors").rename(directory / "tiny-bf16.safetensors")
    assert torch.equal(logits(models.load(directory)), logits(model))


QWEN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("said", "scaling", "context"),
    [
        (64, QWEN, 256),  # the recipe of Qwen's model cards
        (80, QWEN, 256),  # Qwen3: max_position_embeddings has room for the answer
        (256, QWEN, 256),  # the file says the long context already
        (1000, QWEN, 1000),
        (64, {"rope_type": "yarn", "factor": 4.0}, 256),
        (64, {"rope_type": "linear", "factor": 4.0}, 64),
    ],
)
def test_yarn_lengthens_the_context(said: int, scaling: dict[str, Any], context: int, tmp_path: Path) -> None:
    directory = models.save(models.tiny("qwen2", max_len=64), tmp_path / "long")
    edit(directory, rope_scaling=scaling, max_position_embeddings=said)
    assert models.load(directory).info.max_len == context


def test_a_limit_above_the_context_is_refused(tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "short")
    with pytest.raises(ValidationError, match="max_model_len is 257, above the context of short, 256"):
        load_engine(directory, config=EngineConfig(max_len=257))
    assert load_engine(directory, config=EngineConfig(max_len=256)).max_len == 256


def test_swish_is_silu(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    directory = models.save(models.tiny("llama", seed=5), tmp_path / "swish")
    edit(directory, hidden_act="swish")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        wanted = theirs((torch.arange(12) * 7 % 40)[None]).logits[0]
    assert torch.allclose(logits(models.load(directory)), wanted, atol=1e-5)


def test_swiglu_is_refused_for_llada() -> None:
    """In the authors' code SwiGLU halves its input, which their llama block then multiplies by the whole."""
    family = find_family("llada")
    raw = family.write(models.tiny_config("llada"))
    with pytest.raises(ModelLoadError, match="activation_type='swiglu' is not supported"):
        family.read(Fields({**raw, "activation_type": "swiglu"}))


def test_qwen3_moe_without_head_dim_is_as_in_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}
    theirs = transformers.Qwen3MoeConfig(**shape, num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)
    model = transformers.Qwen3MoeForCausalLM(theirs)
    wanted = model.model.layers[0].self_attn.q_proj.weight.shape[0] // 4
    family = find_family("qwen3_moe")
    raw = family.write(models.tiny_config("qwen3_moe"))
    silent = {name: value for name, value in {**raw, **shape}.items() if name != "head_dim"}
    assert family.read(Fields(silent)).head_dim == wanted == 16


def test_llada21_may_edit_by_its_name_or_by_the_flag(tmp_path: Path) -> None:
    sizes = {"vocab_size": 260, "max_len": 256}
    old, new = (write_tiny(tmp_path / name, "llada2_moe", **sizes) for name in ("LLaDA2.0-mini", "LLaDA2.1-mini"))
    assert not load_engine(old).info.edit
    assert load_engine(new).info.edit
    assert any("LLaDA2.1" in note for note in load_engine(new).info.notes)
    assert not load_engine(new, edits="no").info.edit
    assert load_engine(old, edits="yes").info.edit
    with pytest.raises(UnsupportedError, match="edits is for block diffusion"):
        load_engine("demo-ar", edits="yes")
    with pytest.raises(ValidationError, match="edits must be"):
        load_engine(old, edits="maybe")


def test_a_block_length_can_be_given(tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "sdar", "sdar")
    said = load_engine(directory).info.block
    edit(directory, block_size=8)
    with LLM(directory, trained_block=8) as given, LLM(directory) as read:
        assert (said, given.info.block, read.info.block) == (4, 8, 8)
        assert given.generate("hello")[0].outputs[0].token_ids == read.generate("hello")[0].outputs[0].token_ids
    with pytest.raises(UnsupportedError, match="trained_block is for block diffusion"):
        load_engine("demo-ar", trained_block=8)
