"""Tokenizers from GGUF metadata: the same ids as llama.cpp and as the tokenizer.json they were made of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from dfastllm.errors import TokenizerError
from dfastllm.quant.gguf import special_ids, write_file
from dfastllm.text import Tokenizer
from dfastllm.text.gguf import read_tokenizer, tokenizer_metadata
from dfastllm.text.gguf.load import SPACE
from dfastllm.text.gguf.splits import SPLITS

DEMO = Path(__file__).parents[2] / "src/dfastllm/shipped/demo-ar"
ROWS = 1280

HARD = [
    "",
    "a",
    " ",
    "  ",
    "\n",
    "\n\n\n",
    "\t",
    "hello world",
    "Hello World, HELLO",
    "I'LL can't we've it's IT'S 's 'S ' s don''t",
    "  two   spaces\t\ttabs \n\n lines\r\n x ",
    "1 12 123 1234 12345678 3.14 1e-9 0x1F",
    "٣٤٥ ½ ² Ⅷ １２３",
    "naïve ÀÉ été Straße İstanbul",
    "中文字符 かな カナ 한국어 𠮷",
    "!!! ... ?\n//# x=>y $1+2^3|~`",
    "e\u0301 क्षि 👩‍👩‍👧 \u00a0nbsp\u3000wide\u200b",
    "a\x00b\x01\x7f\x85",
    "\u2028x\u2029",
    "<|unknown|> <0x41> <0xFF>",
    "ab" * 150,
    "\ufeffbom",
    "\U0001f600\U0001f1e9\U0001f1ea 👍🏽",
    "ﬁ ligature тест Привет ελληνικά עברית عربى",
    "\ud7ff\ue000\uffff",
    "foo_bar-baz/qux\\n",
    "http://a.b/c?d=e&f=g#h",
    "∑∫√≈ 𝔘𝔫𝔦 ½cup 3/4",
    "def f(x):\n    return x + 1\n",
    " ▁ ▁▁ x",
]
SPECIAL = ["<|user|>hi<|end|>", "<|user|> a <|end|>\n<tool_call>{}</tool_call>b", "<|bos|><|bos|>", "x<|end|>"]


@pytest.fixture(scope="module")
def demo_fields() -> dict[str, Any]:
    fields = tokenizer_metadata(DEMO, ROWS)
    fields.pop("tokenizer.huggingface.json")
    return fields


def test_the_shipped_tokenizer_survives() -> None:
    """Its pattern has no name in GGUF, so the file carries the whole tokenizer.json; ids, roles and template agree."""
    original, fields = Tokenizer.load(DEMO), tokenizer_metadata(DEMO, ROWS)
    again = read_tokenizer(fields)
    assert "tokenizer.huggingface.json" in fields
    assert [again.encode(text) for text in HARD + SPECIAL] == [original.encode(text) for text in HARD + SPECIAL]
    assert (again.eos_ids, again.special_tokens) == (original.eos_ids, original.special_tokens)
    messages = [{"role": "user", "content": "hi"}]
    assert again.apply_chat_template(messages) == original.apply_chat_template(messages)


def test_fields_alone_give_the_shipped_tokenizer_but_for_its_pattern(demo_fields: dict[str, Any]) -> None:
    original, again = Tokenizer.load(DEMO), read_tokenizer(demo_fields)
    assert again.special_ids == original.special_ids
    assert again.encode("<|user|>") == original.encode("<|user|>")
    for text in ("hello world", "x = 12 + 3", "the quick brown fox.", "中"):
        assert again.encode(text) == original.encode(text)
        assert again.decode(again.encode(text)) == text


NEW = ["deepseek-llm", "deepseek-coder", "seed-coder"]


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "gpt-2", "tekken", "gpt-4o", "default", *NEW])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_comes_back(pre: str, demo_fields: dict[str, Any], text: str) -> None:
    tokenizer = _cached(pre, demo_fields)
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


_CACHE: dict[str, Tokenizer] = {}


def _cached(pre: str, fields: dict[str, Any]) -> Tokenizer:
    if pre not in _CACHE:
        _CACHE[pre] = read_tokenizer({**fields, "tokenizer.ggml.pre": pre})
    return _CACHE[pre]


# As the authors' tokenizer.json files cut text. DeepSeek-LLM lists every letter that has another case, Unicode 11's.
_SEED = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
PUBLISHED: dict[str, list[str | None]] = {
    "deepseek-coder": ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, None],
    "deepseek-llm": [
        "[\r\n]",
        SPLITS["deepseek-llm"].patterns[1],
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+$",
        _HAN,
        None,
    ],
    "seed-coder": [_SEED],
}


@pytest.mark.parametrize("pre", NEW)
def test_published_cutting_is_known_by_name(pre: str, tmp_path: Path, demo_fields: dict[str, Any]) -> None:
    """tokenizer.json with these steps -> the name in GGUF -> the same ids, without the tokenizer.json."""
    steps = [
        pre_tokenizers.Digits(individual_digits=True)
        if pattern is None
        else pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
        for pattern in PUBLISHED[pre]
    ]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = {token: i for i, token in enumerate(demo_fields["tokenizer.ggml.tokens"])}
    merges = [merge for merge in (_pair(text) for text in demo_fields["tokenizer.ggml.merges"]) if not _digits(merge)]
    original = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    original.pre_tokenizer = pre_tokenizers.Sequence([*steps, level])
    original.decoder = decoders.ByteLevel()
    original.save(str(tmp_path / "tokenizer.json"))
    fields = tokenizer_metadata(tmp_path, ROWS)
    assert fields["tokenizer.ggml.pre"] == pre
    assert "tokenizer.huggingface.json" not in fields
    again = read_tokenizer(fields)
    draw = np.random.default_rng(0)
    letters = [*"".join(HARD).replace("\x00", ""), *"\u01c5\u0561\u10d0\u1f7d\u3000\U00010410"]
    texts = HARD + ["".join(draw.choice(letters, 1 + i % 24)) for i in range(500)]
    assert [again.encode(text) for text in texts] == [original.encode(text).ids for text in texts]
    assert len({tuple(again.encode(text)) for text in texts}) > 400


def _pair(merge: str) -> tuple[str, str]:
    cut = merge.index(" ", 1)
    return merge[:cut], merge[cut + 1 :]


def _digits(merge: tuple[str, str]) -> bool:
    """Whether it joins digits, which no merge of these models does: one by one and in runs are then the same."""
    return "".join(merge).strip("Ġ").isdecimal()


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("deepseek-coder", "It's 3.14\n\nok", ["It", "'", "s", " ", "3", ".", "1", "4", "\n", "\n", "ok"]),
        ("deepseek-coder", "a, b 中文c", ["a", ",", " b", " ", "中文", "c"]),
        ("deepseek-llm", "It's 3.14  ", ["It", "'", "s", " ", "3", ".", "14", "  "]),
        ("deepseek-llm", "été中文 x", ["é", "t", "é", "中文", " x"]),
        ("seed-coder", "It's 314!\n\nok", ["It", "'s", " ", "3", "1", "4", "!", "\n\n", "ok"]),
    ],
)
def test_pieces(pre: str, text: str, pieces: list[str], demo_fields: dict[str, Any]) -> None:
    cuts = _cached(pre, demo_fields).backend.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:stop] for _, (start, stop) in cuts] == pieces


# SentencePiece


CORPUS = (DEMO / "README.md").read_text() * 3 + "das Straßenfest naïve été 中文 かな 한국어 print(x)\n" * 20


def spm_directory(path: Path, *, metaspace: bool = False) -> Path:
    """A Llama-2-like tokenizer.json: BPE over marked spaces with byte fallback, trained on a little text."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    first = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trained.train_from_iterator(
        [CORPUS], trainers.BpeTrainer(vocab_size=700, special_tokens=first, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=model["vocab"], merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.add_tokens([tokenizers.AddedToken("<|tool|>", normalized=False)])
    path.mkdir(exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps({**roles, "chat_template": "{{ messages[0].content }}"}))
    return path


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, dict[str, Any]]:
    directory = spm_directory(tmp_path_factory.mktemp("spm"))
    return Tokenizer.load(directory), tokenizer_metadata(directory, 720)


SPM_SPECIAL = ["<s>hi</s>", "a<|tool|> b", "<s> x", "</s>\n</s>"]


def test_sentencepiece_from_scores(spm: tuple[Tokenizer, dict[str, Any]]) -> None:
    original, fields = spm[0], dict(spm[1])
    again = read_tokenizer(fields)
    assert "tokenizer.huggingface.json" not in fields
    assert fields["tokenizer.ggml.tokens"][-1] == "[PAD719]"
    texts = HARD + SPM_SPECIAL
    assert [again.encode(text) for text in texts] == [original.encode(text) for text in texts]
    assert [again.decode(again.encode(text)) for text in texts] == [original.decode(original.encode(t)) for t in texts]
    assert again.byte_ids == original.byte_ids
    assert again.encode("a", add_special=True) == original.encode("a", add_special=True)
    del fields["tokenizer.ggml.add_bos_token"]  # SentencePiece files put BOS before a text unless they say otherwise
    assert read_tokenizer(fields).encode("a", add_special=True) == [1, *original.encode("a")]


def test_sentencepiece_that_marks_only_the_start_carries_its_json(tmp_path: Path) -> None:
    directory = spm_directory(tmp_path / "first", metaspace=True)
    original, fields = Tokenizer.load(directory), tokenizer_metadata(directory, 720)
    assert "tokenizer.huggingface.json" in fields
    assert read_tokenizer(fields).encode("a<|tool|>b") == original.encode("a<|tool|>b")


# Against llama.cpp


@pytest.fixture
def vocabulary_file(tmp_path: Path) -> Iterator[Any]:
    llama = pytest.importorskip("llama_cpp") and pytest.importorskip("tests.kit.gguf_reference")
    opened = []

    def make(fields: dict[str, Any]) -> Any:
        path = write_file(tmp_path / f"{len(opened)}.gguf", {"general.architecture": "llama", **fields}, [])
        opened.append(llama.Reference(path, vocab_only=True))
        return opened[-1]

    yield make
    for reference in opened:
        reference.close()


# llama.cpp has ASCII ranges in place of letter case for these.
NOT_ASCII_CASE = {"tekken", "gpt-4o", "llama4", "kanana2"}


@pytest.mark.parametrize("pre", sorted(SPLITS))
def test_byte_level_ids_equal_llama_cpp(pre: str, demo_fields: dict[str, Any], vocabulary_file: Any) -> None:
    fields = {**demo_fields, "tokenizer.ggml.pre": pre}
    reference, ours = vocabulary_file(fields), read_tokenizer(fields)
    texts = [text for text in HARD + SPECIAL if pre not in NOT_ASCII_CASE or text.isascii()]
    different = [
        (text, ours.encode(text), reference.tokenize(text))
        for text in texts
        if ours.encode(text) != reference.tokenize(text)
    ]
    assert different == []
    assert len(texts) > 15
    del fields["tokenizer.ggml.add_bos_token"]  # what the name alone says about BOS
    reference, ours = vocabulary_file(fields), read_tokenizer(fields)
    assert ours.encode("a b", add_special=True) == reference.tokenize("a b", add_special=True)


def test_sentencepiece_ids_equal_llama_cpp(spm: tuple[Tokenizer, dict[str, Any]], vocabulary_file: Any) -> None:
    reference, ours = vocabulary_file(spm[1]), read_tokenizer(spm[1])
    for text in HARD + SPM_SPECIAL:
        assert ours.encode(text) == reference.tokenize(text), text
        assert ours.encode(text, add_special=True) == reference.tokenize(text, add_special=True), text
        theirs = reference.detokenize(reference.tokenize(text))
        assert ours.decode(ours.encode(text), skip_special=False).encode() == theirs, text


@pytest.mark.parametrize("prefix", [True, False])
def test_scores_of_any_kind(prefix: bool, spm: tuple[Tokenizer, dict[str, Any]], vocabulary_file: Any) -> None:
    """Scores as of a unigram model: log probabilities in no order of length or id."""
    scores = np.random.default_rng(0).permutation(720).astype(np.float32) / -64
    fields = {**spm[1], "tokenizer.ggml.scores": scores, "tokenizer.ggml.add_space_prefix": prefix}
    reference, ours = vocabulary_file(fields), read_tokenizer(fields)
    assert [ours.encode(text) for text in HARD] == [reference.tokenize(text) for text in HARD]


# What is refused


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokenizer.ggml.pre": "poro-chat"}, "not known"),
        ({"tokenizer.ggml.model": "t5"}, "supported: gpt2"),
        ({"tokenizer.ggml.model": None}, "supported: gpt2"),
        ({"tokenizer.ggml.tokens": None}, "no list of tokens"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "more than once"),
        ({"tokenizer.ggml.tokens": np.arange(3)}, "no list of tokens"),
        ({"tokenizer.ggml.merges": ["ab"]}, "space between"),
        ({"tokenizer.ggml.merges": ["zzzz qqqq"]}, "unusable"),
        ({"tokenizer.ggml.merges": None}, "no list of merges"),
        ({"tokenizer.ggml.token_type": np.arange(3)}, "no list of 1280 integers"),
        ({"tokenizer.ggml.eos_token_id": 5000}, "below 1280"),
        ({"tokenizer.ggml.eos_token_id": "2"}, "below 1280"),
        ({"tokenizer.ggml.add_bos_token": 7}, "true or false"),
        ({"tokenizer.chat_template": 3}, "no text"),
        ({"tokenizer.huggingface.json": "{"}, r"huggingface\.json is not valid JSON"),
        ({"tokenizer.ggml.model": np.zeros(3, np.int32)}, r"tokenizer\.ggml\.model .* is ndarray"),
    ],
)
def test_damaged_metadata_is_named(change: dict[str, Any], said: str, demo_fields: dict[str, Any]) -> None:
    fields = {key: value for key, value in {**demo_fields, **change}.items() if value is not None}
    with pytest.raises(TokenizerError, match=said):
        read_tokenizer(fields)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokenizer.ggml.scores": None}, "no list of 720 numbers"),
        ({"tokenizer.ggml.scores": np.full(720, np.nan, np.float32)}, "NaN"),
        ({"tokenizer.ggml.scores": np.zeros(5, np.float32)}, "no list of 720 numbers"),
    ],
)
def test_damaged_scores_are_named(change: dict[str, Any], said: str, spm: tuple[Tokenizer, dict[str, Any]]) -> None:
    fields = {key: value for key, value in {**spm[1], **change}.items() if value is not None}
    with pytest.raises(TokenizerError, match=said):
        read_tokenizer(fields)


def test_a_huge_token_costs_no_time(spm: tuple[Tokenizer, dict[str, Any]]) -> None:
    tokens = list(spm[1]["tokenizer.ggml.tokens"])
    tokens[-1] = "a" * 2_000_000
    assert read_tokenizer({**spm[1], "tokenizer.ggml.tokens": tokens}).encode("ab")


def test_unigram_is_refused(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="Unigram"):
        tokenizer_metadata(tmp_path, 8)
    with pytest.raises(TokenizerError, match="only 3 embeddings"):
        tokenizer_metadata(DEMO, 3)


def test_ends_are_named_or_marked() -> None:
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "</s>", "<|im_end|>", "<|eot_id|>"],
        "tokenizer.ggml.token_type": np.array([1, 1, 3, 4], np.int32),
        "tokenizer.ggml.eos_token_id": 3,
    }
    assert special_ids(fields, 4).ends == (3, 2)  # </s> is plain text here
    assert special_ids({**fields, "tokenizer.ggml.eot_token_id": 0}, 4).ends == (3, 0, 2)
    assert special_ids({"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a", "b"]}, 2).bos == 1
