"""Before the first step: the directory of the student's first weights, and the files that it learns from.

What is made here lies in the run's directory and is made once; a run that goes on finds it there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from dfastllm import models
from dfastllm.assemble import is_gguf, model_info
from dfastllm.convert.source import files_for_other_weights
from dfastllm.distill.choose import choose_answers
from dfastllm.distill.data.generate import generate
from dfastllm.distill.sections import Config
from dfastllm.distill.students.layers import make_student
from dfastllm.distill.teacher.collect import collect
from dfastllm.distill.teacher.local import LocalTeacher
from dfastllm.errors import DataError, ValidationError
from dfastllm.llm import resolve
from dfastllm.models.decoder import Decoder
from dfastllm.text import Tokenizer
from dfastllm.train.checkpoint import latest

__all__ = ["Files", "Say", "data_files", "random_student", "start_directory", "test_file"]

Say = Callable[[str], None]  # a line for people
Files = tuple[Path, ...]


def start_directory(config: Config, home: Path) -> Path:
    """The Hugging Face directory of the student before training: the one that was named, or one that is made in `home`
    of a GGUF file, of some layers, or with random weights. Raises what loading raises, and ValidationError for a shape
    that is none."""
    model, made = config.model, home / "start"
    source = None if model.student is None else resolve(model.student)
    if source is not None and model.layers is None and not is_gguf(source):
        return source
    if (made / "config.json").is_file():
        return made
    if source is None:
        student = random_student(config)
        models.save(student, made, files=files_for_other_weights(Path(model.tokenizer or "")))
    else:
        keep = model.layers if model.layers is not None else tuple(range(model_info(source).layers))
        make_student(source, made, keep=keep)
    return made


def random_student(config: Config) -> Decoder:
    """A model of `model.shape` with random weights keyed by train.seed. Raises ValidationError naming an unknown or
    impossible field."""
    section = config.model
    shape = dict(section.shape or {})
    known = sorted({field.name for field in fields(models.DecoderConfig)} - {"vocab_size", "max_len"})
    unknown = sorted(shape.keys() - set(known))
    if unknown:
        raise ValidationError(
            f"model.shape: unknown key {unknown[0]}.", param="model.shape", hint=f"It knows {', '.join(known)}."
        )
    tokenizer = Tokenizer.load(section.tokenizer or "")
    try:
        built = models.DecoderConfig(vocab_size=tokenizer.vocab_size, max_len=section.max_len, **shape)
    except TypeError as error:  # a field that has no default is missing
        raise ValidationError(f"model.shape: {error}.", param="model.shape") from None
    mask = None if models.find_family(section.family).kind == "ar" else tokenizer.mask_id
    ids = models.Ids(eos=tokenizer.eos_ids, mask=mask, bos=tokenizer.bos_id, pad=tokenizer.pad_id)
    info = models.describe(section.family, built, ids, name=section.name or "student")
    return models.build(built, info, seed=config.train.seed)


def data_files(
    config: Config, home: Path, tokenizer: Tokenizer, teacher: LocalTeacher | None, say: Say
) -> tuple[Files, Files]:
    """(training, validation) files whose rows have answers: the user's own, generated ones, and where there is a
    teacher what it answered. Raises DataError where the teacher stopped before the last row, and what asking raises;
    what was answered before is kept."""
    data = config.data
    train, held_out = tuple(map(Path, data.train)), tuple(map(Path, data.validation))
    if data.generate is not None:
        train = (_generated(config, home, "train", data.generate.samples),)
        held_out = (_generated(config, home, "validation", data.generate.validation),)
    if config.kd.teacher is None and teacher is None:
        return train, held_out
    return _answered(config, home, "train", train, tokenizer, teacher, say), _answered(
        config, home, "validation", held_out, tokenizer, teacher, say
    )


def test_file(config: Config, home: Path) -> Path | None:
    """The samples of the evaluation at the end: of the test split where the set is generated, else the first of the
    validation files, with the teacher's answers where it gave some; None: there are none."""
    if config.data.generate is not None:
        return _generated(config, home, "test", max(config.eval.samples, 1), answers=True)
    names = ("validation", "validation-0")
    answered = [path for name in names if (path := home / "data" / f"{name}.answers.jsonl").is_file()]
    return next(iter((*answered, *map(Path, config.data.validation))), None)


def _generated(config: Config, home: Path, split: str, count: int, *, answers: bool | None = None) -> Path:
    made = config.data.generate
    assert made is not None  # asked by its callers
    out = home / "data" / f"{split}.jsonl"
    if out.is_file():
        return out
    own = config.kd.teacher is None and config.kd.local_teacher is None
    generate(
        out,
        count,
        split=split,  # type: ignore[arg-type]
        seed=made.seed,
        style=made.style,
        brief=made.brief,
        tasks=made.tasks,
        mix=dict(made.mix) or None,
        prompts_only=not (own or made.own_answers if answers is None else answers),
    )
    return out


def _answered(
    config: Config,
    home: Path,
    split: str,
    files: Sequence[Path],
    tokenizer: Tokenizer,
    teacher: LocalTeacher | None,
    say: Say,
) -> Files:
    """Each file with the teacher's answers to the rows that have none."""
    found = []
    for number, file in enumerate(files):
        name = split if len(files) == 1 else f"{split}-{number}"
        out = home / "data" / f"{name}.answers.jsonl"
        if out.is_file() and latest(home) is not None:
            pass  # a run goes on with what it began with; a row that failed then is not asked again
        elif config.kd.choose is not None:
            if not out.is_file():
                assert config.kd.local_teacher is not None  # the configuration asks for one
                say(f"{file.name}: {config.kd.choose.samples} answers of {config.kd.local_teacher} to each prompt")
                say(choose_answers(file, out, config.kd.local_teacher, config.kd.choose, seed=config.train.seed))
        else:
            summary = collect(file, out, config.kd.teacher or _required(teacher), tokenizer)
            for line in summary.lines():
                say(line)
            if summary.stopped is not None:
                raise DataError(
                    f"the teacher has not answered all of {file}: {summary.stopped}.",
                    param="kd.teacher",
                    hint="Raise the budget or wait, and run the same command again: what was answered is kept.",
                )
            if summary.rows and not summary.had + summary.given + summary.accepted:
                why: dict[str, int] = {**summary.failed, **summary.rejected}
                raise DataError(
                    f"the teacher gave no answer to learn from to any of the {summary.rows} prompts of {file}: "
                    f"{', '.join(f'{count} {reason}' for reason, count in why.items())}.",
                    param="kd.teacher",
                    hint="An example of each stands above; the same command asks again.",
                )
        found.append(out)
    return tuple(found)


def _required(teacher: LocalTeacher | None) -> LocalTeacher:
    assert teacher is not None
    return teacher
