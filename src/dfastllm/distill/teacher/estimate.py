"""What a run will cost, told before the first call: tokens that will be read, written, and their price.

The prompts are counted as the student cuts them. How long answers will be nobody knows before: it is the mean of the
answers that are there, where there are any, else of the texts that the rows expect; else the most that max_tokens
allows stands for it. `basis` says which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from dfastllm.distill.teacher.budget import Prices
from dfastllm.distill.teacher.cache import AnswerCache, request_key
from dfastllm.distill.teacher.collect import prompt_counter
from dfastllm.distill.teacher.ledger import Answered, head_of, read_answered
from dfastllm.distill.teacher.questions import Question
from dfastllm.distill.teacher.settings import TeacherSettings
from dfastllm.text import Tokenizer

__all__ = ["Estimate", "estimate"]


@dataclass(frozen=True)
class Estimate:
    """rows: prompts; had: with an answer in the file or one of their own; cached: with one in the cache; to_ask: the
    others.

    prompt_tokens     of the rows to ask.
    completion_tokens expected of them; most_completion_tokens: at most (max_tokens each).
    basis             what completion_tokens rests on.
    price, most_price in the currency of the settings; None: they name no price.
    seconds           at least, by the limits of requests and tokens a minute; None: no limits.
    within_budget     whether the expected cost fits what the budget leaves; None: no budget.
    """

    rows: int
    had: int
    cached: int
    to_ask: int
    prompt_tokens: int
    completion_tokens: int
    most_completion_tokens: int
    basis: str
    price: float | None
    most_price: float | None
    seconds: float | None
    within_budget: bool | None

    def lines(self) -> list[str]:
        """For people."""
        found = [
            f"{self.to_ask} of {self.rows} prompts are to be asked ({self.had} have an answer, {self.cached} are in "
            "the cache)",
            f"the teacher will read {self.prompt_tokens:,} tokens and write about {self.completion_tokens:,} "
            f"({self.basis}), {self.most_completion_tokens:,} at most",
        ]
        if self.price is not None and self.most_price is not None:
            found.append(f"price about {self.price:.4g}, {self.most_price:.4g} at most")
        if self.seconds is not None:
            found.append(f"{self.seconds:,.0f} s at least, by the limits of the server")
        if self.within_budget is not None:
            found.append("within the budget" if self.within_budget else "MORE THAN THE BUDGET: the run will end early")
        return found


def estimate(
    questions: Sequence[Question],
    settings: TeacherSettings,
    tokenizer: Tokenizer,
    *,
    out: str | Path | None = None,
    cache: str | Path | None = None,
) -> Estimate:
    """What asking these questions will cost beyond what is in the file `out` and the directory `cache` (None:
    teacher-cache beside `out`, where there is one). Asks nothing and writes nothing."""
    there = Answered() if out is None else read_answered(Path(out))
    if cache is None and out is not None:
        cache = Path(out).parent / "teacher-cache"
    kept = None if cache is None else AnswerCache(cache)
    model = settings.model or ("" if out is None else str(head_of(Path(out)).get("teacher", {}).get("model", "")))
    count = prompt_counter(tokenizer)
    had = cached = prompt = asked = 0
    expected: list[int] = []
    for question in questions:
        if question.row.teacher_text or (question.id, question.digest) in there.done:
            had += 1
            continue
        key = request_key(model, question.messages, question.tools, settings.params)
        if kept is not None and kept.path(key).is_file():
            cached += 1
            continue
        asked += 1
        prompt += count(question.messages, question.tools)
        if isinstance(question.row.expected, str):
            expected.append(len(tokenizer.encode(question.row.expected)))
    each, basis = _length(there.lengths, expected, settings.max_tokens)
    completion, most = round(each * asked), settings.max_tokens * asked
    prices = Prices(settings.price_prompt, settings.price_completion)
    priced = bool(settings.price_prompt or settings.price_completion)
    seconds = [
        60 * used / limit
        for used, limit in (
            (asked, settings.requests_per_minute),
            (prompt + completion, settings.tokens_per_minute),
        )
        if limit is not None
    ]
    total = there.prompt + prompt, there.completion + completion
    fits = None
    if settings.budget_tokens is not None or settings.budget_price is not None:
        fits = settings.budget_tokens is None or sum(total) <= settings.budget_tokens
        fits = fits and (settings.budget_price is None or prices.of(*total) <= settings.budget_price)
    return Estimate(
        rows=len(questions),
        had=had,
        cached=cached,
        to_ask=asked,
        prompt_tokens=prompt,
        completion_tokens=completion,
        most_completion_tokens=most,
        basis=basis,
        price=prices.of(prompt, completion) if priced else None,
        most_price=prices.of(prompt, most) if priced else None,
        seconds=max(seconds, default=None),
        within_budget=fits,
    )


def _length(answered: Sequence[int], expected: Sequence[int], most: int) -> tuple[float, str]:
    """Tokens of an answer to come, and what that rests on."""
    if answered:
        return min(most, fmean(answered)), f"as the {len(answered)} answers that are there"
    if expected:
        return min(most, fmean(expected) + 1), f"as the {len(expected)} answers that the rows expect"
    return most, "no answer is known yet: max_tokens each"
