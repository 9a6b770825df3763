"""Prompts that a draft is aligned on: the user's own, from files of JSON lines, and which of them are held out.

A file is a distillation set's (see `distill.data.rows`): rows with a prompt, and tools, a task and an answer where they
have them. What `dfastllm serve --record-prompts FILE` writes is such a file; the older half that it keeps beside it,
FILE.1, is read with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfastllm.distill.data.rows import RowFile
from dfastllm.errors import DataError, ValidationError

__all__ = ["Prompt", "Prompts", "read_prompts"]

OLDER = ".1"  # what the server's recording appends to the name of its older half


@dataclass(frozen=True)
class Prompt:
    """One conversation up to the assistant's turn.

    key       a hash of messages and tools: equal conversations are one prompt.
    messages  in OpenAI's form.
    tools     OpenAI's tool objects.
    task      a word for groups of a report; "" where the row had none.
    answer    what the row gave as the teacher's answer; "" where it gave none.
    cut       that answer reached the limit of its length: it did not end there (metadata.teacher says so).
    topk      the teacher's likeliest tokens at each token of the answer, (id, log-probability) each; () where the row
              has none.
    """

    key: str
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    task: str = ""
    answer: str = ""
    cut: bool = False
    topk: Sequence[Sequence[tuple[int, float]]] = ()

    @property
    def draw(self) -> float:
        """A number in [0, 1) that follows from the conversation alone: it decides who is held out."""
        return int(self.key[:16], 16) / 16**16


@dataclass(frozen=True)
class Prompts:
    """What the files hold. notes: what was left out, a sentence each."""

    train: tuple[Prompt, ...]
    held: tuple[Prompt, ...]
    notes: tuple[str, ...] = field(default=())


def read_prompts(paths: Sequence[str | Path], held_out: float) -> Prompts:
    """Every prompt of the files once, in their order. held_out: share that is not trained on; which ones follows from
    each prompt alone, so that one that was held out once stays so when there are more.

    Raises DataError for a file that cannot be read, and where one of the two parts is empty; ValidationError for a
    share outside (0, 1).
    """
    if not 0 < held_out < 1:
        raise ValidationError(f"held_out must be inside (0, 1), got {held_out}.", param="held_out")
    found: dict[str, Prompt] = {}
    notes = []
    for path in _with_older(paths):
        rows = RowFile(path, needs_text=False)
        doubles = 0
        for row in rows:
            messages = tuple(row.messages)
            prompt = Prompt(
                _key(messages, row.tools),
                messages,
                row.tools,
                row.task or "",
                row.teacher_text,
                _is_cut(row.metadata),
                row.teacher_topk or (),
            )
            doubles += prompt.key in found
            found.setdefault(prompt.key, prompt)
        if doubles:
            notes.append(f"{path}: {doubles} prompts are there more than once")
        if rows.skips.counts:
            notes.append(f"{path}: left out {rows.skips}")
    train = tuple(prompt for prompt in found.values() if prompt.draw >= held_out)
    held = tuple(prompt for prompt in found.values() if prompt.draw < held_out)
    if not train or not held:
        raise DataError(
            f"{', '.join(map(str, paths))}: {len(train)} prompts to train on and {len(held)} held out; both are needed"
            f"{''.join(f'; {note}' for note in notes)}.",
            param="prompts",
            hint="Collect more prompts, or change the share that is held out.",
        )
    return Prompts(train, held, tuple(notes))


def _is_cut(metadata: Mapping[str, Any]) -> bool:
    teacher = metadata.get("teacher")
    return isinstance(teacher, Mapping) and teacher.get("finish_reason") == "length"


def _with_older(paths: Sequence[str | Path]) -> list[Path]:
    listed = [Path(path) for path in paths]
    older = [path.with_name(path.name + OLDER) for path in listed]
    pairs = zip(older, listed, strict=True)
    return [each for old, new in pairs for each in (old, new) if each is new or (old.is_file() and old not in listed)]


def _key(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> str:
    blob = json.dumps([list(messages), list(tools)], sort_keys=True).encode()
    return hashlib.sha256(blob).hexdigest()
