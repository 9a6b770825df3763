"""A distillation set from the task mix, so that a first run needs no download: prompts, tools, what is expected, who
grades it, and an answer.

    python -m dfastllm.distill.data.generate OUT.jsonl --n 4000 --seed 0 --split train [--style plain|verbose]

A pure function of its arguments. Splits share no template parameters (`dfastllm.tasks`), and no set asks the same
thing twice.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from dfastllm.distill.data.rows import write_rows
from dfastllm.distill.data.wordy import wordy
from dfastllm.errors import DataError, DFastLLMError, ValidationError
from dfastllm.tasks import SPLITS, TASKS, Sample, Split, draw

__all__ = ["STYLES", "Style", "distinct_samples", "draw_sample", "generate", "row_of"]

Style = Literal["plain", "verbose"]
STYLES: tuple[Style, ...] = get_args(Style)
VERSION = 1  # of what the same arguments give
_TRIES = 30  # draws for each sample that is new, before a set counts as exhausted


def draw_sample(
    split: Split,
    seed: int,
    index: int,
    *,
    style: Style = "plain",
    brief: float = 0.0,
    task: str | None = None,
    mix: Mapping[str, float] | None = None,
) -> Sample:
    """The index-th sample of this split's stream, as `tasks.draw`, in this style: `verbose` has words before the
    answer, but for a share of `brief`, and a grader that takes both. Raises ValidationError for a style or a share that
    there is not, and as `tasks.shares`."""
    if style not in STYLES:
        raise ValidationError(f"style must be {' or '.join(STYLES)}, got {style!r}.", param="style")
    if not 0 <= brief <= 1:
        raise ValidationError(f"brief must be a share from 0 to 1, got {brief!r}.", param="brief")
    sample = draw(split, seed, index, task, mix)
    if style == "plain":
        return sample
    return wordy(sample, random.Random(f"wordy/{split}/{seed}/{index}/{task}"), brief=brief)


def distinct_samples(
    n: int,
    *,
    split: Split = "train",
    seed: int = 0,
    style: Style = "plain",
    brief: float = 0.0,
    tasks: Sequence[str] = (),
    mix: Mapping[str, float] | None = None,
) -> Iterator[tuple[int, Sample]]:
    """`n` samples that ask different things, each with its index in the stream. tasks: these in turn, in place of the
    mix. Raises ValidationError as `draw_sample`, and DataError where the split has too few that differ."""
    if n < 1:
        raise ValidationError(f"n must be at least 1, got {n!r}.", param="n")
    if split not in SPLITS:
        raise ValidationError(f"split must be one of {', '.join(SPLITS)}, got {split!r}.", param="split")
    if tasks and mix:
        raise ValidationError("tasks and mix both say what is drawn.", param="tasks", hint="Give one of them.")
    for name in tasks:
        if name not in TASKS:
            raise ValidationError(f"there is no task {name!r}; there are {', '.join(TASKS)}.", param="tasks")
    seen: set[str] = set()
    for index in range(_TRIES * n + 1000):
        task = tasks[index % len(tasks)] if tasks else None
        sample = draw_sample(split, seed, index, style=style, brief=brief, task=task, mix=mix)
        asked = json.dumps([sample.messages, sample.tools], sort_keys=True)
        if asked in seen:
            continue
        seen.add(asked)
        yield index, sample
        if len(seen) == n:
            return
    raise DataError(
        f"only {len(seen)} samples of split {split} ask different things, {n} were wanted.",
        param="n",
        hint="Ask for fewer, or for more tasks.",
    )


def row_of(sample: Sample, id: str, *, answer: bool = True) -> dict[str, Any]:
    """The sample as a line of a set. answer: with the sample's response as teacher_text; without it, the line is a
    prompt for a teacher."""
    row: dict[str, Any] = {"id": id, "source": "dfastllm.tasks", "task": sample.task, "prompt": list(sample.messages)}
    if sample.tools:
        row["tools"] = list(sample.tools)
    if sample.grader is not None:
        row |= {"expected": sample.expected, "grader": sample.grader}
    if answer:
        row["teacher_text"] = sample.response
    return row


def generate(
    out: str | Path,
    n: int,
    *,
    split: Split = "train",
    seed: int = 0,
    style: Style = "plain",
    brief: float = 0.0,
    tasks: Sequence[str] = (),
    mix: Mapping[str, float] | None = None,
    prompts_only: bool = False,
    force: bool = False,
) -> int:
    """Write a set of `n` rows and return `n`. prompts_only: no answers, for a teacher to give. The others: see
    `distinct_samples` and `write_rows`, and what they raise."""
    made = {"split": split, "seed": seed, "rows": n, "style": style, "brief": brief, "prompts_only": prompts_only}
    chosen = {"tasks": list(tasks)} if tasks else {"mix": dict(mix or {})}
    header = {"made_by": "dfastllm.distill.data.generate", "version": VERSION, **made, **chosen}
    samples = distinct_samples(n, split=split, seed=seed, style=style, brief=brief, tasks=tasks, mix=mix)
    rows = (row_of(sample, f"tasks/{split}/{seed}/{index}", answer=not prompts_only) for index, sample in samples)
    return write_rows(out, rows, header, force=force)


def _mix(text: str) -> dict[str, float]:
    """tools=3,prose=0 as a mapping."""
    found = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        try:
            found[name.strip()] = float(number)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{part!r} is not NAME=NUMBER") from error
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dfastllm.distill.data.generate", description="A distillation set from the task mix."
    )
    parser.add_argument("out", type=Path, help="the file of JSON lines to write")
    parser.add_argument("--n", type=int, default=4000, help="rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--style", choices=STYLES, default="plain", help="verbose: words before each answer")
    parser.add_argument("--brief", type=float, default=0.0, help="share of verbose rows without those words")
    parser.add_argument("--tasks", default="", help="these tasks in turn, by commas; default: the mix")
    parser.add_argument("--mix", type=_mix, help="factors on the mix's shares: tools=3,prose=0")
    parser.add_argument("--prompts-only", action="store_true", help="no answers, for a teacher to give")
    parser.add_argument("--force", action="store_true", help="also over a file that is there")
    args = parser.parse_args(arguments)
    try:
        count = generate(
            args.out,
            args.n,
            split=args.split,
            seed=args.seed,
            style=args.style,
            brief=args.brief,
            tasks=[name for name in args.tasks.split(",") if name],
            mix=args.mix,
            prompts_only=args.prompts_only,
            force=args.force,
        )
    except DFastLLMError as error:
        parser.error(str(error))
    print(f"{args.out}: {count} rows")


if __name__ == "__main__":
    main()
