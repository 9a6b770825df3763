"""Tokenizers of older files: byte-level BPE against transformers' classes, tokenizer.model against what SentencePiece
0.2 itself gave for the models and texts in `pieces`."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from dfastllm.errors import TokenizerError
from dfastllm.text import Tokenizer
from tests.text.conftest import CORPUS, byte_level

PIECES = Path(__file__).parent / "pieces"
EXPECTED = json.loads((PIECES / "expected.json").read_text(encoding="utf-8"))
TEXTS = [
    *CORPUS[:4],
    "I'LL can't 1234 ſ it'ſ",
    "  two\t\ttabs \n\n lines\r\n",
    "e\u0301 é",
    "<|im_start|>user\n<|mask|>x",
    "",
]


def write_slow(directory: Path, kind: str, **config: Any) -> Path:
    """vocab.json, merges.txt and tokenizer_config.json of a small tokenizer, its special tokens in the last alone."""
    directory.mkdir()
    raw = json.loads(byte_level().to_str())
    added = {token["content"]: token["id"] for token in raw["added_tokens"]}
    plain = {text: id for text, id in raw["model"]["vocab"].items() if text not in added}
    shifted = {text: i for i, (text, _) in enumerate(sorted(plain.items(), key=lambda item: item[1]))}
    merges = ["#version: 0.2", *(" ".join(merge) for merge in raw["model"]["merges"])]
    (directory / "vocab.json").write_text(json.dumps(shifted))
    (directory / "merges.txt").write_text("\n".join(merges) + "\n")
    rows = {
        str(len(shifted) + i): {"content": text, "special": True, "normalized": False, "lstrip": False}
        for i, text in enumerate(added)
    }
    said = {"tokenizer_class": kind, "added_tokens_decoder": rows, "eos_token": "<|endoftext|>", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(said))
    return directory


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "GPT2Tokenizer"])
def test_byte_level_files_are_read_as_transformers_reads_them(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    directory = write_slow(tmp_path / "slow", kind)
    theirs = getattr(transformers, kind).from_pretrained(directory)
    ours = Tokenizer.load(directory)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
    assert ours.eos_id == theirs.eos_token_id
    assert ours.decode(ours.encode(TEXTS[0])) == TEXTS[0]


def test_dream_is_qwen2_with_its_mask(tmp_path: Path) -> None:
    """Dream and DiffuCoder as published: no tokenizer.json, a class of their own, the mask in tokenizer_config.json."""
    dream = Tokenizer.load(write_slow(tmp_path / "dream", "DreamTokenizer", mask_token="<|mask|>"))
    qwen = Tokenizer.load(write_slow(tmp_path / "qwen", "Qwen2TokenizerFast"))
    assert [dream.encode(text) for text in TEXTS] == [qwen.encode(text) for text in TEXTS]
    assert dream.mask_id == dream.token_to_id("<|mask|>") == dream.vocab_size - 1
    assert dream.encode("a<|mask|>b")[1] == dream.mask_id


def test_ids_with_gaps_are_kept(tmp_path: Path) -> None:
    directory = write_slow(tmp_path / "gaps", "Qwen2Tokenizer")
    (directory / "added_tokens.json").write_text(json.dumps({"<|far|>": 5000}))
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.encode("a<|far|>")[-1] == 5000


@pytest.mark.parametrize("name", ["bpe", "unigram", "plain"])
def test_sentencepiece_gives_its_ids(name: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((PIECES / f"{name}.model").read_bytes())
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.vocab_size == EXPECTED[name]["size"]
    for text, ids, decoded in zip(EXPECTED["texts"], EXPECTED[name]["ids"], EXPECTED[name]["decoded"], strict=True):
        if "</s>" in text:  # which stays text in SentencePiece, and is a token in Hugging Face's and here
            continue
        assert tokenizer.encode(text) == ids, text
        if 0 not in ids:
            assert tokenizer.decode(ids) == decoded, text
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_llama_puts_bos_before_a_text(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((PIECES / "bpe.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    tokenizer = Tokenizer.load(tmp_path)
    plain = tokenizer.encode("the cat")
    assert tokenizer.encode("the cat", add_special=True) == [1, *plain]


def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    odd = write_slow(tmp_path / "odd", "RobertaTokenizer")
    with pytest.raises(TokenizerError, match=r"vocab\.json, merges\.txt of class RobertaTokenizer.*save_pretrained"):
        Tokenizer.load(odd)
    broken = write_slow(tmp_path / "broken", "Qwen2Tokenizer")
    (broken / "merges.txt").write_text("#version: 0.2\na b\na b c\n")
    with pytest.raises(TokenizerError, match=r"merges\.txt in .*broken, line 3: 'a b c' is not two tokens"):
        Tokenizer.load(broken)
    tiktoken = tmp_path / "tiktoken"
    tiktoken.mkdir()
    (tiktoken / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(TokenizerError, match=r"tiktoken writes it.*save_pretrained"):
        Tokenizer.load(tiktoken)
    (tiktoken / "tokenizer.model").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4241003\n"
    )
    with pytest.raises(TokenizerError, match="Git LFS pointer, which stands for a file of 4,241,003 bytes"):
        Tokenizer.load(tiktoken)


@pytest.mark.parametrize("name", ["bpe", "unigram"])
def test_damage_is_an_error_or_a_tokenizer(name: str, tmp_path: Path) -> None:
    """Every cut, and bytes changed here and there: never another exception."""
    data = (PIECES / f"{name}.model").read_bytes()
    for at in range(0, len(data), 97):
        changed = bytearray(data)
        changed[at] ^= 0xFF
        for damaged in (data[:at], bytes(changed)):
            (tmp_path / "tokenizer.model").write_bytes(damaged)
            with contextlib.suppress(TokenizerError):
                Tokenizer.load(tmp_path).encode("the cat")
