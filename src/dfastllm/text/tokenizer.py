"""Text <-> token ids from a checkpoint's tokenizer files.

Wraps the `tokenizers` library. Reads tokenizer.json (or the older files that `slow` reads), tokenizer_config.json,
special_tokens_map.json, generation_config.json (further EOS ids) and chat templates; writes nothing. It does not know
the model: `check_fits` compares it with one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from dfastllm.errors import TokenizerError, ValidationError
from dfastllm.text.chat import ChatTemplates, Rendering
from dfastllm.text.files import read_json, read_text
from dfastllm.text.library import LARGEST_ID, calling, from_json, unusable
from dfastllm.text.reach import reach
from dfastllm.text.slow import read_slow
from dfastllm.text.spelled import PlainText
from dfastllm.text.templates.quoting import Marks, Quoting

__all__ = ["Tokenizer"]

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token", "sep_token", "cls_token")
_NEEDED = ("bos_token", "eos_token", "mask_token")  # without these a text would begin, end or be filled otherwise
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_LONG = 1 << 14  # characters; see `encode`


class Tokenizer:
    """A loaded tokenizer. Immutable after construction and safe to use from many threads.

    vocab_size   highest token id + 1: the least width of logits that fits (a model's own vocabulary may be padded).
    eos_ids      every id that ends a text: the config's eos_token first, then those of generation_config.json.
    special_ids  ids that `decode(skip_special=True)` leaves out.
    byte_ids     ids of SentencePiece byte-fallback tokens (<0x00>..<0xFF>), empty for other tokenizers.
    spellings    of the special tokens: what `parse_special` is about.
    notes        what the files say that was passed over, a sentence each.
    reach        how much text a token stands for at most; None where that cannot be told.
    chat_parse_special  whether special tokens that people spell in messages become those tokens, where a request does
                 not say; set while a model is loaded.
    """

    chat_parse_special = False

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        eos_ids: Sequence[int] = (),
        templates: ChatTemplates | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """backend: the library's tokenizer; truncation and padding are switched off. special_tokens: role (bos_token,
        eos_token, mask_token, ...) -> token text. notes: what was found on the way here. Raises TokenizerError for a
        role that texts need (`_NEEDED`) and whose token is not in the vocabulary; of the others a note is kept."""
        backend.no_truncation()  # a tokenizer.json saved with truncation would otherwise cut prompts silently
        backend.no_padding()
        self.backend = backend
        self.special_tokens = {role: text for role, text in (special_tokens or {}).items() if text}
        self.notes = tuple(notes)
        self.templates = (templates or ChatTemplates({})).chosen(None, self.special_tokens)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise TokenizerError("The tokenizer has an empty vocabulary.", hint="Use the tokenizer.json of the model.")
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        spec = json.loads(backend.to_str())
        self.reach = reach(spec)
        fallback = '"ByteFallback"' in json.dumps(spec["decoder"])
        self.byte_ids = (
            frozenset(i for t, i in vocabulary.items() if _BYTE_TOKEN.fullmatch(t)) if fallback else frozenset()
        )
        for role, token in self.special_tokens.items():
            if token in vocabulary:
                continue
            needed = role in _NEEDED and not (role == "eos_token" and eos_ids)
            if needed:
                raise TokenizerError(
                    f"{role} is {token!r}, which is not in the vocabulary of tokenizer.json.",
                    hint="tokenizer_config.json and tokenizer.json belong to different models, or one is damaged.",
                )
            self.notes += (f"{role} is {token!r}, which is not in the vocabulary: passed over.",)
        self.bos_id = self._role("bos_token")
        self.eos_id = self._role("eos_token")
        self.pad_id = self._role("pad_token")
        self.mask_id = self._role("mask_token")
        own = () if self.eos_id is None else (self.eos_id,)
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys((*own, *eos_ids)))
        if self.eos_id is None and self.eos_ids:
            self.eos_id = self.eos_ids[0]
        roles = (id for role in self.special_tokens if (id := self._role(role)) is not None)
        self._plain = PlainText(backend, {*self.special_ids, *self.eos_ids, *roles})
        self.spellings = tuple(text for id in sorted(self._plain.ids) if (text := self.id_to_token(id)))
        # A special token that is looked for after normalising is found in other spellings too.
        self._normalized = spec["normalizer"] is not None and any(
            token["normalized"] and token["id"] in self._plain.ids for token in spec["added_tokens"]
        )

    def _role(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self.token_to_id(token)

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """The tokenizer of a checkpoint directory. Raises TokenizerError naming the missing or unreadable file."""
        directory = Path(directory)
        if not directory.is_dir():
            raise TokenizerError(f"{directory} is not a directory, so it holds no tokenizer.")
        config = _optional(directory / "tokenizer_config.json")
        backend, given = _load_backend(directory, config)
        _add_declared(backend, config.get("added_tokens_decoder"), directory)
        roles = _optional(directory / "special_tokens_map.json") | config
        special = given | {role: text for role in _SPECIAL_NAMES if (text := _token_text(roles.get(role))) is not None}
        eos = _optional(directory / "generation_config.json").get("eos_token_id")
        eos_ids = [eos] if isinstance(eos, int) else eos or []
        if not isinstance(eos_ids, list) or not all(isinstance(i, int) for i in eos_ids):
            raise TokenizerError(
                f"eos_token_id in generation_config.json of {directory} must be a number or a list, got {eos!r}."
            )
        return cls(backend, special_tokens=special, eos_ids=eos_ids, templates=ChatTemplates.load(directory, config))

    def encode(self, text: str | Rendering, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids. add_special: also what the tokenizer puts around a text (usually BOS); leave it off for a rendered
        chat template, which writes them itself.

        Special tokens that are written out in `text` become their ids. parse_special False: they stay the text that
        they are. Of a `Rendering` those that its template wrote become ids, and those that people wrote stay text.
        Raises ValidationError for text with lone surrogates."""
        given = text if isinstance(text, Rendering) else Rendering(text, None)
        with calling("The tokenizer cannot encode this text", "Its tokenizer.json is damaged or of another model."):
            try:
                if not parse_special:
                    given = self._all_quoted(given.text)
                if given.marked is not None and (given.marked != given.text or self._normalized):
                    return self._encode_marked(given.text, given.marked, add_special)
                return list(self._encoding(given.text, add_special).ids)
            except (TypeError, UnicodeEncodeError) as error:  # of lone surrogates, and of what is no text
                if not isinstance(given.text, str):
                    raise ValidationError(
                        f"A prompt is text, got {type(given.text).__name__}.", param="prompt"
                    ) from error
                raise ValidationError(
                    "The text is not valid Unicode: it has a lone surrogate.", param="prompt"
                ) from error

    def _encoding(self, text: str, add_special: bool, *, offsets: bool = False) -> tokenizers.Encoding:
        if len(text) <= _LONG:
            return self.backend.encode(text, add_special_tokens=add_special)
        # The library lets other threads run while it encodes a batch, and only then.
        batch = self.backend.encode_batch if offsets else self.backend.encode_batch_fast
        return batch([text], add_special_tokens=add_special)[0]

    def _all_quoted(self, text: str) -> Rendering:
        quoting = Quoting(Marks(self.spellings, ()), [text], "")
        return Rendering(text, quoting.quoted(text)) if quoting.needed else Rendering(text, text)

    def _encode_marked(self, text: str, marked: str, add_special: bool) -> list[int]:
        """Token ids of a text, of which only those special tokens count that stand in `marked` too, as they are
        spelled. One that begins or ends with a stand-in there was written by a person."""
        if not self._normalized and all(text.count(one) == marked.count(one) for one in self.spellings):
            return list(self._encoding(text, add_special).ids)
        found = self._encoding(text, False, offsets=True)
        spans, stray = [], False
        for id, (start, stop) in zip(found.ids, found.offsets, strict=True):
            if id in self._plain.ids:
                spelled = marked[start:stop]
                if spelled == text[start:stop] and spelled.strip() == (self.backend.id_to_token(id) or "").strip():
                    spans.append((start, stop, id))
                else:
                    stray = True
        if not stray:
            return list(self._encoding(text, add_special).ids)
        breaks = [at for at, (one, other) in enumerate(zip(text, marked, strict=True)) if one != other]
        return self._plain.encode(text, spans, breaks, add_special=add_special)

    def fewest(self, text: str) -> int:
        """A number of tokens that `text` has at least, told without encoding it; 0 where it cannot be told."""
        return 0 if self.reach is None else self.reach.fewest(text)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `ids`. Bytes that are no UTF-8 become U+FFFD. Ids outside the vocabulary decode to nothing. Raises
        TokenizerError where the library fails."""
        try:  # as `calling` does, which would cost more than a token's decoding
            text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special)
        except BaseException as error:
            if not unusable(error):
                raise
            raise TokenizerError(f"The tokenizer cannot decode these ids: {error}.") from error
        return text

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation; encode it with add_special=False. `variables` (enable_thinking, ...) reach
        the template next to this tokenizer's special tokens. Errors: see ChatTemplates.render."""
        return self.templates.render(
            messages,
            tools,
            add_generation_prompt=add_generation_prompt,
            template=template,
            variables=variables,
        )

    @property
    def has_chat_template(self) -> bool:
        return bool(self.templates)

    def token_to_id(self, token: str) -> int | None:
        found: int | None = self.backend.token_to_id(token)
        return found

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling (not text: spaces and bytes are encoded), None for an id outside it."""
        found: str | None = self.backend.id_to_token(token_id) if token_id >= 0 else None
        return found

    def differing_ids(self, other: Tokenizer, ignoring: Collection[int] = ()) -> list[int]:
        """Ids that stand for another token there, or for none, ascending."""
        ours, theirs = (
            {i: text for text, i in one.backend.get_vocab(with_added_tokens=True).items() if i not in ignoring}
            for one in (self, other)
        )
        return sorted(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))

    def check_fits(self, vocab_size: int, mask_id: int | None = None) -> tuple[str, ...]:
        """Raise TokenizerError when this tokenizer cannot belong to a model with `vocab_size` logits and `mask_id`:
        when ordinary text can become an id past them, or every text would begin with one. Returns a note where it has
        added tokens past them, which stand for themselves alone: a prompt that spells one is refused when it comes."""
        past = {}
        if self.vocab_size > vocab_size:
            added = self.backend.get_added_tokens_decoder()
            vocabulary = self.backend.get_vocab(with_added_tokens=True)
            past = {text: id for text, id in sorted(vocabulary.items(), key=lambda item: item[1]) if id >= vocab_size}
            if any(id not in added for id in past.values()) or self.bos_id in past.values():
                raise TokenizerError(
                    f"The tokenizer's ids reach {self.vocab_size - 1}, but the model has only {vocab_size} embeddings.",
                    hint="This is another model's tokenizer.json.",
                )
        if mask_id is not None and self.mask_id is not None and mask_id != self.mask_id:
            raise TokenizerError(
                f"The tokenizer's mask token is {self.mask_id}, but the model's config says {mask_id}.",
                hint="This is another model's tokenizer.json, or config.json was edited.",
            )
        if not past:
            return ()
        shown = ", ".join(f"{text!r:.40} ({id})" for text, id in list(past.items())[:3])
        more = f" and {len(past) - 3} more" if len(past) > 3 else ""
        return (f"added tokens past the model's {vocab_size} embeddings: {shown}{more}; prompts cannot have them.",)


def _load_backend(directory: Path, config: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The library's tokenizer, and the roles that its own files give to tokens."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        return read_slow(directory, config)
    text = read_text(file)
    spec = read_json(file)  # its errors name the file and the place; the library's do not
    return from_json(text, spec, f"tokenizer.json in {directory}"), {}


def _add_declared(backend: tokenizers.Tokenizer, declared: Any, directory: Path) -> None:
    """Add the tokens that only tokenizer_config.json declares ({id: {content, special, ...}}), each at its own id."""
    if not isinstance(declared, dict):
        return
    for key, row in sorted(declared.items(), key=lambda item: int(item[0]) if item[0].isdigit() else -1):
        content = _token_text(row)
        if content is None or not key.isdigit() or len(key) > 9 or int(key) > LARGEST_ID:
            raise TokenizerError(f"added_tokens_decoder[{key!r}] in {directory}/tokenizer_config.json is no token.")
        if backend.token_to_id(content) is None:
            flags = {k: bool(row[k]) for k in ("single_word", "lstrip", "rstrip", "normalized", "special") if k in row}
            with calling(f"{directory}/tokenizer_config.json declares a token that cannot be added", "It is damaged."):
                backend.add_tokens([tokenizers.AddedToken(content, **flags)])
        if backend.token_to_id(content) != int(key):
            raise TokenizerError(
                f"{content!r} has id {key} in tokenizer_config.json and {backend.token_to_id(content)} in "
                f"tokenizer.json of {directory}.",
                hint="The two files belong to different models.",
            )


def _token_text(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
