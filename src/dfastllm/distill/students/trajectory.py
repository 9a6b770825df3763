"""Trajectories: answers of a canvas model with the step at which each position was decided, as the engine decoded them.

They are recorded from the engine's own canvas updates, kept as JSONL of token ids, and give the states that a student
learns from: the canvas as it stood when so many tokens of a window were decided (pseudo-trajectory distillation, Qian
et al. 2025, d3LLM: the order is the teacher's, the tokens are the answer's). What is asked of a state, and how it
weighs, is `certainty`'s business.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfastllm.core import DecodeParams, FinishReason, SamplingParams, StepEvent
from dfastllm.distill.data.rows import HEADER, Row
from dfastllm.engine import Stream
from dfastllm.errors import DataError, UnsupportedError, ValidationError
from dfastllm.llm import LLM
from dfastllm.tasks import GRADERS
from dfastllm.text.tokenizer import Tokenizer

__all__ = [
    "Question",
    "Recording",
    "Trajectory",
    "Transcript",
    "masked_state",
    "question_of",
    "read_trajectories",
    "record",
    "window_size",
    "write_trajectories",
]

VERSION = 1
UNKNOWN = 1 << 30  # the step of a position that no recording reached: later than every other


@dataclass(frozen=True)
class Question:
    """A prompt to record an answer to.

    id        of the sample, unique in a set.
    prompt    token ids up to the assistant's turn.
    grader    a name in `tasks.GRADERS`, or None: every answer is kept.
    expected  what the grader compares with.
    truth     token ids of a right answer with its end token, or () where none is known.
    """

    id: str
    task: str
    prompt: tuple[int, ...]
    grader: str | None = None
    expected: Any = None
    truth: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trajectory:
    """An answer and when each position of its canvas was decided.

    answer    token ids, the end token last.
    steps     for each position of the recorded canvas the step that decided it, counted from 0 over the steps that
              decided anything; it may be longer than the answer. () where the order is not known.
    forwards  of the model, prefill included; 0 where nothing was decoded.
    """

    id: str
    task: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    steps: tuple[int, ...]
    forwards: int = 0


@dataclass
class Recording:
    """What a recording gave. counts: right, ungraded, replaced (by the truth), wrong, unfinished."""

    trajectories: list[Trajectory] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


class Transcript:
    """The canvas of one request as its events tell it: what stands where, and since which step."""

    def __init__(self) -> None:
        self.fixed: dict[int, int] = {}
        self.steps: dict[int, int] = {}
        self.tokens: list[int] = []
        self.text = ""
        self.count = 0  # steps so far that decided anything

    def absorb(self, event: StepEvent) -> None:
        """Take in the next event of the request."""
        self.text += event.text
        self.tokens += event.token_ids
        update = event.canvas
        if update is None or not (update.commit or update.revise):
            return
        update.apply(self.fixed)
        for position in (*update.commit, *update.revise):
            if position in self.fixed:
                self.steps[position] = self.count
            else:  # masked again
                self.steps.pop(position, None)
        self.count += 1


def question_of(row: Row, tokenizer: Tokenizer, number: int) -> Question:
    """The question of a row of a distillation set; its teacher_text, where it has one, is the truth."""
    prompt = tokenizer.encode(tokenizer.apply_chat_template(row.messages, row.tools or None))
    assert tokenizer.eos_id is not None  # the loop refuses a tokenizer without one
    truth = (*tokenizer.encode(row.teacher_text), tokenizer.eos_id) if row.teacher_text else ()
    return Question(row.id or f"row/{number}", row.task or "", tuple(prompt), row.grader, row.expected, truth)


def record(
    llm: LLM,
    questions: Iterable[Question],
    *,
    decode: Mapping[str, Any],
    max_tokens: int,
    wrong: str = "drop",
    together: int = 32,
) -> Recording:
    """Answers of a canvas model, greedy, with their order.

    decode: options of its decoder. wrong: "drop" an answer that its grader refuses, or take the "truth" in its place,
    whose order is not known. An answer that did not end within max_tokens counts as unfinished and is treated as a
    wrong one. together: requests in flight. Raises UnsupportedError for an autoregressive model, which has no canvas,
    and what the engine raises."""
    if llm.info.kind == "ar":
        raise UnsupportedError(
            f"{llm.info.name} is autoregressive: it decides tokens from left to right and has no trajectory.",
            param="kd.trajectory",
            hint="Choose a masked-diffusion or block-diffusion model.",
        )
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    params = DecodeParams(**decode) if decode else None
    done = Recording()
    coming = iter(questions)
    while part := list(islice(coming, together)):
        streams = [llm.submit(question.prompt, sampling, params) for question in part]
        for question, stream in zip(part, streams, strict=True):
            reason, found = _judged(question, stream)
            if found is None and wrong == "truth" and question.truth:
                reason, found = "replaced", Trajectory(question.id, question.task, question.prompt, question.truth, ())
            done.counts[reason] += 1
            if found is not None:
                done.trajectories.append(found)
    return done


def _judged(question: Question, stream: Stream) -> tuple[str, Trajectory | None]:
    """What became of one request, and its trajectory where the answer counts."""
    transcript = Transcript()
    for event in stream:
        transcript.absorb(event)
        end = event.finish
    assert end is not None  # a stream ends with it, or raises
    if end.reason is not FinishReason.STOP or not isinstance(end.stop, int):
        return "unfinished", None
    if question.grader is not None and not GRADERS[question.grader](transcript.text, question.expected):
        return "wrong", None
    answer = (*transcript.tokens, end.stop)
    length = max(transcript.steps) + 1
    steps = tuple(transcript.steps.get(position, UNKNOWN) for position in range(length))
    found = Trajectory(question.id, question.task, question.prompt, answer, steps, end.usage.forwards)
    return "ungraded" if question.grader is None else "right", found


# ---- files -----------------------------------------------------------------------------------------------------------


def write_trajectories(path: Path, trajectories: Sequence[Trajectory], about: Mapping[str, Any]) -> None:
    """A JSONL file, whole or not at all: a header that says how they were made (`about`), then a line for each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with part.open("w", encoding="utf-8") as file:
        file.write(json.dumps({HEADER: {"kind": "trajectories", "version": VERSION, **about}}) + "\n")
        for one in trajectories:
            row = {"id": one.id, "task": one.task, "prompt": one.prompt, "answer": one.answer, "steps": one.steps}
            file.write(json.dumps({**row, "forwards": one.forwards}) + "\n")
    part.replace(path)


def read_trajectories(path: Path, vocabulary: int) -> tuple[dict[str, Any], list[Trajectory]]:
    """The header and the trajectories of a file. vocabulary: ids of the model that shall learn them. Raises DataError
    for a file that cannot be read, a line that is no trajectory, an id outside of the vocabulary, or none at all."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.", param="kd.trajectory.file") from error
    header: dict[str, Any] = {}
    found = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            if number == 1 and isinstance(value, dict) and HEADER in value:
                header = dict(value[HEADER])
                continue
            found.append(_checked(value, vocabulary))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(
                f"{path}, line {number} is no trajectory: {error!r:.120}.",
                param="kd.trajectory.file",
                hint="Let the run record them anew, by leaving the key out.",
            ) from error
    if not found:
        raise DataError(f"{path} holds no trajectory.", param="kd.trajectory.file")
    return header, found


def _checked(value: Any, vocabulary: int) -> Trajectory:
    lists = {name: tuple(value[name]) for name in ("prompt", "answer", "steps")}
    for name, numbers in lists.items():
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"{name} must hold integers of at least 0")
    ids = (*lists["prompt"], *lists["answer"])
    if not lists["answer"] or max(ids) >= vocabulary:
        raise ValueError(f"ids must be below {vocabulary}, and an answer hold at least one")
    if lists["steps"] and len(lists["steps"]) < len(lists["answer"]):
        raise ValueError("steps must be as many as the answer's tokens, or none")
    return Trajectory(str(value["id"]), str(value["task"]), **lists, forwards=int(value["forwards"]))


# ---- states ----------------------------------------------------------------------------------------------------------


def window_size(windows: Sequence[int], progress: float) -> int:
    """Tokens of the window when this share of the run is done (d3LLM's progressive window): in part i of n equal parts
    of the run it grows linearly from the i-th size to the next; in the last part it is the last size."""
    if not windows:
        raise ValidationError("windows must name at least one size.", param="kd.trajectory.windows")
    at = progress * len(windows)
    part = min(int(at), len(windows) - 1)
    if part == len(windows) - 1:
        return windows[-1]
    return int(windows[part] + (at - part) * (windows[part + 1] - windows[part]))


def masked_state(steps: Sequence[int], share: float, order: str, generator: torch.Generator) -> Tensor:
    """bool [n]: which of n positions are masked in the state that hides this share of them.

    order "teacher": int((1 - share) * n) positions are shown, those that were decided first (d3LLM); positions of one
    step, or of no known order (all equal), in random order. "random": each position is masked with probability `share`
    (dParallel). steps: of each position."""
    count = len(steps)
    noise = torch.rand(count, generator=generator, dtype=torch.float64)
    if order == "random":
        return noise < share
    shown = int((1 - share) * count)
    masked = torch.ones(count, dtype=torch.bool)
    ranked = sorted(range(count), key=lambda i: (steps[i], noise[i].item()))
    masked[ranked[:shown]] = False
    return masked
