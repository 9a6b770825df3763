"""A student against its baseline on the same held-out samples: equal accuracy or not, and how much faster.

`python -m dfastllm.distill.compare STUDENT BASELINE --n 1000`

Both are asked through the engine that serves them, greedily. Speed is counted, not timed: tokens of an answer, tokens
until a tool call is there, tokens per forward. A ratio is student over baseline, its 95 % interval resamples pairs, so
on the same samples a busy machine changes nothing. Exit code: 0 equal accuracy, 1 not shown, 2 what could not be asked.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from dfastllm.core import DecodeParams
from dfastllm.distill.evaluate import evaluate_student, held_out, read_samples
from dfastllm.distill.paired import LEAST_PAIRS, Equality, equal_accuracy, pair
from dfastllm.errors import DFastLLMError, ValidationError
from dfastllm.llm import LLM
from dfastllm.metrics.evaluation import Evaluation, Row
from dfastllm.metrics.records import write_record
from dfastllm.metrics.stats import Ratio, bootstrap_ratio
from dfastllm.tasks import Sample

__all__ = ["Comparison", "compare_students", "main", "show", "verdict"]

Values = NDArray[np.float64]
WIDTH = 80


@dataclass(frozen=True)
class Comparison:
    """baseline, student: their evaluations on the same samples.

    equality  whether the student is as accurate.
    ratios    student over baseline: median_tokens, all_tokens (the sums) and ttfa_tokens (the median where both called)
              are better below 1, tokens_per_forward above. A ratio without samples is left out.
    drift     for each shape that was given: the student's accuracy less the baseline's on the samples of that shape.
    """

    baseline: Evaluation
    student: Evaluation
    equality: Equality
    ratios: Mapping[str, Ratio]
    drift: Mapping[int, float]

    def record(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            "equality": asdict(self.equality),
            "ratios": {name: asdict(ratio) for name, ratio in self.ratios.items()},
            "drift_by_shape": {str(shape): value for shape, value in self.drift.items()},
            "student": self.student.record(),
            "baseline": self.baseline.record(),
        }


def compare_students(
    baseline: Evaluation,
    student: Evaluation,
    *,
    margin: float = 0.01,
    alpha: float = 0.05,
    least: int = LEAST_PAIRS,
    shapes: Sequence[int] = (),
) -> Comparison:
    """Two evaluations of the same samples (see `paired.equal_accuracy` for margin, alpha, least). shapes: enumerated
    shapes to tell the drift of. Raises ValidationError where the samples are not the same."""
    equality = equal_accuracy(baseline.rows, student.rows, margin=margin, alpha=alpha, least=least)
    pairs = pair(baseline.rows, student.rows)
    called = [(a, b) for a, b in pairs if _came(a) and _came(b)]
    ratios = {
        "median_tokens": _ratio(pairs, lambda row: (row.tokens,), _median),
        "all_tokens": _ratio(pairs, lambda row: (row.tokens,), _sum),
        "ttfa_tokens": _ratio(called, lambda row: (row.ttfa_tokens or 0.0,), _median),
        "tokens_per_forward": _ratio(pairs, lambda row: (row.tokens, row.forwards), _quotient),
    }
    drift = {}
    if shapes:
        before = baseline.by_shape(shapes)
        drift = {shape: one.accuracy - before[shape].accuracy for shape, one in student.by_shape(shapes).items()}
    return Comparison(baseline, student, equality, {k: v for k, v in ratios.items() if v is not None}, drift)


def _came(row: Row) -> bool:
    return row.ttfa_tokens is not None and math.isfinite(row.ttfa_tokens)


def _median(values: Values) -> Values:
    return np.asarray(np.median(values[..., 0], axis=-1))


def _sum(values: Values) -> Values:
    return np.asarray(values[..., 0].sum(axis=-1))


def _quotient(values: Values) -> Values:
    totals = values.sum(axis=-2)
    return np.asarray(totals[..., 0] / totals[..., 1])


def _ratio(
    pairs: Sequence[tuple[Row, Row]],
    figures: Callable[[Row], Sequence[float]],
    statistic: Callable[[Values], Values],
) -> Ratio | None:
    """None where there is nothing to divide by."""
    if not pairs:
        return None
    before, after = ([figures(rows[side]) for rows in pairs] for side in (0, 1))
    if not float(statistic(np.asarray(before, dtype=np.float64))) > 0:
        return None
    return bootstrap_ratio(after, before, statistic)


def show(found: Comparison, console: Console) -> None:
    """The table of a comparison and its verdict, at most 80 columns wide."""
    table = Table("", "baseline", "student", "ratio, 95 % interval", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    before, after = found.baseline.summary(), found.student.summary()
    for name, label in _SHARES:
        if before[name] is not None or after[name] is not None:
            table.add_row(label, _percent(before[name]), _percent(after[name]), "")
    sums = [float(sum(row.tokens for row in side.rows)) for side in (found.baseline, found.student)]
    before, after = before | {"all_tokens": sums[0]}, after | {"all_tokens": sums[1]}
    for name, label in _COUNTS:
        if before[name] is not None or after[name] is not None:
            ratio = found.ratios.get(name)
            shown = "" if ratio is None else f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
            table.add_row(label, _number(before[name]), _number(after[name]), shown)
    console.print(table)
    for shape, value in found.drift.items():
        console.print(f"shape {shape}: accuracy {100 * value:+.1f} points", highlight=False)
    console.print(verdict(found.equality), highlight=False)


def verdict(found: Equality) -> str:
    """Whether accuracy is equal, in two lines."""
    word = "equal accuracy" if found.equal else "equal accuracy is not shown"
    why = f": {found.reason}" if found.reason else ""
    return (
        f"{word}{why}\n{found.n} pairs, {found.lost} lost and {found.gained} gained:"
        f" {100 * found.difference:+.2f} points, at least {100 * found.lower:+.2f}"
        f" (one-sided {100 * (1 - found.alpha):g} %)"
    )


_SHARES = (
    ("exact_match", "right answers"),
    ("tool_name_accuracy", "right tool"),
    ("argument_exact_match", "right arguments"),
    ("json_validity", "valid JSON"),
    ("completeness", "required fields"),
    ("false_call_rate", "false calls"),
    ("ttfa_hit_rate", "calls that came"),
)
_COUNTS = (
    ("median_tokens", "median tokens"),
    ("all_tokens", "tokens in all"),
    ("teacher_median_tokens", "teacher's median"),
    ("ttfa_tokens", "TTFA, tokens"),
    ("ttfa_excess_tokens", "TTFA excess, tokens"),
    ("forwards", "forwards an answer"),
    ("tokens_per_forward", "tokens per forward"),
)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"


def _samples(args: argparse.Namespace) -> tuple[Sequence[Sample], Sequence[str] | None]:
    if args.data is None:
        return held_out(args.n, args.seed, args.tasks.split(",") if args.tasks else None), None
    if args.tasks:
        raise ValidationError("--tasks chooses from the task mix; leave it out beside --data.", param="tasks")
    found = read_samples(args.data, args.n)
    if found.skips.counts:
        print(f"rows that cannot be asked: {found.skips}", file=sys.stderr)
    return found.samples, found.ids


def _decode(text: str | None, name: str) -> DecodeParams | None:
    if text is None:
        return None
    try:
        return DecodeParams(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise ValidationError(f"{name} must be decoder options as JSON, got {text!r}: {error}", param=name) from error


def _shapes(text: str | None) -> list[int]:
    try:
        return [int(word) for word in text.split(",")] if text else []
    except ValueError:
        raise ValidationError(
            f"shapes is a list of lengths with commas between, got {text!r}.", param="shapes"
        ) from None


def _run(args: argparse.Namespace) -> Comparison:
    if args.n < 1:
        raise ValidationError(f"n must be at least 1, got {args.n}.", param="n")
    shapes = _shapes(args.shapes)
    samples, ids = _samples(args)
    roles = ("baseline", "student")
    decodes = [_decode(getattr(args, f"{role}_decode") or args.decode, "decode") for role in roles]
    found = {}
    for role, model, decode in zip(roles, (args.baseline, args.student), decodes, strict=True):
        with LLM(model, device=args.device, quantization=args.quantization) as llm:
            found[role] = evaluate_student(llm, samples, max_tokens=args.max_tokens, decode=decode, ids=ids)
    return compare_students(
        found["baseline"],
        found["student"],
        margin=args.margin,
        alpha=args.alpha,
        shapes=shapes,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dfastllm.distill.compare", description="A student against its baseline, on the same samples."
    )
    parser.add_argument("student", help="a shipped model's name, a directory or a GGUF file")
    parser.add_argument("baseline", help="the same: what the student is held against")
    parser.add_argument("--n", type=int, default=LEAST_PAIRS, help="held-out samples, default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--tasks", help="of the task mix, with commas between; default: the graded ones")
    parser.add_argument("--data", type=Path, help="ask the rows of this distillation set instead")
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer, default %(default)s")
    parser.add_argument("--decode", help='decoder options of both as JSON, such as \'{"rule": "factor"}\'')
    parser.add_argument("--student-decode", help="of the student alone")
    parser.add_argument("--baseline-decode", help="of the baseline alone")
    parser.add_argument("--quantization", help="serve both quantised so")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--margin", type=float, default=0.01, help="loss of accuracy that counts as none")
    parser.add_argument("--alpha", type=float, default=0.05, help="of the one-sided bound")
    parser.add_argument("--shapes", help="enumerated shapes to tell the drift of, with commas between")
    parser.add_argument("--json", type=Path, help="also write all of it here")
    args = parser.parse_args(argv)
    try:
        found = _run(args)
    except DFastLLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(found, Console(width=WIDTH, highlight=False))
    if args.json:
        context = {name: str(value) for name, value in vars(args).items() if value is not None and name != "json"}
        write_record(args.json, "comparison", found.record(), arguments=context)
    return 0 if found.equality.equal else 1


if __name__ == "__main__":
    sys.exit(main())
