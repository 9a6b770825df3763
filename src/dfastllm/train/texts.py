"""A user's own text as examples: prompts with answers, conversations, or plain text cut into pieces."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from dfastllm.errors import ValidationError
from dfastllm.text import Tokenizer
from dfastllm.train.data import Example

__all__ = ["file_examples"]

PIECE = 128  # tokens of a piece of plain text


def file_examples(tokenizer: Tokenizer, path: Path, count: int, param: str) -> list[Example]:
    """From a text file (cut into pieces), or a .jsonl file whose lines have `text`, `prompt` and `response`, or
    `messages` that end with the assistant's. At most `count`. param: the option
    that names the file. Raises ValidationError naming the file and the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValidationError(f"{path} does not exist.", param=param) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValidationError(f"{path} cannot be read: {error}.", param=param) from error
    pairs = _json_lines(tokenizer, path, text, param) if path.suffix == ".jsonl" else _pieces(tokenizer.encode(text))
    found: list[Example] = []
    for prompt, response in pairs:
        found.append(Example(tuple(prompt), tuple(response), len(found)))
        if len(found) == count:
            break
    if not found:
        raise ValidationError(f"{path} holds no text of two tokens or more.", param=param)
    return found


def _pieces(tokens: Sequence[int]) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """(first quarter, the rest) of every PIECE tokens."""
    for at in range(0, len(tokens), PIECE):
        piece = tokens[at : at + PIECE]
        if len(piece) >= 2:
            first = max(1, len(piece) // 4)
            yield piece[:first], piece[first:]


def _json_lines(
    tokenizer: Tokenizer, path: Path, text: str, param: str
) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValidationError(f"{path}:{number} is not JSON: {error}.", param=param) from error
        match value:
            case {"text": str(plain)}:
                yield from _pieces(tokenizer.encode(plain))
            case {"prompt": str(prompt), "response": str(response)}:
                yield _answered(tokenizer, tokenizer.encode(prompt), response)
            case {"messages": [*before, {"role": "assistant", "content": str(response)}]} if before:
                yield _answered(tokenizer, tokenizer.encode(tokenizer.apply_chat_template(before)), response)
            case _:
                raise ValidationError(
                    f"{path}:{number} must be an object with text, prompt and response, or messages that end with the "
                    f"assistant's, got {line:.60}.",
                    param=param,
                )


def _answered(tokenizer: Tokenizer, prompt: Sequence[int], response: str) -> tuple[Sequence[int], Sequence[int]]:
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    tokens = [*tokenizer.encode(response, add_special=False), *end]
    return (prompt, tokens) if prompt and tokens else (tokens[:1], tokens[1:] or tokens[:1])
