"""Rows of text that a model runs on to be calibrated and measured: the generated task mix, or a user's file.

Every kind of model gets the inputs it will see when it serves: causal rows, canvases with a random share masked, or
blocks with theirs; the training objectives say how, seeded, so the same call gives the same rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dfastllm.errors import UnsupportedError, ValidationError
from dfastllm.models.decoder import Decoder
from dfastllm.tasks import Split, draw
from dfastllm.text import Tokenizer
from dfastllm.train.data import Example, encode
from dfastllm.train.objectives import MaskedDiffusion, Objective, Rows, make_objective

__all__ = ["file_examples", "rows_of", "task_examples"]

OBJECTIVES = {"ar": "causal", "diffusion": "masked_diffusion", "block": "block_diffusion"}
BATCH = 16  # examples of one forward
PIECE = 128  # tokens of a piece of plain text


def task_examples(tokenizer: Tokenizer, split: Split, count: int, seed: int = 0) -> list[Example]:
    """From the whole mix. Raises UnsupportedError for a tokenizer without an end token or a chat template."""
    if tokenizer.eos_id is None:
        raise UnsupportedError(
            "the task mix needs a tokenizer with an end-of-text token.",
            hint="Give your own text with --calibration-file.",
        )
    return [encode(tokenizer, draw(split, seed, index), index) for index in range(count)]


def file_examples(tokenizer: Tokenizer, path: Path, count: int) -> list[Example]:
    """From a text file (cut into pieces), or a .jsonl file whose lines have `text`, `prompt` and `response`, or
    `messages` that end with the assistant's. At most `count`. Raises ValidationError naming the file and the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValidationError(f"calibration file {path} does not exist.", param="calibration_file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValidationError(f"calibration file {path} cannot be read: {error}.", param="calibration_file") from error
    pairs = _json_lines(tokenizer, path, text) if path.suffix == ".jsonl" else _pieces(tokenizer.encode(text))
    found: list[Example] = []
    for prompt, response in pairs:
        found.append(Example(tuple(prompt), tuple(response), len(found)))
        if len(found) == count:
            break
    if not found:
        raise ValidationError(f"calibration file {path} holds no text of two tokens or more.", param="calibration_file")
    return found


def _pieces(tokens: Sequence[int]) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """(first quarter, the rest) of every PIECE tokens."""
    for at in range(0, len(tokens), PIECE):
        piece = tokens[at : at + PIECE]
        if len(piece) >= 2:
            first = max(1, len(piece) // 4)
            yield piece[:first], piece[first:]


def _json_lines(tokenizer: Tokenizer, path: Path, text: str) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValidationError(f"{path}:{number} is not JSON: {error}.", param="calibration_file") from error
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
                    param="calibration_file",
                )


def _answered(tokenizer: Tokenizer, prompt: Sequence[int], response: str) -> tuple[Sequence[int], Sequence[int]]:
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    tokens = [*tokenizer.encode(response, add_special=False), *end]
    return (prompt, tokens) if prompt and tokens else (tokens[:1], tokens[1:] or tokens[:1])


def rows_of(model: Decoder, examples: Sequence[Example], *, seed: int = 0) -> list[Rows]:
    """Forward passes over these examples, in batches of similar length; a model's skeleton will do. Weights of the rows
    sum to 1 in each forward, all tokens of a canvas alike. Raises UnsupportedError when no example fits the context."""
    info = model.info
    if not info.eos_ids and info.kind != "ar":
        raise UnsupportedError(f"{info.name} has no end-of-text id, which fills its canvases.")
    objective = _objective(model)
    fitting = [e for e in examples if objective.cost(e) <= info.max_len and e.length <= info.max_len - 64]
    if not fitting:
        raise UnsupportedError(f"no example is short enough for the context of {info.max_len} tokens.")
    fitting.sort(key=lambda e: (objective.cost(e), e.index))
    generator = torch.Generator().manual_seed(seed)
    found = [objective.rows(fitting[at : at + BATCH], generator) for at in range(0, len(fitting), BATCH)]
    if info.shift and info.kind == "diffusion":
        found = [replace(rows, wanted=rows.wanted - info.shift) for rows in found]  # the row before predicts
    return found


def _objective(model: Decoder) -> Objective:
    if not model.info.eos_ids:
        from dfastllm.train.objectives import Causal

        return Causal(0)
    objective = make_objective(OBJECTIVES[model.info.kind], model, slack=(0,))
    return replace(objective, tail=1.0) if isinstance(objective, MaskedDiffusion) else objective
