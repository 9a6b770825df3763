"""From timed answers to figures: latencies, throughput, goodput, accuracy, speculation, equality."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from dfastllm.bench.suite.client import Answer
from dfastllm.bench.suite.schema import (
    Accuracy,
    Equality,
    Figures,
    Forwards,
    Latency,
    Output,
    Speculation,
    Speed,
)
from dfastllm.bench.suite.workloads import Prompt
from dfastllm.errors import ValidationError
from dfastllm.metrics.stats import wilson
from dfastllm.metrics.tool_schemas import CallFinder
from dfastllm.text import ToolCall

__all__ = [
    "Measured",
    "block_seconds",
    "equal",
    "figures",
    "first_call",
    "gaps",
    "latency",
    "spec_counts",
    "token_gaps",
]

POINTS = tuple(range(0, 101, 5))  # percentiles of a distribution that is drawn


@dataclass(frozen=True)
class Measured:
    """An answer with its question. baseline: the baseline's answer to the same question, for equality."""

    prompt: Prompt
    answer: Answer
    round: int = 0
    baseline: Answer | None = None


def latency(seconds: Iterable[float | None]) -> Latency | None:
    """Statistics in ms of the values that there are; None for none of them."""
    values = np.asarray([s for s in seconds if s is not None and math.isfinite(s)], dtype=np.float64) * 1e3
    if not len(values):
        return None
    p50, p90, p95, p99 = (float(p) for p in np.percentile(values, (50, 90, 95, 99)))
    return Latency(
        mean=float(values.mean()),
        median=p50,
        std=float(values.std()),
        p50=p50,
        p90=p90,
        p95=p95,
        p99=p99,
        n=len(values),
    )


def gaps(answer: Answer) -> list[float]:
    """Seconds between one chunk with content and the next."""
    return [b.at - a.at for a, b in pairwise(answer.chunks)]


def token_gaps(answer: Answer) -> list[float]:
    """Seconds between tokens: a chunk of m tokens counts the gap before it / m, m times. Empty where the tokens of a
    chunk are not known: neither told by the server nor certain because there are as many chunks as tokens."""
    chunks = [chunk for chunk in answer.chunks if chunk.tokens != 0]
    tokens = [chunk.tokens for chunk in chunks]
    if len(tokens) == answer.completion_tokens and answer.tokens_source == "usage":
        tokens = [1] * len(tokens)
    found: list[float] = []
    for (before, after), count in zip(pairwise(chunks), tokens[1:], strict=True):
        if count is None:
            return []
        found += [(after.at - before.at) / count] * count
    return found


def block_seconds(answer: Answer, block: int | None) -> list[float]:
    """Seconds per block of `block` tokens: from the send to the chunk that completes the first, then from end to end;
    the last one may be shorter. Empty without a block length or without the tokens of each chunk."""
    if not block or not answer.chunks or any(chunk.tokens is None for chunk in answer.chunks):
        return []
    total = sum(chunk.tokens or 0 for chunk in answer.chunks)
    ends: list[float] = []
    seen = 0
    for chunk in answer.chunks:
        seen += chunk.tokens or 0
        while len(ends) < seen // block:
            ends.append(chunk.at)
    if total % block:
        ends.append(answer.chunks[-1].at)
    return [b - a for a, b in pairwise([0.0, *ends])]


def first_call(prompt: Prompt, answer: Answer) -> float | None:
    """Seconds to the first complete call that fits the schema of a tool of the question: one that the server parsed, or
    one in the text of a server that parses none. None when there is none."""
    try:
        finder = CallFinder(prompt.tools or None)
        if answer.call_at is not None:
            call = answer.tool_calls[0]
            if finder.fits(ToolCall(call["name"], call["arguments"])):
                return answer.call_at
        start = 0
        for chunk in answer.chunks:
            if finder.push(answer.text[start : start + chunk.characters]) is not None:
                return chunk.at
            start += chunk.characters
    except (ValidationError, ValueError):  # a schema that cannot be used, arguments that are no JSON
        pass
    return None


def figures(
    measured: Sequence[Measured],
    duration: float,
    *,
    slo: Mapping[str, float] | None = None,
    block: int | None = None,
    counters: Speculation | None = None,
) -> Figures:
    """Everything there is to say about these answers. duration: seconds they took in all. slo: ttft, tpot, e2el in ms.
    block: tokens per block of a diffusion model. counters: speculation by /metrics, used where answers tell none."""
    good = [m for m in measured if m.answer.ok]
    answers = [m.answer for m in good]
    return Figures(
        speed=_speed(measured, good, duration, slo or {}, block),
        output=_output(answers),
        accuracy=_accuracy(good),
        speculation=_speculation(answers) or counters,
        forwards=_forwards(answers),
        exactness=dict(Counter(str(a.vendor["exactness"]) for a in answers if a.vendor and a.vendor.get("exactness"))),
        equality=_equality(good),
    )


def _speed(
    measured: Sequence[Measured], good: Sequence[Measured], duration: float, slo: Mapping[str, float], block: int | None
) -> Speed:
    answers = [m.answer for m in good]
    series: dict[str, list[float | None]] = {
        "ttft": [a.first for a in answers],
        "tpot": [a.tpot for a in answers],
        "itl": [gap for a in answers for gap in token_gaps(a)],
        "e2el": [a.e2e for a in answers],
        "icl": [gap for a in answers for gap in gaps(a)],
        "block": [seconds for a in answers for seconds in block_seconds(a, block)],
        "ttfa": [first_call(m.prompt, m.answer) for m in good if m.prompt.wants_call],
    }
    found = {name: made for name, values in series.items() if (made := latency(values)) is not None}
    counted = [a for a in answers if a.completion_tokens is not None]
    known = len(counted) == len(answers) and bool(answers)
    output = sum(a.completion_tokens or 0 for a in counted) if known else None
    prompts = [a.prompt_tokens for a in answers if a.prompt_tokens is not None]
    prompt = sum(prompts) if len(prompts) == len(answers) and answers else None
    sources = {a.tokens_source for a in answers} or {"none"}
    source = sources.pop() if len(sources) == 1 else "mixed"
    span = max(duration, 1e-9)
    return Speed(
        requests=len(good),
        errors=len(measured) - len(good),
        error_kinds=dict(Counter(m.answer.error or "" for m in measured if not m.answer.ok)),
        duration=duration,
        prompt_tokens=prompt,
        output_tokens=output,
        tokens_source=source,
        request_throughput=len(good) / span,
        output_throughput=output / span if output is not None else None,
        total_token_throughput=(output + prompt) / span if output is not None and prompt is not None else None,
        request_goodput=sum(_meets(a, slo) for a in answers) / span if slo else None,
        user_tps=_user_tps(answers),
        cdf={name: _cdf(series[name]) for name in ("ttft", "tpot", "icl", "e2el") if name in found},
        **found,
    )


def _cdf(values: Sequence[float | None]) -> tuple[float, ...]:
    array = np.asarray([v for v in values if v is not None], dtype=np.float64) * 1e3
    return tuple(round(float(q), 4) for q in np.percentile(array, POINTS))


def _user_tps(answers: Sequence[Answer]) -> float | None:
    rates = []
    for a in answers:
        n, first, last = a.completion_tokens, a.first, a.last
        if n is not None and n > 1 and first is not None and last is not None and last > first:
            rates.append((n - 1) / (last - first))
    return float(np.median(rates)) if rates else None


def _meets(answer: Answer, slo: Mapping[str, float]) -> bool:
    """Within every limit. A one-token answer has no tpot and meets that one."""
    got = {"ttft": answer.first, "tpot": answer.tpot if answer.tpot is not None else 0.0, "e2el": answer.e2e}
    return all((value := got[name]) is not None and value * 1e3 <= limit for name, limit in slo.items())


def _output(answers: Sequence[Answer]) -> Output:
    tokens = [a.completion_tokens for a in answers if a.completion_tokens is not None]
    return Output(
        mean_tokens=float(np.mean(tokens)) if tokens else None,
        mean_characters=float(np.mean([len(a.graded) for a in answers])) if answers else 0.0,
        empty=sum(not a.graded.strip() for a in answers),
        repetition=float(np.mean([_repetition(a.text) for a in answers])) if answers else 0.0,
        finish_reasons=dict(Counter(a.finish_reason or "none" for a in answers)),
    )


def _repetition(text: str) -> float:
    """Share of word 4-grams that occurred before in the same text."""
    words = text.split()
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _accuracy(good: Sequence[Measured]) -> Accuracy | None:
    """A question that was asked in several rounds counts once, by its first answer: repeating it proves nothing new."""
    seen: dict[str, bool] = {}
    for m in good:
        if m.prompt.grader is not None and m.prompt.id not in seen:
            seen[m.prompt.id] = bool(m.prompt.grade(m.answer.graded))
    if not seen:
        return None
    correct, n = sum(seen.values()), len(seen)
    low, high = wilson(correct, n)
    return Accuracy(n=n, correct=correct, value=correct / n, low=low, high=high)


def _speculation(answers: Sequence[Answer]) -> Speculation | None:
    """Summed over answers that tell; None when none does, or when nothing was drafted."""
    told = [a.vendor for a in answers if a.vendor and a.vendor.get("drafts")]
    if not told:
        return None
    positions: list[int] = []
    for vendor in told:
        counts = [int(count) for count in vendor.get("accepted_per_position") or ()]
        positions += [0] * (len(counts) - len(positions))
        for i, count in enumerate(counts):
            positions[i] += count
    return spec_counts(
        sum(int(v["drafts"]) for v in told),
        sum(int(v.get("draft_tokens") or 0) for v in told),
        sum(int(v.get("accepted_tokens") or 0) for v in told),
        positions,
        "response",
    )


def spec_counts(
    drafts: int, tokens: int, accepted: int, positions: Sequence[int], source: Literal["response", "metrics"]
) -> Speculation:
    return Speculation(
        num_drafts=drafts,
        num_draft_tokens=tokens,
        num_accepted_tokens=accepted,
        accepted_per_position=tuple(positions),
        acceptance_rate=accepted / tokens if tokens else None,
        acceptance_length=1 + accepted / drafts if drafts else None,
        source=source,
    )


def _forwards(answers: Sequence[Answer]) -> Forwards | None:
    told = [(int(a.vendor["nfe"]), a.completion_tokens) for a in answers if a.vendor and a.vendor.get("nfe")]
    if not told or any(tokens is None for _, tokens in told):
        return None
    nfe = sum(n for n, _ in told)
    return Forwards(nfe=nfe / len(told), tokens_per_forward=sum(tokens or 0 for _, tokens in told) / nfe)


def equal(a: Answer, b: Answer) -> tuple[bool, bool]:
    """(whether two answers are the same, whether that was told by token ids rather than by text)."""
    if a.token_ids is not None and b.token_ids is not None:
        return a.token_ids == b.token_ids, True
    return a.graded == b.graded, False


def _equality(good: Sequence[Measured]) -> Equality | None:
    pairs = [equal(m.answer, m.baseline) for m in good if m.baseline is not None and m.baseline.ok]
    if not pairs:
        return None
    by_tokens = all(tokens for _, tokens in pairs)
    return Equality(compared=len(pairs), equal=sum(same for same, _ in pairs), by="tokens" if by_tokens else "text")
