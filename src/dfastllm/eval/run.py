"""Asking: batch after batch, each under every setting in turn, so that a slow moment of the machine meets all alike."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfastllm.core import SamplingParams
from dfastllm.errors import ValidationError
from dfastllm.eval.questions import Question
from dfastllm.eval.records import Answer, opened_records
from dfastllm.eval.settings import Setting
from dfastllm.llm import LLM, Completion
from dfastllm.metrics.workload import call_tokens, complete

__all__ = ["Plan", "evaluate", "fingerprint"]

Progress = Callable[[int, int, str], None]  # (answers there, answers in all, the setting at work)


@dataclass(frozen=True)
class Plan:
    """What is asked and how.

    questions  each with an id of its own.
    settings   see `settings.grid`; the first is the baseline.
    sampling   of every answer.
    batch      questions in flight at once.
    raw        continue `Question.raw`, without a chat template.
    about      what else tells this run from others: the data's name and hash, the seed. JSON.
    """

    questions: Sequence[Question]
    settings: Sequence[Setting]
    sampling: SamplingParams
    batch: int = 8
    raw: bool = False
    about: dict[str, Any] = field(default_factory=dict)


def fingerprint(path: Path) -> str:
    """What tells one checkpoint from another: names, sizes and times of its files."""
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    told = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def evaluate(
    llm: LLM, plan: Plan, out: Path, *, restart: bool = False, progress: Progress = lambda *_: None
) -> list[Answer]:
    """Ask what is not answered yet, and return all answers, in the order of settings and questions. Raises
    ValidationError for no questions, ids that are there twice and a batch below 1, what `opened_records` raises, and
    what the engine raises for what it cannot honour."""
    ids = [question.id for question in plan.questions]
    if not ids or len(set(ids)) != len(ids):
        raise ValidationError(
            f"an evaluation needs questions with an id each, got {len(ids)} with {len(set(ids))} ids.", param="data"
        )
    if plan.batch < 1:
        raise ValidationError(f"batch must be at least 1, got {plan.batch}.", param="batch")
    run = {
        "model": llm.info.name,
        "questions": hashlib.sha256(repr([(q.id, q.raw) for q in plan.questions]).encode()).hexdigest()[:16],
        "max_tokens": plan.sampling.max_tokens,
        "temperature": plan.sampling.temperature,
        "raw": plan.raw,
        **plan.about,
    }
    with opened_records(out, run, restart=restart) as records:
        total = len(ids) * len(plan.settings)
        names = {setting.name for setting in plan.settings}
        there = sum(answer.setting in names and answer.id in set(ids) for answer in records.answers)
        left = {s.name: [q for q in plan.questions if q.id not in records.done(s.name)] for s in plan.settings}
        numbers = {s.name: 1 + max((a.batch for a in records.answers if a.setting == s.name), default=0)
                   for s in plan.settings}  # fmt: skip
        if (first := next((some[0] for some in left.values() if some), None)) is not None:
            _ask(llm, plan, plan.settings[0], [first], 0)  # what a process does once is no part of a speed
        turn = 0
        while any(left.values()):
            for at in range(len(plan.settings)):
                setting = plan.settings[(at + turn) % len(plan.settings)]
                some, left[setting.name] = left[setting.name][: plan.batch], left[setting.name][plan.batch :]
                if not some:
                    continue
                progress(there, total, setting.name)
                records.add(_ask(llm, plan, setting, some, numbers[setting.name]))
                numbers[setting.name] += 1
                there += len(some)
            turn += 1
        progress(there, total, "done")
        place = {name: i for i, name in enumerate(setting.name for setting in plan.settings)}
        order = {name: i for i, name in enumerate(ids)}
        kept = [answer for answer in records.answers if answer.setting in place and answer.id in order]
        return sorted(kept, key=lambda answer: (place[answer.setting], order[answer.id]))


def _ask(llm: LLM, plan: Plan, setting: Setting, questions: Sequence[Question], batch: int) -> list[Answer]:
    """One batch, timed without its grading."""
    done: list[Completion]
    if plan.raw:
        began = time.perf_counter()
        prompts = [llm.encode(question.raw) for question in questions]
        outputs = llm.generate(prompts, plan.sampling, setting.decode, shown=call_tokens(llm.tokenizer))
        done, seconds = [output.outputs[0] for output in outputs], time.perf_counter() - began
    else:
        done, seconds = complete(llm, [question.sample for question in questions], plan.sampling, setting.decode)
    return [
        Answer(
            setting=setting.name,
            id=question.id,
            task=question.task,
            right=question.grade(completion.text),
            tokens=completion.usage.completion_tokens,
            forwards=completion.usage.forwards,
            finish=str(completion.finish_reason),
            batch=batch,
            size=len(questions),
            seconds=seconds,
            text=completion.text,
        )
        for question, completion in zip(questions, done, strict=True)
    ]
