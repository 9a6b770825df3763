r"""How text is cut before byte-level BPE: tokenizer.ggml.pre -> regular expressions, applied one after the other.

Each expression cuts every piece the one before it left; matches and what lies between them become pieces. The
expressions are facts of the published tokenizers. `tekken` and `gpt-4o` have those of the tokenizers themselves, with
letter case by Unicode class; llama.cpp approximates them by ASCII ranges.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GPT2", "SPLITS", "Split", "name_of"]

_CASED = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _modern(digits: str) -> str:
    """The pattern shared by Llama 3, Qwen 2 and many others, which differ in how they cut digits."""
    tail = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return _CASED + r"|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + tail


_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(suffix: str, digits: str) -> str:
    words = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{suffix}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{suffix}"
    return words + rf"|{digits}" + r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


_LLAMA3 = (_modern(r"\p{N}{1,3}"),)
_QWEN2 = (_modern(r"\p{N}"),)
_DIGITS_FIRST = (r"\p{N}", GPT2)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_BAILING = (
    r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
)


@dataclass(frozen=True, slots=True)
class Split:
    """whole: a piece that is itself a token is never cut into merges (`ignore_merges`). bos: BOS is put before a text
    unless the file says otherwise."""

    patterns: tuple[str, ...]
    whole: bool = False
    bos: bool = False


def _table() -> dict[str, Split]:
    groups = {
        "default": Split((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": Split(_LLAMA3, whole=True, bos=True),
        "dbrx smaug-bpe": Split(_LLAMA3),
        "qwen2 deepseek-r1-qwen megrez hunyuan stablelm2 kormo solar-open grok-2": Split(_QWEN2),
        "gpt-2 phi-2 mpt olmo jais trillion exaone4 gigachat a.x-4.0 mellum granite-docling": Split((GPT2,)),
        "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": Split(_DIGITS_FIRST),
        "tekken": Split((_cased("", r"\p{N}"),), whole=True, bos=True),
        "gpt-4o llama4 kanana2": Split((_cased(_CASED + "?", r"\p{N}{1,3}"),)),
        "deepseek-v3 hunyuan-dense joyai-llm": Split(_DEEPSEEK3),
        "bailingmoe bailingmoe2 llada-moe": Split(_BAILING),
        "falcon": Split((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]")),
        "minicpm5": Split((r"\p{N}{1,3}", _modern(r"\p{N}+")), whole=True),
        "qwen35": Split(
            (
                _CASED + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+",
            )
        ),
    }
    return {name: split for names, split in groups.items() for name in names.split()}


SPLITS = _table()

_INSENSITIVE = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # how tokenizer.json spells _CASED; they differ in U+017F alone


def name_of(patterns: tuple[str, ...], whole: bool) -> str | None:
    """The `pre` whose cutting is exactly this, None when there is none. An empty tuple is GPT-2's, which is what
    ByteLevel does by itself."""
    wanted = tuple(pattern.replace(_INSENSITIVE, _CASED) for pattern in patterns) or (GPT2,)
    for name, split in SPLITS.items():
        if split.patterns == wanted and split.whole == whole:
            return name
    return None
