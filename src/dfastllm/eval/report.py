"""Figures of an evaluation, as JSON and as a table of at most 80 columns."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dfastllm.eval.records import Answer
from dfastllm.eval.settings import Setting
from dfastllm.metrics.stats import paired_ratio, wilson

__all__ = ["figures", "results_of", "table_of"]

LEAST = 6  # batches that an interval is shown of
HEAD = ("setting", "accuracy", "forwards", "tok/fwd", "tok/s", "speed")
WIDTH = 80


def figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """Of one setting.

    n, right, accuracy with its 95 % interval (Wilson 1927), by_task;
    forwards per answer, tokens_per_forward, tokens_per_answer (end tokens never counted);
    tokens_per_second: all tokens over the seconds of all batches, prompts included in the time and not in the tokens;
    cut: answers that ended at their token limit.
    """
    right, tokens = sum(answer.right for answer in answers), sum(answer.tokens for answer in answers)
    forwards = sum(answer.forwards for answer in answers)
    seconds = sum({answer.batch: answer.seconds for answer in answers}.values())
    low, high = wilson(right, len(answers))
    tasks = dict.fromkeys(answer.task for answer in answers)
    return {
        "n": len(answers),
        "right": right,
        "accuracy": right / len(answers),
        "interval": [low, high],
        "by_task": {t: statistics.fmean(a.right for a in answers if a.task == t) for t in tasks},
        "forwards": forwards / len(answers),
        "tokens_per_forward": tokens / forwards if forwards else 0.0,
        "tokens_per_answer": tokens / len(answers),
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "cut": sum(answer.finish == "length" for answer in answers),
    }


def results_of(settings: Sequence[Setting], answers: Sequence[Answer], about: Mapping[str, Any]) -> dict[str, Any]:
    """The whole as JSON: `about`, and for each setting its name, options, `figures` and `speed`: tokens a second over
    the baseline's, the median over batches of the same questions with its 95 % interval; None for the baseline and
    where batches do not pair."""
    by_setting = {s.name: [a for a in answers if a.setting == s.name] for s in settings}
    base = _speeds(by_setting[settings[0].name])
    rows = []
    for setting in settings:
        own = _speeds(by_setting[setting.name])
        pairs = [(own[key], base[key]) for key in own if key in base]
        paired = setting is not settings[0] and len(pairs) == len(base) == len(own)
        ratio = paired_ratio([a for a, _ in pairs], [b for _, b in pairs]) if paired else None
        rows.append({
            "name": setting.name,
            "options": setting.options,
            **figures(by_setting[setting.name]),
            "speed": None if ratio is None else asdict(ratio),
        })  # fmt: skip
    return {**about, "settings": rows}


def _speeds(answers: Sequence[Answer]) -> dict[frozenset[str], float]:
    """Tokens a second of each batch, by the questions in it. Batches without tokens tell no speed."""
    batches: dict[int, list[Answer]] = {}
    for answer in answers:
        batches.setdefault(answer.batch, []).append(answer)
    found = {frozenset(a.id for a in some): sum(a.tokens for a in some) / some[0].seconds for some in batches.values()}
    return {key: speed for key, speed in found.items() if speed > 0}


def table_of(results: Mapping[str, Any]) -> str:
    """The table, a line a setting, at most 80 columns: where it would be wider, speeds have no interval."""
    lines = [HEAD, *(_cells(row, interval=True) for row in results["settings"])]
    if _width(lines) > WIDTH:
        lines = [HEAD, *(_cells(row, interval=False) for row in results["settings"])]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    shown = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    return "\n".join([shown[0], "-" * len(shown[0]), *shown[1:]])


def _width(lines: Sequence[Sequence[str]]) -> int:
    return sum(2 + max(len(line[i]) for line in lines) for i in range(len(HEAD))) - 2


def _cells(row: Mapping[str, Any], *, interval: bool) -> tuple[str, ...]:
    low, high = row["interval"]
    speed = row["speed"]
    ratio = "1" if speed is None else f"{speed['median']:.2f}"
    if interval and speed is not None and speed["n"] >= LEAST:
        ratio += f" ({speed['low']:.2f}-{speed['high']:.2f})"
    return (
        row["name"],
        f"{row['accuracy']:.1%} ({100 * low:.0f}-{100 * high:.0f})",
        f"{row['forwards']:.1f}",
        f"{row['tokens_per_forward']:.2f}",
        f"{row['tokens_per_second']:,.0f}",
        ratio,
    )
