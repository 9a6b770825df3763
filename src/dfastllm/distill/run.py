"""`run_distillation`: from a configuration to a student that is trained, measured, and written as directories to serve.

A run is one directory: what it learns from, checkpoints, log, the student, the report. The same call goes on with a run
that was stopped, and asks no teacher twice.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from dfastllm import models
from dfastllm.distill.config import changed_keys, load_config
from dfastllm.distill.data.dataset import KDDataset
from dfastllm.distill.evaluate import Questions, read_samples
from dfastllm.distill.finish import Report, finish
from dfastllm.distill.prepare import Files, Say, data_files, start_directory
from dfastllm.distill.probe import probe
from dfastllm.distill.sampler import Sampler, Shapes
from dfastllm.distill.sections import Config
from dfastllm.distill.teacher.local import LocalTeacher
from dfastllm.distill.work import DistillWork, Probe
from dfastllm.errors import UnsupportedError, ValidationError
from dfastllm.kernels.extension import set_threads
from dfastllm.llm import resolve
from dfastllm.models.decoder import Decoder
from dfastllm.text import Tokenizer
from dfastllm.train.loop import fit, refuse_earlier
from dfastllm.train.plan import Plan
from dfastllm.train.work import Value

__all__ = ["datasets", "load_student", "load_teacher", "make_work", "plan_of", "run_distillation"]

CONFIG = "config.json"
# Keys that may differ when a run goes on: what they change is no step of the training.
FREE = ("eval.", "kd.teacher.", "speed.measure", "speed.baseline", "speed.regression_threshold", "speed.ttfa_limit")
FREE_TRAIN = ("train.val_every", "train.save_every", "train.log_every", "train.tensorboard")
ASKED = tuple(
    f"kd.teacher.{key}" for key in ("base_url", "model", "max_tokens", "temperature", "seed", "top_logprobs", "options")
)


def run_distillation(
    config: Config | str | Path,
    out: str | Path,
    *,
    resume: bool = True,
    steps: int | None = None,
    device: str = "cpu",
    threads: int | None = None,
    say: Say | None = None,
) -> Report | None:
    """Distil as the configuration says, in the directory `out`.

    resume: go on with a run that is there; False refuses it. steps: end at this step, without export and measurements
    (None is returned then, unless it is the last); the schedule stays the configuration's. threads: None: as torch
    chooses. say: where lines for people go; None: stderr. Raises ValidationError, what loading and the teacher raise,
    and TrainingError.
    """
    found = load_config(config) if not isinstance(config, Config) else config
    home = Path(out)
    say = say or _on_stderr
    set_threads(threads)
    if found.kd.trajectory is not None:
        _trajectories(found, home, resume, steps, device, say)
        return None
    if found.kd.draft is not None:
        _draft(found, home, resume, steps, device, say)
        return None
    if not resume:
        refuse_earlier(home)
    _remember(found, home)
    start = start_directory(found, home)
    student, tokenizer = load_student(start, device)
    teacher = load_teacher(found, student, tokenizer, device)
    work = make_work(found, home, student, tokenizer, teacher, say)
    done = fit(work, plan_of(found, home.name), home, stop=steps)
    reached = int(done.name.removeprefix("step-"))
    if reached < found.train.steps:
        say(f"stopped at step {reached} of {found.train.steps}: {done}")
        return None
    return finish(found, home, student, start, work.qat, reached, say)


def _on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _trajectories(config: Config, home: Path, resume: bool, steps: int | None, device: str, say: Say) -> None:
    """A diffusion student, which has a work of its own."""
    from dfastllm.distill.students.diffusion import distil_trajectories

    if not resume:
        refuse_earlier(home / "run")
    _remember(config, home)
    distil_trajectories(config, plan_of(config, home.name), home, stop=steps, device=device, say=say)


def _draft(config: Config, home: Path, resume: bool, steps: int | None, device: str, say: Say) -> None:
    """A draft model, which learns its target's distributions alone."""
    from dfastllm.distill.students.draft_run import realign_as

    if not resume:
        refuse_earlier(home / "run")
    _remember(config, home)
    realign_as(config, plan_of(config, home.name), home, stop=steps, device=device, say=say)


def _remember(config: Config, home: Path) -> None:
    """Keep the configuration in the run's directory. Raises ValidationError where a run of another one lies there."""
    path = home / CONFIG
    now = json.loads(config.model_dump_json())
    if path.is_file():
        changed = [
            key
            for key in changed_keys(json.loads(path.read_text(encoding="utf-8")), now)
            if key.startswith(ASKED) or not (key.startswith(FREE) or key in FREE_TRAIN)
        ]
        if changed:
            raise ValidationError(
                f"{home} holds a run of another configuration: {', '.join(changed)} differ.",
                param=changed[0],
                hint="Choose another directory, or remove this one.",
            )
    home.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")


def load_student(start: Path, device: str = "cpu") -> tuple[Decoder, Tokenizer]:
    """The student in float32, ready to be trained, and its tokenizer. Raises UnsupportedError for a model that is not
    causal, and what loading raises."""
    student = models.load(start, device=device, dtype=torch.float32)
    tokenizer = Tokenizer.load(start)
    tokenizer.check_fits(student.info.vocab_size, student.info.mask_id)
    if student.info.kind != "ar":
        raise UnsupportedError(
            f"{student.info.name} is a {student.info.kind} model; these losses train autoregressive ones.",
            param="model.student",
            hint="Give the section kd.trajectory, which trains diffusion students.",
        )
    return student.requires_grad_(True), tokenizer


def load_teacher(config: Config, student: Decoder, tokenizer: Tokenizer, device: str) -> LocalTeacher | None:
    """The teacher in this process, if one is asked for. Raises ValidationError for another vocabulary."""
    if config.kd.local_teacher is None:
        return None
    path = resolve(config.kd.local_teacher)
    if not (config.kd.kl_weight or config.kd.layers_weight):  # its answers alone are wanted: any vocabulary will do
        return LocalTeacher.load(path, device=device)
    return LocalTeacher.load(path, student=tokenizer, student_vocab=student.info.vocab_size, device=device)


def make_work(
    config: Config, home: Path, student: Decoder, tokenizer: Tokenizer, teacher: LocalTeacher | None, say: Say
) -> DistillWork:
    """Data, losses and probe of a run, joined."""
    train_files, held_out_files = data_files(config, home, tokenizer, teacher, say)
    if teacher is not None:
        teacher.close()  # the engine of its answers; its distributions need none
    train, held_out = datasets(config, tokenizer, train_files, held_out_files, say)
    section = config.train
    shapes = None
    if section.use_enumerated_shapes:
        shapes = Shapes(section.seq_lengths, section.shape_probs, section.periodic_upweight_rare)
    sampler = Sampler(train, section.micro_batch_size, section.seed, section.grad_accum, shapes)
    validation = None if held_out is None else Sampler(held_out, section.micro_batch_size)
    asked = None
    if held_out_files and config.eval.validation:
        asked = read_samples(held_out_files[0], config.eval.validation)
    measure = _probe(config, tokenizer, asked) if asked is not None or config.speed.measure else None
    online = teacher if config.kd.kl_weight or config.kd.layers_weight else None
    return DistillWork(config, student, tokenizer, sampler, validation, teacher=online, probe=measure)


def datasets(
    config: Config, tokenizer: Tokenizer, train: Files, held_out: Files, say: Say
) -> tuple[KDDataset, KDDataset | None]:
    """The samples of the files, with a word on what was left out. Raises DataError where none is left."""
    more: dict[str, Any] = {
        "max_seq_length": config.data.max_seq_length,
        "prefix_tokens": config.speed.early_tool_N,
        "prefix_from": config.speed.early_tool_prefix,
    }
    found = [KDDataset(list(files), tokenizer, **more) if files else None for files in (train, held_out)]
    for name, one in zip(("training", "validation"), found, strict=True):
        if one is not None:
            left_out = f", left out: {one.skips}" if one.skipped else ""
            say(f"{name}: {len(one)} samples{left_out}")
    assert found[0] is not None  # a configuration names training files
    return found[0], found[1]


def _probe(config: Config, tokenizer: Tokenizer, asked: Questions | None) -> Probe:
    """Accuracy and speed of the student of that moment, as it would be served."""

    def measure(student: Decoder, step: int, quantization: str | None) -> dict[str, Value]:
        figures = probe(
            student,
            tokenizer,
            () if asked is None else asked.samples,
            ids=None if asked is None else asked.ids,
            max_tokens=config.eval.max_tokens,
            speed_requests=config.speed.measure,
            quantization=quantization,
        )
        return dict(figures)

    return measure


def plan_of(config: Config, name: str) -> Plan:
    """The loop's plan of a configuration."""
    section = config.train
    names = ("steps", "lr", "optimizer", "betas", "weight_decay", "warmup", "schedule", "clip", "seed", "tensorboard")
    return Plan(
        name=name,
        matrix_lr=section.lr if section.matrix_lr is None else section.matrix_lr,
        accumulate=section.grad_accum,
        validate_every=section.val_every,
        save_every=section.save_every,
        log_every=section.log_every,
        **{key: getattr(section, key) for key in names},
    )
