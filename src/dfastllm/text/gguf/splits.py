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
# Letters of scripts with two cases, as DeepSeek-LLM lists them.
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_CHINESE = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_CASED_LETTERS}]+",
    r"\s?[!-/:-~" + "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _CHINESE,
    r"\p{N}+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE, r"\p{N}")
_SEED = _CASED + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
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
        "deepseek-llm": Split(_DEEPSEEK_LLM),
        "deepseek-coder": Split(_DEEPSEEK_CODER),
        "bailingmoe bailingmoe2 llada-moe": Split(_BAILING),
        "seed-coder": Split((_SEED,)),
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

# How tokenizer.json spells what the table has. The contractions differ in U+017F alone; DeepSeek-LLM's digits are cut
# one by one there, which is the same where no merge joins digits.
_SPELT = {"(?i:'s|'t|'re|'ve|'m|'ll|'d)": _CASED, "\r": r"\r", "\n": r"\n"}
_SPLITS_SPELT = {"deepseek-llm": (*_DEEPSEEK_LLM[:-1], r"\p{N}")}


def name_of(patterns: tuple[str, ...], whole: bool) -> str | None:
    """The `pre` whose cutting is exactly this, None when there is none. An empty tuple is GPT-2's, which is what
    ByteLevel does by itself."""
    wanted = tuple(map(_respelt, patterns)) or (GPT2,)
    for name, split in SPLITS.items():
        if wanted in (split.patterns, _SPLITS_SPELT.get(name)) and split.whole == whole:
            return name
    return None


def _respelt(pattern: str) -> str:
    for theirs, ours in _SPELT.items():
        pattern = pattern.replace(theirs, ours)
    return pattern
