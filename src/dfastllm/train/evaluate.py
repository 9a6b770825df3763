"""Held-out accuracy of a model, measured through the engine that serves it.

`python -m dfastllm.train.evaluate MODEL [--split test] [--per-task 100] [--share 0.5] [--json FILE]`
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dfastllm.core import Cache, DecodeParams, SamplingParams
from dfastllm.llm import LLM
from dfastllm.metrics.evaluation import evaluate as answered
from dfastllm.tasks import MIXED, SPLITS, Split, draw

__all__ = ["Result", "evaluate"]


@dataclass(frozen=True)
class Result:
    """accuracy: share of right answers per task; total: over all. forwards: of the model per answer, on average;
    tokens_per_forward: tokens of the answers (no end tokens) over all forwards. wrong: (prompt, got, wanted)."""

    model: str
    split: Split
    per_task: int
    decode: str
    accuracy: dict[str, float]
    total: float
    forwards: float
    tokens_per_forward: float
    seconds: float
    wrong: list[tuple[str, str, str]]


def evaluate(
    model: str | Path | LLM,
    *,
    split: Split = "test",
    per_task: int = 100,
    seed: int = 0,
    share: float = 1.0,
    max_tokens: int = 64,
    tasks: Sequence[str] | None = None,
    dtype: str | None = None,
) -> Result:
    """Greedy answers to `per_task` samples of each of `tasks`, or of each gradable one of the default mix. model: a
    name, a directory, or one that is loaded already (`dtype` is not read then, and it stays open). Canvas models: the
    fixed schedule, low confidence, blocks of 32 (or the model's own), `share` x max_tokens steps over the canvas: 1.0
    is one token a step, 0.5 two."""
    begun = time.monotonic()
    picked = [task for task in (tasks or MIXED) if task != "prose"]
    samples = [draw(split, seed, i, task) for task in picked for i in range(per_task)]
    opened = contextlib.nullcontext(model) if isinstance(model, LLM) else LLM(model, dtype=dtype)
    with opened as llm:
        decode, words = None, "greedy"
        if llm.info.kind != "ar":
            block = llm.info.block or 32
            cache: Cache | None = "none" if llm.info.kind == "diffusion" else None
            steps = int(max_tokens * share)
            decode = DecodeParams(rule="schedule", steps=steps, block_length=block, cache=cache)
            words = f"schedule, {steps} steps for {max_tokens} tokens"
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        found = answered(llm, samples, sampling, decode, words=words)
    return Result(
        model=found.model,
        split=split,
        per_task=per_task,
        decode=found.decode,
        accuracy=found.by_task,
        total=found.exact_match,
        forwards=sum(row.forwards for row in found.rows) / len(found.rows),
        tokens_per_forward=found.tokens_per_forward,
        seconds=round(time.monotonic() - begun, 1),
        wrong=[
            (sample.messages[-1]["content"], row.text, sample.response)
            for sample, row in zip(samples, found.rows, strict=True)
            if not row.right
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dfastllm.train.evaluate", description="Held-out accuracy.")
    parser.add_argument("model", help="a shipped model's name or a directory")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--per-task", type=int, default=100)
    parser.add_argument("--share", type=float, default=1.0, help="denoise steps per canvas token")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--dtype", help="load in this dtype; default: the checkpoint's")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--show", type=int, default=3, help="wrong answers to print")
    args = parser.parse_args()
    result = evaluate(
        args.model,
        split=args.split,
        per_task=args.per_task,
        share=args.share,
        max_tokens=args.max_tokens,
        dtype=args.dtype,
    )
    for task, accuracy in result.accuracy.items():
        print(f"{task:12} {accuracy:.1%}")
    print(
        f"{'all':12} {result.total:.1%}   {result.decode}; {result.forwards:.1f} forwards an answer, "
        f"{result.tokens_per_forward:.2f} tokens per forward, {result.seconds} s"
    )
    for prompt, got, wanted in result.wrong[: args.show]:
        print(f"  {prompt!r}\n    got {got!r}\n    want {wanted!r}")
    if args.json:
        args.json.write_text(json.dumps(asdict(result), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
