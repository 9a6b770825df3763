"""tokenizer.json of a checkpoint directory -> metadata of a GGUF file, as llama.cpp's tokenizers read it.

Where GGUF's own fields cannot say how this tokenizer cuts text, the nearest `pre` is written for llama.cpp and the
whole tokenizer.json beside it, which `read_tokenizer` prefers: our ids are then the original's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dfastllm.errors import TokenizerError
from dfastllm.quant.gguf.ids import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from dfastllm.text.files import read_text
from dfastllm.text.gguf.load import read_tokenizer
from dfastllm.text.gguf.splits import GPT2, name_of
from dfastllm.text.tokenizer import Tokenizer

__all__ = ["tokenizer_metadata"]

NEAREST = "smollm"  # GPT-2's cutting with digits one by one: what an unknown pattern most likely resembles
# Texts that tell ways of cutting apart: contractions, runs of digits and spaces, marks, other scripts, line ends.
_PROBES = (
    "I'LL can't we've",
    "  two   spaces\t\ttabs \n\n lines\r\n x",
    "1234567 3.14 ٣٤٥",
    "naïve ÀÉ été Straße İstanbul ǅ",
    "中文字符 かな カナ 한국어",
    "!!! ... ?\n//# x=>y $1+2^3|~`",
    "e\u0301 क्षि 👩‍👩‍👧 \u00a0nbsp\u3000wide",
    "CamelCase snake_case (a,b) [c] 'quoted' a\x00b",
    " lead",
    "trail ",
)
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "mask": "mask"}


def tokenizer_metadata(directory: str | Path, vocab_size: int) -> dict[str, Any]:
    """Tokens, merges or scores, ids and chat templates. vocab_size: rows of the model's embedding; ids the tokenizer
    does not use become [PADi]. Raises TokenizerError for a tokenizer that is neither byte-level BPE nor SentencePiece's
    BPE, and for one with more ids than the model has rows."""
    directory = Path(directory)
    loaded = Tokenizer.load(directory)
    loaded.check_fits(vocab_size)
    raw = json.loads(loaded.backend.to_str())
    model = raw["model"]
    if model.get("type") != "BPE":
        raise TokenizerError(
            f"tokenizer.json in {directory} is a {model.get('type')} tokenizer; GGUF files are written for BPE alone.",
            hint="Pass no tokenizer, and keep tokenizer.json beside the GGUF file.",
        )
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = np.full(vocab_size, UNUSED, np.int32)
    for token, i in model["vocab"].items():
        tokens[i], kinds[i] = token, NORMAL
    for entry in raw["added_tokens"]:
        if entry["id"] >= vocab_size:  # the model has no row for it
            continue
        tokens[entry["id"]] = entry["content"]
        kinds[entry["id"]] = CONTROL if entry["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        fields = _sentencepiece(raw, tokens, kinds, merges)
    else:
        fields = _byte_level(raw, merges)
    fields |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    for role, key in _ROLES.items():
        text = loaded.special_tokens.get(f"{role}_token")
        id = None if text is None else loaded.token_to_id(text)
        if id is not None and id < vocab_size:
            fields[f"tokenizer.ggml.{key}_token_id"] = id
    others = [i for i in loaded.eos_ids if i != loaded.eos_id]
    fields |= {f"tokenizer.ggml.{key}_token_id": i for key, i in zip(("eot", "eom"), others, strict=False)}
    fields |= _surround(loaded)
    for name in loaded.templates.names:
        key = "tokenizer.chat_template" if name == "default" else f"tokenizer.chat_template.{name}"
        fields[key] = loaded.templates.source(name)
    again = read_tokenizer(fields)
    if any(again.encode(text) != loaded.encode(text) for text in _PROBES):
        fields["tokenizer.huggingface.json"] = read_text(directory / "tokenizer.json")
    return fields


def _byte_level(raw: Mapping[str, Any], merges: list[str]) -> dict[str, Any]:
    patterns, known = _patterns(raw)
    whole = bool(raw["model"].get("ignore_merges"))
    pre = name_of(tuple(patterns), whole) if known and raw.get("normalizer") is None else None
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre or NEAREST,
        "tokenizer.ggml.merges": merges,
    }


def _patterns(raw: Mapping[str, Any]) -> tuple[list[str], bool]:
    """Expressions that cut text before byte-level BPE, and whether that is all that happens to it."""
    outer = raw.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer])
    patterns: list[str] = []
    for step in steps:
        kind = step.get("type")
        if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            expression = step["pattern"].get("Regex")
            patterns.append(expression if expression is not None else re.escape(step["pattern"]["String"]))
        elif kind == "Digits" and step.get("individual_digits"):
            patterns.append(r"\p{N}")
        elif kind == "ByteLevel" and not step.get("add_prefix_space") and step is steps[-1]:
            if step.get("use_regex") and patterns:
                patterns.append(GPT2)
        else:
            return patterns, False
    level = bool(steps) and steps[-1].get("type") == "ByteLevel"
    return patterns, level


def _sentencepiece(raw: Mapping[str, Any], tokens: list[str], kinds: np.ndarray, merges: list[str]) -> dict[str, Any]:
    """Scores that order tokens as the merges do: the earliest merge that makes a token; characters come last."""
    rank: dict[str, int] = {}
    for i, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), i)
    scores = np.array([-float(rank.get(token, len(merges) + i)) for i, token in enumerate(tokens)], np.float32)
    for i, token in enumerate(tokens):
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            kinds[i] = BYTE
    unknown = raw["model"].get("unk_token")
    if unknown in tokens:
        kinds[tokens.index(unknown)] = UNKNOWN
    prepends = '"Prepend"' in json.dumps(raw.get("normalizer"))
    metaspace = raw.get("pre_tokenizer") or {}
    if metaspace.get("type") == "Metaspace":
        prepends = metaspace.get("prepend_scheme") != "never"
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prepends,
    }


def _surround(loaded: Tokenizer) -> dict[str, bool]:
    """Whether BOS and EOS are put around a text, found by encoding one."""
    plain, around = loaded.encode("a"), loaded.encode("a", add_special=True)
    return {
        "tokenizer.ggml.add_bos_token": loaded.bos_id is not None and around[:1] == [loaded.bos_id] != plain[:1],
        "tokenizer.ggml.add_eos_token": loaded.eos_id is not None and around[-1:] == [loaded.eos_id] != plain[-1:],
    }
