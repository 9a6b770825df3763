"""A draft re-aligned as a configuration says (`dfastllm distill`, kd.draft): which of its keys mean something there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dfastllm.distill.data.generate import generate
from dfastllm.distill.data.rows import write_rows
from dfastllm.distill.sections import Config
from dfastllm.distill.students.acceptance import Measuring
from dfastllm.distill.students.answers import Asking
from dfastllm.distill.students.draft import Realignment, Say, realign
from dfastllm.distill.teacher.questions import read_questions, row_fields
from dfastllm.errors import ValidationError
from dfastllm.train.plan import Plan

__all__ = ["realign_as", "small_config"]

FEW = 32  # prompts of a trial

# What a configuration with kd.draft may say; the rest of it has no meaning there, and is refused.
READ = {
    "model": {"student"},
    "data": {"train", "generate", "max_seq_length"},
    "train": {
        *(
            "steps",
            "optimizer",
            "lr",
            "matrix_lr",
            "betas",
            "weight_decay",
            "warmup",
            "schedule",
            "clip",
            "bf16",
            "seed",
        ),
        *("val_every", "save_every", "log_every", "tensorboard"),
    },
    "kd": {"draft", "local_teacher", "divergence"},
    "speed": set(),
    "quant": set(),
    "eval": set(),
}


def realign_as(
    config: Config, plan: Plan, home: Path, *, stop: int | None = None, device: str = "cpu", say: Say = print
) -> dict[str, Any] | None:
    """`realign` as a configuration says that has kd.draft. Raises ValidationError for a key that has no meaning with
    it, and where target or draft is missing."""
    settings = config.kd.draft
    assert settings is not None  # what the caller looked at
    for name, read in READ.items():
        section = getattr(config, name)
        if name == "quant":
            extra = ["quant"] if section.enabled else []
        else:
            extra = sorted(section.model_fields_set - read)
        if extra:
            key = extra[0] if name == "quant" else f"{name}.{extra[0]}"
            raise ValidationError(f"{key} has no meaning with kd.draft.", param=key, hint="Leave it out.")
    if config.kd.local_teacher is None or config.model.student is None:
        missing = "kd.local_teacher" if config.kd.local_teacher is None else "model.student"
        raise ValidationError(
            f"kd.draft needs {missing}.",
            param=missing,
            hint="kd.local_teacher is the target, model.student the draft.",
        )
    home.mkdir(parents=True, exist_ok=True)
    asked = Realignment(
        config.kd.local_teacher,
        config.model.student,
        _prompt_files(config, home),
        home,
        given=settings.given,
        held_out=settings.held_out,
        asking=Asking(settings.temperature, settings.max_tokens, settings.top, config.train.seed),
        whole=settings.top == 0,
        kind=config.kd.divergence,
        longest=config.data.max_seq_length,
        tokens=settings.batch_tokens,
        bf16=config.train.bf16,
        frozen=settings.frozen,
        rank=settings.rank,
        device=device,
        plan=plan,
        measuring=Measuring(
            settings.length,
            max_tokens=settings.max_tokens,
            repeats=settings.repeats,
            quantization=settings.quantization,
        ),
    )
    return realign(asked, stop=stop, say=say)


def small_config(config: Config, home: Path) -> Config:
    """The same with one step, the first prompts and short answers: to try whether all of it can be done. Raises
    DataError for files without prompts."""
    assert config.kd.draft is not None  # what the caller looked at
    data = config.data
    if data.generate is not None:
        data = data.model_copy(update={"generate": data.generate.model_copy(update={"samples": FEW})})
    else:
        questions = [one for file in data.train for one in read_questions(file, FEW)[0]][:FEW]
        write_rows(home / "first.jsonl", [row_fields(one.row) for one in questions], force=True)
        data = data.model_copy(update={"train": (str(home / "first.jsonl"),)})
    few = {"max_tokens": min(config.kd.draft.max_tokens, 16), "repeats": 1, "held_out": 0.3}
    kd = config.kd.model_copy(update={"draft": config.kd.draft.model_copy(update=few)})
    train = config.train.model_copy(update={"steps": 1, "tensorboard": False})
    return config.model_copy(update={"data": data, "kd": kd, "train": train})


def _prompt_files(config: Config, home: Path) -> tuple[str, ...]:
    """The user's files, or one that is made of the task mix."""
    made = config.data.generate
    if made is None:
        return config.data.train
    out = home / "prompts.jsonl"
    if not out.is_file():
        generate(
            out,
            made.samples,
            seed=made.seed,
            style=made.style,
            brief=made.brief,
            tasks=made.tasks,
            mix=dict(made.mix) or None,
            prompts_only=True,
        )
    return (str(out),)
