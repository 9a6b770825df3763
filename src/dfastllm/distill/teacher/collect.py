"""From prompts to a distillation set: every question to the teacher, its answer judged, aligned and written.

A run may be cut off anywhere and begun again: what has an answer is not asked again. Answers are written in the order
of the prompts, so that the same answers make the same file however they came.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dfastllm.distill.teacher.align import Student, tool_names
from dfastllm.distill.teacher.answer import Answer
from dfastllm.distill.teacher.budget import Budget, Prices
from dfastllm.distill.teacher.cache import AnswerCache
from dfastllm.distill.teacher.client import Counts, Reply, TeacherClient, rough_tokens
from dfastllm.distill.teacher.clock import SYSTEM, Clock
from dfastllm.distill.teacher.judge import KEEPABLE, rejection
from dfastllm.distill.teacher.ledger import Ledger, head_of, read_answered, rejected_path
from dfastllm.distill.teacher.progress import progress
from dfastllm.distill.teacher.questions import Question, read_questions, row_fields
from dfastllm.distill.teacher.settings import TeacherSettings
from dfastllm.distill.teacher.summary import Summary
from dfastllm.errors import (
    AuthenticationError,
    BudgetError,
    DFastLLMError,
    ModelNotFoundError,
    RateLimitError,
    StorageError,
    TeacherError,
    ValidationError,
)
from dfastllm.text import Tokenizer, chat_prompt

__all__ = ["Teacher", "collect", "fingerprint", "prompt_counter"]

VERSION = 1
# What every further question would meet too.
_FATAL = (AuthenticationError, ModelNotFoundError, RateLimitError, StorageError)


class Teacher(Protocol):
    """Who answers: a server's client, or a model in this process."""

    counts: Counts

    def describe(self) -> dict[str, Any]: ...

    async def ask(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> Reply: ...


def collect(
    prompts: str | Path,
    out: str | Path,
    teacher: TeacherSettings | Teacher,
    tokenizer: Tokenizer,
    *,
    cache: str | Path | None = None,
    limit: int | None = None,
    concurrency: int = 8,
    give_up_after: int = 8,
    deadline: float | None = None,
    keep: Collection[str] = (),
    show: bool = True,
    clock: Clock = SYSTEM,
) -> Summary:
    """Ask the teacher every prompt of a JSONL file that has no answer in `out` yet, the first `limit` of them at most.

    out         JSONL: the fields of the prompt's row, teacher_text, teacher_topk where the teacher's tokens are the
                student's, and metadata.teacher. Rejected answers go to OUT.rejected.jsonl. A row that brings its own
                teacher_text is taken over as it is.
    tokenizer   the student's.
    cache       directory of a server's answers; None: teacher-cache beside `out`.
    concurrency, give_up_after, deadline   of a teacher in this process; a server's are in its settings.
    keep        reasons of `judge.KEEPABLE` that reject no answer here. A cut answer is written as it is; its row says
                so in metadata.teacher.finish_reason, and no data set that adds the end of the text may be made of it.
    show        a progress bar on the terminal, or a line now and then.

    A budget that is spent, a deadline and an interruption (Ctrl-C: what is under way is waited for, a second one does
    not wait) end the run early and are told in the summary. Raises DataError for prompts or an `out` that cannot be
    used, and what ends the run: AuthenticationError, ModelNotFoundError, RateLimitError, StorageError, or TeacherError
    after `give_up_after` questions in a row without an answer. What was answered before is kept in each case.
    """
    out = Path(out)
    if wrong := sorted(set(keep) - KEEPABLE):
        raise ValidationError(
            f"keep must be among {', '.join(sorted(KEEPABLE))}, got {', '.join(wrong)}.", param="keep"
        )
    questions, skipped = read_questions(prompts, limit)
    summary = Summary(out, rejected_path(out), len(questions), skipped)

    if isinstance(teacher, TeacherSettings):
        if not teacher.model and (told := head_of(out).get("teacher")):  # the model that the file was begun with
            teacher = teacher.model_copy(update={"model": str(told.get("model", ""))})
        if out.is_file() and {(one.id, one.digest) for one in questions} <= read_answered(out).done:
            with Ledger(out, _head(teacher.describe(), tokenizer, keep)):  # made so, or refused; no server is needed
                summary.had = len(questions)
                return summary
        kept = AnswerCache(out.parent / "teacher-cache" if cache is None else cache)
        return asyncio.run(_from_server(questions, out, teacher, kept, tokenizer, summary, show, clock, keep))

    run = _Run(questions, tokenizer, summary, teacher, Budget(), concurrency, give_up_after, deadline, clock, keep)
    return asyncio.run(run.go(out, show))


async def _from_server(
    questions: Sequence[Question],
    out: Path,
    settings: TeacherSettings,
    cache: AnswerCache,
    tokenizer: Tokenizer,
    summary: Summary,
    show: bool,
    clock: Clock,
    keep: Collection[str],
) -> Summary:
    prices = Prices(settings.price_prompt, settings.price_completion)
    budget = Budget(settings.budget_tokens, settings.budget_price, prices)
    limits = (settings.concurrency, settings.give_up_after, settings.deadline)
    client = TeacherClient(settings, cache, budget=budget, tokens=prompt_counter(tokenizer), clock=clock)
    async with client:
        await _Run(questions, tokenizer, summary, client, budget, *limits, clock, keep).go(out, show)
    summary.price = prices.of(summary.prompt_tokens, summary.completion_tokens)
    summary.unsettled_tokens, summary.damaged_entries = budget.unsettled, cache.damaged
    return summary


def _head(teacher: Mapping[str, Any], tokenizer: Tokenizer, keep: Collection[str]) -> dict[str, Any]:
    """Of a file of answers: what they follow from."""
    told: dict[str, Any] = {"version": VERSION, "kind": "teacher answers"}
    if keep:
        told["keep"] = sorted(keep)
    return {**told, "teacher": dict(teacher), "tokenizer": fingerprint(tokenizer)}


def fingerprint(tokenizer: Tokenizer) -> str:
    """Of what a tokenizer makes of a text: the beginning of a hash of its tokenizer.json."""
    return hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest()[:16]


def prompt_counter(tokenizer: Tokenizer) -> Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]], int]:
    """Counts a prompt's tokens as the student cuts them: near the teacher's own number, and told before a call."""

    def count(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> int:
        try:
            return len(tokenizer.encode(chat_prompt(tokenizer, messages, tools or None)))
        except DFastLLMError:  # a template that does not read these messages or tools; the teacher's may
            return rough_tokens(messages, tools)

    return count


@dataclass
class _Run:
    """One run in progress.

    ready     lines that wait for those of earlier prompts, by number; None: nothing to write.
    written   prompts that are done, from the first on.
    in_a_row  questions without an answer since the last one with.
    stop      why no further question is asked; fatal: the error that the run ends with.
    """

    questions: Sequence[Question]
    tokenizer: Tokenizer
    summary: Summary
    teacher: Teacher
    budget: Budget
    concurrency: int
    give_up_after: int
    deadline: float | None
    clock: Clock
    keep: Collection[str] = ()
    ready: dict[int, tuple[bool, dict[str, Any]] | None] = field(default_factory=dict)
    written: int = 0
    in_a_row: int = 0
    stop: str | None = None
    fatal: DFastLLMError | None = None
    student: Student = field(init=False)

    async def go(self, out: Path, show: bool) -> Summary:
        self.student = Student(self.tokenizer)
        begun = time.monotonic()
        until = math.inf if self.deadline is None else self.clock.now() + self.deadline
        with (
            Ledger(out, _head(self.teacher.describe(), self.tokenizer, self.keep)) as ledger,
            progress(len(self.questions), show) as shown,
        ):
            self.budget.prompt, self.budget.completion = ledger.answered.prompt, ledger.answered.completion
            numbers = iter(range(len(self.questions)))

            async def work() -> None:
                for at in numbers:
                    if self.clock.now() >= until:
                        self._end(f"deadline: {self.deadline:g} s are over")
                    if self.stop is not None:
                        return
                    self.ready[at] = await self._line(self.questions[at], ledger)
                    try:
                        self._write(ledger)
                    except StorageError as error:
                        self._end(str(error), error)
                    shown(self.written, self.summary)

            await self._all([asyncio.create_task(work()) for _ in range(self.concurrency)])
        if self.fatal is not None:
            raise self.fatal
        return self.summary.finished(self.teacher.counts, self.stop, time.monotonic() - begun)

    def _end(self, why: str, error: DFastLLMError | None = None) -> None:
        """Ask nothing further. The first reason is the one that is told."""
        self.stop, self.fatal = self.stop or why, self.fatal or error

    async def _all(self, workers: Sequence[asyncio.Task[None]]) -> None:
        """Wait for the workers. An interruption lets those finish that are in the middle of a question."""
        try:
            await asyncio.wait(workers)
        except asyncio.CancelledError:
            self._end("interrupted")
            await asyncio.wait(workers)
        for worker in workers:
            worker.result()

    async def _line(self, question: Question, ledger: Ledger) -> tuple[bool, dict[str, Any]] | None:
        """(whether it is learnt from, the line), None where there is nothing to write."""
        if (question.id, question.digest) in ledger.answered.done:
            self.summary.had += 1
            return None
        if question.row.teacher_text:
            self.summary.given += 1
            return True, self._row(question, {}, {"digest": question.digest, "given": True})
        try:
            reply = await self.teacher.ask(question.messages, question.tools)
        except BudgetError as error:
            self._end(str(error))
            return None
        except _FATAL as error:
            self._end(str(error), error)
            return None
        except DFastLLMError as error:
            self._failed(question, error)
            return None
        self.in_a_row = 0
        return self._judged(question, reply)

    def _failed(self, question: Question, error: DFastLLMError) -> None:
        reason = error.reason if isinstance(error, TeacherError) else "refused"
        self.summary.failed[reason] += 1
        self.summary.first_failure.setdefault(reason, f"{question.id}: {error}")
        if reason == "refused" and (self.summary.had or self.summary.accepted):
            return  # of this question: others were answered
        self.in_a_row += 1
        if self.in_a_row >= self.give_up_after:
            last = TeacherError(
                f"The teacher gave no answer to {self.in_a_row} questions in a row, the last: {error}",
                reason=reason,
                hint="All answers so far are kept; the same command goes on where this one ended.",
            )
            self._end(str(last), last)

    def _judged(self, question: Question, reply: Reply) -> tuple[bool, dict[str, Any]]:
        answer, counted = reply.answer, self.summary
        used = answer.prompt_tokens or 0, answer.completion_tokens or 0
        if reply.cached:  # counts as if it were paid now: what is bounded is what the file's answers cost
            self.budget.prompt += used[0]
            self.budget.completion += used[1]
        else:
            counted.prompt_tokens += used[0]
            counted.completion_tokens += used[1]
        about = {
            "key": reply.key,
            "digest": question.digest,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
        }
        text, reason = self._text(question, answer)
        if reason is not None:
            counted.rejected[reason] += 1
            fields = {"reason": reason, "text": text, "calls": [[c.name, c.arguments] for c in answer.calls]}
            return False, {"id": question.id, **fields, "metadata": {"teacher": about}}
        counted.accepted += 1
        given: dict[str, Any] = {"teacher_text": text}
        topk = self.student.topk(answer, text)
        if isinstance(topk, str):
            counted.without_logprobs[topk] += 1
        else:
            counted.with_logprobs += 1
            given["teacher_topk"] = topk
        return True, self._row(question, given, about)

    def _text(self, question: Question, answer: Answer) -> tuple[str, str | None]:
        """The answer in the student's words, and why it is rejected."""
        reason = rejection(answer, tool_names(question.tools), self.keep)
        if reason is not None:
            return answer.content, reason
        text = self.student.text(answer, question.messages, question.tools)
        if text is None:
            return answer.content, "calls_unread"
        if question.tools and self.student.cut_call(text, question.tools):
            return text, "broken_call"
        try:
            self.tokenizer.encode(text)
        except DFastLLMError:
            return text, "not_encodable"
        return text, None

    def _row(self, question: Question, fields: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
        row = {**row_fields(question.row), "id": question.id, **fields}
        row["metadata"] = {**question.row.metadata, "teacher": dict(about)}
        return row

    def _write(self, ledger: Ledger) -> None:
        """Write what is next in the order of the prompts."""
        while self.written in self.ready:
            line = self.ready.pop(self.written)
            self.written += 1
            if line is not None:
                (ledger.accept if line[0] else ledger.reject)(line[1])
