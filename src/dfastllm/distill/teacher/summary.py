"""What a run with a teacher did, in counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfastllm.distill.teacher.client import Counts
from dfastllm.distill.teacher.judge import REASONS

__all__ = ["Summary"]


@dataclass
class Summary:
    """out, rejected_to: the files. rows: prompts of the file; skipped: lines of it that are none, by reason.

    had            rows that were answered before this run.
    given          rows that brought their own answer.
    accepted       answers of this run that are learnt from; with_logprobs of them with log-probabilities,
                   without_logprobs by reason without.
    rejected       answers of this run that are not, by reason (`judge.REASONS`).
    failed         rows without an answer, by reason; first_failure: an example of each.
    sent, cached, retried   requests, answers that were in the cache, attempts made again by reason.
    prompt_tokens, completion_tokens, price   paid in this run, by the server's usage; unsettled_tokens: of the budget,
                   for requests whose outcome is unknown.
    damaged_entries   of the cache, asked for again.
    stopped        why the run ended before the last prompt; None: it did not.
    """

    out: Path
    rejected_to: Path
    rows: int
    skipped: Mapping[str, int]
    had: int = 0
    given: int = 0
    accepted: int = 0
    with_logprobs: int = 0
    without_logprobs: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    first_failure: dict[str, str] = field(default_factory=dict)
    sent: int = 0
    cached: int = 0
    retried: Mapping[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    price: float = 0.0
    unsettled_tokens: int = 0
    damaged_entries: int = 0
    seconds: float = 0.0
    stopped: str | None = None

    def finished(self, counts: Counts, stopped: str | None, seconds: float) -> Summary:
        self.sent, self.cached, self.retried = counts.sent, counts.cached, counts.retried
        self.stopped, self.seconds = stopped, round(seconds, 1)
        return self

    def to_json(self) -> dict[str, Any]:
        """For a log: plain values under these names."""
        found = dict(vars(self))
        return {
            name: dict(value) if isinstance(value, Mapping) else str(value) if isinstance(value, Path) else value
            for name, value in found.items()
        }

    def lines(self) -> list[str]:
        """For people."""
        answered = self.had + self.given + self.accepted
        found = [f"{answered} of {self.rows} prompts have an answer in {self.out}"]
        found[0] += f" ({self.had} from before)" if self.had else ""
        asked = f"{self.sent} requests, {self.cached} answers from the cache"
        found.append(asked + _counted(", tried again: ", self.retried))
        if self.accepted:
            found.append(
                f"{self.with_logprobs} answers with log-probabilities" + _counted(", without: ", self.without_logprobs)
            )
        if self.rejected:
            found.append(f"rejected{_counted(': ', self.rejected)}; they are in {self.rejected_to}")
            found += [f"  {reason}: {REASONS[reason]}" for reason in self.rejected]
        if self.failed:
            found.append("no answer" + _counted(": ", self.failed))
            found += [f"  {reason}, for example {example}" for reason, example in self.first_failure.items()]
        if self.skipped:
            found.append("lines that are no prompt" + _counted(": ", self.skipped))
        spent = f"{self.prompt_tokens} tokens read and {self.completion_tokens} written by the teacher"
        found.append(spent + (f", price {self.price:.4g}" if self.price else "") + f", {self.seconds:.1f} s")
        if self.unsettled_tokens:
            found.append(f"{self.unsettled_tokens} tokens of requests whose outcome is unknown are counted as spent")
        if self.damaged_entries:
            found.append(f"{self.damaged_entries} damaged entries of the cache were asked for again")
        if self.stopped is not None:
            found.append(f"ended early: {self.stopped}")
        return found


def _counted(before: str, counts: Mapping[str, int]) -> str:
    rows = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return before + ", ".join(f"{count} {reason}" for reason, count in rows) if rows else ""
