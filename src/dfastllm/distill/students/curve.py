"""Accuracy against tokens per forward of canvas models, along the dials of their decoders, on held-out samples.

`python -m dfastllm.distill.students.curve MODEL [MODEL ...] [--tasks mix|long|NAME,NAME] [--n 300] [--json FILE]`

The first model is the one that the others are compared with: for each of its points, the quickest point of another
whose accuracy is shown to be equal (`distill.paired`). Such a point was chosen among several, so `--again SEED`
measures the chosen pairs once more on other samples. `--levels .95,.96` compares the curves at these accuracies,
between points.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dfastllm.core import DecodeParams
from dfastllm.distill.evaluate import evaluate_student, held_out
from dfastllm.distill.paired import equal_accuracy
from dfastllm.distill.students.levels import levels_of
from dfastllm.llm import LLM
from dfastllm.metrics.evaluation import Row
from dfastllm.metrics.records import write_record
from dfastllm.metrics.stats import bootstrap_ratio
from dfastllm.tasks import LONG, Sample

__all__ = ["DIALS", "Pair", "Point", "again", "curve", "main", "measure", "quickest_equal"]

DIALS: tuple[Mapping[str, Any], ...] = (
    {"rule": "schedule"},
    *({"threshold": at} for at in (0.99, 0.95, 0.9, 0.8, 0.7, 0.5)),
    *({"factor": at} for at in (0.25, 0.5, 1.0, 2.0)),
)


@dataclass(frozen=True)
class Point:
    """One setting of a decoder.

    setting      its options as JSON.
    exact_match  share of right answers.
    tokens       of an answer on average, its end not counted.
    forwards     of the model for an answer, on average.
    rows         of the samples, for paired comparisons.
    """

    setting: str
    exact_match: float
    tokens: float
    forwards: float
    rows: tuple[Row, ...]

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / self.forwards

    @property
    def by_task(self) -> dict[str, float]:
        """Share of right answers of each task."""
        marks: dict[str, list[bool]] = {}
        for row in self.rows:
            marks.setdefault(row.task, []).append(row.right)
        return {task: sum(right) / len(right) for task, right in marks.items()}

    def record(self) -> dict[str, Any]:
        """Its figures, without the rows."""
        named = ("setting", "exact_match", "tokens", "forwards", "tokens_per_forward", "by_task")
        return {name: getattr(self, name) for name in named}


@dataclass(frozen=True)
class Pair:
    """A setting of the first model, and the quickest one of another that is as accurate; both as JSON."""

    before: str
    after: str


def measure(llm: LLM, samples: Sequence[Sample], decode: Mapping[str, Any], max_tokens: int) -> Point:
    """Greedy answers to samples with a grader by a decoder of these options; {}: the model's own."""
    params = DecodeParams(**decode) if decode else None
    rows = evaluate_student(llm, samples, max_tokens=max_tokens, decode=params).rows
    count = len(rows)
    return Point(
        json.dumps(dict(decode)),
        sum(row.right for row in rows) / count,
        sum(row.tokens for row in rows) / count,
        sum(row.forwards for row in rows) / count,
        tuple(rows),
    )


def curve(
    llm: LLM, samples: Sequence[Sample], max_tokens: int, dials: Sequence[Mapping[str, Any]] = DIALS
) -> Iterator[Point]:
    """A point for each setting."""
    for decode in dials:
        yield measure(llm, samples, decode, max_tokens)


def quickest_equal(before: Point, after: Sequence[Point], margin: float = 0.01, alpha: float = 0.05) -> Point | None:
    """The point of most tokens per forward whose accuracy is shown to be at most `margin` below that of `before`."""
    equal = [p for p in after if equal_accuracy(before.rows, p.rows, margin=margin, alpha=alpha, least=1).equal]
    return max(equal, key=lambda point: point.tokens_per_forward, default=None)


def again(first: LLM, other: LLM, pairs: Sequence[Pair], samples: Sequence[Sample], max_tokens: int) -> list[Any]:
    """Chosen pairs on samples that had no part in the choice: equality, and the ratio of tokens per forward with its
    95 % interval over pairs of answers. A record for each."""
    points = {
        (side, setting): measure(llm, samples, json.loads(setting), max_tokens)
        for side, llm in (("before", first), ("after", other))
        for setting in dict.fromkeys(getattr(pair, side) for pair in pairs)
    }
    found = []
    for pair in pairs:
        before, after = points["before", pair.before], points["after", pair.after]
        ratio = bootstrap_ratio(_counted(after), _counted(before), lambda values: _per_forward(values.sum(axis=-2)))
        equality = asdict(equal_accuracy(before.rows, after.rows))
        figures = {"tokens_per_forward": asdict(ratio), "equality": equality}
        found.append({**asdict(pair), **figures, "points": [before.record(), after.record()]})
    return found


def _counted(point: Point) -> list[tuple[int, int]]:
    return [(row.tokens, row.forwards) for row in point.rows]


def _per_forward(totals: Any) -> Any:
    return totals[..., 0] / totals[..., 1]


def _line(point: Point) -> str:
    return (
        f"{point.setting:24} {point.exact_match:7.1%} {point.tokens_per_forward:7.2f} tokens per forward, "
        f"{point.forwards:6.2f} forwards, {point.tokens:5.1f} tokens an answer"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dfastllm.distill.students.curve", description="Accuracy against tokens per forward."
    )
    parser.add_argument("models", nargs="+", help="shipped models or directories; the first is compared with")
    parser.add_argument("--tasks", default="mix", help="mix, long, or names with commas between")
    parser.add_argument("--n", type=int, default=300, help="samples of the test split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, help="64, or 128 for the long tasks")
    parser.add_argument("--dials", help="a JSON list of decoder options in place of the standard ones")
    parser.add_argument("--levels", default="", help="accuracies to compare at, between points: 0.95,0.96")
    parser.add_argument("--again", type=int, help="measure the chosen pairs once more on samples of this seed")
    parser.add_argument("--json", type=Path, help="also write a record here")
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    tasks = {"mix": None, "long": list(LONG)}.get(args.tasks, args.tasks.split(","))
    samples = held_out(args.n, args.seed, tasks)
    most = args.max_tokens or (64 if tasks is None else 128)
    dials = DIALS if args.dials is None else json.loads(args.dials)
    found: dict[str, list[Point]] = {}
    for name in args.models:
        print(f"{name}: {args.n} samples of {args.tasks}, canvas {most}", flush=True)
        found[name] = []
        with LLM(name) as llm:
            for point in curve(llm, samples, most, dials):
                found[name].append(point)
                print("  " + _line(point), flush=True)
    fresh = None if args.again is None else held_out(args.n, args.again, tasks)
    levels = [float(level) for level in args.levels.split(",") if level]
    compared = {name: _compared(args.models[0], name, found, levels, fresh, most) for name in args.models[1:]}
    if args.json is not None:
        points = {name: [point.record() for point in points] for name, points in found.items()}
        asked = {"tasks": args.tasks, "samples": args.n, "seed": args.seed, "again": args.again, "max_tokens": most}
        command = shlex.join(["python", "-m", "dfastllm.distill.students.curve", *sys.argv[1:]])
        results = {"curves": points, "against": {args.models[0]: compared}}
        write_record(args.json, "distillation: accuracy against tokens per forward", results, command=command, **asked)


def _compared(
    first: str,
    name: str,
    found: Mapping[str, Sequence[Point]],
    levels: Sequence[float],
    fresh: Sequence[Sample] | None,
    max_tokens: int,
) -> dict[str, Any]:
    """Of a model against the first one, for the record; said in lines too."""
    pairs = []
    for before in found[first]:
        after = quickest_equal(before, found[name])
        told = "no equal point" if after is None else f"{after.setting} gives {_ratio(after, before):.2f} x"
        print(f"{name} against {first} {before.setting}: {told}")
        if after is not None:
            pairs.append(Pair(before.setting, after.setting))
    at = levels_of([p.rows for p in found[first]], [p.rows for p in found[name]], levels) if levels else []
    for one in at:
        told = "not reached" if one.ratio is None else f"{one.ratio:.2f} x ({one.low:.2f} to {one.high:.2f})"
        print(f"at {one.level:.1%}: {told}")
    anew: list[Any] = []
    if fresh is not None and pairs:
        with LLM(first) as left, LLM(name) as right:
            anew = again(left, right, pairs, fresh, max_tokens)
    for one in anew:
        ratio, equal = one["tokens_per_forward"], one["equality"]
        told = f"{ratio['median']:.2f} x ({ratio['low']:.2f} to {ratio['high']:.2f})"
        print(f"again, {one['after']} against {one['before']}: {told}, {equal['reason'] or 'equal'}", flush=True)
    return {"pairs": [asdict(pair) for pair in pairs], "levels": [asdict(one) for one in at], "again": anew}


def _ratio(after: Point, before: Point) -> float:
    return after.tokens_per_forward / before.tokens_per_forward


if __name__ == "__main__":
    main()
