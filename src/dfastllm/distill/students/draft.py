"""A draft model re-aligned to its target on the user's own traffic.

The target answers the prompts itself, in this process, with the engine that serves it; an autoregressive draft learns
the target's distributions on these answers (`align`), a masked one gets a bigram head that learns which tokens follow
each other there (`bigram`); how much of its drafts is accepted, and what that gains, is measured before and after on
prompts that were not learned from (`acceptance`).

`python -m dfastllm.distill.students.draft TARGET DRAFT PROMPTS.jsonl OUT`, or `dfastllm distill` with kd.draft. Prompts
are what `dfastllm serve --record-prompts` writes, or any distillation set. OUT gets answers.jsonl, run (checkpoints and
log.jsonl), draft (the model) and report.json. Started again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dfastllm.assemble import model_info
from dfastllm.distill.losses.divergence import DIVERGENCES, Divergence
from dfastllm.distill.students.acceptance import Acceptance, Measuring, measure_drafts, table
from dfastllm.distill.students.answers import Answer, Asking, answered, given_answers
from dfastllm.distill.students.lessons import RANK, lesson_of
from dfastllm.distill.students.prompts import Prompts, read_prompts
from dfastllm.engine.speculate.model import check_vocabulary
from dfastllm.errors import DFastLLMError, UnsupportedError, ValidationError
from dfastllm.kernels import set_threads
from dfastllm.llm import LLM, resolve
from dfastllm.train.checkpoint import content, require_same
from dfastllm.train.loop import fit
from dfastllm.train.plan import Plan, training

__all__ = ["Realignment", "default_plan", "realign"]

Say = Callable[[str], None]  # a line for people

HELD_MOST = 64  # held-out prompts that are measured on; more would only take longer


@dataclass(frozen=True)
class Realignment:
    """What is asked for.

    target, draft  a shipped model's name, a directory or a GGUF file each; of one vocabulary.
    prompts        files of JSON lines.
    out            directory of the results.
    given          the files' teacher_text are the target's own answers, collected elsewhere; none are made. Without
                   `whole` their rows' teacher_topk is learned from, and those without one are left out.
    held_out       share of the prompts that is only measured on.
    asking         how the target answers; its temperature is the divergence's too.
    whole          the target's whole distributions, from a forward of its weights; else its likeliest tokens
                   (asking.top), as they came with the answers.
    kind           which divergence.
    longest        tokens of a prompt and its answer, and at most the draft's context; longer ones are left out.
    tokens         of a batch.
    bf16           matrix products in bfloat16.
    frozen         the draft's embedding, and a head that is tied to it, stay as they are.
    rank           of the bigram head that a masked draft gets; None: lessons.RANK.
    device         where the draft is trained; the engine that answers and measures runs on the CPU.
    plan           of the training.
    measuring      of the drafts.
    """

    target: str
    draft: str
    prompts: tuple[str, ...]
    out: Path
    given: bool = False
    held_out: float = 0.1
    asking: Asking = field(default_factory=Asking)
    whole: bool = True
    kind: Divergence = "forward"
    longest: int = 1024
    tokens: int = 2048
    bf16: bool = False
    frozen: bool = False
    rank: int | None = None
    device: str = "cpu"
    plan: Plan = field(default_factory=lambda: default_plan())
    measuring: Measuring = field(default_factory=Measuring)

    def __post_init__(self) -> None:
        if not self.whole and not self.given and not self.asking.top:
            raise ValidationError("without whole distributions, top must be at least 1.", param="top")


def default_plan(**changes: Any) -> Plan:
    """Of a model that has been trained already."""
    return replace(
        Plan("realign", 300, lr=5e-4, matrix_lr=5e-4, warmup=20, schedule="cosine", validate_every=100), **changes
    )


def realign(
    asked: Realignment, *, fresh: bool = False, stop: int | None = None, say: Say = print
) -> dict[str, Any] | None:
    """Do all of it and return what report.json holds. fresh: remove what an earlier run left in `out`. stop: end at
    this step of the training, without a report (None). say: told what happens, a line each.

    Raises UnsupportedError for models that do not fit each other, DataError for prompts or answers that cannot be used,
    what loading raises, and what the training loop does.
    """
    out = asked.out
    if fresh:
        _clear(out)
    prompts = read_prompts(asked.prompts, asked.held_out)
    prompts = replace(prompts, held=prompts.held[:HELD_MOST])
    for note in prompts.notes:
        say(note)
    lesson = lesson_of(asked)
    with LLM(asked.target) as llm:
        if llm.info.kind != "ar":
            raise UnsupportedError(
                f"{llm.info.name} is of kind {llm.info.kind}; drafts are for autoregressive targets.", param="target"
            )
        check_vocabulary(llm.info, llm.tokenizer, lesson.info, lesson.tokenizer)
        out.mkdir(parents=True, exist_ok=True)
        train, held = _answers(llm, prompts, asked, say)
        target = llm.info
    work = lesson.work(target, train, held)
    if work.left_out:
        say(f"{work.left_out} answers are too long with their prompts and were left out")
    say(f"{len(work.answers)} answers, {work.steps_of_epoch} batches an epoch; {asked.plan.steps} steps")
    require_same(out / "run", "run.json", {**_what(asked), **lesson.also})
    before = dict(work.validate(0))
    done = fit(work, asked.plan, out / "run", stop=stop)
    if done.name != f"step-{asked.plan.steps}":
        say(f"stopped at {done}; {asked.plan.steps} steps are wanted")
        return None
    after = dict(work.validate(asked.plan.steps))
    state = json.loads((done / "state.json").read_text(encoding="utf-8"))
    place = lesson.export(work, out / "draft")
    rows = measure_drafts(
        asked.target,
        {"before": asked.draft, "after": place},
        [(answer.task, answer.prompt) for answer in work.held],
        replace(asked.measuring, temperature=asked.asking.temperature),
    )
    say(table(rows))
    report = {
        "target": model_info(resolve(asked.target)).name,
        "prompts": {"train": len(work.answers), "held": len(work.held)},
        "asking": asdict(asked.asking),
        "measuring": asdict(asked.measuring),
        "steps": asked.plan.steps,
        "training_seconds": state["seconds"],
        "training_tokens": state["tokens"],
        "held_out": {"before": before, "after": after},
        "drafts": [row.to_json() for row in rows],
        "gain": gain(rows),
        "gain_interval": gain_interval(rows),
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def _what(asked: Realignment) -> dict[str, Any]:
    """What decides the weights of a run."""
    written = {"out", "device", "measuring", "plan", "prompts"}  # where to, and what is looked at afterwards
    return {
        **{name: found for name, found in asdict(asked).items() if name not in written},
        "prompts": [content(Path(file)) for file in asked.prompts],
        "plan": training(asked.plan),
    }


def _clear(out: Path) -> None:
    """Remove what an earlier run left, and nothing else that may lie there."""
    for name in ("answers.jsonl", "report.json"):
        (out / name).unlink(missing_ok=True)
    for name in ("run", "draft"):
        shutil.rmtree(out / name, ignore_errors=True)


def gain(rows: Sequence[Acceptance]) -> dict[str, float]:
    """For each group how many times as many draft tokens a verifying forward accepts after as before."""
    first, second = ({row.group: row.per_verify for row in rows if row.draft == label} for label in ("before", "after"))
    return {group: second[group] / first[group] for group in first if first[group] > 0}


def gain_interval(rows: Sequence[Acceptance], draws: int = 2000) -> dict[str, list[float]]:
    """The 95 % interval of each group's gain: prompts drawn again with replacement, the same ones on both sides."""
    first, second = ({row.group: row for row in rows if row.draft == label} for label in ("before", "after"))
    found = {}
    generator = torch.Generator().manual_seed(0)
    for group in first:
        one, other = (torch.tensor(row.by_prompt, dtype=torch.float64) for row in (first[group], second[group]))
        again = torch.randint(len(one), (draws, len(one)), generator=generator)
        sums = [x[again].sum(1) for x in (one, other)]  # [draws, 3]: drafts, draft tokens, accepted ones
        rates = [x[:, 2] / x[:, 0] for x in sums]
        ratios = (rates[1] / rates[0])[rates[0] > 0]
        if len(ratios):
            found[group] = ratios.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return found


def _answers(llm: LLM, prompts: Prompts, asked: Realignment, say: Say) -> tuple[list[Answer], list[Answer]]:
    """To the prompts that are trained on, and to those held out."""
    every = [*prompts.held, *prompts.train]
    if asked.given:
        found, notes = given_answers(llm.tokenizer, every)
        if not asked.whole:
            notes += [f"prompt {a.key[:12]}: its row has no teacher_topk of its answer" for a in found if a.top is None]
            found = [a for a in found if a.top is not None]
    else:
        found, notes = answered(llm, every, asked.out / "answers.jsonl", asked.asking, _tenths(say))
    if notes:
        say(f"{len(notes)} prompts were left out; the first: {notes[0]}")
    held = {prompt.key for prompt in prompts.held}
    return [a for a in found if a.key not in held], [a for a in found if a.key in held]


def _tenths(say: Say) -> Callable[[int, int], None]:
    """Tells how many answers there are each time that another tenth is done."""
    told = -1

    def show(done: int, total: int) -> None:
        nonlocal told
        if done * 10 // total > told:
            told = done * 10 // total
            say(f"answers: {done} of {total}")

    return show


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m dfastllm.distill.students.draft",
        description="Re-align a draft model to its target on your own prompts.",
    )
    add = found.add_argument
    add("target", help="a shipped model's name, a directory or a GGUF file")
    add("draft", help="a smaller one of the same vocabulary, or a masked one, which gets a bigram head")
    add("prompts", nargs="+", help="files of JSON lines, as dfastllm serve --record-prompts writes them")
    add("out", type=Path, help="directory for answers, checkpoints, the draft and the report")
    add("--given", action="store_true", help="the rows' teacher_text are the target's own answers; make none")
    add("--held-out", type=float, default=0.1, help="share of the prompts that is only measured on")
    add("--temperature", type=float, default=0.0, help="of the answers, of both distributions and of the measuring")
    add("--max-tokens", type=int, default=128, help="of an answer")
    add(
        "--top",
        type=int,
        default=0,
        help="learn from this many likeliest tokens; 0: from whole distributions. With "
        "--given: from those that the rows have",
    )
    add("--kind", choices=DIVERGENCES, default="forward", help="divergence")
    add("--steps", type=int, default=300)
    add("--lr", type=float, default=5e-4)
    add("--matrix-lr", type=float, help="of the layers' matrices; default: --lr")
    add("--optimizer", choices=("adamw", "muon"), default="adamw")
    add("--tokens", type=int, default=2048, help="of a batch")
    add("--longest", type=int, default=1024, help="tokens of a prompt and its answer; longer ones are left out")
    add("--bf16", action="store_true", help="matrix products in bfloat16")
    add("--frozen", action="store_true", help="leave the draft's embedding, and a head tied to it, as they are")
    add("--rank", type=int, help=f"of the bigram head that a masked draft gets (default {RANK})")
    add("--warmup", type=int, default=20, help="steps")
    add("--weight-decay", type=float, default=0.01)
    add("--save-every", type=int, default=100, help="steps between checkpoints, and between validations")
    add("--stop", type=int, help="end at this step, without a report; the same command goes on")
    add("--length", type=int, default=5, help="draft tokens, for measuring")
    add("--repeats", type=int, default=3, help="of the timed runs")
    add("--quantization", help="of the drafts when they are measured: 8bit, or a format of dfastllm quantize")
    add("--seed", type=int, default=0)
    add("--threads", type=int, help="CPU threads")
    add("--fresh", action="store_true", help="remove what an earlier run left in OUT")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        if args.threads is not None:
            set_threads(args.threads)
            torch.set_num_threads(args.threads)
        asked = Realignment(
            args.target,
            args.draft,
            tuple(args.prompts),
            args.out,
            given=args.given,
            held_out=args.held_out,
            asking=Asking(args.temperature, args.max_tokens, args.top, args.seed),
            whole=args.top == 0,
            kind=args.kind,
            longest=args.longest,
            tokens=args.tokens,
            bf16=args.bf16,
            frozen=args.frozen,
            rank=args.rank,
            plan=default_plan(
                steps=args.steps,
                lr=args.lr,
                matrix_lr=args.lr if args.matrix_lr is None else args.matrix_lr,
                optimizer=args.optimizer,
                warmup=min(args.warmup, args.steps),
                weight_decay=args.weight_decay,
                validate_every=args.save_every,
                save_every=args.save_every,
                seed=args.seed,
            ),
            measuring=Measuring(
                args.length,
                max_tokens=args.max_tokens,
                repeats=args.repeats,
                quantization=args.quantization,
            ),
        )
        realign(asked, fresh=args.fresh, stop=args.stop)
    except DFastLLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
