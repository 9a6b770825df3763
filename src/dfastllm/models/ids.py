"""Token ids of a checkpoint from its own files. Does not tokenise: that is the text room's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dfastllm.errors import ModelLoadError, TokenizerError, ValidationError
from dfastllm.models.family import Family, Fields, Ids
from dfastllm.models.headers import read_json
from dfastllm.options import generation_defaults

__all__ = ["added_tokens", "ordinary_tokens", "read_defaults", "read_ids", "usable", "with_fallbacks"]

ABSENT = -1  # how some files write that there is no such token


def read_ids(directory: Path, fields: Fields, family: Family, vocab_size: int) -> Ids:
    """Ids in order of trust: generation_config.json, config.json, the tokenizer's own special tokens, the family's
    published values (only those inside the vocabulary). eos: the union of the first that name any, with the family's
    end tokens that the tokenizer has; the first id is config.json's, the one padding is counted as.

    Raises ModelLoadError for an id that is no integer.
    """
    generation = _optional(directory / "generation_config.json")
    tokens = added_tokens(directory)
    special = _optional(directory / "tokenizer_config.json").raw

    def one(name: str) -> int | None:
        for source in (fields, generation):
            listed = _integers(source.raw.get(f"{name}_token_id"), f"{name}_token_id", source)
            if listed:
                return listed[0]
        content = special.get(f"{name}_token")
        if isinstance(content, dict):
            content = content.get("content")
        return tokens.get(content) if isinstance(content, str) else None

    eos = _integers(fields.raw.get("eos_token_id"), "eos_token_id", fields)
    eos += _integers(generation.raw.get("eos_token_id"), "eos_token_id", generation)
    if not eos and one("eos") is not None:
        eos = [one("eos") or 0]
    eos += [tokens[content] for content in family.end_tokens if content in tokens]
    mask = one("mask")
    if mask is None:
        mask = next((tokens[content] for content in family.mask_tokens if content in tokens), None)
    known = Ids(eos=tuple(dict.fromkeys(eos)), mask=mask, bos=one("bos"), pad=one("pad"))
    return with_fallbacks(known, family.ids, vocab_size)


def usable(known: Ids, family: Family, vocab_size: int) -> tuple[Ids, tuple[str, ...]]:
    """The ids without those past the vocabulary that generating can do without, and a note for each of these: padding;
    an end of the text, where there is another; a mask, where the model is autoregressive. The others stay, and
    `describe` refuses them."""
    notes = []

    def past(token: int | None) -> bool:
        return token is not None and token >= vocab_size

    def drop(role: str, token: int | None) -> None:
        notes.append(f"the {role} token's id, {token}, is past the vocabulary of {vocab_size}: passed over.")

    eos = tuple(token for token in known.eos if not past(token))
    if eos and eos != known.eos:
        for token in set(known.eos) - set(eos):
            drop("end", token)
        known = replace(known, eos=eos)
    if past(known.pad):
        drop("padding", known.pad)
        known = replace(known, pad=None)
    if family.kind == "ar" and past(known.mask):
        drop("mask", known.mask)
        known = replace(known, mask=None)
    return known, tuple(notes)


def with_fallbacks(known: Ids, published: Ids, vocab_size: int) -> Ids:
    """The known ids, and the published ones that are inside the vocabulary where nothing is known."""

    def inside(token: int | None) -> int | None:
        return token if token is not None and token < vocab_size else None

    return Ids(
        eos=known.eos or tuple(token for token in published.eos if token < vocab_size),
        mask=known.mask if known.mask is not None else inside(published.mask),
        bos=known.bos if known.bos is not None else inside(published.bos),
        pad=known.pad if known.pad is not None else inside(published.pad),
    )


def read_defaults(directory: Path, kind: str) -> dict[str, Any]:
    """What generation_config.json says of the options of a request, by our names. Raises ModelLoadError for a value
    that no request could ask for, or none to a model of this kind."""
    generation = _optional(directory / "generation_config.json")
    try:
        return generation_defaults(generation.raw, kind)
    except ValidationError as error:
        raise ModelLoadError(f"{directory / generation.where}: {error}", param=error.param) from error


def added_tokens(directory: Path) -> dict[str, int]:
    """Content -> id of the tokens a tokenizer adds to its vocabulary, from tokenizer.json, tokenizer_config.json and
    added_tokens.json, whichever are there; malformed entries are passed over (the text room refuses them)."""
    found: dict[str, int] = {}
    for content, token in _optional(directory / "added_tokens.json").raw.items():
        if isinstance(token, int):
            found[content] = token
    decoder = _optional(directory / "tokenizer_config.json").raw.get("added_tokens_decoder")
    for token, entry in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(entry, dict) and str(token).isdigit():
            found[str(entry.get("content"))] = int(token)
    listed = _optional(directory / "tokenizer.json").raw.get("added_tokens")
    for entry in listed if isinstance(listed, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("id"), int):
            found[str(entry.get("content"))] = entry["id"]
    return found


def ordinary_tokens(directory: Path) -> int | None:
    """One past the largest id that tokenizer.json gives to ordinary text: its added tokens, which stand for themselves
    alone, are not counted. None where there is no tokenizer.json. Raises TokenizerError if it cannot be read."""
    raw = _optional(directory / "tokenizer.json").raw
    if not raw:
        return None
    vocab = raw["model"].get("vocab") if isinstance(raw.get("model"), dict) else None
    if isinstance(vocab, dict):  # BPE, WordPiece, WordLevel: token -> id
        added = set(added_tokens(directory).values())
        ids = [token for token in vocab.values() if isinstance(token, int) and token not in added]
        return max(ids, default=-1) + 1
    return len(vocab) if isinstance(vocab, list) else 0  # Unigram: [token, score] in order of id


def _optional(path: Path) -> Fields:
    """The fields of a JSON file, none where there is no such file. Raises ModelLoadError, for the tokenizer's files
    TokenizerError, if it cannot be read."""
    try:
        return Fields(read_json(path) if path.is_file() else {}, path.name)
    except ModelLoadError as error:
        if path.name.startswith(("tokenizer", "added_tokens")):
            raise TokenizerError(error.message) from error
        raise


def _integers(value: Any, name: str, source: Fields) -> list[int]:
    """An id, a list of ids, or null, as a list. -1 is how some files write null."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(not isinstance(item, int) or isinstance(item, bool) for item in values):
        raise ModelLoadError(f"{source.where}: {name} must be an integer or a list of integers, got {value!r:.200}.")
    return [item for item in values if item != ABSENT]
