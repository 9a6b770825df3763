"""How much of a draft a target accepts, and what speculating with it gains: draft models compared with plain decoding
of the same requests on the engine that serves.

Counts are of drafts of a fixed length, so they do not depend on the machine. Seconds are of the length that the engine
chooses itself, which is how it serves; runs take turns, and the answers must be plain decoding's, token for token.

`python -m dfastllm.distill.students.acceptance TARGET PROMPTS.jsonl DRAFT...` compares drafts, quantised ones too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from dfastllm import assemble
from dfastllm.core import Request, SamplingParams, SpeculativeParams, StepStats
from dfastllm.distill.data.rows import RowFile
from dfastllm.distill.students.layers import tokenizer_of
from dfastllm.engine import Engine, EngineConfig
from dfastllm.engine.speculate import check_vocabulary, model_drafter
from dfastllm.errors import DataError, DFastLLMError, GenerationError
from dfastllm.kernels import set_threads
from dfastllm.llm import resolve
from dfastllm.metrics.speculation import Run, answer, usage_counts
from dfastllm.options import SpeculativeMethod
from dfastllm.text import chat_prompt

__all__ = ["Acceptance", "Measuring", "measure_drafts", "table"]

ALL = "all"
PAGE = 16


@dataclass(frozen=True)
class Measuring:
    """How drafts are measured.

    length        draft tokens at most.
    temperature   of the answers.
    max_tokens    of an answer.
    together      requests at once.
    repeats       of the timed runs, whose median counts.
    quantization  of the drafts while they are loaded, None: as stored.
    """

    length: int = 5
    temperature: float = 0.0
    max_tokens: int = 128
    together: int = 1
    repeats: int = 3
    quantization: str | None = None


@dataclass(frozen=True)
class Acceptance:
    """One draft on one group of prompts.

    draft               its label.
    group               a task, or "all".
    prompts             how many.
    accepted            draft tokens that stood, of all drafted.
    per_verify          draft tokens that stood in a verifying forward.
    per_forward         tokens of the answers over forwards of the target, those of prompts included.
    plain_per_second    tokens a second of plain decoding.
    drafted_per_second  with the draft, its length chosen by the engine.
    plain_ms            a step without drafts, milliseconds, the median of all that read no prompt.
    verify_ms           a step that judged a draft of the fixed length, without the making of it.
    draft_ms            the making of one draft token.
    by_prompt           drafts, draft tokens and accepted ones of each prompt.
    """

    draft: str
    group: str
    prompts: int
    accepted: float
    per_verify: float
    per_forward: float
    plain_per_second: float
    drafted_per_second: float
    plain_ms: float
    verify_ms: float
    draft_ms: float
    by_prompt: tuple[tuple[int, int, int], ...]

    @property
    def speedup(self) -> float:
        return self.drafted_per_second / self.plain_per_second

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "by_prompt": list(map(list, self.by_prompt)), "speedup": self.speedup}


def measure_drafts(
    target: str | Path,
    drafts: Mapping[str, str | Path],
    prompts: Sequence[tuple[str, Sequence[int]]],
    how: Measuring,
) -> list[Acceptance]:
    """Each draft (label -> model) on each group and on all prompts, (group, token ids) each.

    Raises UnsupportedError for a draft of another vocabulary, what loading raises, and GenerationError where a draft
    changed an answer, which none may.
    """
    room = max(len(ids) for _, ids in prompts) + how.max_tokens + how.length
    methods: dict[str, SpeculativeMethod] = {}
    engines = {}
    for label, method, engine in _engines(target, drafts, how, room):
        methods[label], engines[label] = method, engine
    groups: dict[str, list[Request]] = {}
    for number, (group, ids) in enumerate(prompts):
        sampling = SamplingParams(temperature=how.temperature, max_tokens=how.max_tokens, seed=number)
        groups.setdefault(group, []).append(Request(f"p{number}", tuple(ids), sampling))
    fixed, paced = (
        {label: SpeculativeParams(method, how.length, adaptive=adaptive) for label, method in methods.items()}
        for adaptive in (False, True)
    )
    found: dict[str, list[_Part]] = {label: [] for label in drafts}
    steps = {label: _Steps() for label in engines}
    for label, engine in engines.items():
        engine.subscribe(steps[label])
    for group, requests in groups.items():
        for label, engine in engines.items():
            with steps[label].kept("plain"):
                plain = answer(engine, requests)
            with steps[label].kept("drafted"):
                counted = answer(engine, _asking(requests, fixed[label]))
            _check(plain, counted, label)
            answer(engine, _asking(requests, paced[label]))  # what the engine learns of the draft here it may keep
            seconds: list[tuple[float, float]] = []
            for _ in range(how.repeats):
                runs = answer(engine, requests), answer(engine, _asking(requests, paced[label]))
                _check(*runs, label)
                seconds.append((runs[0].seconds, runs[1].seconds))
            plain_s, drafted_s = (statistics.median(times) for times in zip(*seconds, strict=True))
            found[label].append(_Part(group, counted, plain_s, drafted_s))
    return [row for label, parts in found.items() for row in _rows(label, parts, steps[label])]


@dataclass(frozen=True)
class _Part:
    """One draft on one group. counted: with drafts of the fixed length."""

    group: str
    counted: Run
    plain_seconds: float
    drafted_seconds: float


class _Steps:
    """What steps of an engine took, of those runs that are to be kept."""

    def __init__(self) -> None:
        self._into: str | None = None
        self._seen: dict[str, list[StepStats]] = {"plain": [], "drafted": []}

    def __call__(self, stats: StepStats) -> None:
        if self._into is not None:
            self._seen[self._into].append(stats)

    @contextmanager
    def kept(self, into: str) -> Iterator[None]:
        self._into = into
        try:
            yield
        finally:
            self._into = None

    def milliseconds(self) -> tuple[float, float, float]:
        """Medians: a plain step, a verifying one, the making of one draft token. 0 where there was none."""
        plain = [s.seconds for s in self._seen["plain"] if s.rows == s.sequences]
        judged = [s for s in self._seen["drafted"] if s.drafts and s.rows == s.sequences + sum(d for d, _ in s.drafts)]
        verify = [s.seconds - s.draft_seconds for s in judged]
        making = [s.draft_seconds / max(d for d, _ in s.drafts) for s in judged]
        first, second, third = (1000 * statistics.median(times or [0.0]) for times in (plain, verify, making))
        return first, second, third


def _engines(
    target: str | Path, drafts: Mapping[str, str | Path], how: Measuring, room: int
) -> Iterator[tuple[str, SpeculativeMethod, Engine]]:
    """One engine for each draft, all over the same target, and the method that its kind drafts by; nothing is shared
    between requests. room: K,V positions that a request may need."""
    pages = how.together * (-(-room // PAGE) + 1)
    config = EngineConfig(max_sequences=how.together, kv_tokens=pages * PAGE, page_size=PAGE, prefix_caching=False)
    loaded = assemble.load(resolve(target))
    for label, model in drafts.items():
        draft = assemble.load(resolve(model), quantization=how.quantization, drafting=True)
        check_vocabulary(loaded.model.info, loaded.tokenizer, draft.model.info, draft.tokenizer)
        method: SpeculativeMethod = "draft_model" if draft.model.info.kind == "ar" else "diffusion"
        drafter = model_drafter(method, draft.model, config, bigram=draft.bigram)
        yield label, method, Engine(loaded.model, loaded.tokenizer, config, drafters={method: drafter})


def _asking(requests: Sequence[Request], speculative: SpeculativeParams) -> list[Request]:
    return [replace(request, speculative=speculative) for request in requests]


def _check(plain: Run, drafted: Run, label: str) -> None:
    differing = [name for name, tokens in plain.tokens.items() if drafted.tokens[name] != tokens]
    if differing:
        raise GenerationError(
            f"speculating with {label} changed {len(differing)} of {len(plain.tokens)} answers, the first is that to "
            f"prompt {differing[0][1:]}.",
            hint="Answers must be plain decoding's; this is a fault of dfastllm, please report it.",
        )


def _rows(label: str, parts: Sequence[_Part], steps: _Steps) -> Iterator[Acceptance]:
    """Of each group, and of all of them where there are several. Steps take the same in all groups."""
    groups = [([part], part.group) for part in parts]
    if len(parts) > 1:
        groups.append((list(parts), ALL))
    for some, group in groups:
        usages = [usage for part in some for usage in part.counted.usages.values()]
        tokens = sum(len(answer) for part in some for answer in part.counted.tokens.values())
        counts = usage_counts(usages, tokens)
        yield Acceptance(
            label,
            group or ALL,
            len(usages),
            counts["accepted"] or 0.0,
            (counts["acceptance_length"] or 1.0) - 1.0,
            tokens / counts["forwards"],
            tokens / sum(part.plain_seconds for part in some),
            tokens / sum(part.drafted_seconds for part in some),
            *steps.milliseconds(),
            tuple((u.drafts, u.draft_tokens, u.accepted_tokens) for u in usages),
        )


def table(rows: Sequence[Acceptance]) -> str:
    """Lines of text, a group's drafts below each other."""
    lines = [
        f"{'prompts':14} {'draft':10} {'n':>4} {'accepted':>9} {'a verify':>9} {'a forward':>10} {'plain tok/s':>12}"
        f" {'drafted tok/s':>14} {'speedup':>8} {'plain ms':>9} {'verify ms':>10} {'draft ms':>9}"
    ]
    for group in dict.fromkeys(row.group for row in rows):
        for row in (row for row in rows if row.group == group):
            lines.append(
                f"{row.group:14} {row.draft:10} {row.prompts:4} {row.accepted:9.1%} {row.per_verify:9.2f}"
                f" {row.per_forward:10.2f} {row.plain_per_second:12.1f} {row.drafted_per_second:14.1f}"
                f" {row.speedup:8.2f} {row.plain_ms:9.2f} {row.verify_ms:10.2f} {row.draft_ms:9.2f}"
            )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m dfastllm.distill.students.acceptance", description="How much of drafts a target accepts."
    )
    add = found.add_argument
    add("target", help="a shipped model's name, a directory or a GGUF file")
    add("prompts", help="a file of JSON lines")
    add("drafts", nargs="+", help="models of the target's vocabulary")
    add("--most", type=int, default=32, help="prompts that are measured on, the first ones")
    add("--length", type=int, default=5, help="draft tokens")
    add("--temperature", type=float, default=0.0)
    add("--max-tokens", type=int, default=128)
    add("--together", type=int, default=1, help="requests at once")
    add("--repeats", type=int, default=3, help="of the timed runs")
    add("--quantization", help="of the drafts while they are loaded: 8bit, or a format of dfastllm quantize")
    add("--json", type=Path, help="write the rows here too")
    add("--threads", type=int)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        set_threads(args.threads)
        how = Measuring(args.length, args.temperature, args.max_tokens, args.together, args.repeats, args.quantization)
        tokenizer = tokenizer_of(args.target)
        rows = list(islice(RowFile(args.prompts, needs_text=False), args.most))
        if not rows:
            raise DataError(f"{args.prompts} holds no prompt.", param="prompts")
        prompts = [
            (row.task or "", tokenizer.encode(chat_prompt(tokenizer, row.messages, list(row.tools) or None)))
            for row in rows
        ]
        found = measure_drafts(args.target, {Path(draft).name: draft for draft in args.drafts}, prompts, how)
        print(table(found))
        if args.json is not None:
            args.json.write_text(json.dumps([row.to_json() for row in found], indent=1) + "\n", encoding="utf-8")
    except DFastLLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
