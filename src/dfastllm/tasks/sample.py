"""A sample, how it is split, and how it is drawn."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["SPLITS", "Draft", "Maker", "Sample", "Split", "pick_split"]

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
HELD_OUT = 0.04  # share of the parameter space of each of validation and test


@dataclass(frozen=True)
class Sample:
    """One exchange with a checkable answer.

    messages: the chat up to the assistant's turn. tools: OpenAI tool objects, or (). response: the assistant's text
    that is trained on. expected: what the grader compares with (its type is the grader's business). grader: a name in
    `graders.GRADERS`, or None for open text. key: the template parameters that decided the split.
    """

    task: str
    messages: tuple[Mapping[str, Any], ...]
    response: str
    expected: Any
    grader: str | None
    key: tuple[Any, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Draft:
    """What a task's maker returns: a sample before its split is known. `key` holds the parameters that make it new:
    two drafts of one task with equal keys ask the same thing, perhaps in other words."""

    key: tuple[Any, ...]
    prompt: str
    response: str
    expected: Any
    grader: str | None
    tools: tuple[Mapping[str, Any], ...] = ()
    before: Sequence[Mapping[str, Any]] = ()  # messages after the user's prompt (tool calls and results)


Maker = Callable[[random.Random], Draft]


def pick_split(task: str, key: tuple[Any, ...]) -> Split:
    """The split that owns these parameters: a hash of them alone, so no parameters are ever in two splits."""
    blob = json.dumps([task, key], sort_keys=True, ensure_ascii=False).encode()
    part = int.from_bytes(hashlib.sha256(blob).digest()[:8], "big") / 2**64
    if part < HELD_OUT:
        return "test"
    return "validation" if part < 2 * HELD_OUT else "train"
