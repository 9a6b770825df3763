"""Tokenizers that a checkpoint has in older files, as the fast tokenizer that transformers makes of them: vocab.json
with merges.txt (byte-level BPE: GPT-2, Qwen2, Dream), and tokenizer.model (SentencePiece: BPE and Unigram).

How text is cut before byte-level BPE is in no file, only in the code of the class that tokenizer_config.json names; of
other classes than those here nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from dfastllm.errors import TokenizerError
from dfastllm.text.files import read_json, read_text
from dfastllm.text.library import calling, require_ids
from dfastllm.text.merges import merges_of
from dfastllm.text.sentencepiece import BPE, CONTROL, UNIGRAM, UNKNOWN, USER_DEFINED, PieceModel, read_piece_model

__all__ = ["BYTE_LEVEL", "FILES", "read_slow"]

FILES = ("tokenizer.model", "vocab.json", "vocab.txt")
SPACE = "\u2581"  # SentencePiece's mark of a space
_SAVE = (
    "Save its fast tokenizer there with transformers: AutoTokenizer.from_pretrained(DIRECTORY).save_pretrained("
    "DIRECTORY), or take tokenizer.json from another upload of the model."
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Class -> (how text is cut, whether it is composed to NFC first).
BYTE_LEVEL = {
    "GPT2Tokenizer": (_GPT2, False),
    "CodeGenTokenizer": (_GPT2, False),
    "Qwen2Tokenizer": (_QWEN2, True),
    "DreamTokenizer": (_QWEN2, True),  # Qwen2's under another name
}
_BOS_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")  # put BOS before a text unless told otherwise


def read_slow(directory: Path, config: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The tokenizer, and the roles that its files give to tokens. config: tokenizer_config.json. Raises TokenizerError
    for files that are missing, damaged or of a kind that is not read, with the way out."""
    kind = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file() and kind in BYTE_LEVEL:
        return _byte_level(directory, config, kind), {}
    if (directory / "tokenizer.model").is_file():
        return _sentencepiece(directory, config, kind)
    there = [name for name in (*FILES, "merges.txt") if (directory / name).is_file()]
    if not there:
        raise TokenizerError(f"{directory} has no tokenizer.json.", hint="Download the model's tokenizer files too.")
    raise TokenizerError(
        f"{directory} has no tokenizer.json but {', '.join(there)} of class {kind or 'that no file names'}; of "
        f"vocab.json with merges.txt these classes are read: {', '.join(BYTE_LEVEL)}.",
        hint=_SAVE,
    )


def _byte_level(directory: Path, config: Mapping[str, Any], kind: str) -> tokenizers.Tokenizer:
    vocab = read_json(directory / "vocab.json")
    where = f"vocab.json in {directory}"
    if not all(isinstance(id, int) and id >= 0 for id in vocab.values()):
        raise TokenizerError(f"{where} must map tokens to ids, numbers from 0.")
    merges = []
    for number, line in enumerate(read_text(directory / "merges.txt").split("\n"), 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        parts = line.rstrip("\r").split(" ")
        if len(parts) != 2:
            raise TokenizerError(f"merges.txt in {directory}, line {number}: {line!r:.80} is not two tokens.")
        merges.append((parts[0], parts[1]))
    added = _declared(directory, config)
    vocab |= {text: id for id, (text, _) in added.items()}
    require_ids(vocab.values(), where)
    pattern, composed = BYTE_LEVEL[kind]
    with calling(f"{where} and merges.txt make no tokenizer", "The two files belong to different models."):
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
        prefix = bool(config.get("add_prefix_space", False))
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
            ]
        )
        if composed:
            backend.normalizer = normalizers.NFC()
        backend.decoder = decoders.ByteLevel()
        for text, flags in added.values():
            backend.add_tokens([AddedToken(text, **flags)])
    return backend


def _declared(directory: Path, config: Mapping[str, Any]) -> dict[int, tuple[str, dict[str, bool]]]:
    """Added tokens by id, of added_tokens.json and tokenizer_config.json, which knows more of them."""
    named = read_json(directory / "added_tokens.json") if (directory / "added_tokens.json").is_file() else {}
    found: dict[int, tuple[str, dict[str, bool]]] = {
        id: (text, {"special": True, "normalized": False}) for text, id in named.items() if isinstance(id, int)
    }
    rows = config.get("added_tokens_decoder")
    for key, row in rows.items() if isinstance(rows, Mapping) else ():
        if str(key).isdigit() and isinstance(row, Mapping) and isinstance(row.get("content"), str):
            names = ("single_word", "lstrip", "rstrip", "normalized", "special")
            found[int(key)] = (row["content"], {name: bool(row[name]) for name in names if name in row})
    return dict(sorted(found.items()))


def _sentencepiece(
    directory: Path, config: Mapping[str, Any], kind: str
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    where = f"tokenizer.model in {directory}"
    model = read_piece_model(directory / "tokenizer.model", _SAVE)
    if model.kind not in (UNIGRAM, BPE):
        raise TokenizerError(f"{where} is a SentencePiece model of another kind than unigram and bpe.", hint=_SAVE)
    with calling(f"{where} makes no tokenizer", "Download it again."):
        backend = tokenizers.Tokenizer(_bpe(model) if model.kind == BPE else _unigram(model))
        _surroundings(backend, model, config)
        backend.add_special_tokens(
            [AddedToken(p.text, normalized=False) for p in model.pieces if p.type in (CONTROL, UNKNOWN)]
        )
        backend.add_tokens([AddedToken(p.text, normalized=False) for p in model.pieces if p.type == USER_DEFINED])
        roles = model.roles()
        if config.get("add_bos_token", kind in _BOS_CLASSES) and "bos_token" in roles:
            bos = str(_text_of(config.get("bos_token")) or roles["bos_token"])
            named = [("bos", backend.token_to_id(bos))]
            backend.post_processor = processors.TemplateProcessing(single="bos $A", special_tokens=named)
    return backend, roles


def _bpe(model: PieceModel) -> models.Model:
    tokens, scores = [piece.text for piece in model.pieces], [piece.score for piece in model.pieces]
    return models.BPE(
        vocab=model.vocabulary,
        merges=merges_of(tokens, scores, model.vocabulary),
        unk_token=model.unknown,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def _unigram(model: PieceModel) -> models.Model:
    unknown = next((i for i, piece in enumerate(model.pieces) if piece.type == UNKNOWN), None)
    pieces = [(piece.text, piece.score) for piece in model.pieces]
    return models.Unigram(pieces, unknown, model.byte_fallback)


def _surroundings(backend: tokenizers.Tokenizer, model: PieceModel, config: Mapping[str, Any]) -> None:
    """What is done to a text before and after. It begins with a mark of a space, and so does, unless the class is not
    `legacy`, every piece of it between special tokens."""
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.strips:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    prefix = bool(model.prefix if config.get("add_prefix_space") is None else config["add_prefix_space"])
    if config.get("legacy") is False and prefix:  # only where the whole text begins, and not before a space of its own
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
    else:  # as SentencePiece itself
        steps += [normalizers.Prepend(SPACE)] * prefix + [normalizers.Replace(" ", SPACE)]
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    undone = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*undone, decoders.Strip(" ", 1, 0)] if prefix else undone)


def _text_of(value: Any) -> str | None:
    value = value.get("content") if isinstance(value, Mapping) else value
    return value if isinstance(value, str) else None
