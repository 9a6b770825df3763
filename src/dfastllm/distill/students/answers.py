"""A target's own answers to prompts, made by the engine that serves it and kept on disk, so that a run that was stopped
asks for none twice.

The file is a distillation set (see `distill.data.rows`): an answer that ended by itself is a row's teacher_text, its
tokens are in the row's metadata. One that the limit cut off is a row without teacher_text, which other readers leave
out; a draft learns from its tokens all the same. A row may hold the target's likeliest tokens (teacher_topk).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfastllm.core import FinishReason, SamplingParams
from dfastllm.distill.data.rows import HEADER, Row, RowFile
from dfastllm.distill.students.prompts import Prompt
from dfastllm.errors import DataError, DFastLLMError, StorageError
from dfastllm.llm import LLM, Completion
from dfastllm.text import Tokenizer, chat_prompt

__all__ = ["Answer", "Asking", "answered", "given_answers"]

TOGETHER = 32  # answers made at once, and then written


@dataclass(frozen=True)
class Asking:
    """How answers are made. A file of answers that were made otherwise is refused.

    temperature  0: greedy.
    max_tokens   of an answer; less where the context ends.
    top          likeliest tokens that are kept of each position; 0: none.
    seed         of the draws, with the prompt.
    """

    temperature: float = 0.0
    max_tokens: int = 128
    top: int = 0
    seed: int = 0

    def sampling(self, prompt: Prompt, room: int) -> SamplingParams:
        """room: tokens that the context leaves."""
        return SamplingParams(
            temperature=self.temperature,
            max_tokens=min(self.max_tokens, room),
            seed=int(prompt.key[:12], 16) ^ self.seed,
            logprobs=self.top or None,
        )


@dataclass(frozen=True)
class Answer:
    """One answer in tokens.

    prompt  ids of the rendered conversation.
    ids     of the answer, its end token among them if it ended by itself.
    ended   whether it did.
    top     ids int32 and log-probabilities float32, [len(ids), K] each, -inf where unknown; None: not known at all.
    """

    key: str
    task: str
    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    ended: bool
    top: tuple[Tensor, Tensor] | None = None


def answered(
    llm: LLM,
    prompts: Sequence[Prompt],
    path: Path,
    how: Asking,
    show: Callable[[int, int], None] = lambda done, all: None,
) -> tuple[list[Answer], list[str]]:
    """The model's answers to these prompts, in their order, and what was left out and why. Those that the file has are
    read from it, the others are made and appended, `TOGETHER` at a time.

    show: told how many there are, and of how many. Raises DataError for a file that was made in another way, and
    StorageError where it cannot be written.
    """
    header = {"target": llm.info.name, "vocab_size": llm.info.vocab_size, **vars(how)}
    kept = _read(path, header)
    ends = llm.info.eos_ids
    notes = []
    todo = []
    for prompt in prompts:
        if prompt.key in kept:
            continue
        try:
            ids = llm.render(prompt.messages, prompt.tools or None)
        except DFastLLMError as error:  # messages that this template refuses
            notes.append(f"prompt {prompt.key[:12]}: {error}")
            continue
        room = llm.engine.max_len - len(ids)
        if room < 1:
            notes.append(f"prompt {prompt.key[:12]}: its {len(ids)} tokens fill the context")
            continue
        todo.append((prompt, ids, how.sampling(prompt, room)))
    done = len(prompts) - len(todo) - len(notes)
    total = done + len(todo)
    pending = iter(todo)
    while batch := list(islice(pending, TOGETHER)):
        found = llm.generate([ids for _, ids, _ in batch], [sampling for *_, sampling in batch])
        rows = [_row(prompt, ids, f.outputs[0], ends) for (prompt, ids, _), f in zip(batch, found, strict=True)]
        _append(path, rows, header)
        kept |= {row["metadata"]["key"]: row for row in rows}
        done += len(batch)
        show(done, total)
    return [_answer(kept[prompt.key], prompt.task) for prompt in prompts if prompt.key in kept], notes


def given_answers(tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> tuple[list[Answer], list[str]]:
    """Answers that the prompts' rows gave, as tokens: of the same target, collected elsewhere (over HTTP), with its
    likeliest tokens where the rows have them. One that the row does not call cut is taken to have ended by itself.
    Raises DataError for a tokenizer without an end."""
    if tokenizer.eos_id is None:
        raise DataError("the tokenizer names no token that ends a text.", param="tokenizer")
    answers, notes = [], []
    for prompt in prompts:
        if not prompt.answer.strip():
            notes.append(f"prompt {prompt.key[:12]}: its row has no teacher_text")
            continue
        try:
            ids = tokenizer.encode(chat_prompt(tokenizer, list(prompt.messages), list(prompt.tools) or None))
            said = tokenizer.encode(prompt.answer, parse_special=False)
        except DFastLLMError as error:  # messages that this template refuses
            notes.append(f"prompt {prompt.key[:12]}: {error}")
            continue
        whole = (*said, *(() if prompt.cut else (tokenizer.eos_id,)))
        told = len(prompt.topk) in (len(said), len(whole))  # the end's own entry may be missing
        top = _tensors(prompt.topk, len(whole)) if prompt.topk and told else None
        answers.append(Answer(prompt.key, prompt.task, tuple(ids), whole, not prompt.cut, top))
    return answers, notes


def _row(prompt: Prompt, ids: Sequence[int], found: Completion, ends: Sequence[int]) -> dict[str, Any]:
    ended = found.finish_reason is FinishReason.STOP
    last = [found.stop if isinstance(found.stop, int) else ends[0]] if ended else []
    row: dict[str, Any] = {"id": prompt.key[:16], "task": prompt.task or None, "prompt": list(prompt.messages)}
    if prompt.tools:
        row["tools"] = list(prompt.tools)
    if ended:
        row["teacher_text"] = found.text
    if found.logprobs:
        row["teacher_topk"] = [[[i, round(v, 4)] for i, v in one.top] for one in found.logprobs]
    row["metadata"] = {
        "key": prompt.key,
        "prompt_ids": list(ids),
        "answer_ids": [*found.token_ids, *last],
        "finish_reason": str(found.finish_reason),
    }
    return row


def _answer(row: Mapping[str, Any], task: str) -> Answer:
    data = row["metadata"]
    ids = tuple(data["answer_ids"])
    pairs = row.get("teacher_topk")
    return Answer(
        data["key"],
        task,
        tuple(data["prompt_ids"]),
        ids,
        data["finish_reason"] == "stop",
        None if not pairs else _tensors(pairs, len(ids)),
    )


def _tensors(pairs: Sequence[Sequence[Sequence[Any]]], length: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, pairs))
    ids = torch.zeros(length, width, dtype=torch.int32)
    logprobs = torch.full((length, width), -torch.inf)
    for at, one in enumerate(pairs):
        ids[at, : len(one)] = torch.tensor([i for i, _ in one], dtype=torch.int32)
        logprobs[at, : len(one)] = torch.tensor([v for _, v in one])
    return ids, logprobs


def _read(path: Path, header: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Rows by key. A row that is broken (the run was killed while it was written) is not there."""
    if not path.exists():
        return {}
    file = RowFile(path, needs_text=False)
    rows: dict[str, Mapping[str, Any]] = {row.metadata["key"]: _raw(row) for row in file if "key" in row.metadata}
    if dict(file.header) != dict(header):
        differing = [k for k in header.keys() | file.header.keys() if header.get(k) != file.header.get(k)]
        said = ", ".join(f"{k} {file.header.get(k)!r} (now {header.get(k)!r})" for k in sorted(differing))
        raise DataError(
            f"{path} holds answers that were made with {said}.",
            param="answers",
            hint="Remove the file, or name another directory.",
        )
    return rows


def _raw(row: Row) -> dict[str, Any]:
    return {"metadata": row.metadata, "teacher_topk": row.teacher_topk}


def _append(path: Path, rows: Sequence[Mapping[str, Any]], header: Mapping[str, Any]) -> None:
    """At the end of the file, which begins with the header, and which a killed run may have left in the middle of a
    row."""
    lines = [json.dumps(row) for row in rows]
    try:
        with path.open("ab+") as file:
            size = file.seek(0, 2)
            if size == 0:
                lines.insert(0, json.dumps({HEADER: dict(header)}))
            elif file.seek(size - 1) and file.read(1) != b"\n":
                file.write(b"\n")
            file.write("".join(f"{line}\n" for line in lines).encode())
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}.") from error
