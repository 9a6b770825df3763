"""A canvas student with fewer forwards: it learns from trajectories, at first the teacher's, then its own.

The teacher (another canvas model, or the student before training) answers the prompts of the run in our engine, which
tells the order of its decisions; its right answers are learnt from by certainty forcing (`certainty`). Every so many
steps the student of that moment answers further prompts by its own quick decoder, and its right answers take the place
of some of the first ones: what it learns from then are states that it comes to itself.

`distil_trajectories` is the run that `kd.trajectory` of a configuration asks for.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from dfastllm import models
from dfastllm.distill.data.rows import RowFile
from dfastllm.distill.evaluate import held_out, read_samples
from dfastllm.distill.finish import save_student
from dfastllm.distill.losses.fused import Hidden
from dfastllm.distill.paired import equal_accuracy
from dfastllm.distill.plots import plot_run
from dfastllm.distill.prepare import Say, data_files, start_directory
from dfastllm.distill.probe import in_engine
from dfastllm.distill.sections import Config
from dfastllm.distill.students.certainty import Forced, certainty_forcing, states_of
from dfastllm.distill.students.curve import measure
from dfastllm.distill.students.trajectory import (
    Question,
    Recording,
    Trajectory,
    question_of,
    read_trajectories,
    record,
    write_trajectories,
)
from dfastllm.errors import DataError, UnsupportedError, ValidationError
from dfastllm.llm import LLM, resolve
from dfastllm.models.decoder import Decoder
from dfastllm.tasks import Sample, Split, draw, shares
from dfastllm.text.tokenizer import Tokenizer
from dfastllm.train import Losses, Plan, Work, fit
from dfastllm.train.objectives import short_attention
from dfastllm.train.work import Value

__all__ = ["Picked", "Prompts", "TrajectoryWork", "distil_trajectories", "small_config"]

TRIED = 16  # prompts of a run that is only tried
WINDOW = 16  # micro-batches whose trajectories are sorted by length together


class Prompts:
    """The prompts of a run, in the order of its files, over and over; and samples that are only measured on."""

    def __init__(self, config: Config, files: Sequence[Path], tokenizer: Tokenizer) -> None:
        self.config = config
        rows = [row for file in files for row in RowFile(file, needs_text=False)]
        self.questions = [question_of(row, tokenizer, number) for number, row in enumerate(rows)]
        if not self.questions:
            raise DataError("data holds no row with a prompt.", param="data.train")

    def take(self, begin: int, count: int) -> list[Question]:
        """`count` questions from number `begin` on, each once at most."""
        have = len(self.questions)
        return [self.questions[number % have] for number in range(begin, begin + min(count, have))]

    def held_out(self, count: int, split: Split) -> list[Sample]:
        """`count` samples with a grader: of this split of the task mix, each of its tasks equally often, or of the
        validation files, whose samples are there for both."""
        made = self.config.data.generate
        if made is not None:
            return held_out(count, split=split, tasks=_graded(made.tasks, made.mix)) if count else []
        files = self.config.data.validation
        return [sample for file in files for sample in read_samples(file, count).samples][:count]


@dataclass(frozen=True)
class Picked:
    """A micro-batch: trajectories, the turn of each (which chooses its canvas), and what its noise is keyed by."""

    ones: tuple[Trajectory, ...]
    turns: tuple[int, ...]
    key: str


class TrajectoryWork(Work):
    """A student that learns from trajectories.

    first: those of the teacher. A position is (round, epoch, number of the micro-batch); round 0 learns from `first`.
    home: where the student's own recordings are kept, one file a round, so that a resumed run goes on with them.
    """

    start = (0, 0, 0)

    def __init__(
        self,
        config: Config,
        model: Decoder,
        tokenizer: Tokenizer,
        home: Path,
        first: Sequence[Trajectory],
        prompts: Prompts,
    ) -> None:
        assert config.kd.trajectory is not None
        self.config, self.model, self.tokenizer, self.home = config, model, tokenizer, home
        self.settings = config.kd.trajectory
        self.states = states_of(model.info, self.settings)
        self.first, self.prompts = list(first), prompts
        self.round, self.pool = 0, self.first
        self.samples = prompts.held_out(config.eval.validation, "validation")
        self._events: list[Mapping[str, Value]] = []

    # ---- batches -----------------------------------------------------------------------------------------------------

    def batches(self, position: Any) -> Iterator[tuple[Picked, tuple[int, int, int]]]:
        turn, epoch, number = position
        while True:
            if turn != self.round:
                turn, epoch, number = self.round, 0, 0
            cut = self._cut(turn, epoch)
            while number < len(cut) and turn == self.round:
                ones, turns = cut[number]
                number += 1
                yield Picked(ones, turns, f"{self.config.train.seed}/{turn}/{epoch}/{number}"), (turn, epoch, number)
            if turn == self.round:
                epoch, number = epoch + 1, 0

    def _cut(self, turn: int, epoch: int) -> list[tuple[tuple[Trajectory, ...], tuple[int, ...]]]:
        """The pool in the order of this epoch, in micro-batches of similar length."""
        shuffled = random.Random(f"order/{self.config.train.seed}/{turn}/{epoch}")
        order = [(one, epoch + at) for at, one in enumerate(self.pool)]  # the turn goes on through the canvases
        shuffled.shuffle(order)
        size = self.config.train.micro_batch_size
        found = []
        for at in range(0, len(order), size * WINDOW):
            near = sorted(order[at : at + size * WINDOW], key=lambda pair: self.states.cost(*pair))
            found += [near[i : i + size] for i in range(0, len(near), size)]
        shuffled.shuffle(found)
        return [(tuple(one for one, _ in group), tuple(turn for _, turn in group)) for group in found]

    # ---- losses ------------------------------------------------------------------------------------------------------

    def losses(self, batch: Picked, step: int) -> Losses:
        noise = torch.Generator().manual_seed(random.Random(f"noise/{batch.key}").getrandbits(62))
        asked = self.states.ask(batch.ones, batch.turns, step / self.config.train.steps, noise)
        asked = asked.to(str(self.model.device))
        rows, certainty = asked.rows, self.config.kd.certainty
        with torch.autocast(rows.ids.device.type, torch.bfloat16, enabled=self.config.train.bf16):
            hidden = self.model(rows.ids, rows.positions, short_attention(rows))
            forced: Forced = certainty_forcing(
                Hidden.of(self.model, hidden[rows.wanted]),
                rows.targets,
                rows.weights,
                asked.groups,
                temperature=certainty.temperature,
            )
        terms = {"trajectory": forced.trajectory}
        if certainty.weight:
            terms["certainty"] = certainty.weight * forced.certainty
        figures = {"right": forced.right, "sure": forced.sure}
        return Losses(terms, figures, tokens=rows.batch * rows.length, samples=len(batch.ones))

    # ---- the student's own answers -----------------------------------------------------------------------------------

    def before_step(self, step: int) -> None:
        every = self.settings.every
        if every and step and step % every == 0 and self.round != step // every:
            self._record(step // every)

    def _record(self, turn: int) -> None:
        """The student's answers to the next prompts, and a pool of the right ones and some of the first."""
        begin = (turn - 1) * self.settings.fresh
        with in_engine(self.model, self.tokenizer) as llm:
            found = record(
                llm,
                self.prompts.take(begin, self.settings.fresh),
                decode=self.settings.quick,
                max_tokens=self.settings.max_tokens,
                wrong=self.settings.wrong,
            )
        if found.trajectories:
            about = {"round": turn, "model": self.model.info.name, "decode": dict(self.settings.quick)}
            write_trajectories(self._file(turn), found.trajectories, about | {"counts": dict(found.counts)})
            self._use(turn, found.trajectories)
        self._events.append({"event": "recorded", "round": turn, **_figures(found)})

    def _file(self, turn: int) -> Path:
        return self.home / f"round-{turn}.jsonl"

    def _use(self, turn: int, fresh: Sequence[Trajectory]) -> None:
        kept = round(self.settings.kept * len(self.first))
        picked = random.Random(f"kept/{self.config.train.seed}/{turn}").sample(self.first, kept)
        self.round, self.pool = turn, [*fresh, *picked]

    def extra_state(self) -> dict[str, Any]:
        return {"round": self.round}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        turn = int(state.get("round", 0))
        if turn:
            self._use(turn, read_trajectories(self._file(turn), self.model.info.vocab_size)[1])

    # ---- measuring ---------------------------------------------------------------------------------------------------

    def validate(self, step: int) -> Mapping[str, Value]:
        """Accuracy and tokens per forward of the student's quick decoder on held-out samples, in our engine. A failed
        measurement is said in the line, and training goes on."""
        if not self.samples:
            return {}
        try:
            with in_engine(self.model, self.tokenizer) as llm:
                return measured(llm, self.samples, self.settings.quick, self.config.eval.max_tokens)
        except Exception as error:  # whatever a measurement raises, the training it measures goes on
            return {"speed.measure_failed": f"{type(error).__name__}: {error}"}

    def events(self) -> list[Mapping[str, Value]]:
        found, self._events = self._events, []
        return found


def measured(llm: LLM, samples: Sequence[Sample], decode: Mapping[str, Any], max_tokens: int) -> dict[str, Value]:
    """Of answers to held-out samples, for the log: task.exact_match, task.tokens_per_forward, and the mean forwards and
    tokens of one."""
    point = measure(llm, samples, decode, max_tokens)
    names = ("exact_match", "tokens_per_forward", "forwards", "tokens")
    return {f"task.{name}": getattr(point, name) for name in names}


def _figures(found: Recording) -> dict[str, Value]:
    """Of a recording, for the log."""
    decoded = [one for one in found.trajectories if one.forwards]
    tokens = sum(len(one.answer) - 1 for one in decoded)
    rate = tokens / max(1, sum(one.forwards for one in decoded))
    return {**found.counts, "tokens_per_forward": rate}


def _graded(tasks: Sequence[str], mix: Mapping[str, float]) -> list[str]:
    """The gradable ones of these tasks; of none, those that the mix has."""
    named = tasks or [name for name, share in shares(mix).items() if share]
    return [name for name in named if draw("validation", 0, 0, name).grader is not None]


# ---- the run ---------------------------------------------------------------------------------------------------------


def distil_trajectories(
    config: Config,
    plan: Plan,
    home: Path,
    *,
    stop: int | None = None,
    device: str = "cpu",
    say: Say = print,
) -> Path | None:
    """The run of a configuration with `kd.trajectory`; returns the student's directory, or None where it was stopped
    before its end.

    home gets data, trajectories.jsonl, run/ (checkpoints, log.jsonl, a recording for each round), the student, a
    picture of the losses, and figures.json: accuracy and tokens per forward of the quick decoder on `eval.samples`
    samples of the test split, before and after. stop: end at this step. Raises ValidationError, DataError,
    UnsupportedError, CheckpointError, TrainingError."""
    settings = config.kd.trajectory
    assert settings is not None  # the caller looked
    start = start_directory(config, home)
    model = models.load(start, device=device, dtype=torch.float32).requires_grad_(True)
    tokenizer = Tokenizer.load(start)
    states_of(model.info, settings)
    files, _ = data_files(config, home, tokenizer, None, say)
    prompts = Prompts(config, files, tokenizer)
    first = _first(config, start, tokenizer, prompts, home, say)
    work = TrajectoryWork(config, model, tokenizer, home / "run", first, prompts)
    done = fit(work, plan, home / "run", stop=stop)
    reached = int(done.name.removeprefix("step-"))
    if reached < plan.steps:
        say(f"stopped at step {reached} of {plan.steps}: {done}")
        return None
    student = save_student(model, start, home / (config.model.name or "student"), config.model.dtype)
    _compare(config, start, student, prompts, home, say)
    try:
        plot_run(home / "run", home)
    except UnsupportedError as error:  # without matplotlib
        say(f"no pictures: {error}")
    return student


def small_config(config: Config, home: Path) -> Config:
    """The same run on the first prompts of its data, one step long and without recordings of its own, for `--check`.
    home: gets the beginnings of the data files."""
    settings, made = config.kd.trajectory, config.data.generate
    assert settings is not None
    files = []
    for number, name in enumerate(config.data.train):
        beginning = home / f"beginning-{number}.jsonl"
        with Path(name).open(encoding="utf-8") as whole:
            beginning.write_text("".join(islice(whole, TRIED + 1)), encoding="utf-8")
        files.append(str(beginning))
    fewer = None if made is None else made.model_copy(update={"samples": TRIED, "validation": 1})
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"train": tuple(files), "generate": fewer}),
            "train": config.train.model_copy(update={"steps": 1, "tensorboard": False}),
            "kd": config.kd.model_copy(update={"trajectory": settings.model_copy(update={"every": 0})}),
            "eval": config.eval.model_copy(update={"samples": 0, "validation": min(config.eval.validation, 4)}),
        }
    )


def _first(
    config: Config, start: Path, tokenizer: Tokenizer, prompts: Prompts, home: Path, say: Say
) -> list[Trajectory]:
    """The first trajectories: of the file that is named, of an earlier start of this run, or recorded now."""
    settings = config.kd.trajectory
    assert settings is not None
    path = home / "trajectories.jsonl" if settings.file is None else Path(settings.file)
    if settings.file is None and not path.is_file():
        teacher = start if config.kd.local_teacher is None else resolve(config.kd.local_teacher)
        say(f"{teacher.name} answers {len(prompts.questions)} prompts")
        with LLM(teacher) as llm:
            if llm.tokenizer.backend.to_str() != tokenizer.backend.to_str():
                raise ValidationError(
                    f"the tokenizers of {llm.info.name} and of the student differ: its answers' ids mean other words.",
                    param="kd.local_teacher",
                    hint="Choose a teacher with the student's tokenizer.",
                )
            how = {"decode": settings.decode, "max_tokens": settings.max_tokens}
            found = record(llm, prompts.questions, wrong=settings.wrong, **how)  # type: ignore[arg-type]
        write_trajectories(path, found.trajectories, {"model": teacher.name, **how, "counts": dict(found.counts)})
        say(f"{len(found.trajectories)} trajectories: {', '.join(f'{n} {why}' for why, n in found.counts.items())}")
    return read_trajectories(path, tokenizer.vocab_size)[1]


def _compare(config: Config, start: Path, student: Path, prompts: Prompts, home: Path, say: Say) -> None:
    """figures.json: the quick decoder before and after, on the same samples."""
    settings = config.kd.trajectory
    assert settings is not None
    samples = prompts.held_out(config.eval.samples, "test")
    if not samples:
        return
    points = []
    for path in (start, student):
        with LLM(path) as llm:
            points.append(measure(llm, samples, settings.quick, config.eval.max_tokens))
    before, after = points
    section = config.eval
    equality = equal_accuracy(before.rows, after.rows, margin=section.margin, alpha=section.alpha)
    figures = {"samples": len(samples), "before": before.record(), "after": after.record(), "equal": asdict(equality)}
    (home / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    for name, point in (("before", before), ("after", after)):
        say(f"{name}: {point.exact_match:.1%} right, {point.tokens_per_forward:.2f} tokens per forward")
    say("equal accuracy" if equality.equal else f"equal accuracy is not shown: {equality.reason}")
