"""`dfastllm distill --check`: what can be tried before a teacher is paid and a machine is busy for hours.

Each check stands alone and says what it found; one that fails does not hide the next ones that can still be made.
Nothing here calls a teacher's server, and nothing is written outside of a temporary directory. Where answers are still
to be asked for, the student's own stand in for them.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dfastllm.core import SamplingParams
from dfastllm.distill.config import load_config
from dfastllm.distill.data.dataset import KDDataset
from dfastllm.distill.data.encode import RowEncoder
from dfastllm.distill.data.generate import distinct_samples, row_of
from dfastllm.distill.data.rows import write_rows
from dfastllm.distill.prepare import start_directory
from dfastllm.distill.probe import in_engine
from dfastllm.distill.qat.model import prepare_qat
from dfastllm.distill.qat.stability import check_qat_stability
from dfastllm.distill.run import load_student, load_teacher, plan_of
from dfastllm.distill.sampler import Sampler, Shapes
from dfastllm.distill.sections import Config
from dfastllm.distill.shapes import shape_probabilities
from dfastllm.distill.teacher.estimate import estimate
from dfastllm.distill.teacher.local import LocalTeacher
from dfastllm.distill.teacher.questions import Question, read_questions, row_fields
from dfastllm.distill.work import DistillWork
from dfastllm.errors import DataError, DFastLLMError
from dfastllm.kernels.extension import set_threads
from dfastllm.models.decoder import Decoder
from dfastllm.text import Tokenizer, chat_prompt
from dfastllm.train.log import FILE, read_log
from dfastllm.train.loop import Loop

__all__ = ["Check", "check_config", "show_checks"]

ROWS = 16  # samples that are tried
WIDTH = 80


@dataclass(frozen=True)
class Check:
    """One thing tried: its name, whether it passed, and what was found. skipped: it is not part of this run."""

    name: str
    passed: bool
    found: str
    skipped: bool = False


@dataclass
class _Parts:
    """What the checks made, for the ones after them."""

    config: Config
    home: Path
    device: str
    student: Decoder | None = None
    tokenizer: Tokenizer | None = None
    teacher: LocalTeacher | None = None
    dataset: KDDataset | None = None


class _NotMadeError(Exception):
    """An earlier check failed, so this one cannot be made."""


def check_config(path: str | Path, *, device: str = "cpu", threads: int | None = None) -> list[Check]:
    """Every check in turn: configuration, student, teacher, data, shapes, losses, a training step, QAT, cost."""
    set_threads(threads)
    found: list[Check] = []
    try:
        config = load_config(path)
    except DFastLLMError as error:
        return [Check("configuration", False, str(error))]
    found.append(Check("configuration", True, f"{config.train.steps} steps, files and models are there"))
    with tempfile.TemporaryDirectory() as home:
        parts = _Parts(config, Path(home), device)
        for name, check in _checks(config).items():
            found.append(_tried(name, check, parts))
        if parts.teacher is not None:
            parts.teacher.close()
    return found


def _tried(name: str, check: Callable[[_Parts], str | None], parts: _Parts) -> Check:
    try:
        said = check(parts)
    except _NotMadeError as error:
        return Check(name, False, f"not made: {error}")
    except DFastLLMError as error:
        return Check(name, False, str(error))
    except Exception as error:  # a check is there to find what nobody foresaw
        return Check(name, False, f"{type(error).__name__}: {error}")
    return Check(name, True, "not part of this run", skipped=True) if said is None else Check(name, True, said)


def _student(parts: _Parts) -> str:
    start = start_directory(parts.config, parts.home)
    parts.student, parts.tokenizer = load_student(start, parts.device)
    size = sum(p.numel() for p in parts.student.parameters())
    info = parts.student.info
    return f"{info.family}, {info.layers} layers, {size / 1e6:,.1f} M parameters, vocabulary {info.vocab_size}"


def _teacher(parts: _Parts) -> str | None:
    student, tokenizer = _need(parts.student, "student"), _need(parts.tokenizer, "student")
    if parts.config.kd.teacher is not None:
        parts.config.kd.teacher.api_key()  # raises where the variable it names is not set
        return f"{parts.config.kd.teacher.base_url}; not called"
    parts.teacher = load_teacher(parts.config, student, tokenizer, parts.device)
    return None if parts.teacher is None else f"{parts.teacher.model.info.name}, in this process"


def _data(parts: _Parts) -> str:
    tokenizer = _need(parts.tokenizer, "student")
    rows, answered = _rows(parts, tokenizer)
    speed = parts.config.speed
    encoder = RowEncoder(
        tokenizer,
        max_seq_length=parts.config.data.max_seq_length,
        prefix_tokens=speed.early_tool_N,
        prefix_from=speed.early_tool_prefix,
    )
    parts.dataset = KDDataset.of(rows, encoder)
    summary = parts.dataset.summary()
    whose = "" if answered else ", answers of the student stand in for the teacher's"
    skipped = f", left out: {parts.dataset.skips}" if parts.dataset.skipped else ""
    return (
        f"{summary['rows']} samples tried, median {summary['median_prompt_tokens']:g} + "
        f"{summary['median_response_tokens']:g} tokens, {summary['tool_should_be_used']} should call{whose}{skipped}"
    )


def _rows(parts: _Parts, tokenizer: Tokenizer) -> tuple[list[dict[str, Any]], bool]:
    """A few rows with answers, and whether the answers are the data's own."""
    made = parts.config.data.generate
    if made is not None:
        drawn = distinct_samples(
            ROWS, seed=made.seed, style=made.style, brief=made.brief, tasks=made.tasks, mix=dict(made.mix) or None
        )
        return [row_of(sample, str(index)) for index, sample in drawn], True
    questions = [q for file in parts.config.data.train for q in read_questions(file, ROWS)[0]][:ROWS]
    rows = [row_fields(question.row) for question in questions]
    missing = [number for number, row in enumerate(rows) if "teacher_text" not in row]
    if not missing:
        return rows, True
    if parts.config.kd.teacher is None and parts.config.kd.local_teacher is None:
        raise DataError(
            f"{len(missing)} of the first {len(rows)} rows have no teacher_text, and there is no teacher to ask.",
            param="kd.teacher",
            hint="Give kd.teacher or kd.local_teacher, or answers in the data.",
        )
    student = _need(parts.student, "student")
    asked = [questions[number] for number in missing]
    prompts = [tokenizer.encode(chat_prompt(tokenizer, q.messages, q.tools or None)) for q in asked]
    with in_engine(student, tokenizer) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=1.0, max_tokens=32, seed=0))
    for number, output in zip(missing, outputs, strict=True):
        rows[number]["teacher_text"] = output.text.strip() or "."
    return rows, False


def _shapes(parts: _Parts) -> str | None:
    train, dataset = parts.config.train, _need(parts.dataset, "data")
    if not train.use_enumerated_shapes:
        return None
    shares = shape_probabilities(train.seq_lengths, train.shape_probs)
    lengths = dataset.lengths()
    fits = [sum(length <= shape for length in lengths) for shape in train.seq_lengths]
    told = (
        f"{shape}: {share:.0%} of the steps, {fit} of {len(lengths)} samples whole"
        for shape, share, fit in zip(train.seq_lengths, shares, fits, strict=True)
    )
    return "; ".join(told)


def _work(parts: _Parts) -> DistillWork:
    train, student = parts.config.train, _need(parts.student, "student")
    shapes = None
    if train.use_enumerated_shapes:
        shapes = Shapes(train.seq_lengths, train.shape_probs, train.periodic_upweight_rare)
    sampler = Sampler(_need(parts.dataset, "data"), min(train.micro_batch_size, ROWS), train.seed, 1, shapes)
    float_config = parts.config.model_copy(update={"quant": type(parts.config.quant)()})
    return DistillWork(float_config, student, _need(parts.tokenizer, "student"), sampler, teacher=parts.teacher)


def _losses(parts: _Parts) -> str:
    """Every loss that is switched on, at a step with rollouts and with the early-call loss at full weight."""
    work = _work(parts)
    batch, _ = next(work.batches((0, 0, 0)))
    every = parts.config.speed.rollout_every
    found = work.losses(batch, -(-work.objective.ramp_steps // every) * every)
    values = {name: term.item() for name, term in found.terms.items()}
    wrong = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    if wrong or not values:
        raise DataError(", ".join(wrong) or "no loss applies to these samples.", param="kd")
    dead = [name for name, term in found.terms.items() if not term.requires_grad]
    if dead:
        raise DataError(f"{', '.join(dead)} carry no gradient.", param="kd")
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def _step(parts: _Parts) -> str:
    """One optimizer step on these samples; the student keeps what it learnt, nothing is written."""
    work = _work(parts)
    before = {name: p.detach().clone() for name, p in work.model.named_parameters()}
    loop = Loop(work, plan_of(parts.config, "check"), parts.home / "none")
    first, last = loop.one_step(), loop.one_step()
    moved = sum(not torch.equal(before[name], p.detach()) for name, p in work.model.named_parameters())
    if not moved:
        raise DataError("no parameter changed.", param="train.lr")
    return f"loss {first['loss']:.4g}, then {last['loss']:.4g}; gradient {first['grad_norm']:.3g}"


def _qat(parts: _Parts) -> str | None:
    config, student = parts.config.quant, _need(parts.student, "student")
    if not config.enabled:
        return None
    qat = prepare_qat(student, config)
    qat.enable()
    dataset = _need(parts.dataset, "data")
    report = check_qat_stability(student, dataset.collate([dataset[0]]))
    qat.disable()
    if report["has_nan"]:
        raise DataError(f"rounded logits are not finite: {report.get('error', '')}.", param="quant")
    start = int(parts.config.train.steps * config.start_fraction)
    return f"{config.format} from step {start}: logits keep a cosine of {report['cosine_sim']:.4f}"


def _cost(parts: _Parts) -> str | None:
    settings, tokenizer = parts.config.kd.teacher, _need(parts.tokenizer, "student")
    if settings is None:
        return None
    return "; ".join(estimate(_questions(parts), settings, tokenizer).lines())


def _questions(parts: _Parts) -> list[Question]:
    made = parts.config.data.generate
    if made is None:
        files = (*parts.config.data.train, *parts.config.data.validation)
        return [question for file in files for question in read_questions(file)[0]]
    file = parts.home / "questions.jsonl"
    drawn = distinct_samples(
        made.samples, seed=made.seed, style=made.style, brief=made.brief, tasks=made.tasks, mix=dict(made.mix) or None
    )
    write_rows(file, (row_of(sample, str(index), answer=False) for index, sample in drawn))
    return read_questions(file)[0]


def _trajectories(parts: _Parts) -> str:
    """A run of one step on the first prompts: recording, both losses, a gradient, and what a validation measures."""
    from dfastllm.distill.students.diffusion import distil_trajectories, small_config

    small = small_config(parts.config, parts.home)
    said: list[str] = []
    distil_trajectories(small, plan_of(small, "check"), parts.home, device=parts.device, say=said.append)
    line = read_log(parts.home / "run" / FILE)[-1]
    if "speed.measure_failed" in line:
        raise DataError(f"the student cannot be measured: {line['speed.measure_failed']}.", param="eval.validation")
    losses = ", ".join(f"{name} {line[name]:.4g}" for name in sorted(line) if name.split(".")[0] == "loss")
    return f"{said[-1]}; {losses}, gradient {line['grad_norm']:.3g}; {line['right']:.0%} of the tokens right"


def _drafts(parts: _Parts) -> str:
    """A run of one step on the first prompts: answers, divergence, the measuring of drafts."""
    from dfastllm.distill.students.draft_run import realign_as, small_config

    small = small_config(parts.config, parts.home)
    report = realign_as(small, plan_of(small, "check"), parts.home, device=parts.device, say=lambda line: None)
    assert report is not None  # its one step was made
    before, rows = report["held_out"]["before"], report["drafts"]
    return (
        f"{report['prompts']['train']} answers; loss {before['validation_loss']:.4g}, best token equal "
        f"{before['agreement']:.0%}; {rows[0]['per_verify']:.2f} draft tokens accepted in a verifying forward"
    )


def _need(value: Any, made_by: str) -> Any:
    if value is None:
        raise _NotMadeError(f"the check of the {made_by} failed")
    return value


_OF_TRAJECTORIES: Mapping[str, Callable[[_Parts], str | None]] = {"trajectories": _trajectories}
_CHECKS: Mapping[str, Callable[[_Parts], str | None]] = {
    "student": _student,
    "teacher": _teacher,
    "data": _data,
    "shapes": _shapes,
    "losses": _losses,
    "training step": _step,
    "QAT": _qat,
    "teacher's cost": _cost,
}


def _checks(config: Config) -> Mapping[str, Callable[[_Parts], str | None]]:
    if config.kd.trajectory is not None:
        return _OF_TRAJECTORIES
    return _CHECKS if config.kd.draft is None else {"drafts": _drafts}


def show_checks(checks: Sequence[Check], console: Console | None = None) -> None:
    """The checks as a table of at most 80 columns."""
    console = console or Console(width=WIDTH, highlight=False)
    table = Table("check", "", "found", width=min(WIDTH, console.width))
    for check in checks:
        word = "–" if check.skipped else "ok" if check.passed else "FAILED"
        table.add_row(check.name, word, check.found.replace("[", "\\["))
    console.print(table)
    failed = [check.name for check in checks if not check.passed]
    console.print(f"failed: {', '.join(failed)}" if failed else "all checks passed; no teacher was called")
