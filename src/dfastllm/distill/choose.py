"""Several answers of a teacher to every prompt, and the shortest right one of them to learn from.

A teacher that is wordy now and then brief teaches brevity at its own accuracy so (rejection sampling; for reasoning:
Munkhbat et al. 2025, arXiv 2502.20122). Needs rows with a grader.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dfastllm.core import SamplingParams
from dfastllm.distill.data.rows import Row, RowFile, write_rows
from dfastllm.distill.sections import ChooseSection
from dfastllm.distill.teacher.questions import row_fields
from dfastllm.errors import DataError
from dfastllm.llm import LLM, RequestOutput
from dfastllm.tasks import Sample, grade

__all__ = ["choose_answers", "shortest_right"]

WAVE = 512  # prompts that are answered together


def choose_answers(prompts: Path, out: Path, teacher: str, section: ChooseSection, *, seed: int = 0) -> str:
    """Write `out`: every row of `prompts` with the shortest right answer of `section.samples`, the first greedy, the
    others drawn at `section.temperature`. Rows of which none is right are left out. Returns what was done, in words.
    Raises DataError for rows without a grader, and where no answer was right."""
    rows = RowFile(prompts, needs_text=False)
    counts = {"rows": 0, "kept": 0, "greedy": 0, "chosen": 0}
    with LLM(teacher) as llm:
        kept = write_rows(
            out,
            _chosen(llm, list(rows), section, seed, counts),
            {"made_by": "dfastllm.distill.choose", "teacher": llm.info.name, **section.model_dump(), "seed": seed},
        )
    if not kept:
        raise DataError(f"no answer of {teacher} to {prompts} was right.", param="kd.choose")
    return (
        f"{out.name}: {kept} of {counts['rows']} rows have a right answer among {section.samples};"
        f" {counts['greedy'] / kept:.1f} tokens first, {counts['chosen'] / kept:.1f} the shortest"
    )


def _chosen(
    llm: LLM, rows: Sequence[Row], section: ChooseSection, seed: int, counts: dict[str, int]
) -> Iterator[dict[str, Any]]:
    greedy = SamplingParams(temperature=0.0, max_tokens=section.max_tokens)
    for start in range(0, len(rows), WAVE):
        wave = rows[start : start + WAVE]
        for row in wave:
            if row.grader is None:
                raise DataError(
                    f"line {row.line} has no grader, so no answer can be told right.",
                    param="kd.choose",
                    hint="Use rows with grader and expected, or leave kd.choose out.",
                )
        asked = [llm.render(row.messages, list(row.tools) or None) for row in wave]
        firsts = llm.generate(asked, greedy)
        more: list[list[RequestOutput]] = [[] for _ in wave]
        if section.samples > 1:
            drawn = [
                SamplingParams(
                    temperature=section.temperature,
                    max_tokens=section.max_tokens,
                    n=section.samples - 1,
                    seed=(seed * 1_000_003 + start + at) % 2**31,
                )
                for at in range(len(wave))
            ]
            more = [[output] for output in llm.generate(asked, drawn)]
        for row, first, others in zip(wave, firsts, more, strict=True):
            counts["rows"] += 1
            best = shortest_right(row, [first, *others])
            if best is not None:
                counts["kept"] += 1
                counts["greedy"] += len(first.outputs[0].token_ids)
                counts["chosen"] += best[1]
                yield {**row_fields(row), "teacher_text": best[0]}


def shortest_right(row: Row, outputs: Sequence[RequestOutput]) -> tuple[str, int] | None:
    """(text, tokens) of the right answer with the fewest tokens, the earliest of equals; None: none is right. An answer
    that was cut off is not right."""
    sample = Sample(row.task or "rows", tuple(row.messages), "", row.expected, row.grader, (), row.tools)
    answers = [one for output in outputs for one in output.outputs if one.finish_reason == "stop"]
    right = [one for one in answers if one.text.strip() and grade(sample, one.text)]
    if not right:
        return None
    best = min(right, key=lambda one: len(one.token_ids))
    return best.text, len(best.token_ids)
