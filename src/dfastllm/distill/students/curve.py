"""Accuracy against tokens per forward of canvas models, along the dials of their decoders, on held-out samples.

`python -m dfastllm.distill.students.curve MODEL [MODEL ...] [--tasks mix|long|NAME,NAME] [--n 300] [--json FILE]`

The first model is the one that the others are compared with: for each of its points, the quickest point of another
whose accuracy is shown to be equal (`distill.paired`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfastllm.core import DecodeParams
from dfastllm.distill.evaluate import evaluate_student, held_out
from dfastllm.distill.paired import equal_accuracy
from dfastllm.llm import LLM
from dfastllm.metrics.evaluation import Row
from dfastllm.tasks import LONG, Sample

__all__ = ["DIALS", "Point", "curve", "main", "measure", "quickest_equal"]

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

    def record(self) -> dict[str, Any]:
        """Its figures, without the rows."""
        named = ("setting", "exact_match", "tokens", "forwards", "tokens_per_forward")
        return {name: getattr(self, name) for name in named}


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


def _line(point: Point) -> str:
    return (
        f"{point.setting:24} {point.exact_match:7.1%} {point.tokens_per_forward:7.2f} tokens per forward, "
        f"{point.forwards:6.2f} forwards, {point.tokens:5.1f} tokens an answer"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dfastllm.distill.students.curve", description="Accuracy against tokens per forward."
    )
    parser.add_argument("models", nargs="+", help="shipped models or directories; the first is compared with")
    parser.add_argument("--tasks", default="mix", help="mix, long, or names with commas between")
    parser.add_argument("--n", type=int, default=300, help="samples of the test split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, help="64, or 128 for the long tasks")
    parser.add_argument("--dials", help="a JSON list of decoder options in place of the standard ones")
    parser.add_argument("--json", type=Path, help="also write the points here")
    args = parser.parse_args()
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
    for name in args.models[1:]:
        for before in found[args.models[0]]:
            after = quickest_equal(before, found[name])
            told = "no equal point" if after is None else f"{after.setting} gives {_ratio(after, before):.2f} x"
            print(f"{name} against {args.models[0]} {before.setting}: {told}")
    if args.json is not None:
        about = {"tasks": args.tasks, "samples": args.n, "seed": args.seed, "max_tokens": most}
        points = {name: [point.record() for point in points] for name, points in found.items()}
        args.json.write_text(json.dumps({**about, "models": points}, indent=1) + "\n")


def _ratio(after: Point, before: Point) -> float:
    return after.tokens_per_forward / before.tokens_per_forward


if __name__ == "__main__":
    main()
