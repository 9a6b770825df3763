"""Metadata of a GGUF file -> Tokenizer: byte-level BPE ("gpt2") and SentencePiece ("llama"), chat templates, ids.

The same ids as llama.cpp gives, by the `tokenizers` library. A file that carries the whole tokenizer.json
(tokenizer.huggingface.json, as in the GGUF specification) is read from that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from dfastllm.errors import TokenizerError
from dfastllm.quant.gguf import SpecialIds, special_ids, tokens_of
from dfastllm.quant.gguf.ids import CONTROL, UNKNOWN, USER_DEFINED, tokenizer_model
from dfastllm.text.chat import ChatTemplates
from dfastllm.text.files import json_object
from dfastllm.text.gguf.splits import SPLITS
from dfastllm.text.library import calling, from_json
from dfastllm.text.merges import merges_of
from dfastllm.text.tokenizer import Tokenizer

__all__ = ["read_tokenizer"]

SPACE = "\u2581"  # SentencePiece's mark of a space
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "pad", "mask_token": "mask"}


def read_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file's metadata. Raises TokenizerError for a kind of tokenizer or a `pre` that is not
    supported (listing those that are), and for lists that are absent, damaged or disagree."""
    kind = tokenizer_model(metadata)
    tokens, kinds = tokens_of(metadata)
    if len(set(tokens)) != len(tokens):
        twice = Counter(tokens).most_common(1)[0][0]
        raise TokenizerError(f"tokenizer.ggml.tokens has {twice!r:.80} more than once.", hint="The file is damaged.")
    ids = special_ids(metadata, len(tokens))
    notes = [*ids.notes]
    whole = metadata.get("tokenizer.huggingface.json")
    with calling(
        "The tokenizer in this GGUF file is unusable", "Use the model's own checkpoint, or another file of it."
    ):
        if isinstance(whole, str):
            backend = from_json(whole, json_object(whole, "tokenizer.huggingface.json"), "tokenizer.huggingface.json")
        elif kind == "gpt2":
            backend = _byte_level(metadata, tokens, ids, notes)
        elif kind == "llama":
            backend = _sentencepiece(metadata, tokens, kinds, ids)
        else:
            raise TokenizerError(
                f"tokenizer.ggml.model is {kind!r:.40}; supported: gpt2 (byte-level BPE), llama (SentencePiece).",
                param="tokenizer.ggml.model",
            )
        if not isinstance(whole, str):
            _add(backend, tokens, kinds)
    found = {role: getattr(ids, name) for role, name in _ROLES.items()}
    # An id beyond the tokenizer's own vocabulary (padding of the embedding) has no text to speak of.
    special = {role: tokens[i] for role, i in found.items() if i is not None and backend.token_to_id(tokens[i]) == i}
    templates = ChatTemplates(_templates(metadata))
    return Tokenizer(backend, special_tokens=special, eos_ids=ids.ends, templates=templates, notes=notes)


def _add(backend: tokenizers.Tokenizer, tokens: list[str], kinds: list[int]) -> None:
    """Control, unknown and user-defined tokens are found in the text before anything else, as written."""
    backend.add_special_tokens(
        [AddedToken(t, normalized=False) for t, kind in zip(tokens, kinds, strict=True) if kind in (CONTROL, UNKNOWN)]
    )
    backend.add_tokens(
        [AddedToken(t, normalized=False) for t, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED]
    )


def _flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise TokenizerError(f"tokenizer.ggml.{name} is {value!r:.40}, wanted true or false.")
    return value


def _byte_level(
    metadata: Mapping[str, Any], tokens: list[str], ids: SpecialIds, notes: list[str]
) -> tokenizers.Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre")
    if pre is None:  # an old file
        pre = "default"  # llama.cpp's choice too, with a warning
        notes.append(
            "the GGUF file has no tokenizer.ggml.pre, which says how text is cut before it becomes tokens: the oldest "
            "rule is used, and if the model's own is another, its answers are worse. Newer conversions of it say it."
        )
    if not isinstance(pre, str) or pre not in SPLITS:
        raise TokenizerError(
            f"tokenizer.ggml.pre is {pre!r:.40}, which is not known; known: {', '.join(sorted(SPLITS))}.",
            hint="Use the safetensors checkpoint, whose tokenizer.json says how text is cut.",
            param="tokenizer.ggml.pre",
        )
    split = SPLITS[pre]
    raw = metadata.get("tokenizer.ggml.merges")
    if not isinstance(raw, list) or not all(isinstance(merge, str) for merge in raw):
        raise TokenizerError("tokenizer.ggml.merges of this GGUF file is no list of merges.")
    merges = []
    for merge in raw:
        cut = merge.find(" ", 1)
        if cut < 0:
            raise TokenizerError(f"tokenizer.ggml.merges has {merge!r:.40}, wanted two tokens with a space between.")
        merges.append((merge[:cut], merge[cut + 1 :]))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split.whole))
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in split.patterns]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, level])
    backend.decoder = decoders.ByteLevel()
    _surround(backend, metadata, ids, bos=split.bos)
    return backend


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], kinds: list[int], ids: SpecialIds
) -> tokenizers.Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or scores.dtype.kind not in "fi" or len(scores) < len(tokens):
        raise TokenizerError(f"tokenizer.ggml.scores of this GGUF file is no list of {len(tokens)} numbers.")
    if not np.isfinite(scores).all():
        raise TokenizerError("tokenizer.ggml.scores of this GGUF file has numbers that are NaN or infinite.")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = next((t for t, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None)
    if unknown is None and ids.unknown is not None:
        unknown = tokens[ids.unknown]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges_of(tokens, scores.tolist(), vocabulary),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = _flag(metadata, "add_space_prefix", True)
    marks = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), marks]) if prefix else marks
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    _surround(backend, metadata, ids, bos=True)
    return backend


def _surround(backend: tokenizers.Tokenizer, metadata: Mapping[str, Any], ids: SpecialIds, bos: bool) -> None:
    """What `encode(add_special=True)` puts around a text."""
    before = ids.bos if _flag(metadata, "add_bos_token", bos) else None
    after = ids.eos if _flag(metadata, "add_eos_token", False) else None
    named = [(name, i) for name, i in (("bos", before), ("eos", after)) if i is not None]
    if named:
        text = ["bos"] * (before is not None) + ["$A"] + ["eos"] * (after is not None)
        backend.post_processor = processors.TemplateProcessing(single=" ".join(text), special_tokens=named)


def _templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    found = {"default": metadata.get("tokenizer.chat_template")}
    prefix = "tokenizer.chat_template."
    found |= {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    for name, value in found.items():
        if value is not None and not isinstance(value, str):
            raise TokenizerError(f"The chat template {name!r:.40} of this GGUF file is no text.")
    return {name: value for name, value in found.items() if isinstance(value, str)}
