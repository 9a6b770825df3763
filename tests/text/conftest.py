"""Fixtures of tests/text: small tokenizers of each kind met in the field, trained here in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dfastllm import text

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps.",
    "naïve café — 你好，世界 🙂🙃 Ω≈ç√",
    '{"name": "add", "arguments": {"a": 1, "b": 2}}\n<tool_call>',
    "    def add(a: int) -> int:\n        return a + 1\n\n",
] * 4
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]


def _train(tokenizer: Tokenizer, **options: Any) -> Tokenizer:
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    trainer = trainers.BpeTrainer(special_tokens=special, show_progress=False, **options)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_level() -> Tokenizer:
    """GPT-2, Llama 3, Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _train(tokenizer, vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def _byte_fallback() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in ["<unk>", *SPECIAL]]
        + [AddedToken(f"<0x{i:02X}>", special=False, normalized=False) for i in range(256)],
        limit_alphabet=40,  # rarer characters need bytes
        show_progress=False,
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator(CORPUS, trainer)
    # Bytes are ordinary vocabulary in real files, not added tokens: rebuild without the added ones.
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [t for t in data["added_tokens"] if not t["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(data))


def llama2() -> Tokenizer:
    """SentencePiece BPE with byte fallback; the leading space of a text is stripped."""
    tokenizer = _byte_fallback()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def gemma() -> Tokenizer:
    """The same without a prefix space."""
    tokenizer = _byte_fallback()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def metaspace() -> Tokenizer:
    """T5, Mistral: a Metaspace decoder."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return _train(tokenizer, vocab_size=200)


def word_suffix() -> Tokenizer:
    """CLIP, old GPT: `</w>` ends a word, and its space appears only once another token follows."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    return _train(tokenizer, vocab_size=250, end_of_word_suffix="</w>")


def word_piece() -> Tokenizer:
    """BERT."""
    vocabulary = {
        token: i for i, token in enumerate(["[UNK]", *SPECIAL, "the", "dog", "##s", ".", "sleep", "'", "##é"])
    }
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return tokenizer


KINDS = {f.__name__: f for f in (byte_level, llama2, gemma, metaspace, word_suffix, word_piece)}

_loaded = {name: text.Tokenizer(build(), special_tokens={"eos_token": SPECIAL[0]}) for name, build in KINDS.items()}


@pytest.fixture(params=sorted(KINDS))
def tokenizer(request: pytest.FixtureRequest) -> text.Tokenizer:
    """Every kind in turn."""
    return _loaded[request.param]


@pytest.fixture
def byte_tokenizer() -> text.Tokenizer:
    return _loaded["byte_level"]


@pytest.fixture
def llama2_tokenizer() -> text.Tokenizer:
    return _loaded["llama2"]


@pytest.fixture(scope="session")
def byte_backend() -> Tokenizer:
    """The library's own object of the byte-level kind."""
    return byte_level()


@pytest.fixture
def word_tokenizer() -> text.Tokenizer:
    return _loaded["word_suffix"]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A checkpoint directory with a byte-level tokenizer and a ChatML template."""
    byte_level().save(str(tmp_path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        "chat_template": (
            "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path
