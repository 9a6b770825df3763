"""What a checkpoint says and generating can do without is passed over with a note; what changes texts is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from tokenizers import Tokenizer as Library

from dfastllm import assemble, models
from dfastllm.errors import ModelLoadError, TokenizerError
from dfastllm.models import Ids
from dfastllm.models.family import find_family
from dfastllm.models.ids import usable
from dfastllm.quant.gguf import special_ids
from tests.kit.convert_models import write_tiny


def edit(directory: Path, file: str, **fields: Any) -> None:
    path = directory / file
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **fields}))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny")


@pytest.mark.parametrize("role", ["pad_token", "unk_token", "cls_token", "sep_token"])
def test_a_role_that_texts_do_not_need_is_a_note(role: str, directory: Path) -> None:
    edit(directory, "tokenizer_config.json", **{role: "[NOBODY]"})
    [note] = assemble.load(directory).model.info.notes
    assert role in note
    assert "[NOBODY]" in note


@pytest.mark.parametrize("role", ["bos_token", "eos_token", "mask_token"])
def test_a_role_that_texts_need_is_refused(role: str, directory: Path) -> None:
    edit(directory, "tokenizer_config.json", **{role: "[NOBODY]"})
    with pytest.raises(TokenizerError, match=role):
        assemble.load(directory)


def test_another_end_of_the_text_makes_the_tokenizers_own_dispensable(directory: Path) -> None:
    edit(directory, "tokenizer_config.json", eos_token="[NOBODY]")
    edit(directory, "generation_config.json", eos_token_id=5)
    loaded = assemble.load(directory)
    assert any("eos_token" in note for note in loaded.model.info.notes)
    assert loaded.tokenizer.eos_ids == (5,)


def test_an_empty_role_is_no_role(directory: Path) -> None:
    edit(directory, "tokenizer_config.json", unk_token="", pad_token="")
    assert assemble.load(directory).model.info.notes == ()


def test_added_tokens_past_the_rows_are_a_note_and_ordinary_ones_are_not(directory: Path) -> None:
    file = directory / "tokenizer.json"
    tokenizer = Library.from_file(str(file))
    rows = models.load(directory).info.vocab_size
    missing = rows - tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([AddedToken(f"<extra{i}>") for i in range(missing + 2)])
    tokenizer.save(str(file))
    [note] = assemble.load(directory).model.info.notes
    assert f"'<extra{missing}>' ({rows})" in note
    raw = json.loads(file.read_text())
    raw["model"]["vocab"] |= {token["content"]: token["id"] for token in raw["added_tokens"]} | {"ordinary": rows + 2}
    file.write_text(json.dumps(raw))
    with pytest.raises(TokenizerError, match=f"reach {rows + 2}, but the model has only {rows}"):
        assemble.load(directory)
    assert [problem.code for problem in models.check(directory).problems] == ["bad_tokenizer"]


@pytest.mark.parametrize("role", ["pad", "bos", "mask"])
def test_minus_one_is_no_token(role: str, directory: Path) -> None:
    edit(directory, "config.json", **{f"{role}_token_id": None})
    silent = models.load(directory).info
    edit(directory, "config.json", **{f"{role}_token_id": -1})
    assert models.load(directory).info == silent


def test_which_ids_past_the_vocabulary_count() -> None:
    known = Ids(eos=(3, 500), mask=501, bos=1, pad=502)
    kept, notes = usable(known, find_family("llama"), 100)
    assert kept == Ids(eos=(3,), mask=None, bos=1, pad=None)
    assert sorted(note.split("'s id, ")[1].split(",")[0] for note in notes) == ["500", "501", "502"]
    assert usable(known, find_family("llada"), 100)[0].mask == 501  # which `describe` refuses
    assert usable(Ids(eos=(500,)), find_family("llama"), 100)[0].eos == (500,)
    assert usable(Ids(eos=(3,), mask=99, pad=0), find_family("llada"), 100) == (Ids(eos=(3,), mask=99, pad=0), ())


def test_a_mask_past_the_vocabulary_of_a_diffusion_model_is_refused(tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "llada", "llada")
    edit(directory, "config.json", mask_token_id=10_000)
    with pytest.raises(ModelLoadError, match="mask token id 10000 is outside"):
        models.load(directory)


@pytest.mark.parametrize("role", ["padding", "eot", "eom", "unknown", "mask"])
def test_gguf_ids_past_the_vocabulary_are_notes(role: str) -> None:
    found = special_ids({f"tokenizer.ggml.{role}_token_id": 100, "tokenizer.ggml.eos_token_id": 7}, 100)
    assert found.ends == (7,)
    [note] = found.notes
    assert f"{role}_token_id is 100" in note


@pytest.mark.parametrize("role", ["bos", "eos"])
@pytest.mark.parametrize("id", [100, -1, True, "7"])
def test_gguf_ids_that_texts_need_are_refused(role: str, id: Any) -> None:
    with pytest.raises(TokenizerError, match=f"{role}_token_id"):
        special_ids({f"tokenizer.ggml.{role}_token_id": id}, 100)


def test_a_stored_head_beside_a_tied_embedding_counts_as_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    directory = models.save(models.tiny("llama", seed=3), tmp_path / "headed")
    edit(directory, "config.json", tie_word_embeddings=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ours = models.load(directory, dtype="float32")
    ids = torch.arange(12)
    with torch.no_grad():
        hidden = ours(ids, torch.arange(12), models.dense_attention(1, 12, "causal"))
        assert torch.allclose(ours.head(hidden), theirs(ids[None]).logits[0], atol=1e-5)
    assert any("it is used" in note for note in ours.info.notes)
    assert set(ours.info.notes) < set(models.check(directory).notes)


def test_a_stored_copy_of_the_embedding_is_no_head(tmp_path: Path) -> None:
    model = models.tiny("llama", seed=3, tied=True)
    directory = models.save(model, tmp_path / "copied")
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, directory / "model.safetensors")
    again = models.load(directory)
    assert again.lm_head is None
    assert again.info.notes == ()
