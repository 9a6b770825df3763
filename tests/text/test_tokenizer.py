"""Loading tokenizer files, and every way they can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from dfastllm.errors import TokenizerError, ValidationError
from dfastllm.text import Tokenizer


def edit(directory: Path, file: str, **changes: Any) -> None:
    path = directory / file
    data = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(data | changes))


def test_load(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.eos_id == tokenizer.token_to_id("<|im_end|>")
    assert tokenizer.pad_id == tokenizer.token_to_id("<|endoftext|>")
    assert tokenizer.mask_id == tokenizer.token_to_id("<|mask|>")
    assert tokenizer.bos_id is None
    assert tokenizer.eos_ids == (tokenizer.eos_id,)
    assert tokenizer.special_ids == {0, 1, 2, 3}
    assert tokenizer.vocab_size == 330
    assert tokenizer.id_to_token(3) == "<|mask|>"
    assert tokenizer.id_to_token(330) is None
    assert tokenizer.id_to_token(-1) is None
    assert tokenizer.byte_ids == frozenset()


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_byte_level_round_trip(byte_tokenizer: Tokenizer, text: str) -> None:
    assert byte_tokenizer.decode(byte_tokenizer.encode(text), skip_special=False) == text


def test_special_tokens_are_skipped_or_shown(byte_tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer.encode("a<|im_end|>b")
    assert 2 in ids
    assert byte_tokenizer.decode(ids) == "ab"
    assert byte_tokenizer.decode(ids, skip_special=False) == "a<|im_end|>b"


def test_eos_ids_of_the_generation_config_come_after_the_tokenizers(directory: Path) -> None:
    edit(directory, "generation_config.json", eos_token_id=[0, 2, 3])
    assert Tokenizer.load(directory).eos_ids == (2, 0, 3)
    edit(directory, "generation_config.json", eos_token_id=0)
    assert Tokenizer.load(directory).eos_ids == (2, 0)
    edit(directory, "tokenizer_config.json", eos_token=None)
    tokenizer = Tokenizer.load(directory)
    assert (tokenizer.eos_id, tokenizer.eos_ids) == (0, (0,))


def test_special_tokens_map_fills_in(directory: Path) -> None:
    edit(directory, "special_tokens_map.json", bos_token="<|im_start|>", eos_token="<|endoftext|>")
    tokenizer = Tokenizer.load(directory)
    config_wins = tokenizer.token_to_id("<|im_end|>")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, config_wins)  # the config says bos_token: null
    (directory / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.load(directory)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 0)


def test_saved_truncation_never_cuts_a_prompt(directory: Path) -> None:
    backend = Backend.from_file(str(directory / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(directory / "tokenizer.json"))
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.decode(tokenizer.encode("The quick brown fox")) == "The quick brown fox"


def test_add_special_runs_the_post_processor(directory: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    backend = Backend.from_file(str(directory / "tokenizer.json"))
    backend.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    backend.save(str(directory / "tokenizer.json"))
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.encode("dog", add_special=True) == [0, *tokenizer.encode("dog")]


def test_tokens_only_the_config_declares(directory: Path) -> None:
    token = {"content": "<tool>", "special": True, "normalized": False}
    edit(directory, "tokenizer_config.json", added_tokens_decoder={"330": token})
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.encode("a<tool>")[-1] == 330
    assert 330 in tokenizer.special_ids
    edit(directory, "tokenizer_config.json", added_tokens_decoder={"345": token})
    with pytest.raises(TokenizerError, match="'<tool>' has id 345"):
        Tokenizer.load(directory)
    edit(directory, "tokenizer_config.json", added_tokens_decoder={"x": token})
    with pytest.raises(TokenizerError, match="is no token"):
        Tokenizer.load(directory)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe{}", "is not UTF-8"),
        (b'{"version": "1.0", ', "is not valid JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"[1]", "must hold a JSON object"),
        (b"{}", "is no tokenizer"),
        (b'{"version": "1.0", "model": {"type": "Nonsense"}}', "is no tokenizer"),
    ],
)
def test_a_damaged_tokenizer_file_is_named(directory: Path, content: bytes, message: str) -> None:
    (directory / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.load(directory)
    assert "tokenizer.json" in str(caught.value)
    assert caught.value.code == "bad_tokenizer"


def test_missing_files_are_named(directory: Path, tmp_path: Path) -> None:
    (directory / "tokenizer_config.json").unlink()
    assert not Tokenizer.load(directory).has_chat_template
    (directory / "tokenizer.json").rename(directory / "tokenizer.model")
    with pytest.raises(TokenizerError, match=r"tokenizer.model is no SentencePiece model.*save_pretrained"):
        Tokenizer.load(directory)
    with pytest.raises(TokenizerError, match="not a directory"):
        Tokenizer.load(tmp_path / "absent")


def test_files_that_disagree(directory: Path) -> None:
    edit(directory, "tokenizer_config.json", mask_token="<mdm>")
    with pytest.raises(TokenizerError, match="mask_token is '<mdm>', which is not in the vocabulary"):
        Tokenizer.load(directory)


def test_a_bad_generation_config_is_named(directory: Path) -> None:
    edit(directory, "generation_config.json", eos_token_id="</s>")
    with pytest.raises(TokenizerError, match="eos_token_id in generation_config"):
        Tokenizer.load(directory)


def test_another_models_tokenizer(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    tokenizer.check_fits(330, mask_id=3)
    tokenizer.check_fits(512)
    with pytest.raises(TokenizerError, match="ids reach 329, but the model has only 329 embeddings"):
        tokenizer.check_fits(329)
    with pytest.raises(TokenizerError, match="mask token is 3, but the model's config says 5"):
        tokenizer.check_fits(330, mask_id=5)


def test_lone_surrogates_are_the_callers_fault(byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValidationError, match="surrogate"):
        byte_tokenizer.encode("\ud800")


def test_text_a_damaged_tokenizer_cannot_encode(word_tokenizer: Tokenizer) -> None:
    assert word_tokenizer.decode(word_tokenizer.encode("the dog")) == "the dog"
    with pytest.raises(TokenizerError, match="cannot encode this text: Unk token"):
        word_tokenizer.encode("\u2603")
